"""The collator of scripts for the common DPO trainer, and how a batch of that form becomes a complete one.

`DataCollatorForPreference` returns the keys that such scripts know. `with_positions` adds to a dict of these keys what
a `PairBatch` needs beside, so that a user's own collator works as well. Given up: a content id without hashing the
batch on the CPU, since such a dict says only by a mask which tokens are completions.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from holdfast.batch import HOST_SEQUENCES, HostSequences
from holdfast.data.columns import REFERENCE_COLUMNS
from holdfast.data.layouts.sequences import (
    check_counts,
    check_row_options,
    completion_masks,
    padded_rows,
    pairs_of_halves,
    truncated_sequences,
)
from holdfast.data.tokenize import TruncationMode, content_id

POSITION_KEYS = ("source", "target", "sequence", "chosen", "rejected", "content")
"""What a complete batch has beside the model's inputs (see `holdfast.batch.PairBatch`)."""


@dataclass(frozen=True)
class DataCollatorForPreference:  # not final: scripts subclass it and override `torch_call`
    """A data collator: rows with `prompt_ids`, `chosen_ids` and `rejected_ids` -> `input_ids`, `attention_mask` and
    `completion_mask` [2P T], chosen rows first. `completion_mask` is 1 for the completion tokens that are scored.

    `ref_chosen_logps` and `ref_rejected_logps` [P] are passed on when the rows have them. It is for scripts that name
    this collator; `PaddedLayout` makes the same rows as a complete batch.
    """

    pad_token_id: int
    max_length: int | None = None
    truncation_mode: TruncationMode = "keep_start"
    pad_to_multiple_of: int | None = None
    return_tensors: str = "pt"

    def __post_init__(self) -> None:
        check_row_options(self.max_length, self.truncation_mode, self.pad_to_multiple_of)
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
        sequences = truncated_sequences(features, self.max_length, self.truncation_mode)
        input_ids, attention_mask = padded_rows(sequences, self.pad_token_id, self.pad_to_multiple_of)
        tensors = {
            "input_ids": torch.from_numpy(input_ids),
            "attention_mask": torch.from_numpy(attention_mask),
            "completion_mask": torch.from_numpy(completion_masks(sequences, attention_mask)),
        }
        logps = [column for column in REFERENCE_COLUMNS if column in features[0]]
        return tensors | {column: torch.tensor([row[column] for row in features]) for column in logps}


def with_positions(tensors: Mapping[str, Any]) -> dict[str, Any]:
    """What `PairBatch.from_tensors` takes, from a dict with `completion_mask`; a complete dict comes back as is.

    `input_ids`, `attention_mask` and `completion_mask` are [2P T], chosen rows first, padded on either side. A
    completion token counts when the position before it is attended; `content` is hashed on the CPU. Everything else
    in the dict stays a model input.

    Raises `ValueError` for missing keys, shapes that are not two halves, reference log-probs among the keys, and rows
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
    counts = counts_as_target.sum(1).cpu().numpy()
    check_counts(counts)
    sequence, column = counts_as_target.nonzero(as_tuple=True)  # [N] each, row by row
    rows = zip(ids.cpu().numpy(), attended.cpu().numpy(), completion.cpu().numpy(), strict=True)
    content = [_masked_content_id(row, row_attended, row_completion) for row, row_attended, row_completion in rows]
    positions = {
        "source": sequence * num_tokens + column - 1,
        "target": ids[sequence, column],
        "sequence": sequence,
        "content": torch.tensor(content, dtype=torch.int64),
        **pairs_of_halves(num_rows),
    }
    in_host_memory = HostSequences(content=tuple(content), lengths=tuple(counts.tolist()), rows=tuple(range(num_rows)))
    on_device = {name: tensor.to(ids.device) for name, tensor in positions.items()}
    return dict(tensors) | on_device | {HOST_SEQUENCES: in_host_memory}


def _masked_content_id(ids: np.ndarray, attended: np.ndarray, completion: np.ndarray) -> tuple[int, int]:
    """The content id of a padded row: that of `PaddedLayout` when the completion is one run up to the row's end."""
    ids, completion = ids[attended], completion[attended]
    start = int(completion.argmax())
    scored = completion[start:]
    return content_id(ids[:start], ids[start:], None if scored.all() else scored)


def _check_halves(tensors: Mapping[str, Tensor]) -> None:
    """ValueError where the tensors are not those of `DataCollatorForPreference`."""
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
