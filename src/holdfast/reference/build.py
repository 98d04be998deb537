"""From options to a reference: the one module that knows every way to hold one.

`WAYS` has the ways by name. A new way is a class in a file of `reference.scorers`, and an entry in `WAYS`. Which
combinations of options have a meaning is decided here, before anything is scored.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Literal

from torch import nn

from holdfast.policy.adapters import is_adapted
from holdfast.policy.quantised import is_quantised
from holdfast.policy.sharding import is_sharded
from holdfast.reference.base import Scorer
from holdfast.reference.identity.identity import Identity, numerics, store_key
from holdfast.reference.moving import lora_products
from holdfast.reference.moving.hard_snapshot import HardSnapshot
from holdfast.reference.moving.model import MovingModel
from holdfast.reference.moving.soft_snapshot import SoftSnapshot
from holdfast.reference.reference import Reference, Roles
from holdfast.reference.run_folder import RunFolder
from holdfast.reference.scorers.adapter import AdapterReference
from holdfast.reference.scorers.mixture import MixtureReference, mixture_shares
from holdfast.reference.scorers.model import ModelReference, freeze
from holdfast.reference.scorers.offloaded import OffloadedReference
from holdfast.reference.scorers.other_adapter import OtherAdapterReference, check_other_adapter
from holdfast.reference.scorers.snapshot import SnapshotReference
from holdfast.reference.sources.stored import PrecomputedReference
from holdfast.reference.sources.window import Window
from holdfast.reference.tensor_file import SnapshotDevice
from holdfast.scoring.causal_lm import unwrap, vocabulary_size
from holdfast.scoring.frozen import Autocast
from holdfast.store.store import LogpStore, default_root

Motion = Literal["fixed", "hard", "soft"]
"""What a sync does: there is none, it sets the reference to the policy (alpha = 1), or it mixes the two."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ReferenceOptions:
    """Which reference a run asks for.

    - `way`: the name of a way to hold it; `auto` goes by the model. `adapter`: the adapter of the policy that is it.
    - `snapshot_device`: where a snapshot is held. `folder`: where files of the reference go.
    - `is_ahead`: whether log-probs are computed ahead. `window`: over how many optimizer steps, None to choose here.
    - `is_stream`: whether the training set has no end.
    - `sync_steps`, `mixup_alpha`: how often and how far it moves; None and 0 for a fixed one.
    - `shares`: the share of each of several references; None for equal shares.
    - `store`: the folder of stores; None for the default. `keeps_versions`: whether stores of past versions stay.
    """

    way: str = "auto"
    adapter: str | None = None
    snapshot_device: SnapshotDevice = "device"
    folder: RunFolder = field(default_factory=lambda: RunFolder(Path("_reference")))
    is_ahead: bool = False
    window: int | None = None
    is_stream: bool = False
    sync_steps: int | None = None
    mixup_alpha: float = 0.0
    shares: Sequence[float] | None = None
    store: Path | None = None
    keeps_versions: bool = False

    @property
    def motion(self) -> Motion:
        """Whether the reference is fixed, and if not, how it moves."""
        return "fixed" if self.sync_steps is None else "hard" if self.mixup_alpha == 1 else "soft"


# --- the ways ---------------------------------------------------------------------------------------------------------


def _model(options: ReferenceOptions, policy: nn.Module, autocast: Autocast) -> Roles:
    """A second module: a copy of the policy."""
    if options.motion == "fixed":
        return Roles(scorer=ModelReference.capture(policy, autocast))
    model = MovingModel.capture(policy, autocast)
    return Roles(scorer=model, moving=model)


def _adapter(options: ReferenceOptions, policy: nn.Module, autocast: Autocast) -> Roles:
    """Inside a PEFT policy."""
    return Roles(scorer=AdapterReference.capture(policy, autocast))


