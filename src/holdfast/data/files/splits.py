"""`train[:10%]` -> the rows it names, checked before anything is read into a cache."""

import re
from collections.abc import Mapping
from pathlib import Path

from datasets import ReadInstruction

from holdfast.data.files.faults import brief, show, words_of


def rows_of_split(split: str, lengths: Mapping[str, int], path: Path) -> list[tuple[str, int, int]]:
    """The parts of splits, (name, first row, row after the last), that `split` names; `lengths` is by split.

    Raises `ValueError` for what is no split or has no rows.
    """
    spec = "+".join(lengths) if split == "all" else split
    asked = f"split={brief(split)} was asked for"
    hint = f"Write one of {list(lengths)}, or a part of it, such as '{next(iter(lengths))}[:100]' or '...[:10%]'."
    try:
        if not split.isprintable():
            raise ValueError("A split is one line of text.")
        instructions = ReadInstruction.from_spec(spec).to_absolute(dict(lengths))
        parts = [
            (part.splitname, part.from_ or 0, lengths[part.splitname] if part.to is None else part.to)
            for part in instructions
        ]
    except (AssertionError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{asked}; {show(path)} could not be read: {words_of(error)}. {hint}") from error
    if _rounds_to_nothing(spec, lengths) or not any(end > start for _, start, end in parts):
        raise ValueError(f"{asked}, which has no rows; {show(path)} holds {dict(lengths)}. {hint}")
    return parts


def whole_splits(split: str, lengths: Mapping[str, int], path: Path) -> str:
    """The split of that name, or several joined by "+", which a stream can be. ValueError for parts of splits."""
    names = list(lengths) if split == "all" else [name.strip() for name in split.split("+")]
    if not set(names) <= set(lengths):
        raise ValueError(
            f"split={brief(split)} was asked for as a stream, which is a whole split; {show(path)} has "
            f"{list(lengths)}. Leave `streaming` out, or take the whole split."
        )
    return "+".join(names)


def _rounds_to_nothing(spec: str, lengths: Mapping[str, int]) -> bool:
    """Whether the last per cents of a split are no row. `datasets` takes the whole split for them."""
    last = re.finditer(r"([\w.-]+) ?\[-(\d{1,9})%:", spec)
    return any(round(int(part[2]) * lengths.get(part[1], 100) / 100) == 0 < int(part[2]) for part in last)
