"""Tokenized pairs -> a plain dict of tensors: where the completion tokens of a batch sit, and what the model is shown.

`PaddedLayout` writes chosen rows first, then rejected ones, padded on the right, and says in three vectors which
positions count (see `holdfast.batch.PairBatch`). Truncation happens here and not in the dataset, so that a dataset
prepared once serves every `max_length`, and padding costs only what the longest row of a batch needs. Rows are built
with numpy: one array a sequence, hashed and copied into place. Given up: computing a prompt shared by both completions
once, which padded rows cannot express.

`DataCollatorForPreference` gives the keys that scripts for the common DPO trainer know; `with_positions` adds the
rest to such a dict, so that a user's own collator works as well.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, final

import numpy as np
import torch
from torch import Tensor

from holdfast.data.formats import REFERENCE_COLUMNS
from holdfast.data.tokenize import TruncationMode, check_truncation, content_id, truncate

POSITION_KEYS = ("source", "target", "sequence", "chosen", "rejected", "content")


@final
@dataclass(frozen=True, slots=True)
class PaddedLayout:
    """A data collator: rows with `prompt_ids`, `chosen_ids` and `rejected_ids` -> what `PairBatch.from_tensors` takes.

    `input_ids` and `attention_mask` [2P T], the P chosen rows first, padded on the right to the longest row of the
    batch (and up to a multiple of `pad_to_multiple_of`); `source`, `target`, `sequence` [N], `chosen`, `rejected` [P],
    `content` [2P 2]. A completion token at the start of its row has no predecessor and is not among the N.

    Raises `ValueError` for a row that has no completion token to predict after truncation.
    """

    name: ClassVar[str] = "padded"

    pad_token_id: int
    max_length: int | None = None
    truncation_mode: TruncationMode = "keep_start"
    pad_to_multiple_of: int | None = None

    def __post_init__(self) -> None:
        _check_options(self)

    def __call__(self, features: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        return self.of_pairs(truncated_rows(features, self.max_length, self.truncation_mode))

    def of_pairs(self, rows: Sequence["Row"]) -> dict[str, Tensor]:
        """The same for rows that are cut already: all chosen ones, then all rejected ones."""
        return self._laid_out(rows) | _halves(len(rows))

    def of_completions(self, rows: Sequence["Row"]) -> dict[str, Tensor]:
        """The same for completions without pairs: `chosen` and `rejected` are empty."""
        none = torch.empty(0, dtype=torch.int64)
        return self._laid_out(rows) | {"chosen": none, "rejected": none}

    def _laid_out(self, rows: Sequence["Row"]) -> dict[str, Tensor]:
        input_ids, attention_mask = _padded(rows, self.pad_token_id, self.pad_to_multiple_of)
        num_tokens = input_ids.shape[1]
        first = np.array([max(row.num_prompt, 1) for row in rows])
        counts = np.array([len(row.ids) for row in rows]) - first
        check_counts(counts)
        sequence = np.repeat(np.arange(len(rows)), counts)
        rank = np.arange(len(sequence)) - np.repeat(counts.cumsum() - counts, counts)
        position = sequence * num_tokens + first[sequence] + rank
        tensors = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "source": position - 1,
            "target": input_ids.reshape(-1)[position],
            "sequence": sequence,
            "content": np.array([content_of(row) for row in rows]),
        }
        return {name: torch.from_numpy(array) for name, array in tensors.items()}


@dataclass(frozen=True)
class DataCollatorForPreference:  # not final: scripts subclass it and override `torch_call`
    """A data collator: the same rows -> `input_ids`, `attention_mask` and `completion_mask` [2P T], chosen rows first.

    `ref_chosen_logps` and `ref_rejected_logps` [P] are passed on when the rows have them. For scripts that name this
    collator; holdfast's own is `PaddedLayout`.
    """

    pad_token_id: int
    max_length: int | None = None
    truncation_mode: TruncationMode = "keep_start"
    pad_to_multiple_of: int | None = None
    return_tensors: str = "pt"

    def __post_init__(self) -> None:
        _check_options(self)
        if self.return_tensors != "pt":
            raise ValueError(
                f"return_tensors must be 'pt'; found {self.return_tensors!r}. Leave it out: PyTorch tensors are the "
                "only ones there are."
            )

    def __call__(self, features: Sequence[Mapping[str, Any]], return_tensors: str | None = None) -> dict[str, Tensor]:
        if return_tensors not in (None, "pt"):
            raise ValueError(f"return_tensors must be 'pt'; found {return_tensors!r}. Leave it out.")
        return self.torch_call(features)

    def torch_call(self, features: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """The batch of `features`."""
        rows = truncated_rows(features, self.max_length, self.truncation_mode)
        input_ids, attention_mask = _padded(rows, self.pad_token_id, self.pad_to_multiple_of)
        completion_mask = attention_mask.copy()
        for mask, row in zip(completion_mask, rows, strict=True):
            mask[: row.num_prompt] = 0
        tensors = {
            "input_ids": torch.from_numpy(input_ids),
            "attention_mask": torch.from_numpy(attention_mask),
            "completion_mask": torch.from_numpy(completion_mask),
        }
        given = [column for column in REFERENCE_COLUMNS if column in features[0]]
        return tensors | {column: torch.tensor([row[column] for row in features]) for column in given}


def with_positions(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What `PairBatch.from_tensors` takes, from a dict with `completion_mask`; a complete dict comes back as is.

    `input_ids`, `attention_mask` and `completion_mask` are [2P T], chosen rows first, padded on either side. A
    completion token counts when the position before it is attended; `content` is hashed on the CPU. Everything else
    in the dict stays a model input.

    Raises `ValueError` for missing keys, shapes that are not two halves, reference log-probs brought along, and rows
    without a completion token to predict.
    """
    if all(name in tensors for name in POSITION_KEYS):
        return dict(tensors)
    _check_halves(tensors)
    ids, attended, completion = (tensors[key] for key in ("input_ids", "attention_mask", "completion_mask"))
    attended, completion = attended.bool(), completion.bool() & attended.bool()
    num_rows, num_tokens = ids.shape
    counts_as_target = torch.zeros_like(completion)
    counts_as_target[:, 1:] = completion[:, 1:] & attended[:, :-1]
    check_counts(counts_as_target.sum(1).cpu().numpy())
    sequence, column = counts_as_target.nonzero(as_tuple=True)  # [N] each, row by row
    content = [
        _masked_content_id(*arrays)
        for arrays in zip(*(tensor.cpu().numpy() for tensor in (ids, attended, completion)), strict=True)
    ]
    positions = {
        "source": sequence * num_tokens + column - 1,
        "target": ids[sequence, column],
        "sequence": sequence,
        "content": torch.tensor(content, dtype=torch.int64),
        **_halves(num_rows),
    }
    inputs = {name: tensor for name, tensor in tensors.items() if name != "completion_mask"}
    return inputs | {name: tensor.to(ids.device) for name, tensor in positions.items()}