def _snapshot(options: ReferenceOptions, policy: nn.Module, autocast: Autocast) -> Roles:
    """The first values of the policy's trainable tensors. Where log-probs are computed ahead, the values are rarely
    needed, so they are on disk."""
    device: SnapshotDevice = "disk" if options.is_ahead else "device"
    if options.way == "snapshot":
        device = options.snapshot_device
    if options.motion == "fixed":
        snapshot = SnapshotReference(policy, autocast, device=device, folder=options.folder)
        return Roles(scorer=snapshot, late_copy=snapshot)
    kind = HardSnapshot if options.motion == "hard" else SoftSnapshot
    moving = kind(policy, autocast, device=device, folder=options.folder)
    return Roles(scorer=moving, moving=moving, late_copy=moving)


Way = Callable[[ReferenceOptions, nn.Module, Autocast], Roles]
WAYS: Mapping[str, Way] = {"model": _model, "adapter": _adapter, "snapshot": _snapshot}
"""The ways to hold the policy as it starts to train, by name."""

WAY_NAMES = ("auto", *WAYS, "precomputed", "none")
"""The values of the option `reference`."""


def _way_of_policy(options: ReferenceOptions, policy: nn.Module) -> str:
    """The name of the way to hold the policy as its own reference. ValueError where that way does not fit the policy or
    the motion."""
    moves, is_ahead = options.motion != "fixed", options.is_ahead
    if options.way == "adapter" and not is_adapted(policy):
        raise ValueError(
            f"reference='adapter' was asked for, but the policy is a {type(policy).__name__} without a PEFT adapter. "
            "Pass a `peft_config`, or use reference='model' or 'precomputed'."
        )
    obstacle = lora_products.mixing_obstacle(policy) if options.motion == "soft" and is_adapted(policy) else None
    if options.way == "model" and (moves or not is_ahead):
        return "model"
    if options.way == "auto" and (obstacle or not (is_ahead or is_adapted(policy))):
        return "model"
    if options.way not in ("auto", "model", "adapter", "precomputed"):
        name = options.way
    else:
        name = "adapter" if is_adapted(policy) and not moves else "snapshot"
    if obstacle:
        raise ValueError(
            f"sync_ref_model=True was asked for with reference={options.way!r} and ref_model_mixup_alpha="
            f"{options.mixup_alpha}, but inside the policy there is no exact mix of two such adapters: {obstacle}. Use "
            "reference='model', whose weights move merged, or ref_model_mixup_alpha=1."
        )
    return name


# --- one reference, or several ----------------------------------------------------------------------------------------


def _one(options: ReferenceOptions, policy: nn.Module, ref_model: nn.Module | None, autocast: Autocast) -> Roles:
    """One reference: the model that the user chose, an adapter of the policy, or the policy as it starts to train."""
    if ref_model is not None:
        return _of_model(options, policy, ref_model, autocast)
    if options.adapter is not None:
        peft_policy = check_other_adapter(policy, options.adapter)
        return Roles(scorer=OtherAdapterReference(peft_policy, autocast, options.adapter))
    return WAYS[_way_of_policy(options, policy)](options, policy, autocast)


def _of_model(options: ReferenceOptions, policy: nn.Module, ref_model: nn.Module, autocast: Autocast) -> Roles:
    """The reference that is a module which the user chose."""
    if options.way in WAYS.keys() - {"model"} or options.adapter is not None:
        option = (
            f"ref_adapter_name={options.adapter!r}" if options.adapter is not None else f"reference={options.way!r}"
        )
        raise ValueError(
            f"{option} was asked for together with a `ref_model`: the first is inside the policy, the second is "
            "another model. Drop one of them."
        )
    check_ref_model(policy, ref_model)
    if options.motion == "fixed":
        return Roles(scorer=ModelReference(freeze(ref_model), autocast, origin=_ORIGIN))
    model = MovingModel.of_model(ref_model, autocast, origin=_ORIGIN, policy=policy)
    return Roles(scorer=model, moving=model)


_ORIGIN = "the given ref_model"


