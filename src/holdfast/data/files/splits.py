"""`train[:10%]` -> the rows it names, checked before anything is read into a cache."""

from collections.abc import Mapping
from pathlib import Path

from datasets import ReadInstruction

from holdfast.data.files.faults import show


def rows_of_split(split: str, lengths: Mapping[str, int], path: Path) -> list[tuple[str, int, int]]:
    """The parts of splits, (name, first row, row after the last), that `split` names; `lengths` is by split.

    Raises `ValueError` for what is no split or has no rows.
    """
    spec = "+".join(lengths) if split == "all" else split
    hint = f"Write one of {list(lengths)}, or a part of it, such as '{next(iter(lengths))}[:100]' or '...[:10%]'."
    try:
        instructions = ReadInstruction.from_spec(spec).to_absolute(dict(lengths))
        parts = [
            (part.splitname, part.from_ or 0, lengths[part.splitname] if part.to is None else part.to)
            for part in instructions
        ]
    except (AssertionError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"split={split!r} was asked for; {show(path)} could not be read: {error or 'no such split'} {hint}"
        ) from error
    if not any(end > start for _, start, end in parts):
        raise ValueError(
            f"split={split!r} was asked for, which has no rows; {show(path)} holds {dict(lengths)}. {hint}"
        )
    return parts


def check_stream(split: str | None, lengths: Mapping[str, int], path: Path) -> None:
    """ValueError for a part of a split, which a stream cannot be."""
    if split is not None and "[" in split:
        raise ValueError(
            f"split={split!r} was asked for as a stream, which is a whole split; {show(path)} has {list(lengths)}. "
            "Leave `streaming` out, or take the whole split."
        )