class Row(NamedTuple):
    """One sequence after truncation: int64 ids, of which the first `num_prompt` are the prompt."""

    ids: np.ndarray
    num_prompt: int


def content_of(row: Row) -> tuple[int, int]:
    """The content id of a sequence whose completion tokens all count."""
    return content_id(row.ids[: row.num_prompt], row.ids[row.num_prompt :])


def truncated_rows(
    features: Sequence[Mapping[str, Any]], max_length: int | None, truncation_mode: TruncationMode
) -> list[Row]:
    """All chosen sequences, then all rejected ones."""
    prompts = [np.asarray(row["prompt_ids"], dtype=np.int64) for row in features]
    rows = []
    for column in ("chosen_ids", "rejected_ids"):
        for prompt, row in zip(prompts, features, strict=True):
            completion = np.asarray(row[column], dtype=np.int64)
            kept, completion = truncate(prompt, completion, max_length, truncation_mode)
            rows.append(Row(np.concatenate([kept, completion]), len(kept)))
    return rows


def _padded(rows: Sequence[Row], pad_token_id: int, multiple: int | None) -> tuple[np.ndarray, np.ndarray]:
    """`input_ids` and `attention_mask`, [R T] int64."""
    longest = max(len(row.ids) for row in rows)
    num_tokens = longest if multiple is None else -(-longest // multiple) * multiple
    input_ids = np.full((len(rows), num_tokens), pad_token_id, dtype=np.int64)
    attention_mask = np.zeros_like(input_ids)
    for ids, mask, row in zip(input_ids, attention_mask, rows, strict=True):
        ids[: len(row.ids)] = row.ids
        mask[: len(row.ids)] = 1
    return input_ids, attention_mask


def _halves(num_rows: int) -> dict[str, Tensor]:
    chosen, rejected = torch.arange(num_rows).chunk(2)
    return {"chosen": chosen, "rejected": rejected}


def _masked_content_id(ids: np.ndarray, attended: np.ndarray, completion: np.ndarray) -> tuple[int, int]:
    """The content id of a padded row: that of `PaddedLayout` when the completion is one run up to the row's end."""
    ids, completion = ids[attended], completion[attended]
    start = int(completion.argmax())
    scored = completion[start:]
    return content_id(ids[:start], ids[start:], None if scored.all() else scored)


def _check_options(layout: PaddedLayout | DataCollatorForPreference) -> None:
    check_truncation(layout.max_length, layout.truncation_mode)
    if layout.pad_to_multiple_of is not None and layout.pad_to_multiple_of < 1:
        raise ValueError(
            f"pad_to_multiple_of must be at least 1; found {layout.pad_to_multiple_of}. Give a length such as 8, or "
            "None."
        )


def check_counts(counts: np.ndarray) -> None:
    """ValueError where one of the numbers of completion tokens, of all chosen rows and then all rejected ones, is 0."""
    empty = np.flatnonzero(counts <= 0)
    if len(empty) > 0:
        num_pairs = len(counts) // 2
        found = [f"{'chosen' if row < num_pairs else 'rejected'} of pair {row % num_pairs}" for row in empty.tolist()]
        raise ValueError(
            "every sequence of a batch must have a completion token to predict (after truncation, and not at the start "
            f"of the row); found none in {found}. Prepare the dataset with the `max_length` and `truncation_mode` of "
            "the collator: `prepare_dataset` leaves out such rows."
        )


def _check_halves(tensors: Mapping[str, Tensor]) -> None:
    needed = ("input_ids", "attention_mask", "completion_mask")
    missing = [key for key in needed if key not in tensors]
    if missing:
        raise ValueError(
            f"a collated batch needs {list(needed)}, or {list(POSITION_KEYS)} beside the model inputs; found "
            f"{sorted(tensors)}. Use `PaddedLayout` or return the keys of `DataCollatorForPreference`."
        )
    if logps := [key for key in REFERENCE_COLUMNS if key in tensors]:
        raise ValueError(
            f"the collated batch holds {logps}, and log-probs of unknown weights cannot be trusted. Drop these keys; "
            "reference log-probs are computed and kept by holdfast."
        )
    shapes = {key: tuple(tensors[key].shape) for key in needed}
    if len(set(shapes.values())) > 1 or len(shapes["input_ids"]) != 2 or shapes["input_ids"][0] % 2 != 0:
        raise ValueError(
            f"{list(needed)} must have one shape [2P, T], the P chosen rows first, then the P rejected rows; found "
            f"{shapes}. Correct the data collator."
        )
