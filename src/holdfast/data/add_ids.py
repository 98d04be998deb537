"""The functions that add token ids to rows of a dataset: to a row, to a table of rows, to a row of a stream.

`datasets` maps them over the rows, in other processes if asked, and keeps what they wrote in its cache. What a function
is made of is the key of that cache, so it holds nothing that does not change what it writes.
"""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, final

import pyarrow as pa
from datasets import Features
from transformers import PreTrainedTokenizerBase

from holdfast.data.batch_tokenizer import BatchTokenizer, EncodedPair
from holdfast.data.columns import MASK_COLUMNS, TOKENIZED_COLUMNS, columns_of_pairs
from holdfast.data.encoder import from_bytes
from holdfast.data.files.places import Places
from holdfast.data.formats import Preference, check_columns, read_preference
from holdfast.data.notes import as_values
from holdfast.data.row_error import RowError, naming_places
from holdfast.data.stream_report import REASON
from holdfast.data.token_columns import AS_TEXT, AS_TOKEN, CUT, NOTES, python_rows, with_ids
from holdfast.data.tokenize import tokenize
from holdfast.data.verdicts import Judge

TOKENIZATION_RULES = 5
"""Part of the cache key: raise it when the same row gives other token ids, so that no older cache is used."""


@final
class AddIds:
    """The function that adds token ids to rows. What it is made of is the cache key of `datasets`, beside the rows."""

    def __init__(
        self,
        *,
        processing_class: PreTrainedTokenizerBase,
        name: str,
        template_date: str | None,
        assistant_only: bool = True,
        special_tokens_in_text: str = "text",
        rules: int = TOKENIZATION_RULES,
    ) -> None:
        self.name = name
        self._key = {
            "processing_class": processing_class,
            "name": name,
            "template_date": template_date,
            "assistant_only": assistant_only,
            "special_tokens_in_text": special_tokens_in_text,
            "rules": rules,
        }
        self._assistant_only = assistant_only
        self._tokenizer = processing_class
        self._date = template_date
        self._special_tokens_in_text = special_tokens_in_text
        self._together: BatchTokenizer | None = None  # made where it is used: in each process

    def __reduce__(self) -> tuple[Any, ...]:
        return partial(AddIds, **self._key), ()

    def __call__(self, row: Mapping[str, Any], index: int, features: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """The token ids of a row, which a tokenized row has already, and what is reported of it. An implicit prompt
        becomes a column, which callbacks that generate look for."""
        try:
            kind = check_columns(row)
        except ValueError as error:
            raise RowError(self.name, index, str(error)) from error
        if kind == "tokenized":
            ids = {column: row[column] for column in columns_of_pairs(row)}
            return {**ids, CUT: [], AS_TEXT: None, AS_TOKEN: None, NOTES: []}
        (preference,), (pair,) = self.tokenized([row], [index], features)
        ids = {column: from_bytes(getattr(pair, column)).tolist() for column in TOKENIZED_COLUMNS}
        masks = {column: _values(getattr(pair, column)) for column in MASK_COLUMNS}
        split: dict[str, Any] = {}
        if kind == "implicit":
            length = len(preference.prompt)
            split = {"prompt": row["chosen"][:length], **{side: row[side][length:] for side in ("chosen", "rejected")}}
        report = {CUT: from_bytes(pair.cut_ids).tolist(), AS_TEXT: pair.as_text, AS_TOKEN: pair.as_token}
        return {**split, **ids, **masks, **report, NOTES: as_values(pair.notes)}

    def tokenized(
        self, rows: Sequence[Mapping[str, Any]], indices: Sequence[int], features: Mapping[str, Any] | None
    ) -> tuple[list[Preference], list[EncodedPair]]:
        """The preferences in the rows of a dataset with these types, and their token ids. Raises `ValueError` for the
        first row of which there are none, with its number."""
        if self._together is None:
            self._together = BatchTokenizer(
                self._tokenizer,
                self._date,
                one_by_one=tokenize,
                special_tokens_in_text=self._special_tokens_in_text,
                assistant_only=self._assistant_only,
            )
        with suppress(Exception):  # a row is at fault, and perhaps not the first that is
            preferences = [read_preference(row, features) for row in rows]
            return preferences, self._together(preferences)
        return self._row_by_row(rows, indices, features, self._together)

    def _row_by_row(
        self,
        rows: Sequence[Mapping[str, Any]],
        indices: Sequence[int],
        features: Mapping[str, Any] | None,
        tokenizer: BatchTokenizer,
    ) -> tuple[list[Preference], list[EncodedPair]]:
        preferences: list[Preference] = []
        pairs: list[EncodedPair] = []
        for row, index in zip(rows, indices, strict=True):
            try:
                preferences.append(read_preference(row, features))
                pairs.append(tokenizer.one(preferences[-1]))
            except ValueError as error:
                raise RowError(self.name, index, str(error)) from error
        return preferences, pairs

    def decode(self, ids: list[int]) -> str:
        """The text of token ids."""
        return str(self._tokenizer.decode(ids))


def _values(mask: bytes | None) -> list[int] | None:
    return None if mask is None else list(mask)


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class AddIdsToTable:
    """The same for a table of rows, of a dataset with these features."""

    add_ids: AddIds
    features: Features

    def __call__(self, table: pa.Table, indices: Sequence[int]) -> pa.Table:
        """The table with token ids, and what is reported of each row."""
        rows = python_rows(table, self.features)
        preferences, pairs = self.add_ids.tokenized(rows, indices, self.features)
        return with_ids(table, self.features, rows, preferences, pairs)


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class AddIdsAndVerdict:
    """The function of a stream: token ids of a row, and the verdict on it."""

    add_ids: AddIds
    judge: Judge
    places: Places | None
    features: Features | None

    def __call__(self, row: Mapping[str, Any], index: int) -> dict[str, Any]:
        with naming_places(self.places):
            ids = self.add_ids(row, index, self.features)
            return {**ids, REASON: self.judge.reason(ids, index)}
