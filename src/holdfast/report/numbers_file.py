"""The report as JSON: what the page says and shows, for scripts."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from holdfast.record.typed_json import to_json
from holdfast.report.answers import answers
from holdfast.report.changes import changes
from holdfast.report.findings import findings, time_by_part
from holdfast.report.healthy import healthy_range, judged
from holdfast.report.page import memory_by_part
from holdfast.report.run import Run

FORMAT = 1


def report_json(runs: Sequence[Run]) -> str:
    """The report's JSON: {"format", "runs": [{"name", "folder", "outcome", "last_step", "answers", "findings",
    "changes", "healthy", "series", "seconds_by_part", "bytes_by_part", "syncs", "samples", "facts"}]}."""
    content = {"format": FORMAT, "runs": [_run(run) for run in runs]}
    return json.dumps(content, ensure_ascii=True, allow_nan=False, default=str) + "\n"


def _run(run: Run) -> dict[str, Any]:
    found = changes(run)
    series = {
        metric: [list(point) for point in zip(*(part.tolist() for part in run.series(metric)), strict=True)]
        for metric in run.metrics
    }
    return {
        "name": run.name,
        "folder": str(run.folder),
        "outcome": None if run.facts is None else run.facts.outcome,
        "last_step": run.last_step,
        "answers": [asdict(each) for each in answers(run)],
        "findings": [asdict(each) for each in findings(run)],
        "changes": None if found is None else asdict(found),
        "healthy": _healthy(run),
        "series": series,
        "seconds_by_part": time_by_part(run),
        "bytes_by_part": memory_by_part(run),
        "syncs": [step for step, _ in run.syncs()],
        "samples": [to_json(sample) for sample in run.samples],
        "facts": None if run.facts is None else to_json(run.facts),
    }


def _healthy(run: Run) -> dict[str, Any]:
    """For each metric with a range: the range, the recent mean, and since when it is outside."""
    found = {}
    for metric in run.metrics:
        healthy, value = healthy_range(run, metric), judged(run, metric)
        if healthy is not None:
            found[metric] = {
                "low": healthy.low,
                "high": healthy.high,
                "recent": None if value is None else value.value,
                "outside_since": None if value is None else value.since,
            }
    return found
