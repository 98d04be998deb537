"""Which layout the rows of a run get: what was asked for, once the models have been seen to compute it right.

Rows that hold several sequences are read wrongly, and without a word, by models that carry state along a row, count
distance in columns, or drop the arguments of their attention. So before anything is scored every model of the run,
policy and references alike (one of each class), is given the first batch in that layout and in the padded one, which is
always right, and must say the same. One layout holds for all of them: padded and shared rows differ by rounding, and a
margin is a difference of two log-probs.

Given up: rows with several sequences for weights that are sharded over processes (FSDP, DeepSpeed): the comparison
would come before they are put together.
"""

import contextlib
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel

from holdfast.batch import ContentId, PairBatch, SequenceLogps
from holdfast.data.layouts.padded import PaddedLayout
from holdfast.data.layouts.prefix_shared import ROW_TOKENS, SharedLayout
from holdfast.internals.transformers import attention_of, carries_state, is_on_attention_interface
from holdfast.scoring.attention import configs_of
from holdfast.scoring.causal_lm import unwrap
from holdfast.scoring.frozen import Autocast, frozen_logps
from holdfast.scoring.tolerance import TOLERANCE_NATS, TOLERANCE_NATS_HALF, TOLERANCE_NATS_MEAN

logger = logging.getLogger(__name__)

Layout = PaddedLayout | SharedLayout

SHARDED = "it cannot be compared with padded rows before the weights of a sharded policy are put together"

LAYERS = frozenset({"full_attention", "sliding_attention", "chunked_attention"})
"""The kinds of layer that see what their mask lets them see."""


class LayoutOptions(Protocol):
    """The options of a run (`DPOConfig`) that say how its rows are laid out."""

    layout: str
    padding_free: bool
    tokens_per_batch: int | None

    @property
    def layout_options(self) -> dict[str, Any]:
        """How sequences are cut and rows filled up."""
        ...


def make_layout(args: LayoutOptions, pad_token_id: int) -> Layout:
    """The layout named `args.layout`, untried; for `auto` the prefix-shared one."""
    if args.layout == "padded":
        return PaddedLayout(pad_token_id, **args.layout_options)
    row_tokens = None if args.tokens_per_batch is None else min(ROW_TOKENS, args.tokens_per_batch)
    how = {"row_tokens": row_tokens, "shares_prompts": args.layout != "packed"}
    return SharedLayout(pad_token_id, **args.layout_options, **how)


def choose_layout(
    args: LayoutOptions,
    collator: Any,
    rows: Callable[[], Sequence[Mapping[str, Any]]],
    models: Sequence[nn.Module],
    pair_batch: Callable[[Mapping[str, Tensor]], PairBatch],
    accelerator: Accelerator,
    is_sharded: bool,
) -> Any:
    """`collator`, once all `models` have been seen to compute right what it lays out; where they do not and
    `args.layout` is `auto`, a layout that they do: packed, else padded, with a line on why. `rows()` gives the first
    pairs, and `pair_batch` makes a batch of what a layout gives. A collator that is not holdfast's comes back as it is.

    Raises ValueError where the layout that was named is wrong for a model, or where padded rows are all that is right
    and `args.padding_free` forbids them.
    """
    if is_sharded and args.tokens_per_batch is not None:
        raise ValueError(
            f"tokens_per_batch={args.tokens_per_batch} was asked for, but the weights are sharded: all processes must "
            "compute equally many parts, and their batches differ. Lower per_device_train_batch_size instead."
        )
    if not isinstance(collator, SharedLayout):
        return collator
    options = (collator.pad_token_id, collator.max_length, collator.truncation_mode, collator.pad_to_multiple_of)
    padded = PaddedLayout(*options)

    def problem(layout: SharedLayout) -> str | None:
        return SHARDED if is_sharded else _problem(layout, padded, rows, models, pair_batch, accelerator)

    if (reason := problem(collator)) is None:
        return collator
    if args.layout != "auto" or not collator.shares_prompts:
        raise ValueError(
            f"layout={collator.name!r} was asked for, but {reason}. Use layout='auto', which takes one that fits."
        )
    packed = replace(collator, shares_prompts=False)
    if problem(packed) is None:
        return _said(packed, reason, accelerator)
    if args.padding_free:
        raise ValueError(
            f"padding_free=True was asked for, but {reason}. Drop it, and the rows of this model will be padded."
        )
    return _said(padded, reason, accelerator)


def _said(layout: Layout, reason: str, accelerator: Accelerator) -> Layout:
    """`layout`, with a line on why it is that one."""
    if accelerator.is_main_process:
        logger.warning("layout: %s, because %s", layout.name, reason)
    return layout


