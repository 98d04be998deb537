"""From options to a reference: the one place that knows every way to hold one.

A way is a class in a file of its own; a new one is added to `Way` and `_held`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Literal

from torch import nn

from holdfast.policy.adapters import is_adapted
from holdfast.policy.quantised import is_quantised
from holdfast.reference.adapter import AdapterReference
from holdfast.reference.base import Reference
from holdfast.reference.identity import Identity, numerics, store_key
from holdfast.reference.mixture import MixtureReference, mixture_weights
from holdfast.reference.model import ModelReference, freeze
from holdfast.reference.moving import lora_products as products
from holdfast.reference.moving.average import check_mixable, effective_parameters
from holdfast.reference.offloaded import ParkedReference
from holdfast.reference.other_adapter import NamedAdapterReference, check_named
from holdfast.reference.run_folder import RunFolder
from holdfast.reference.snapshot import Motion, SnapshotReference
from holdfast.reference.stored import PrecomputedReference
from holdfast.reference.tensor_file import Place
from holdfast.reference.windowed import WindowedReference
from holdfast.scoring.frozen import Autocast
from holdfast.scoring.score import unwrap, vocabulary_size
from holdfast.store.store import LogpStore, default_root

Way = Literal["model", "adapter", "snapshot", "precomputed", "none"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Wish:
    """What was asked for: the way by name (`auto` = go by the model), which adapter of the policy it is, where a
    snapshot is held (in `folder`, if on disk), whether log-probs are computed ahead and over how many optimizer steps
    (`window`; None where that is left open), whether the data is a stream, how often and how far the reference moves
    (None and 0 for a fixed one), the weights of several references (None for equal ones), and the folder of stored
    log-probs (None for the default), with or without those of versions that are over."""

    way: str = "auto"
    adapter: str | None = None
    place: Place = "device"
    folder: RunFolder = field(default_factory=lambda: RunFolder(Path("_reference")))
    is_ahead: bool = False
    window: int | None = None
    is_stream: bool = False
    sync_steps: int | None = None
    mixup_alpha: float = 0.0
    weights: Sequence[float] | None = None
    store: Path | None = None
    keeps_versions: bool = False

    @property
    def motion(self) -> Motion:
        """Whether it stays, or how it moves."""
        return "fixed" if self.sync_steps is None else "hard" if self.mixup_alpha == 1 else "soft"


def choose_reference(
    wish: Wish,
    policy: nn.Module,
    ref_models: Sequence[nn.Module | None],
    autocast: Autocast,
    *,
    mixed_precision: str = "no",
    layout: Callable[[], str] = lambda: "padded",
    is_quiet: bool = False,
    is_main: bool = True,
    wait_for_all: Callable[[], object] = lambda: None,
) -> Reference | None:
    """The reference for `policy` as it is now; None for the way `none`.

    `ref_models` are the modules that the user chose, placed already, None among them for the policy itself; several of
    them are mixed. Raises ValueError when the wish contradicts the models.
    """
    if wish.way == "none":
        if any(ref_model is not None for ref_model in ref_models):
            raise ValueError(
                "A `ref_model` was given, but the losses and reference='none' compare with no reference, so it would "
                "be ignored. Drop `ref_model`, or use a loss that compares with a reference."
            )
        return None
    wish = replace(wish, is_ahead=wish.is_ahead or wish.way == "precomputed")
    held = _mixed(wish, policy, ref_models, autocast)
    if not wish.is_ahead:
        return _windowed(wish, held)

    def open_store(identity: Identity, version: int | None) -> LogpStore:
        device = next(policy.parameters()).device
        rounded = numerics(identity, device=device, mixed_precision=mixed_precision, layout=layout())
        return LogpStore.open(wish.store or default_root(), store_key(identity, rounded, version))

    moves = wish.motion != "fixed"
    is_whole = not moves and wish.window is None
    stored = PrecomputedReference(
        held,
        open_store=open_store,
        park=partial(_parked, wish, autocast),
        is_whole=is_whole,
        moves=moves,
        keeps_versions=wish.keeps_versions,
        is_quiet=is_quiet,
        is_main=is_main,
        wait_for_all=wait_for_all,
    )
    return stored if is_whole and not wish.is_stream else _windowed(wish, stored)


def _mixed(wish: Wish, policy: nn.Module, ref_models: Sequence[nn.Module | None], autocast: Autocast) -> Reference:
    """The one reference, or the mixture of several. Where the policy is one of them, `wish.way` says how it is held."""
    if len(ref_models) == 1:
        return _held(wish, policy, ref_models[0], autocast)
    others = replace(wish, way="model") if None in ref_models else wish
    parts = [_held(wish if module is None else others, policy, module, autocast) for module in ref_models]
    return MixtureReference(parts, mixture_weights(wish.weights, len(parts)))


def _windowed(wish: Wish, held: Reference) -> Reference:
    """`held` asked a window at a time, where that was asked for or spares exchanges of weights."""
    steps = wish.window
    if steps is None:
        parts = held.references if isinstance(held, MixtureReference) else (held,)
        comes_from_afar = wish.place != "device" and any(isinstance(part, SnapshotReference) for part in parts)
        if not (wish.is_ahead or comes_from_afar):
            return held
        # After a hard sync the policy itself can score all that comes before the next one.
        steps = wish.sync_steps if wish.is_ahead or wish.motion == "hard" else None
    return held if steps == 1 else WindowedReference(held, steps=steps, sync_steps=wish.sync_steps)


def _held(wish: Wish, policy: nn.Module, ref_model: nn.Module | None, autocast: Autocast) -> Reference:
    """The reference that is asked, now or ahead."""
    if ref_model is not None:
        return _chosen(wish, policy, ref_model, autocast)
    if wish.adapter is not None:
        return NamedAdapterReference(check_named(policy, wish.adapter), autocast, wish.adapter)
    if wish.way == "adapter" and not is_adapted(policy):
        raise ValueError(
            f"reference='adapter' was asked for, but the policy is a {type(policy).__name__} without a PEFT adapter. "
            "Pass a `peft_config`, or use reference='model' or 'precomputed'."
        )
    moves, obstacle = wish.motion != "fixed", _why_not_inside(wish, policy)
    is_module = wish.way == "model" and (moves or not wish.is_ahead)
    if is_module or (wish.way == "auto" and (obstacle or not (wish.is_ahead or is_adapted(policy)))):
        return ModelReference.capture(policy, autocast, moves=moves)
    if wish.way != "snapshot" and not moves and is_adapted(policy):
        return AdapterReference.capture(policy, autocast)
    if obstacle:
        raise ValueError(
            f"sync_ref_model=True was asked for with reference={wish.way!r} and ref_model_mixup_alpha="
            f"{wish.mixup_alpha}, but inside the policy there is no exact mix of two such adapters: {obstacle}. Use "
            "reference='model', whose weights move merged, or ref_model_mixup_alpha=1."
        )
    place = wish.place if wish.way == "snapshot" else "disk" if wish.is_ahead else "device"
    return SnapshotReference(policy, autocast, place=place, folder=wish.folder, motion=wish.motion)


def _why_not_inside(wish: Wish, policy: nn.Module) -> str | None:
    """What of the policy's adapters cannot be mixed without merging them; None where all can, or need not be."""
    return products.why_not(policy) if wish.motion == "soft" and is_adapted(policy) else None


