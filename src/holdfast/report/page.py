"""The report as one HTML page: four answers, what stands out, curves, time and memory, data, samples, and how the run
was made. It loads nothing; see `holdfast.pages`."""

from collections.abc import Mapping, Sequence
from datetime import datetime

from holdfast.pages.charts.bars import bars, stacked_bars
from holdfast.pages.charts.lines import Level
from holdfast.pages.markup import Content, Html, element, html, joined, prose
from holdfast.pages.page import page as whole_page
from holdfast.pages.tables import facts as fact_table
from holdfast.pages.tables import table
from holdfast.record.facts import Facts
from holdfast.report.answers import Answer, answers
from holdfast.report.curves_drawn import chart
from holdfast.report.findings import Finding, Kind, findings, of_metric, time_by_part
from holdfast.report.page_style import CSS
from holdfast.report.panels import Panel, by_source, panels_of
from holdfast.report.run import Run
from holdfast.report.samples_shown import samples
from holdfast.report.units import in_bytes, in_short, in_time, unit_of_bytes

_MOST_EVENTS = 60
_PROVENANCE = {
    "description": "reference",
    "weights": "digest of its weights",
    "config": "digest of its settings",
    "data": "digest of the training data",
    "adapters": "adapters of the policy",
    "way": "option reference",
    "numerics": "numerics",
    "max_length": "max_length",
    "truncation_mode": "truncation_mode",
    "version": "syncs so far",
}
_MEMORY = {"weights": "policy's weights", "reference": "reference", "gradients": "gradients",
           "optimizer": "optimizer's state"}  # fmt: skip


def report_page(runs: Sequence[Run], refresh_seconds: int | None = None) -> str:
    """The page's HTML. With `refresh_seconds` a browser loads it again so often, for a run that goes on."""
    found = {run.name: findings(run) for run in runs}
    names = ", ".join(run.name for run in runs)
    one = runs[0] if len(runs) == 1 else None
    body = [
        element("h1", f"Report of {names}"),
        *([_status(one), _answers(answers(one))] if one is not None else [_comparison(runs), _answers_of_all(runs)]),
        _stands_out(found, is_one=one is not None),
        element("h2", "Curves"),
        _charts(runs, found),
        _sources(runs),
        _time_and_memory(runs),
        _data(runs),
        samples(runs),
        _events(runs),
        _made(runs),
        element("p", "Written by holdfast from the run's own record. No model was loaded.", kind="faint"),
    ]
    return whole_page(f"Report of {names}", *body, style=CSS, refresh_seconds=refresh_seconds)


# The top -------------------------------------------------------------------------------------------------------------


def status_of(run: Run) -> str:
    """A line: how the run ended or how far it is, when, and how fast."""
    facts = run.facts
    if facts is None:
        return f"{run.last_step:,} steps were logged. The run left no record, so this is read from trainer_state.json."
    outcome = {"running": "running", "finished": "finished", "interrupted": "interrupted", "failed": "failed"}
    steps = f"step {run.last_step:,}" + (f" of {facts.max_steps:,}" if facts.max_steps > 0 else "")
    words = [f"{outcome.get(facts.outcome, facts.outcome)}, {steps}", f"began {_clock(facts.started)}"]
    words += [f"ended {_clock(facts.finished)}"] if facts.finished is not None else []
    seconds = max((log.seconds for log in run.logs if log.seconds is not None), default=None)
    words += [f"{in_time(seconds)} of training"] if seconds is not None else []
    speed = run.last("speed/pairs_per_second")
    words += [f"{speed:.3g} pairs/s"] if speed is not None else []
    words += [f"resumed {len(facts.resumed)} times"] if len(facts.resumed) > 1 else []
    words += [f"resumed at step {facts.resumed[0].step:,}"] if len(facts.resumed) == 1 else []
    return ", ".join(words) + "."


def _clock(time: str) -> str:
    try:
        return datetime.fromisoformat(time).strftime("%Y-%m-%d %H:%M UTC")
    except ValueError:
        return time


def _status(run: Run) -> Html:
    return element("p", status_of(run), kind="status")


def _answers(found: Sequence[Answer]) -> Html:
    return element("section", *map(_answer, found), kind="answers")


def _answer(answer: Answer) -> Html:
    parts = [element("h3", answer.question), element("p", prose(answer.short), kind="short")]
    parts += [element("p", prose(sentence)) for sentence in answer.more]
    parts += [element("pre", answer.command)] if answer.command else []
    return element("div", *parts, kind=f"answer {answer.mood}")


def _answers_of_all(runs: Sequence[Run]) -> Html:
    details = [
        element("details", element("summary", f"{run.name}: the four answers"), _status(run), _answers(answers(run)))
        for run in runs
    ]
    return joined(details)


