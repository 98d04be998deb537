"""A check that a row's log-probs do not depend on the other rows of its batch (law L6b).

A log-prob can be stored, looked up, or scored ahead only if it is a fact about the weights and the token ids. In some
models it depends on the batch as well. The known case, rotary frequencies of the longest row, is removed by
`policy.rotations`. Other cases, such as an expert's capacity, are found here. Before a run begins, each of its models
scores one row alone, and then beside a longer row. Where the log-probs differ, `arguments.check_same_batches` refuses
whatever would score other batches than the policy's. The cost is two small forward passes per model.
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
from holdfast.data.columns import CHOSEN_IDS, PROMPT_IDS
from holdfast.data.inputs import takes_positions
from holdfast.data.layouts.padded import PaddedLayout
from holdfast.data.layouts.sequences import TokenSequence
from holdfast.internals.deepspeed import ENGINE_ATTRIBUTES
from holdfast.policy.untouched import plain_attributes, untouched
from holdfast.scoring.causal_lm import unwrap
from holdfast.scoring.frozen import Autocast, evaluating
from holdfast.scoring.precision import is_half_precision
from holdfast.scoring.score import score
from holdfast.scoring.tolerance import TOLERANCE_NATS, TOLERANCE_NATS_HALF, TOLERANCE_NATS_MEAN

logger = logging.getLogger(__name__)

_NUM_TOKENS = 6
"""Length of the row that is scored twice: short, so that rotary frequencies for the longer row differ."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Dependence:
    """How a model's log-probs depend on the batch: `reason` says so in a clause. `outlives_batch` is true where they
    also depend on earlier batches."""

    reason: str
    outlives_batch: bool


def find_dependence(
    models: Sequence[nn.Module], dataset: Any, length: int | None, autocast: Autocast
) -> Dependence | None:
    """How the first of the `models` that depends on the batch does so; None where none does. See `dependence`.

    The row is the first of the training data. `length` is what `pin_rotations` returned. The result is the same on all
    processes.
    """
    row = next(iter(dataset))
    first = next(filter(None, (dependence(model, row, length, autocast) for model in models)), None)
    return next(filter(None, gather_object([first])), None) if PartialState().num_processes > 1 else first


def dependence(model: nn.Module, row: Mapping[str, Any], length: int | None, autocast: Autocast) -> Dependence | None:
    """How `model`'s log-probs of a row depend on a longer row beside it; None where they do not. The model is left as
    it was."""
    alone, beside = short_batches(model, row, length)
    kind = type(unwrap(model)).__name__
    with untouched(model):
        logps_alone = _logps(model, alone, autocast).per_token
        state_alone = dict(_state(model))
        logps_beside = _logps(model, beside, autocast).per_token[: len(logps_alone)]
        changed = [name for name, value in _state(model) if not _is_same(state_alone.get(name), value)]
    if changed:
        return Dependence(reason=f"`{changed[0]}` of {kind} changes with the rows of a batch", outlives_batch=True)
    if not logps_alone.isfinite().all():
        return None  # NaN is refused where the data are scored
    gaps = (logps_beside - logps_alone).abs()
    is_half = is_half_precision(model, autocast)
    tolerance = TOLERANCE_NATS_HALF if is_half else TOLERANCE_NATS_MEAN
    mean, largest = float(gaps.mean()), float(gaps.max())
    if mean <= tolerance and (is_half or largest <= TOLERANCE_NATS):
        return None
    reason = (
        f"{kind} scores a row otherwise beside a longer one, by {mean:.3g} nats per token and {largest:.3g} at most "
        f"({tolerance:g} is rounding)"
    )
    return Dependence(reason=reason, outlives_batch=False)


def check_resumable(dependence: Dependence | None) -> None:
    """ValueError for a model whose log-probs depend on earlier batches, which a resumed run has not seen."""
    if dependence is not None and dependence.outlives_batch:
        raise ValueError(
            f"Resuming was asked for, but {dependence.reason}, and that state is in no checkpoint: the resumed run "
            "would not be the run that was stopped. Start again, or use a model whose numbers depend on a row alone."
        )


def _state(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """What a forward pass may leave behind, by name: copies of the buffers and of plain attributes."""
    yield from ((name, buffer.detach().clone()) for name, buffer in model.named_buffers())
    for path, part in model.named_modules():
        for name, value in plain_attributes(part).items():
            if name not in ENGINE_ATTRIBUTES and isinstance(value, int | float | str | Tensor):
                yield f"{path}.{name}", value.detach().clone() if isinstance(value, Tensor) else value


def _is_same(ours: Any, theirs: Any) -> bool:
    if isinstance(ours, Tensor) and isinstance(theirs, Tensor):
        return ours.shape == theirs.shape and bool(torch.equal(ours, theirs.to(ours.device)))
    return ours is not None and not isinstance(ours, Tensor) and not isinstance(theirs, Tensor) and ours == theirs


def _logps(model: nn.Module, batch: PairBatch, autocast: Autocast) -> SequenceLogps:
    """The log-probs of `batch`, computed with gradients as the policy's are."""
    with torch.enable_grad(), evaluating(model), autocast():
        logps = score(model, batch).logps
    return SequenceLogps(per_token=logps.per_token.detach(), sequence=logps.sequence, num_sequences=logps.num_sequences)


def short_batches(model: nn.Module, row: Mapping[str, Any], length: int | None) -> tuple[PairBatch, PairBatch]:
    """Two batches: the row alone, and the row beside a longer one.

    Where the model takes rotary positions as an input, the longer row's last position is that of the longest row. So
    the batch need not be as long as that.
    """
    ids = np.array([*row[PROMPT_IDS], *row[CHOSEN_IDS]], dtype=np.int64)[:_NUM_TOKENS]
    num_prompt = min(max(1, len(row[PROMPT_IDS])), len(ids) - 1)
    longest = _longest_row(model) if length is None else length
    other = np.resize(ids[::-1], max(len(ids) + 1, min(longest, 2 * len(ids))))
    first = TokenSequence(ids, num_prompt)
    layout = PaddedLayout(int(ids[0]))
    alone = layout.of_completions([first])
    beside = layout.of_completions([first, TokenSequence(other, num_prompt)])
    causal_lm = unwrap(model)
    has_rotations = any(hasattr(part, "rope_type") for part in causal_lm.modules())
    if takes_positions(causal_lm) and has_rotations and not _has_virtual_tokens(model):
        alone["position_ids"] = torch.arange(len(ids))[None]
        positions = torch.arange(len(other))
        beside["position_ids"] = torch.stack([positions, positions + max(0, longest - len(other))])
    device = next(model.parameters()).device
    device = torch.device("cpu") if device.type == "meta" else device

    def on_device(tensors: Mapping[str, Any]) -> PairBatch:
        moved = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in tensors.items()}
        return PairBatch.from_tensors(moved)

    return on_device(alone), on_device(beside)


def _longest_row(model: nn.Module) -> int:
    """A length beyond the rows that the model was made for."""
    config: Any = unwrap(model).config.get_text_config()
    return 2 * int(getattr(config, "max_position_embeddings", None) or 1_024)


def _has_virtual_tokens(model: nn.Module) -> bool:
    return isinstance(model, PeftModel) and any(config.is_prompt_learning for config in model.peft_config.values())
