"""What `columns` of a run may be: the name of a public format, or a mapping from what holdfast reads to columns.

    columns: sharegpt
    columns: {prompt: question, chosen: response_chosen, rejected: response_rejected}
    columns: {format: sharegpt, prompt: dialogue}
    columns: {prompt: instruction, responses: completions.*.response, scores: completions.*.overall_score}

`check_mapping` checks what needs no dataset, so that a run fails before anything is loaded. `plan` then finds the
columns in a dataset. Given up: expressions. What a path (see `holdfast.data.shapes.paths`) cannot say is done with
`dataset.map`.
"""

import difflib
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from holdfast.data.columns import MASK_COLUMNS, REFERENCE_COLUMNS, TEMPLATE_KWARGS, TOKENIZED_COLUMNS, TOOLS
from holdfast.data.shapes.named import NAMED_FORMATS
from holdfast.data.shapes.paths import Steps, steps_of

PASSED_ON = (TOOLS, TEMPLATE_KWARGS, *REFERENCE_COLUMNS, *TOKENIZED_COLUMNS, *MASK_COLUMNS, "source")
"""Columns of holdfast whose values are taken as they are."""

JUDGEMENTS = ("best", "scores", "ranks", "preference")
"""How a pair is chosen among `responses`: by the number or name of the best, by scores (more is better), by ranks (less
is better), or by one number for two answers, below 0 where the first is preferred."""

OPTIONAL, LEFT_OUT = "optional", "left_out"
"""Keys of a checked mapping beside its own: the keys whose columns may be missing, and those written as null."""

SIDES = ("prompt", "chosen", "rejected")
_FLAGS = ("as_messages", "dialogues")
_KEYS = (*SIDES, "system", "history", "prompt_and_chosen", "responses", *JUDGEMENTS, *PASSED_ON)
_LISTS = ("prompt", "responses", "scores")

ColumnMapping = str | Mapping[str, Any]
"""The name of a format, or a mapping."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Where each thing of a row is found. A tuple of several `Steps` is several columns: texts to join, or answers."""

    where: Mapping[str, tuple[Steps, ...]]
    is_several: Collection[str]
    as_messages: bool
    dialogues: bool

    @property
    def renames(self) -> dict[str, str] | None:
        """New names by old ones where nothing but names changes, None otherwise."""
        if self.as_messages or self.dialogues or self.is_several:
            return None
        if any(key not in (*SIDES, *PASSED_ON) or len(steps[0]) > 1 for key, steps in self.where.items()):
            return None
        names = {str(steps[0][0]): key for key, steps in self.where.items()}
        return names if len(names) == len(self.where) else None


def check_mapping(columns: Any) -> dict[str, Any]:
    """The mapping with that of its format filled in. Raises `ValueError` for an unknown format or key (with the
    nearest), for values that name no column, and for a mapping from which no pair can be made."""
    if isinstance(columns, str):
        columns = {"format": columns}
    if not isinstance(columns, Mapping) or not columns:
        raise ValueError(
            f"`columns` must be the name of a format or a mapping such as {{prompt: question}}; found {columns!r}. The "
            f"formats are {', '.join(NAMED_FORMATS)}."
        )
    written = dict(columns)
    name = written.pop("format", None)
    if name is not None and name not in NAMED_FORMATS:
        raise ValueError(f"`columns` names the format {name!r}, which there is not. {_nearest(name, NAMED_FORMATS)}")
    for key, value in written.items():
        _check_entry(key, value)
    whole = {**(NAMED_FORMATS[name].columns if name is not None else {}), **written}
    mapping = {key: value for key, value in whole.items() if value is not None}
    _check_pair(mapping)
    mapping[OPTIONAL] = [
        key for key in (NAMED_FORMATS[name].optional if name is not None else ()) if key not in written
    ]
    mapping[LEFT_OUT] = [key for key, value in written.items() if value is None]
    return mapping


def plan(columns: ColumnMapping, available: Collection[str]) -> Plan:
    """The plan of a mapping for a dataset with these columns. Raises the `ValueError` of `check_mapping`, and one for a
    column that there is not, with the nearest that there is."""
    mapping = check_mapping(columns)
    optional, left_out = mapping.pop(OPTIONAL), mapping.pop(LEFT_OUT)
    for side in SIDES if "prompt_and_chosen" not in mapping else ():  # those that have holdfast's names already
        if side in available and side not in left_out and (side == "prompt" or "responses" not in mapping):
            mapping.setdefault(side, side)
    where: dict[str, tuple[Steps, ...]] = {}
    flags = {flag: bool(mapping.pop(flag, False)) for flag in _FLAGS}
    for key, value in mapping.items():
        names = [value] if isinstance(value, str) else list(value)
        if key == "prompt" and len(names) > 1:  # of texts to join, only the first must be there
            names = [names[0], *(name for name in names[1:] if name in available)]
        if key in optional and not any(name in available or name.split(".")[0] in available for name in names):
            continue
        where[key] = tuple(steps_of(name, available, key) for name in names)
    is_several = [key for key in where if not isinstance(mapping[key], str)]
    return Plan(
        where=where,
        is_several=is_several,
        as_messages=flags["as_messages"] or bool({"system", "history", "prompt_and_chosen"} & where.keys()),
        dialogues=flags["dialogues"],
    )


def _check_entry(key: Any, value: Any) -> None:
    if key in _FLAGS:
        if not isinstance(value, bool):
            raise ValueError(f"`columns` has {key!r} with {value!r}; it must be true or false.")
        return
    if key not in _KEYS:
        raise ValueError(
            f"`columns` has the key {key!r}; its keys are what holdfast reads, and its values columns of the dataset. "
            f"{_nearest(key, ('format', *_KEYS, *_FLAGS))}"
        )
    names = [value] if isinstance(value, str) else value
    is_name = isinstance(names, list | tuple) and len(names) > 0 and all(isinstance(name, str) for name in names)
    if value is not None and (not is_name or not all(name.strip() for name in names)):
        raise ValueError(f"`columns` must name a column for {key!r}; found {value!r}. Write the name of a column.")
    if isinstance(value, list | tuple) and key not in _LISTS:
        raise ValueError(f"`columns` must name one column for {key!r}; found {value!r}. Several may be {list(_LISTS)}.")


def _check_pair(mapping: Mapping[str, Any]) -> None:
    """ValueError where two things say what a pair is, or one of them is incomplete."""
    judgements = [key for key in JUDGEMENTS if key in mapping]
    if "responses" in mapping:
        if len(judgements) != 1 or "chosen" in mapping or "rejected" in mapping:
            raise ValueError(
                "`columns` takes a pair from 'responses', which needs exactly one of "
                f"{', '.join(JUDGEMENTS)}, and neither 'chosen' nor 'rejected'; found {list(mapping)}."
            )
    elif judgements:
        raise ValueError(f"`columns` has {judgements[0]!r}, which judges 'responses'; found {list(mapping)}. Add it.")
    if "prompt_and_chosen" in mapping and ({"prompt", "chosen"} & mapping.keys() or "rejected" not in mapping):
        raise ValueError(
            "`columns` has 'prompt_and_chosen', a conversation whose last message is chosen. It needs 'rejected', and "
            f"neither 'prompt' nor 'chosen'; found {list(mapping)}."
        )


def _nearest(name: Any, names: Collection[str]) -> str:
    near = difflib.get_close_matches(str(name), list(names), n=1)
    return f"Did you mean {near[0]!r}?" if near else f"Choose among {', '.join(names)}."
