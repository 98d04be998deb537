"""Whether a row's log-probs depend on the other rows of its batch; and what is done where they do.

A log-prob can be stored, looked up, or scored ahead only if it is a fact about the weights and the token ids. In some
models it is not: rotary embeddings of the kinds `dynamic` and `longrope` take their frequencies from the longest row of
the batch, and some of them keep these for the batches that follow. So each model of a run scores a row alone and beside
a longer one before anything else. Frequencies that move are made a constant of the run, those for rows of `max_length`
tokens. Where numbers differ all the same, whatever would score other batches than the policy's is refused.

Given up: the frequencies that such a model would choose for a batch of short rows alone.
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from peft import PeftModel
from torch import Tensor, nn

from holdfast.batch import PairBatch, SequenceLogps
from holdfast.data.inputs import takes_positions
from holdfast.data.layouts.padded import PaddedLayout, Row
from holdfast.policy.rotations import plain_attributes
from holdfast.policy.untouched import untouched
from holdfast.scoring.causal_lm import unwrap
from holdfast.scoring.frozen import Autocast, evaluating
from holdfast.scoring.score import score
from holdfast.scoring.tolerance import TOLERANCE_NATS, TOLERANCE_NATS_HALF, TOLERANCE_NATS_MEAN

logger = logging.getLogger(__name__)

_NUM_ALONE = 6
"""Tokens of the row that is scored twice: few, so that frequencies for longer rows are others."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Dependence:
    """How a model's log-probs depend on the batch, in a clause; `is_kept` where they also depend on batches before."""

    reason: str
    is_kept: bool


def find_dependence(
    models: Sequence[nn.Module], dataset: Any, length: int | None, autocast: Autocast
) -> Dependence | None:
    """How one of the `models`, the first such, scores a row otherwise beside a longer one; None where all score it
    alike. The row is the first of the training data, `length` is what `pin_rotations` returned. The same on all
    processes."""
    row = next(iter(dataset))
    found = next(filter(None, (dependence(model, row, length, autocast) for model in models)), None)
    return next(filter(None, gather_object([found])), None) if PartialState().num_processes > 1 else found


def dependence(model: nn.Module, row: Mapping[str, Any], length: int | None, autocast: Autocast) -> Dependence | None:
    """How `model`'s log-probs of a row depend on a longer one beside it; None where they do not. The model is left as
    it was found."""
    alone, beside = _batches(model, row, length)
    name = type(unwrap(model)).__name__
    with untouched(model):
        expected = _logps(model, alone, autocast).per_token
        first = dict(_state(model))
        found = _logps(model, beside, autocast).per_token[: len(expected)]
        changed = [key for key, value in _state(model) if not _is_same(first.get(key), value)]
    if changed:
        return Dependence(reason=f"`{changed[0]}` of {name} changes with the rows of a batch", is_kept=True)
    if not expected.isfinite().all():
        return None  # no evidence; NaN is refused where the data are scored
    gaps = (found - expected).abs()
    is_half = any(p.dtype in (torch.float16, torch.bfloat16) for p in model.parameters()) or _is_rounded(autocast)
    most = TOLERANCE_NATS_HALF if is_half else TOLERANCE_NATS_MEAN
    mean, largest = float(gaps.mean()), float(gaps.max())
    if mean <= most and (is_half or largest <= TOLERANCE_NATS):
        return None
    reason = (
        f"{name} scores a row otherwise beside a longer one, by {mean:.3g} nats per token and {largest:.3g} at most "
        f"({most:g} is rounding)"
    )
    return Dependence(reason=reason, is_kept=False)


def check_resumable(found: Dependence | None) -> None:
    """ValueError for a model that goes by the batches before, which a resumed run has not seen."""
    if found is not None and found.is_kept:
        raise ValueError(
            f"Resuming was asked for, but {found.reason}, and that state is in no checkpoint: the resumed run would "
            "not be the run that was stopped. Start again, or use a model whose numbers depend on a row alone."
        )


def _state(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """All that a forward pass may leave behind, by name: copies of the buffers, and plain attributes."""
    yield from ((name, buffer.detach().clone()) for name, buffer in model.named_buffers())
    for path, part in model.named_modules():
        for name, value in plain_attributes(part).items():
            if isinstance(value, int | float | str | Tensor):
                yield f"{path}.{name}", value.detach().clone() if isinstance(value, Tensor) else value


def _is_same(ours: Any, theirs: Any) -> bool:
    if isinstance(ours, Tensor) and isinstance(theirs, Tensor):
        return ours.shape == theirs.shape and bool(torch.equal(ours, theirs.to(ours.device)))
    return ours is not None and not isinstance(ours, Tensor) and not isinstance(theirs, Tensor) and ours == theirs


def _logps(model: nn.Module, batch: PairBatch, autocast: Autocast) -> SequenceLogps:
    """With gradients, as the policy is scored."""
    with torch.enable_grad(), evaluating(model), autocast():
        found = score(model, batch).logps
    return SequenceLogps(per_token=found.per_token.detach(), sequence=found.sequence, num_sequences=found.num_sequences)


def _batches(model: nn.Module, row: Mapping[str, Any], length: int | None) -> tuple[PairBatch, PairBatch]:
    """A row alone, and beside one that is longer, and as long as rows can be by its positions where the model is told
    these and knows no table of them."""
    ids = np.array([*row["prompt_ids"], *row["chosen_ids"]], dtype=np.int64)[:_NUM_ALONE]
    num_prompt = min(max(1, len(row["prompt_ids"])), len(ids) - 1)
    longest = _longest_row(model) if length is None else length
    other = np.resize(ids[::-1], max(len(ids) + 1, min(longest, 2 * len(ids))))
    layout = PaddedLayout(int(ids[0]))
    alone = layout.of_completions([Row(ids, num_prompt)])
    beside = layout.of_completions([Row(ids, num_prompt), Row(other, num_prompt)])
    causal_lm = unwrap(model)
    is_told = takes_positions(causal_lm) and any(hasattr(part, "rope_type") for part in causal_lm.modules())
    if is_told and not _has_virtual_tokens(model):
        alone["position_ids"] = torch.arange(len(ids))[None]
        own = torch.arange(len(other))
        beside["position_ids"] = torch.stack([own, own + max(0, longest - len(other))])
    device = next(model.parameters()).device
    device = torch.device("cpu") if device.type == "meta" else device
    moved = ({name: tensor.to(device) for name, tensor in batch.items()} for batch in (alone, beside))
    first, second = (PairBatch.from_tensors(batch) for batch in moved)
    return first, second


def _longest_row(model: nn.Module) -> int:
    """Longer than the rows that the model was first made for."""
    config: Any = unwrap(model).config.get_text_config()
    return 2 * int(getattr(config, "max_position_embeddings", None) or 1_024)


def _has_virtual_tokens(model: nn.Module) -> bool:
    return isinstance(model, PeftModel) and any(config.is_prompt_learning for config in model.peft_config.values())


def _is_rounded(autocast: Autocast) -> bool:
    with autocast():
        return any(torch.is_autocast_enabled(kind) for kind in ("cpu", "cuda"))
