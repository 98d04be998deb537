"""The Arrow side of tokenizing a dataset: a table of rows -> Python rows -> the same table with columns of token ids.

Only what is tokenized is turned into Python values, once. Other columns, and messages that stay as they are, remain
Arrow data, since turning them into Python values and back costs as much as rendering them.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from datasets import Features, List, Value

from holdfast.data.batch_tokenizer import EncodedPair
from holdfast.data.columns import MASK_COLUMNS, SOURCE, TEMPLATE_KWARGS, TEXT_COLUMNS, TOKENIZED_COLUMNS, TOOLS
from holdfast.data.encoder import NUM_ID_BYTES, from_bytes
from holdfast.data.formats import Preference
from holdfast.data.notes import as_values
from holdfast.data.reading.prompts import columns_of

CUT, AS_TEXT, AS_TOKEN, NOTES = "holdfast_cut", "holdfast_as_text", "holdfast_as_token", "holdfast_notes"
REPORT_COLUMNS = (CUT, AS_TEXT, AS_TOKEN, NOTES)
"""What is said about the rows once all are tokenized: the prompt ids that were cut, and special tokens that a row
spells out (see `TokenizedPair`), and notes on the row. These columns are then removed."""

_IDS, _MASK, _TEXT = List(Value("int32")), List(Value("int8")), Value("string")
_NOTES = List({"kind": _TEXT, "detail": _TEXT})
_NOTES_IN_ARROW = Features({NOTES: _NOTES}).arrow_schema.field(NOTES).type


def features_with_ids(features: Features) -> Features:
    """The features of a dataset of text or messages, and those of the columns that are added. They are stated, since
    `datasets` would infer no type from a first batch of empty prompts."""
    prompt = {"prompt": features["chosen"]} if "prompt" not in features and "chosen" in features else {}
    ids = dict.fromkeys((*TOKENIZED_COLUMNS, CUT), _IDS)
    masks = dict.fromkeys(MASK_COLUMNS, _MASK)
    return Features({**features, **prompt, **ids, **masks, AS_TEXT: _TEXT, AS_TOKEN: _TEXT, NOTES: _NOTES})


def python_rows(table: pa.Table, features: Features) -> list[dict[str, Any]]:
    """The columns of a table that are tokenized, as one dict for each row."""
    columns = [name for name in (*TEXT_COLUMNS, TOOLS, TEMPLATE_KWARGS, SOURCE) if name in table.column_names]
    values = features.decode_batch({name: table[name].to_pylist() for name in columns})
    return [dict(zip(columns, row, strict=True)) for row in zip(*values.values(), strict=True)]


def with_ids(
    table: pa.Table,
    features: Features,
    rows: Sequence[Mapping[str, Any]],
    preferences: Sequence[Preference],
    pairs: Sequence[EncodedPair],
) -> pa.Table:
    """The table with the columns of `features_with_ids`. An implicit prompt becomes a column, which callbacks that
    generate look for, and is no longer part of the completions."""
    if "prompt" not in table.column_names:
        split = [columns_of(row, preference.prompt) for row, preference in zip(rows, preferences, strict=True)]
        for side in ("chosen", "rejected"):
            rest = [columns[side] for columns in split]
            table = table.set_column(table.column_names.index(side), side, _as_arrow(rest, features, side))
        prompts = [columns["prompt"] for columns in split]
        table = table.append_column("prompt", _as_arrow(prompts, features, "chosen"))
    for column in TOKENIZED_COLUMNS:
        table = table.append_column(column, _lists([getattr(pair, column) for pair in pairs]))
    for column in MASK_COLUMNS:
        table = table.append_column(column, _masks([getattr(pair, column) for pair in pairs]))
    table = table.append_column(CUT, _lists([pair.cut_ids for pair in pairs]))
    table = table.append_column(AS_TEXT, pa.array([pair.as_text for pair in pairs], pa.string()))
    table = table.append_column(AS_TOKEN, pa.array([pair.as_token for pair in pairs], pa.string()))
    return table.append_column(NOTES, pa.array([as_values(pair.notes) for pair in pairs], _NOTES_IN_ARROW))


def rows_with(column: pa.ChunkedArray) -> list[int]:
    """The rows in which one of `REPORT_COLUMNS` says something."""
    if len(column) == 0:
        return []
    values: Any = pa.concat_arrays(column.chunks)
    says = values.is_valid().to_numpy(zero_copy_only=False)
    if pa.types.is_list(values.type):
        says &= np.diff(values.offsets.to_numpy()) > 0
    return np.flatnonzero(says).tolist()


def _as_arrow(values: list[Any], features: Features, column: str) -> pa.Array:
    """Values such as were read from this column, as Arrow data."""
    only = Features({column: features[column]})
    return pa.array(only.encode_batch({column: values})[column], only.arrow_schema.field(column).type)


def _lists(ids: Sequence[bytes]) -> pa.ListArray:
    """A column of token ids from their bytes, without a Python object for each id."""
    ends = np.cumsum([0, *(len(each) // NUM_ID_BYTES for each in ids)], dtype=np.int64)
    assert ends[-1] < 2**31, "a batch of more than 2 billion tokens"
    return pa.ListArray.from_arrays(pa.array(ends, pa.int32()), pa.array(from_bytes(b"".join(ids)), pa.int32()))


def _masks(masks: Sequence[bytes | None]) -> pa.ListArray:
    """A column of masks from their bytes."""
    ends = np.cumsum([0, *(len(each or b"") for each in masks)], dtype=np.int64)
    assert ends[-1] < 2**31, "a batch of more than 2 billion tokens"
    values = np.frombuffer(b"".join(each or b"" for each in masks), dtype=np.int8)
    are_missing = pa.array([each is None for each in masks], pa.bool_())
    return pa.ListArray.from_arrays(pa.array(ends, pa.int32()), pa.array(values, pa.int8()), mask=are_missing)