def _chosen(wish: Wish, policy: nn.Module, ref_model: nn.Module, autocast: Autocast) -> Reference:
    """The module that the user chose."""
    if wish.way in ("adapter", "snapshot") or wish.adapter is not None:
        asked = f"ref_adapter_name={wish.adapter!r}" if wish.adapter is not None else f"reference={wish.way!r}"
        raise ValueError(
            f"{asked} was asked for together with a `ref_model`: the first is inside the policy, the second is "
            "another model. Drop one of them."
        )
    check_ref_model(policy, ref_model)
    moves = wish.motion != "fixed"
    if moves:
        check_mixable(dict(ref_model.named_parameters()), effective_parameters(policy))
    return ModelReference(freeze(ref_model), autocast, origin="the given ref_model", policy=policy if moves else None)


def _parked(wish: Wish, autocast: Autocast, held: Reference, number: int = 0) -> Reference | None:
    """What is kept of `held` once all datasets are scored: nothing in memory, but enough to be asked again, except for
    quantised weights, which have state beside their tensors."""
    if isinstance(held, MixtureReference):
        parts = [_parked(wish, autocast, part, index) for index, part in enumerate(held.references)]
        known = [part for part in parts if part is not None]
        return MixtureReference(known, held.weights) if len(known) == len(parts) else None
    if held.module is None:
        return held
    if is_quantised(held.module):
        return None
    name = f"parked-{number}.safetensors"
    return ParkedReference(held.module, autocast, folder=wish.folder, name=name, origin="the given ref_model")


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
