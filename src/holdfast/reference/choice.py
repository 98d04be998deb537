"""From options to a reference: the one place that knows every way to hold one.

A way is a class in a file of its own; a new one is added to `Way` and `_held`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from torch import nn

from holdfast.logprobs import unwrap, vocabulary_size
from holdfast.reference.adapter import AdapterReference
from holdfast.reference.base import Autocast, Reference
from holdfast.reference.model import ModelReference, freeze
from holdfast.reference.named import NamedAdapterReference, check_named
from holdfast.reference.policy import PolicyReference
from holdfast.reference.precomputed import PrecomputedReference
from holdfast.reference.snapshot import Place, SnapshotReference, check_snapshot
from holdfast.reference.sync import check_mixable, effective_parameters, is_adapted

Way = Literal["model", "adapter", "snapshot", "precomputed", "none"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Wish:
    """What was asked for: the way by name (`auto` = go by the model), whether log-probs are computed ahead, whether the
    reference moves, which adapter of the policy it is, and where a snapshot is held (in `file`, if on disk)."""

    way: str = "auto"
    adapter: str | None = None
    is_ahead: bool = False
    moves: bool = False
    place: Place = "device"
    file: Path = Path("snapshot.safetensors")


def choose_reference(
    wish: Wish,
    policy: nn.Module,
    ref_model: nn.Module | None,
    autocast: Autocast,
    *,
    gather: Callable[[list[Any]], list[Any]] = list,
    is_quiet: bool = False,
) -> Reference | None:
    """The reference for `policy` as it is now; None for the way `none`.

    `ref_model` is the module that the user chose, placed already, or None for the policy itself. Raises ValueError when
    the wish contradicts the models.
    """
    if wish.way == "none":
        if ref_model is not None:
            raise ValueError(
                "A `ref_model` was given, but the losses and reference='none' compare with no reference, so it would "
                "be ignored. Drop `ref_model`, or use a loss that compares with a reference."
            )
        return None
    is_ahead = wish.is_ahead or wish.way == "precomputed"
    held = _held(wish, policy, ref_model, autocast, is_ahead)
    return PrecomputedReference(held, gather=gather, is_quiet=is_quiet) if is_ahead else held


def _held(wish: Wish, policy: nn.Module, ref_model: nn.Module | None, autocast: Autocast, is_ahead: bool) -> Reference:
    """The reference that is asked, now or ahead."""
    if ref_model is not None:
        if wish.way in ("adapter", "snapshot") or wish.adapter is not None:
            asked = f"ref_adapter_name={wish.adapter!r}" if wish.adapter is not None else f"reference={wish.way!r}"
            raise ValueError(
                f"{asked} was asked for together with a `ref_model`: the first is inside the policy, the second is "
                "another model. Drop one of them."
            )
        check_ref_model(policy, ref_model)
        if wish.moves:
            check_mixable(dict(ref_model.named_parameters()), effective_parameters(policy))
        return ModelReference(
            freeze(ref_model), autocast, origin="the given ref_model", policy=policy if wish.moves else None
        )
    if wish.adapter is not None:
        return NamedAdapterReference(check_named(policy, wish.adapter), autocast, wish.adapter)
    if wish.way == "adapter" and not is_adapted(policy):
        raise ValueError(
            f"reference='adapter' was asked for, but the policy is a {type(policy).__name__} without a PEFT adapter. "
            "Pass a `peft_config`, or use reference='model' or 'precomputed'."
        )
    if wish.way == "snapshot":
        check_snapshot(policy, wish.place, moves=wish.moves)
        return SnapshotReference(policy, autocast, place=wish.place, file=wish.file, moves=wish.moves)
    if (wish.way == "model" and not is_ahead) or wish.moves:
        return ModelReference.capture(policy, autocast, moves=wish.moves)
    if is_adapted(policy):
        return AdapterReference.capture(policy, autocast)
    return PolicyReference(policy, autocast) if is_ahead else ModelReference.capture(policy, autocast, moves=False)


def check_ref_model(policy: nn.Module, ref_model: nn.Module) -> None:
    """ValueError where `ref_model` cannot be the reference: shared trainable weights, or another vocabulary."""
    trainable = {id(p): name for name, p in policy.named_parameters() if p.requires_grad}
    shared = [trainable[id(p)] for p in ref_model.parameters() if id(p) in trainable]
    if shared:
        raise ValueError(
            f"`ref_model` shares {len(shared)} trainable tensors with `model`, {shared[0]!r} first, so the reference "
            "would train along with the policy. Leave `ref_model` out, or pass a model of its own."
        )
    sizes = vocabulary_size(unwrap(policy)), vocabulary_size(unwrap(ref_model))
    if sizes[0] != sizes[1]:
        raise ValueError(
            f"`ref_model` has a vocabulary of {sizes[1]} tokens and `model` one of {sizes[0]}: their log-probs are not "
            "of the same tokens. Use a reference with the policy's tokenizer, or resize its embeddings likewise."
        )