def _several(
    options: ReferenceOptions, policy: nn.Module, ref_models: Sequence[nn.Module | None], autocast: Autocast
) -> tuple[Roles, list[Scorer]]:
    """The one reference, or the mixture of several, and its scorers. Where the policy is one of several, `options.way`
    is the way to hold the policy."""
    if len(ref_models) == 1:
        roles = _one(options, policy, ref_models[0], autocast)
        return roles, [roles.scorer]
    others = replace(options, way="model") if None in ref_models else options
    each = [_one(options if module is None else others, policy, module, autocast) for module in ref_models]
    late_copy = next((roles.late_copy for roles in each if roles.late_copy is not None), None)
    scorers = [roles.scorer for roles in each]
    mixture = MixtureReference(scorers, mixture_shares(options.shares, len(scorers)))
    return Roles(scorer=mixture, late_copy=late_copy), scorers


def _offloaded(options: ReferenceOptions, autocast: Autocast, scorers: list[Scorer]) -> Scorer | None:
    """The scorers that remain once whole datasets are scored. They have no module in memory: weights wait in a file.
    None where a module is quantised, since a file would lack its quantisation state."""
    remaining: list[Scorer] = []
    for number, scorer in enumerate(scorers):
        module = scorer.module
        if module is None:
            remaining.append(scorer)
        elif is_quantised(module):
            return None
        else:
            name = f"parked-{number}.safetensors"
            offloaded = OffloadedReference.offload(module, autocast, folder=options.folder, name=name, origin=_ORIGIN)
            remaining.append(offloaded)
    if len(remaining) == 1:
        return remaining[0]
    return MixtureReference(remaining, mixture_shares(options.shares, len(remaining)))


# --- the reference ----------------------------------------------------------------------------------------------------


def build_reference(
    options: ReferenceOptions,
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

    `ref_models` are the modules that the user chose, each on its device already; None stands for the policy itself, and
    several are mixed. `layout` names the layout of rows when the store is opened. `is_main`, `is_quiet` and
    `wait_for_all` are those of `PrecomputedReference`. ValueError where the options contradict the models.
    """
    if options.way == "none":
        if any(ref_model is not None for ref_model in ref_models):
            raise ValueError(
                "A `ref_model` was given together with reference='none', so it would be ignored. Drop `ref_model`, or "
                "leave `reference` at 'auto': beside losses that compare with no reference it is kept for the metrics."
            )
        return None
    options = replace(options, is_ahead=options.is_ahead or options.way == "precomputed")
    in_lockstep = any(is_sharded(module) for module in (policy, *ref_models) if module is not None)
    roles, scorers = _several(options, policy, ref_models, autocast)
    window = _window(options, roles.scorer)
    if not options.is_ahead:
        return Reference(roles, window=window, in_lockstep=in_lockstep)

    def open_store(identity: Identity, version: int | None) -> LogpStore:
        device = next(policy.parameters()).device
        rounding = numerics(identity, device=device, mixed_precision=mixed_precision, layout=layout())
        return LogpStore.open(options.store or default_root(), store_key(identity, rounding, version))

    stored = PrecomputedReference(
        open_store,
        keeps_versions=options.keeps_versions,
        is_quiet=is_quiet,
        is_main=is_main,
        wait_for_all=wait_for_all,
        in_lockstep=in_lockstep,
    )
    scores_datasets = options.motion == "fixed" and options.window is None
    offload = partial(_offloaded, options, autocast, scorers) if scores_datasets else None
    is_whole = scores_datasets and not options.is_stream
    window = None if is_whole else window
    return Reference(roles, stored=stored, window=window, offload=offload, in_lockstep=in_lockstep)


def _window(options: ReferenceOptions, scorer: Scorer) -> Window | None:
    """The window, where a run asks for one or where it saves exchanges of weights; else None."""
    steps = options.window
    if steps is None:
        if not (options.is_ahead or scorer.is_off_device):
            return None
        # After a hard sync the policy is the reference, so it can score every step up to the next sync itself.
        steps = options.sync_steps if options.is_ahead or options.motion == "hard" else None
    return None if steps == 1 else Window(steps=steps, sync_steps=options.sync_steps)


def check_ref_model(policy: nn.Module, ref_model: nn.Module) -> None:
    """ValueError where `ref_model` shares trainable weights with the policy or has another vocabulary."""
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
