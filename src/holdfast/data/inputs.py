"""The batch of a user's own data collator, made complete: its content ids cover all of its inputs.

A stored log-prob is found by its completion's content id, so the id must cover every model input that the number
depends on: positions, token types, the pixels of an image. A tensor with a row for each completion is such an input,
and so are plain settings. Any other tensor cannot be assigned to completions. Its name goes into `unidentified_inputs`,
and a reference that stores log-probs refuses the batch.

Rows that are padded on the left get their positions here, so that no number depends on how long a row's neighbours are.
Given up: reading a user's inputs on the device; they are hashed in host memory.
"""

import hashlib
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, final

import numpy as np
import torch
from torch import Tensor

from holdfast.batch import (
    COMPLETION_MASK,
    HOST_SEQUENCES,
    HOST_SOURCES,
    PAIR_MARGINS,
    PAIR_SOURCES,
    PAIR_WEIGHTS,
    HostSequences,
)
from holdfast.data.layouts.base import Layout
from holdfast.data.layouts.choose import layout_of
from holdfast.data.layouts.preference_collator import POSITION_KEYS, with_positions
from holdfast.scoring.segments import SEGMENTS

UNIDENTIFIED = "unidentified_inputs"
"""The key under which a batch names the inputs that no content id covers."""

_COMPLETE = "is_complete"
"""The key under which a batch of a user's collator says that `Completed` has made it complete."""

_COVERED = frozenset(
    {
        "input_ids",
        "attention_mask",
        COMPLETION_MASK,
        "reference_logps",
        HOST_SEQUENCES,
        HOST_SOURCES,
        PAIR_SOURCES,
        PAIR_WEIGHTS,
        PAIR_MARGINS,
        *POSITION_KEYS,
    }
)
_PLAIN = (str, int, float, bool, type(None))


def complete_batch(tensors: Mapping[str, Any], collator: Any, causal_lm: Any) -> dict[str, Any]:
    """All tensors that `PairBatch.from_tensors` takes, from what the data collator of a run returned.

    A batch that a layout made is complete already. Any other batch, such as one of a user's data loader, gets the
    positions of its completion tokens and its content ids here, and `position_ids` where `causal_lm` takes them.
    """
    if _COMPLETE in tensors:
        return {name: value for name, value in tensors.items() if name != _COMPLETE}
    if layout_of(collator) is not None and tensors.keys() >= set(POSITION_KEYS):
        return dict(tensors)
    return _completed(tensors, takes_positions=takes_positions(causal_lm))


def _completed(tensors: Mapping[str, Any], *, takes_positions: bool) -> dict[str, Any]:
    """The batch that a user's own collator returned, made complete."""
    # A collator that changes what a layout made may have left what is no tensor as it was.
    tensors = {name: value for name, value in tensors.items() if name != HOST_SEQUENCES}
    return with_inputs_identified(with_positions(tensors), takes_positions=takes_positions)


@final
@dataclass(frozen=True, slots=True)
class Completed:
    """A data collator: `collator`, whose batches are made complete in host memory, before they are moved.

    `takes_positions` says whether the model takes `position_ids`. Batches are without the keys `left_out`.
    """

    collator: Callable[[list[dict[str, Any]]], Mapping[str, Any]]
    takes_positions: bool
    left_out: tuple[str, ...] = ()

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        tensors = {name: value for name, value in self.collator(rows).items() if name not in self.left_out}
        return _completed(tensors, takes_positions=self.takes_positions) | {_COMPLETE: True}


def completed(collator: Any, causal_lm: Any, left_out: tuple[str, ...] = ()) -> Any:
    """`collator`; around one whose batches are no layout's, one that makes them complete."""
    if isinstance(collator, Layout):
        return collator
    return Completed(collator, takes_positions(causal_lm), left_out)


def with_inputs_identified(tensors: Mapping[str, Any], *, takes_positions: bool) -> dict[str, Any]:
    """A batch of a user's collator, with content ids that cover its inputs. `unidentified_inputs` names the inputs that
    they cannot cover. With `takes_positions`, rows that are padded on the left get `position_ids`."""
    batch = _identified(dict(tensors), takes_positions=takes_positions)
    is_known = HOST_SEQUENCES in batch or batch["content"].device.type != "cpu"
    return batch if is_known else batch | {HOST_SEQUENCES: HostSequences.of_tensors(batch)}


