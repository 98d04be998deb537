"""An inspection of pairs as files: every count as JSON, and every pair with its numbers as a line of CSV."""

import csv
import io
import json
import math
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from holdfast.inspect.pair_numbers import PairNumbers
from holdfast.inspect.ranking.flipping import dpo_loss, loss_to_flip
from holdfast.inspect.ranking.groups import Group
from holdfast.inspect.ranking.inspection import DatasetRanking, RankingInspection
from holdfast.inspect.ranking.margins import margins, margins_per_token
from holdfast.inspect.ranking.movement import is_memorised
from holdfast.inspect.ranking.picks import Pick
from holdfast.store.files import write_durably
from holdfast.visible import visible


def as_json(inspection: RankingInspection) -> dict[str, Any]:
    """All counts as plain values; `datasets` is by name. Keys of quantiles and limits are numbers as text. None stands
    for what there are no pairs for, or cannot be said, and for an infinite `rest`."""
    objective = inspection.objective
    values = {
        "reference": inspection.reference,
        "policy": inspection.policy,
        "loss_types": inspection.loss_types,
        "beta": None if objective is None else objective.options.beta,
        "objective": None if objective is None else {
            "losses": dict(objective.losses),
            "is_per_token": objective.is_per_token,
            "rest": objective.rest if math.isfinite(objective.rest) else None,
            "obstacle": objective.obstacle,
        },
        "notes": inspection.notes,
        "not_read": dict(inspection.not_read),
        "datasets": {each.name: _dataset(each) for each in inspection.datasets},
    }  # fmt: skip
    return json.loads(json.dumps(values, allow_nan=False))


def write_json(inspection: RankingInspection, path: Path) -> None:
    """Writes the counts as a JSON file."""
    write_durably(path, (json.dumps(as_json(inspection), indent=2) + "\n").encode())


def _dataset(dataset: DatasetRanking) -> dict[str, Any]:
    return {
        **_group(dataset.whole),
        "by_source": {group.name: _group(group) for group in dataset.by_source},
        "by_length": {group.name: _group(group) for group in dataset.by_length},
        "pairs_to_look_at": [_pick(dataset, pick) for pick in dataset.picks],
    }


def _group(group: Group) -> dict[str, Any]:
    return {
        "reference": asdict(group.reference),
        "policy": None if group.policy is None else asdict(group.policy),
        "movement": None if group.movement is None else asdict(group.movement),
    }


def _pick(dataset: DatasetRanking, pick: Pick) -> dict[str, Any]:
    places = np.array(pick.places, dtype=np.int64)
    texts = [asdict(dataset.texts[place]) for place in pick.places]
    rows = [int(row) for row in dataset.reference.row[places]]
    shown = [{"row": row, **text} for row, text in zip(rows, texts, strict=True)]
    return {"title": pick.title, "reason": pick.reason, "num_pairs": pick.num_pairs, "pairs": shown}


# Single pairs --------------------------------------------------------------------------------------------------------


def write_csv(inspection: RankingInspection, path: Path) -> None:
    """Writes a line for each pair of all datasets: `dataset`, `row`, `source`, lengths, log-probs, margins, and what
    follows from them. What is not known is empty."""
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    for number, dataset in enumerate(inspection.datasets):
        columns = _columns(dataset, None if inspection.objective is None else inspection.objective.options.beta)
        if number == 0:
            writer.writerow(["dataset", "row", "source", *columns])
        writer.writerows(_lines(dataset, columns))
    write_durably(path, text.getvalue().encode())


def _lines(dataset: DatasetRanking, columns: dict[str, np.ndarray]) -> Iterator[list[Any]]:
    numbers = dataset.reference
    names = [*numbers.sources, ""]
    values = [_plain(column) for column in columns.values()]
    heads = zip(numbers.row.tolist(), (names[code] for code in numbers.source.tolist()), strict=True)
    for (row, source), line in zip(heads, zip(*values, strict=True), strict=True):
        yield [_cell(dataset.name), row, _cell(source), *line]


def _columns(dataset: DatasetRanking, beta: float | None) -> dict[str, np.ndarray]:
    reference, policy = dataset.reference, dataset.policy
    columns = {
        "prompt_tokens": reference.prompt_tokens,
        "chosen_tokens": reference.chosen_tokens,
        "rejected_tokens": reference.rejected_tokens,
        **_of_model("reference", reference),
        "loss_to_flip": np.full(len(reference), np.nan) if beta is None else loss_to_flip(margins(reference), beta),
        "ches": reference.ches,
        "normalised_ches": reference.normalised_ches,
    }
    if policy is not None:
        before, after = margins(reference), margins(policy)
        columns |= _of_model("policy", policy)
        columns |= {
            "chosen_change": policy.chosen_logps - reference.chosen_logps,
            "rejected_change": policy.rejected_logps - reference.rejected_logps,
            "margin_change": after - before,
            "loss": np.full(len(reference), np.nan) if beta is None else dpo_loss(before, after, beta),
            "flipped": ((before < 0) & (after >= 0)).astype(np.int64),
            "unflipped": ((before >= 0) & (after < 0)).astype(np.int64),
            "memorised": is_memorised(reference, policy).astype(np.int64),
        }
    return columns


def _of_model(name: str, numbers: PairNumbers) -> dict[str, np.ndarray]:
    return {
        f"{name}_chosen_logps": numbers.chosen_logps,
        f"{name}_rejected_logps": numbers.rejected_logps,
        f"{name}_margin": margins(numbers),
        f"{name}_margin_per_token": margins_per_token(numbers),
    }


def _plain(column: np.ndarray) -> list[Any]:
    if column.dtype.kind != "f":
        return column.tolist()
    return ["" if math.isnan(value) else repr(value) for value in column.tolist()]


def _cell(text: str) -> str:
    """The text without characters that do not print, and with an apostrophe where a spreadsheet would compute it."""
    return visible(f"'{text}" if text[:1] in ("=", "+", "-", "@", "\t", "\r") else text)
