"""A layout tried on the models of a run: whether they compute it as they compute padded rows, which are always right.

Each model, one of each class, is given the first batch in both layouts. Some models are known by their class or
settings to read rows of several sequences wrongly. They are found without numbers, because the state of an untrained
hybrid model may change a log-prob too little to be measured.

Where weights are sharded over processes, all of them score the same pairs together, and agree about each model before
the next one.
"""

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, final

import torch
from accelerate import Accelerator
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel

from holdfast.agreement import of_all
from holdfast.batch import PairBatch, SequenceLogps
from holdfast.data.layouts.base import Layout
from holdfast.data.layouts.noise import by_content, gaps, largest_rounding_gap, typical_gap
from holdfast.data.layouts.padded import PaddedLayout
from holdfast.internals.transformers import attention_of, carries_state, is_on_attention_interface
from holdfast.scoring.attention import configs_of
from holdfast.scoring.causal_lm import unwrap
from holdfast.scoring.frozen import Autocast, frozen_logps
from holdfast.scoring.precision import is_half_precision, rounding_unit
from holdfast.scoring.tolerance import TOLERANCE_NATS, TOLERANCE_NATS_HALF, TOLERANCE_NATS_MEAN

ATTENTION_LAYERS = frozenset({"full_attention", "sliding_attention", "chunked_attention"})
"""The kinds of layer that see what their mask lets them see."""

_COLUMNS = 64
"""Padded rows are compared with rows that are padded to the next multiple of it: kernels divide such rows otherwise."""


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class LayoutTrial:
    """What a layout is tried on: all `models` of a run, and its first pairs, which `first_pairs()` returns.

    `pair_batch` makes a batch of what a layout returns.
    """

    models: Sequence[nn.Module]
    first_pairs: Callable[[], Sequence[Mapping[str, Any]]]
    pair_batch: Callable[[Mapping[str, Tensor]], PairBatch]
    accelerator: Accelerator

    def problem(self, layout: Layout) -> str | None:
        """Why a model computes `layout` wrongly, in a clause; None where all compute it right. The same on all
        processes."""
        if layout.fallback() is None:
            return None
        reason = _of_any(self._known_problem()) if layout.fills_rows else None
        return reason or self._measured_problem(layout)

    def _known_problem(self) -> str | None:
        return next(filter(None, map(known_problem, self.models)), None)

    def _measured_problem(self, layout: Layout) -> str | None:
        pairs = self.first_pairs()
        padded = PaddedLayout(layout.pad_token_id, layout.max_length, layout.truncation_mode, layout.pad_to_multiple_of)
        batch, padded_batch = self.pair_batch(layout(pairs)), self.pair_batch(padded(pairs))
        further = replace(padded, pad_to_multiple_of=self._further(padded_batch.inputs["input_ids"].shape[1]))
        other = self.pair_batch(further([*reversed(pairs)]))
        one_of_each_class = {type(unwrap(model)): model for model in reversed(self.models)}
        for model in one_of_each_class.values():
            autocast = _most_exact(model, self.accelerator)
            own = measured_problem(
                unwrap(model),
                partial(frozen_logps, model, autocast=autocast),
                batch,
                padded_batch,
                is_half_precision=is_half_precision(model, autocast),
                other_padded_batch=other,
                unit=rounding_unit(model, autocast),
            )
            if (reason := _of_any(own)) is not None:
                return reason
        return None

    def _further(self, num_columns: int) -> int:
        """A number of columns beyond `num_columns`, where every model has positions for it; else that number."""
        configs: list[Any] = [unwrap(model).config.get_text_config() for model in self.models]
        limits = [limit for config in configs if (limit := getattr(config, "max_position_embeddings", None))]
        return max(num_columns, min([num_columns // _COLUMNS * _COLUMNS + _COLUMNS, *limits]))


def _of_any(reason: str | None) -> str | None:
    """The first reason that a process has. Rounding may differ between machines, and all must do the same."""
    return next(filter(None, of_all(reason)), None)


def _most_exact(model: nn.Module, accelerator: Accelerator) -> Autocast:
    """No autocast where the model computes without it, so that a small error is not hidden by rounding."""
    is_fp32 = all(p.dtype == torch.float32 for p in model.parameters() if p.is_floating_point())
    attention = attention_of(unwrap(model).config)
    return contextlib.nullcontext if is_fp32 and attention in ("eager", "sdpa") else accelerator.autocast


def measured_problem(
    causal_lm: PreTrainedModel,
    logps: Callable[[PairBatch], SequenceLogps],
    batch: PairBatch,
    padded_batch: PairBatch,
    *,
    is_half_precision: bool = False,
    other_padded_batch: PairBatch | None = None,
    unit: float = 0.0,
) -> str | None:
    """How the log-probs of `batch` differ from those of `padded_batch`, in a clause; None where they are the same.

    Both are the same pairs, in two layouts. `logps` scores a batch with the model, without dropout or gradients. In
    fp32 no token may differ by more than `TOLERANCE_NATS`, and the mean by no more than `TOLERANCE_NATS_MEAN`. In half
    precision only the mean counts: it may differ by what rounding does to the padded rows themselves (see
    `data.layouts.noise`), of which `other_padded_batch` is another batch of the same pairs, and `unit` the rounding
    unit of the dtype; without another batch by `TOLERANCE_NATS_HALF`. Raises what `logps` raises for the padded batch.
    """
    expected = by_content(padded_batch, logps(padded_batch))
    most = TOLERANCE_NATS_HALF if is_half_precision else TOLERANCE_NATS_MEAN
    if is_half_precision and other_padded_batch is not None:
        most = largest_rounding_gap(causal_lm, logps, padded_batch, other_padded_batch, rounding_unit=unit)
    try:
        computed = by_content(batch, logps(batch))
    except torch.OutOfMemoryError:
        raise
    except (TypeError, ValueError, RuntimeError) as error:
        return f"{type(causal_lm).__name__} fails on them ({type(error).__name__}: {str(error).splitlines()[0]})"
    distances = gaps(computed, expected)
    mean = typical_gap(causal_lm, distances) if is_half_precision else float(distances.mean())
    largest = float(distances.max())
    if mean <= most and (is_half_precision or largest <= TOLERANCE_NATS):  # NaN is neither
        return None
    return (
        f"{type(causal_lm).__name__} gives log-probs that differ from those of padded rows by {mean:.3g} nats per "
        f"token, {largest:.3g} at most ({most:.2g} is rounding)"
    )


def known_problem(model: nn.Module) -> str | None:
    """Why a model of this class and these settings reads rows of several sequences wrongly, in a clause; None where
    nothing is known against it."""
    if isinstance(model, PeftModel) and any(config.is_prompt_learning for config in model.peft_config.values()):
        return "its adapter puts virtual tokens before each row"
    causal_lm = unwrap(model)
    name = type(causal_lm).__name__
    if not is_on_attention_interface(causal_lm):
        return f"{name} is not on the attention interface of transformers"
    layer_types = {kind for config in configs_of(causal_lm) for kind in getattr(config, "layer_types", None) or ()}
    if others := layer_types - ATTENTION_LAYERS:
        return f"{name} has layers that are not attention ({', '.join(sorted(others))})"
    is_carried = carries_state(causal_lm) or any(isinstance(module, nn.Conv1d) for module in causal_lm.modules())
    return f"{name} carries state along its rows" if is_carried else None