def _identified(batch: dict[str, Any], *, takes_positions: bool) -> dict[str, Any]:
    """The same; what `HostSequences` it has are made to fit, and it gets none."""
    ids, mask = batch["input_ids"], batch["attention_mask"]
    attended = mask.bool()
    if SEGMENTS not in batch and takes_positions and "position_ids" not in batch and not bool(attended[:, 0].all()):
        batch["position_ids"] = (attended.long().cumsum(1) - 1).clamp(min=0)
    extras = {name: value for name, value in batch.items() if name not in _COVERED and name != SEGMENTS}
    if SEGMENTS in batch:
        extras.pop("position_ids", None)
    if not bool(((mask == 0) | (mask == 1)).all()) and SEGMENTS not in batch:
        extras["attention_mask"] = mask
    if not extras:
        return batch
    rows = _rows_of_sequences(batch, ids.shape[1])
    unknown = [name for name, value in extras.items() if not _is_known(value, None if rows is None else len(ids))]
    known = {name: _in_host_memory(value) for name, value in sorted(extras.items()) if name not in unknown}
    if rows is not None:
        shown = attended.cpu().numpy()
        content = [
            _extended(content, [(name, _of_row(name, value, row, shown[row])) for name, value in known.items()])
            for content, row in zip(batch["content"].tolist(), rows, strict=True)
        ]
        batch["content"] = torch.tensor(content, dtype=torch.int64, device=batch["content"].device)
        if HOST_SEQUENCES in batch:
            own = tuple((high, low) for high, low in content)
            batch[HOST_SEQUENCES] = replace(batch[HOST_SEQUENCES], content=own)
    return batch | ({UNIDENTIFIED: tuple(unknown)} if unknown else {})


def _rows_of_sequences(batch: Mapping[str, Any], num_columns: int) -> list[int] | None:
    """The row of each sequence; None where a row holds several sequences."""
    num_sequences = len(batch["content"])
    rows = torch.zeros(num_sequences, dtype=torch.int64)
    rows[batch["sequence"].cpu()] = (batch["source"] // num_columns).cpu()
    return rows.tolist() if len(set(rows.tolist())) == num_sequences else None


def _is_known(value: Any, num_rows: int | None) -> bool:
    if isinstance(value, Tensor):
        return num_rows is not None and value.ndim > 0 and len(value) == num_rows
    return isinstance(value, _PLAIN) and num_rows is not None


def _in_host_memory(value: Any) -> Any:
    return value.detach().cpu() if isinstance(value, Tensor) else value


def _of_row(name: str, value: Any, row: int, attended: np.ndarray) -> bytes:
    """A row's own values of an input, as bytes; of an input with a value for each token, those of attended tokens.

    Empty where leaving the input out changes nothing for the model: None, and positions that count from 0.
    """
    if not isinstance(value, Tensor):
        return b"" if value is None else repr(value).encode()
    own = value[row]
    if own.ndim > 0 and own.shape[0] == len(attended):
        own = own[torch.from_numpy(attended)]
    if name == "position_ids" and torch.equal(own, torch.arange(len(own), dtype=own.dtype)):
        return b""
    raw = own.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    return f"{own.dtype} {tuple(own.shape)} ".encode() + raw


def _extended(content: list[int], inputs: list[tuple[str, bytes]]) -> list[int]:
    """A content id that also covers these inputs. Where all of them are empty, it is `content` itself."""
    not_empty = [(name, value) for name, value in inputs if value]
    if not not_empty:
        return content
    state = hashlib.blake2b(np.array(content, dtype="<i8").tobytes(), digest_size=16)
    for name, value in not_empty:
        state.update(f"{name} {len(value)} ".encode() + value)
    raw = state.digest()
    return [int.from_bytes(raw[:8], "little", signed=True), int.from_bytes(raw[8:], "little", signed=True)]


def takes_positions(causal_lm: Any) -> bool:
    """Whether the model takes `position_ids`. Other models derive positions from the attention mask."""
    return "position_ids" in inspect.signature(causal_lm.forward).parameters