def _comparison(runs: Sequence[Run]) -> Html:
    """A table of the runs: what differs between them, and their last numbers."""
    head: list[Content] = ["", *(run.name for run in runs)]
    rows: list[Sequence[Content]] = [["state", *(_state(run) for run in runs)]]
    rows += [["reference", *(_reference(run) for run in runs)]]
    rows += [[name, *values] for name, values in differing_options(runs).items()]
    shown = ("loss", "rewards/margins", "rewards/accuracies", "reference/kl_chosen", "win_rate")
    prefixes = dict.fromkeys(prefix for run in runs for prefix in ("", *run.evaluations))
    for metric in (prefix + name for name in shown for prefix in prefixes):
        values = [run.last(metric) for run in runs]
        if any(value is not None for value in values):
            rows.append([f"last {metric}", *("" if value is None else f"{value:.4g}" for value in values)])
    return table(head, rows, caption="The runs beside each other: what differs, and the last numbers.")


def _state(run: Run) -> str:
    return f"step {run.last_step:,}" if run.facts is None else f"{run.facts.outcome}, step {run.last_step:,}"


def _reference(run: Run) -> str:
    if run.facts is None:
        return "not recorded" if run.checkpoint is None else str(run.checkpoint.manifest.get("description", "none"))
    return "none" if run.facts.reference is None else run.facts.reference.description


def differing_options(runs: Sequence[Run]) -> dict[str, list[str]]:
    """The options whose values differ between runs that have a record, and those values; "default" where one has not
    set it, "not recorded" for a run without a record."""
    options = [None if run.facts is None else _options(run.facts) for run in runs]
    recorded = [each for each in options if each is not None]
    names = dict.fromkeys(name for each in recorded for name in each)
    differing = [name for name in names if name != "output_dir" and len({str(each.get(name)) for each in recorded}) > 1]
    return {
        name: ["not recorded" if each is None else str(each.get(name, "default")) for each in options]
        for name in differing
    }


def _options(facts: Facts) -> dict[str, object]:
    return {"model": facts.model.name, "loss_type": ", ".join(facts.loss_types), "beta": facts.beta, **facts.options}


def _stands_out(found: Mapping[str, Sequence[Finding]], *, is_one: bool) -> Html:
    notes = [_note(finding, "" if is_one else f"{name}: ") for name, of_run in found.items() for finding in of_run]
    if not notes:
        return element("p", "Nothing stands out: every curve with a healthy range is within it.", kind="note good")
    return joined([element("h2", "What stands out"), *notes])


def _note(finding: Finding, before: str = "") -> Html:
    kind = {Kind.WARNING: "note warn", Kind.GOOD: "note good"}.get(finding.kind, "note")
    return element("p", prose(f"{before}{finding.text}"), kind=kind)


# Curves --------------------------------------------------------------------------------------------------------------


def _charts(runs: Sequence[Run], found: Mapping[str, tuple[Finding, ...]]) -> Html:
    panels = panels_of(runs)
    if not panels:
        return element("p", "Nothing was logged yet.")
    first = [panel for panel in panels if panel.is_main]
    others = [panel for panel in panels if not panel.is_main]
    more = [
        element("h3", "More curves"),
        element("div", *(_panel(runs, each, found) for each in others), kind="charts"),
    ]
    main = element("div", *(_panel(runs, each, found) for each in first), kind="charts")
    return joined([main, *(more if others else [])])


def _panel(runs: Sequence[Run], panel: Panel, found: Mapping[str, tuple[Finding, ...]]) -> Html:
    parts = [chart(runs, panel)]
    parts += [element("p", panel.words, kind="what")] if panel.words else []
    for run in runs:
        before = "" if len(runs) == 1 else f"{run.name}: "
        about = dict.fromkeys(each for metric in panel.metrics for each in of_metric(found[run.name], metric))
        parts += [_note(each, before) for each in about]
    return element("div", *parts, kind="panel")


def _sources(runs: Sequence[Run]) -> Html:
    charts = []
    for run in runs:
        values = by_source(run)
        if values:
            name = "Held-out accuracy by source" + ("" if len(runs) == 1 else f": {run.name}")
            charts.append(bars(values, title=name, marks=[Level(y=0.5, text="chance")]))
    return joined([element("h2", "By source"), element("div", *charts, kind="charts")]) if charts else Html("")


# Costs ---------------------------------------------------------------------------------------------------------------


