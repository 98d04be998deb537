"""What is said about the rows of a dataset once all of them are tokenized, with numbers and examples."""

from collections.abc import Callable
from typing import Any

from datasets import Dataset

from holdfast.data.add_ids import AddIds
from holdfast.data.notes import TOPICS, Occurrence, rows_by_kind
from holdfast.data.token_columns import AS_TEXT, AS_TOKEN, CUT, NOTES, REPORT_COLUMNS, rows_with
from holdfast.data.usability import prompt_is_cut, share, spells_special_tokens


def report_rows(dataset: Dataset, add_ids: AddIds, warn: Callable[[str], None]) -> None:
    """Warns of what the tokenized rows, in Arrow format, say about themselves. Raises `ValueError` for what may not be
    so in all rows (see `holdfast.data.notes`)."""
    report: Any = dataset.select_columns(list(REPORT_COLUMNS))[:]
    if cut := rows_with(report[CUT]):
        where = f"in {share(len(cut), len(dataset))} of the {add_ids.name} dataset"
        warn(prompt_is_cut(where, add_ids.decode(report[CUT][cut[0]].as_py()), f"row {cut[0]}"))
    spelled_out: dict[str, tuple[str, str, str]] = {}
    for column in (AS_TEXT, AS_TOKEN):
        if rows := rows_with(report[column]):
            where = f"in {share(len(rows), len(dataset))}"
            spelled_out[column] = where, report[column][rows[0]].as_py(), f"row {rows[0]}"
    if spelled_out:
        warn(spells_special_tokens(add_ids.name, spelled_out.get(AS_TEXT), spelled_out.get(AS_TOKEN)))
    _report_notes(report[NOTES], add_ids.name, warn)


def _report_notes(column: Any, name: str, warn: Callable[[str], None]) -> None:
    by_kind = rows_by_kind((row, column[row].as_py()) for row in rows_with(column))
    for topic in TOPICS:
        found = {kind: by_kind[kind] for kind in topic.kinds if kind in by_kind}
        if not found:
            continue
        occurrences = {
            kind: Occurrence(where=f"in {share(len(rows), len(column))}", detail=detail, row=f"row {rows[0]}")
            for kind, (rows, detail) in found.items()
        }
        message = topic.message(name, occurrences)
        if topic.is_refused and any(len(rows) == len(column) for rows, _ in found.values()):
            raise ValueError(message)
        warn(message)
