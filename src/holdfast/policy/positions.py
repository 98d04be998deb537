"""Whether a run's longest row fits the positions of its models.

A model with a table of positions (GPT-2, OPT) has no vector beyond its end: such a row is an index error in the middle
of a run. Rotary embeddings go on beyond the length that a model was trained on, where its numbers are extrapolations.
To train it there may be meant, so that is said once and not refused. `max_length` alone says nothing, since its default
is longer than many models: the rows count, as they are after truncation.
"""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from holdfast.policy.adapters import is_adapted
from holdfast.policy.rotations import longest_pair
from holdfast.scoring.causal_lm import unwrap

logger = logging.getLogger(__name__)

_NO_END = 2**53
_FIXED_TABLES = ("embed_positions", "pos_encoding")
_NOT_OF_TEXT = ("vision", "visual", "image", "audio", "speech")


def check_positions(
    models: Sequence[nn.Module | None], datasets: Mapping[str, Any], max_length: int | None, *, is_main: bool = True
) -> None:
    """ValueError where a row of the prepared `datasets`, truncated to `max_length`, is longer than the table of
    positions of one of `models` (the policy, then its references), or may be, in a stream. A warning where it is longer
    than the rotary embeddings of one are made for."""
    lengths = {name: longest_pair(data) for name, data in datasets.items() if data is not None}
    name = max(lengths, key=lambda name: lengths[name] or 0)
    longest = min(lengths[name] or 0, max_length or _NO_END)
    found = f"the longest row of the {name} data has {lengths[name]} tokens"
    for number, model in enumerate(models):
        if model is None:
            continue
        called = f"{f'reference {number}' if number else 'the policy'} ({type(unwrap(model)).__name__})"
        limit = table_length(model)
        if limit is not None:
            num_free = limit - _num_virtual(model)
            is_open = None in lengths.values() and (max_length is None or max_length > num_free)
            if longest > num_free or is_open:
                stream = f"with max_length={max_length} the rows of a stream may have any length up to that"
                raise ValueError(
                    f"{called} has a table of {limit} positions, and {found if longest > num_free else stream} (prompt "
                    f"and completion). Set max_length to at most {num_free}, or use a model of more positions."
                )
            continue
        limit = _trained_length(model)
        if limit is not None and longest > limit and is_main:
            logger.warning(
                "%s is made for %d positions (max_position_embeddings), and %s. Beyond, its rotary embeddings "
                "extrapolate. Unless that is meant, set max_length=%d, or scale them in the model's config.",
                called, limit, found, limit,
            )  # fmt: skip


def table_length(model: nn.Module) -> int | None:
    """The number of positions in the model's table of positions, learned or fixed; None where it has none."""
    lengths: list[int] = []
    for name, module in model.named_modules():
        leaf = name.rpartition(".")[2]
        if any(part in name for part in _NOT_OF_TEXT):
            continue
        if isinstance(module, nn.Embedding) and ("pos" in leaf or leaf == "wpe"):
            lengths.append(module.num_embeddings - getattr(module, "offset", 0))
        tables: list[Any] = [getattr(module, table, None) for table in _FIXED_TABLES]
        lengths += [len(table) for table in tables if isinstance(table, Tensor) and table.dim() == 2]
    if getattr(unwrap(model).config, "model_type", "") == "mpt":  # its table of biases
        lengths.append(unwrap(model).config.max_seq_len)
    return min(lengths, default=None)


def num_free_positions(model: nn.Module) -> int | None:
    """How many tokens a row of the model may have: the length of its table of positions, less virtual tokens; None
    where it has no table."""
    limit = table_length(model)
    return None if limit is None else limit - _num_virtual(model)


def _trained_length(model: nn.Module) -> int | None:
    """The longest row that the model's rotary embeddings are made for, as its config says; None without any."""
    if not any(name.endswith("inv_freq") for name, _ in model.named_buffers()):
        return None
    config = unwrap(model).config.get_text_config()
    length = None if getattr(config, "alibi", False) else getattr(config, "max_position_embeddings", None)
    scaling = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    kinds = [scaling, *(kind for kind in scaling.values() if isinstance(kind, Mapping))]
    scaled = [
        float(kind.get("factor") or 1.0) * (kind.get("original_max_position_embeddings") or length or 0)
        for kind in kinds
    ]
    return int(max(length, *scaled)) if length else None


def _num_virtual(model: Any) -> int:
    """The positions that the virtual tokens of a prompt-learning adapter take."""
    if not is_adapted(model):
        return 0
    config: Any = model.peft_config[model.active_adapter] if isinstance(model.active_adapter, str) else None
    return config.num_virtual_tokens if config is not None and config.is_prompt_learning else 0