def _problem(
    layout: SharedLayout,
    padded: PaddedLayout,
    rows: Callable[[], Sequence[Mapping[str, Any]]],
    models: Sequence[nn.Module],
    pair_batch: Callable[[Mapping[str, Tensor]], PairBatch],
    accelerator: Accelerator,
) -> str | None:
    """Why not all `models` can have `layout`, in a clause; the same on all processes."""
    reason = next(filter(None, (known_problem(model) for model in models)), None)
    if reason is None:
        features = rows()
        shared, expected = pair_batch(layout(features)), pair_batch(padded(features))
        for model in {type(unwrap(model)): model for model in reversed(models)}.values():  # one of each class
            reason = reason or shared_problem(
                unwrap(model),
                partial(frozen_logps, model, autocast=_exact(model, accelerator)),
                shared,
                expected,
                is_half_precision=not _is_fp32(model),
            )
    if accelerator.num_processes > 1:  # rounding may differ between machines, and all must do the same
        return next(filter(None, gather_object([reason])), None)
    return reason


def _is_fp32(model: nn.Module) -> bool:
    is_rounded = torch.cuda.is_available() and torch.get_float32_matmul_precision() != "highest"
    return not is_rounded and all(p.dtype == torch.float32 for p in model.parameters() if p.is_floating_point())


def _exact(model: nn.Module, accelerator: Accelerator) -> Autocast:
    """Without autocast where that can be: what rounding does not hide is found."""
    attention = attention_of(unwrap(model).config)
    return contextlib.nullcontext if _is_fp32(model) and attention in ("eager", "sdpa") else accelerator.autocast


def shared_problem(
    causal_lm: PreTrainedModel,
    logps: Callable[[PairBatch], SequenceLogps],
    shared: PairBatch,
    padded: PairBatch,
    *,
    is_half_precision: bool = False,
) -> str | None:
    """Why `causal_lm` must not be given shared prompts, in a clause; None when it computes them as it does padded rows.

    `shared` and `padded` are the same pairs in the two layouts, and `logps` scores a batch with the model, without
    dropout or gradients. Compared token by token and by the mean: `TOLERANCE_NATS` and `TOLERANCE_NATS_MEAN` in fp32,
    `TOLERANCE_NATS_HALF` for the mean below it. Raises what `logps` raises for the padded batch.
    """
    if (reason := known_problem(causal_lm)) is not None:
        return reason
    expected = _by_content(padded, logps(padded))
    try:
        found = _by_content(shared, logps(shared))
    except torch.OutOfMemoryError:
        raise
    except (TypeError, ValueError, RuntimeError) as error:
        return f"{type(causal_lm).__name__} fails on them ({type(error).__name__}: {str(error).splitlines()[0]})"
    assert found.keys() == expected.keys(), "the same pairs"
    gaps = torch.cat([(found[content] - expected[content]).abs() for content in expected])
    mean, largest = float(gaps.mean()), float(gaps.max())
    most = TOLERANCE_NATS_HALF if is_half_precision else TOLERANCE_NATS_MEAN
    if mean <= most and (is_half_precision or largest <= TOLERANCE_NATS):  # NaN is neither
        return None
    return (
        f"{type(causal_lm).__name__} gives log-probs that differ from those of padded rows by {mean:.3g} nats per "
        f"token, {largest:.3g} at most ({most:g} is rounding)"
    )


def known_problem(model: nn.Module) -> str | None:
    """The same as far as it needs no numbers: before training, the state of a hybrid model may be too faint to be seen
    in them."""
    if isinstance(model, PeftModel) and any(config.is_prompt_learning for config in model.peft_config.values()):
        return "its adapter puts virtual tokens before each row"
    causal_lm = unwrap(model)
    name = type(causal_lm).__name__
    if not is_on_attention_interface(causal_lm):
        return f"{name} is not on the attention interface of transformers"
    others = {kind for config in configs_of(causal_lm) for kind in getattr(config, "layer_types", None) or ()} - LAYERS
    if others:
        return f"{name} has layers that are not attention ({', '.join(sorted(others))})"
    is_carried = carries_state(causal_lm) or any(isinstance(module, nn.Conv1d) for module in causal_lm.modules())
    return f"{name} carries state along its rows" if is_carried else None


def _by_content(batch: PairBatch, logps: SequenceLogps) -> dict[ContentId, Tensor]:
    parts = logps.per_token.detach().float().split(batch.lengths())
    return dict(zip(batch.content_ids(), parts, strict=True))