def _time_and_memory(runs: Sequence[Run]) -> Html:
    times = {run.name: time_by_part(run) for run in runs}
    times = {name: parts for name, parts in times.items() if parts}
    memory = {run.name: parts for run in runs if (parts := memory_by_part(run))}
    charts = []
    if times:
        whole = {part: sum(each.get(part, 0.0) for each in times.values()) for each in times.values() for part in each}
        texts = {part: in_time(seconds) for part, seconds in whole.items()} if len(times) == 1 else {}
        charts.append(stacked_bars(times, title="Time by part", x_label="seconds", texts=texts))
    if memory:
        unit, name_of_unit = unit_of_bytes(max(sum(parts.values()) for parts in memory.values()))
        scaled = {name: {part: size / unit for part, size in parts.items()} for name, parts in memory.items()}
        first = next(iter(memory.values()))
        texts = {part: in_bytes(size) for part, size in first.items()} if len(memory) == 1 else {}
        note = "Worked out from shapes and dtypes, on one process; activations are not in it."
        charts.append(stacked_bars(scaled, title="Memory by part", x_label=name_of_unit, texts=texts, note=note))
    if not charts:
        return Html("")
    peaks = {run.name: peak for run in runs if (peak := run.last("memory/peak_bytes")) is not None}
    said = [element("p", f"{_of(name, runs)}The highest use was {in_bytes(peak)}.") for name, peak in peaks.items()]
    return joined([element("h2", "Time and memory"), element("div", *charts, kind="charts"), *said])


def memory_by_part(run: Run) -> dict[str, int]:
    """Bytes on one process by part; nothing where the run left no record."""
    if run.facts is None:
        return {}
    found = {words: getattr(run.facts.memory, part) for part, words in _MEMORY.items()}
    return {words: size for words, size in found.items() if size is not None}


def _of(name: str, runs: Sequence[Run]) -> str:
    return "" if len(runs) == 1 else f"{name}: "


# Data, events, options -----------------------------------------------------------------------------------------------


def _data(runs: Sequence[Run]) -> Html:
    rows: list[Sequence[Content]] = []
    for run in runs:
        for name, data in ({} if run.facts is None else run.facts.data).items():
            left_out = "; ".join(f"{reason}: {number:,}" for reason, number in (data.left_out or {}).items())
            sources = ", ".join(f"{source} {number:,}" for source, number in (data.sources or {}).items())
            rows.append(
                [f"{_of(run.name, runs)}{name}", _count(data.num_rows), _count(data.num_used), left_out, sources]
            )
    if not rows:
        return Html("")
    head = ["data", "rows", "pairs used", "left out", "pairs by source"]
    return joined([element("h2", "Data"), table(head, rows, kind="left")])


def _count(number: int | None) -> str:
    return "a stream: not counted" if number is None else f"{number:,}"


def _events(runs: Sequence[Run]) -> Html:
    tables = []
    for run in runs:
        events = [event for event in run.events if event.kind not in ("evaluation",)]
        rows = [[f"{event.step:,}", event.kind, event.text] for event in events[-_MOST_EVENTS:]]
        if rows:
            hidden = len(events) - len(rows)
            caption = f"{_of(run.name, runs)}the last {len(rows)} of {len(events)}" if hidden else _of(run.name, runs)
            tables.append(table(["step", "event", ""], rows, kind="words", caption=caption or None))
    if not tables:
        return Html("")
    return joined([element("h2", "What happened"), element("details", element("summary", "events"), *tables)])


def _made(runs: Sequence[Run]) -> Html:
    parts = []
    for run in runs:
        shown = [] if run.facts is None else [fact_table(_facts(run.facts))]
        if run.facts is not None and run.facts.options:
            options = {name: str(value) for name, value in run.facts.options.items()}
            shown += [element("h3", "Options that were set"), fact_table(options)]
        if (provenance := provenance_of(run)) and run.checkpoint is not None:
            where = f"{run.checkpoint.folder.name}/reference/manifest.json"
            shown += [element("h3", f"What the reference was made from, by {where}"), fact_table(provenance)]
        if shown:
            summary = element("summary", f"{_of(run.name, runs)}model, options, versions, provenance of the reference")
            parts.append(element("details", summary, *shown))
    return joined([element("h2", "How it was made"), *parts]) if parts else Html("")


def provenance_of(run: Run) -> dict[str, Content]:
    """What the last complete checkpoint records of the reference: digests, settings, and how far it had moved."""
    manifest = {} if run.checkpoint is None else run.checkpoint.manifest
    return {
        words: ", ".join(map(str, value)) if isinstance(value, list) else str(value)
        for name, words in _PROVENANCE.items()
        if (value := manifest.get(name)) not in (None, [], {})
    }


def _facts(facts: Facts) -> dict[str, Content]:
    model, layout = facts.model, facts.layout
    trained = f"{in_short(model.num_trainable)} of {in_short(model.num_parameters)} parameters"
    shown: dict[str, Content] = {
        "model": f"{model.name} ({model.class_name}, {model.dtype})",
        "trains": trained if model.adapter is None else f"{trained}: {model.adapter}",
        "loss": f"{', '.join(facts.loss_types)}, beta {facts.beta:g}",
        "layout": layout.line or layout.name,
        "processes": f"{facts.num_processes}, on {facts.device}",
        "epochs": f"{facts.num_epochs:g}",
        "versions": ", ".join(f"{name} {version}" for name, version in facts.versions.items()),
    }
    if facts.command:
        shown["command"] = element("code", html(" ".join(facts.command)))
    return shown
