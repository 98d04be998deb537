"""The reference models that a user chose: checked before anything is loaded, then loaded.

All checks come first, since loading a model takes minutes. Given up: options per model; `ref_model_init_kwargs` are for
each path."""

import os
from collections.abc import Sequence
from typing import Any, Protocol, cast

from torch import nn

from holdfast.losses import LossOptions
from holdfast.policy.divided import check_undivided
from holdfast.policy.load import PolicyOptions, init_mapping, load_model
from holdfast.reference.scorers.mixture import check_mixture, mixture_shares

RefModel = str | os.PathLike[str] | nn.Module | None
"""A reference as a user names it: a module, a path or hub id, or None for the policy as it starts to train."""


class RefModelOptions(PolicyOptions, Protocol):
    """The options of a run (`DPOConfig`) that concern reference models."""

    ref_model_init_kwargs: dict[str, Any] | str | None
    ref_model_weights: list[float] | None
    ld_alpha: float | None
    sync_ref_model: bool
    output_dir: str | None

    @property
    def loss_types(self) -> list[str]:
        """The losses by name."""
        ...

    @property
    def loss_options(self) -> LossOptions:
        """The options that the losses read."""
        ...


def ref_model_entries(ref_model: RefModel | Sequence[RefModel]) -> list[RefModel]:
    """The references as a list; `[None]` where the user names none."""
    return list(ref_model) if isinstance(ref_model, list | tuple) else [cast(RefModel, ref_model)]


def check_ref_models(ref_model: RefModel | Sequence[RefModel], args: RefModelOptions) -> None:
    """ValueError or TypeError where a run of `args` cannot have these references. Nothing is loaded."""
    entries = ref_model_entries(ref_model)
    for entry in entries:
        if not isinstance(entry, str | os.PathLike | nn.Module | None):
            raise TypeError(
                f"`ref_model` is or holds a {type(entry).__name__}; pass a model, its path or hub id, None for the "
                "policy as it starts to train, or a list of these."
            )
    if not entries or sum(entry is None for entry in entries) > 1:
        raise ValueError(
            f"`ref_model` is a list of {len(entries)} references, {sum(entry is None for entry in entries)} of them "
            "None. Name at least one reference, and None (the policy as it starts to train) once, with the weight that "
            "it shall have."
        )
    if args.ref_model_init_kwargs is not None and not any(isinstance(entry, str | os.PathLike) for entry in entries):
        kinds = ", ".join(type(entry).__name__ for entry in entries)
        raise ValueError(
            f"`ref_model_init_kwargs` says how to load a reference, but `ref_model` is {kinds}, not a path, so it "
            "would be ignored. Pass a path, or drop it."
        )
    if args.ref_model_weights is not None and not isinstance(ref_model, list | tuple):
        raise ValueError(
            f"ref_model_weights={args.ref_model_weights} was asked for, but `ref_model` is one "
            f"{type(ref_model).__name__}, so there is nothing to weight. Pass a list of references, or drop it."
        )
    _check_not_overwritten(entries, args.output_dir)
    mixture_shares(args.ref_model_weights, len(entries))
    if len(entries) == 1:
        return
    check_mixture(args.loss_types, args.loss_options, args.ld_alpha)
    if args.sync_ref_model:
        raise ValueError(
            f"sync_ref_model=True was asked for with {len(entries)} references, which are mixed by their log-probs: "
            "there are no weights to mix with the policy's. Use a single `ref_model`, or sync_ref_model=False."
        )


def _check_not_overwritten(entries: Sequence[RefModel], output_dir: str | None) -> None:
    """ValueError where the run would write its policy over a reference."""
    for entry in entries:
        if output_dir is None or not isinstance(entry, str | os.PathLike) or not os.path.isdir(entry):
            continue
        if os.path.realpath(entry) == os.path.realpath(output_dir):
            raise ValueError(
                f"the reference is the model in {os.fspath(entry)!r}, which is also the output_dir: the trained policy "
                "would replace it, and no later run could be compared with it. Name another output_dir."
            )


def load_ref_models(ref_model: RefModel | Sequence[RefModel], args: RefModelOptions) -> list[nn.Module | None]:
    """The reference modules that a user chose. Each path or hub id is loaded with `ref_model_init_kwargs`. None stands
    for the policy as it starts to train. ValueError where one is divided among processes."""
    modules = [_load_ref_model(entry, args) for entry in ref_model_entries(ref_model)]
    for module in filter(None, modules):
        check_undivided(module, "ref_model")
    return modules


def _load_ref_model(ref_model: RefModel, args: RefModelOptions) -> nn.Module | None:
    if ref_model is None or isinstance(ref_model, nn.Module):
        return ref_model
    path = os.fspath(ref_model)
    init_kwargs = args.ref_model_init_kwargs
    if init_kwargs is None:  # the policy's, without those that belong to the policy's path
        policy_kwargs = init_mapping(args.model_init_kwargs, path)
        init_kwargs = {name: value for name, value in policy_kwargs.items() if name not in ("revision", "subfolder")}
    module: Any = load_model(path, init_kwargs, args=args, is_trainable=False)
    if init_mapping(init_kwargs, path).get("device_map") is not None and not getattr(module, "hf_device_map", None):
        # transformers records a map of several devices only. Without a record, `move_to_device` would move the model.
        module.hf_device_map = {"": str(next(module.parameters()).device)}
    return module
