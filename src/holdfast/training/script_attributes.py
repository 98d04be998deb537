"""`ScriptableTrainer`: what scripts and subclasses read and set of a trainer beside its methods.

They know the common DPO trainer, which keeps most of its options once more as attributes of its own. Here the options
are in `args` alone. So an attribute of an option reads it there. Set before `super().__init__(...)`, it is an option
like those of `args`. Set later it is an error, except for `beta`, which callbacks schedule. A subclass logs numbers of
its own with `self._metrics["train"][name].append(number)`.

Given up: numbers in `_metrics` that were not logged yet are no part of a checkpoint.
"""

import copy
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import MISSING, fields
from functools import cached_property, partial
from types import MappingProxyType
from typing import Any, ClassVar, final

from accelerate.utils import gather_object
from torch import nn

from holdfast.card import TAGS
from holdfast.config import DPOConfig
from holdfast.policy.adapters import is_adapted
from holdfast.training.never_called import NEVER_CALLED, check_hooks
from holdfast.training.resumable_trainer import ResumableTrainer

_EARLY = "_set_early"
"""Where a trainer keeps what was set before its constructor ran."""
_MADE_LAST = "_interruption"
"""An attribute that `DPOTrainer.__init__` makes at its end."""


@final
class OfOption:
    """An attribute of a trainer that is an option of its `args`."""

    def __init__(
        self, option: str, read: Callable[[DPOConfig], Any] | None = None, *, can_change: bool = False
    ) -> None:
        self.option = option
        self._read = read or (lambda args: getattr(args, option))
        self._can_change = can_change

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    def __get__(self, trainer: Any, owner: type | None = None) -> Any:
        if trainer is None:
            return self
        early = _early(trainer)
        if self._name in early:
            return early[self._name]
        if "args" not in trainer.__dict__:
            raise AttributeError(f"{self._name} is read from `args`, which the trainer has not been given yet")
        return self._read(trainer.args)

    def __set__(self, trainer: Any, value: Any) -> None:
        if _MADE_LAST not in trainer.__dict__:
            trainer.__dict__.setdefault(_EARLY, {})[self._name] = value
        elif self._can_change:
            setattr(trainer.args, self.option, value)
        elif value != self._read(trainer.args):
            raise ValueError(
                f"`trainer.{self._name}` was set once the trainer was made, with "
                f"{self.option}={getattr(trainer.args, self.option)!r}; it would change nothing. Set {self.option} in "
                "DPOConfig."
            )


def _early(trainer: Any) -> dict[str, Any]:
    return trainer.__dict__.get(_EARLY, {})


def _one_or_list(args: DPOConfig) -> str | list[str]:
    names = args.loss_types
    return names[0] if len(names) == 1 else names


def _tokenizer(trainer: Any) -> Any:
    return getattr(trainer.processing_class, "tokenizer", trainer.processing_class)


READABLE: Mapping[str, Callable[[Any], Any]] = MappingProxyType(
    {
        "_tokenizer": _tokenizer,
        "tokenizer": _tokenizer,
        "aux_loss_enabled": lambda trainer: trainer._router_coef != 0,
        "aux_loss_coef": lambda trainer: trainer._router_coef,
        "router_aux_loss_coef": lambda trainer: trainer._router_coef,
        "is_peft_model": lambda trainer: is_adapted(trainer.model),
        "padding_value": lambda trainer: trainer._pad_token_id,
        "pad_token_id": lambda trainer: trainer._pad_token_id,
        "label_pad_token_id": lambda trainer: -100,
        "use_liger_kernel": lambda trainer: False,
        "is_encoder_decoder": lambda trainer: False,
        "is_vision_model": lambda trainer: False,
        "_is_vlm": lambda trainer: False,
        "reference_free": lambda trainer: trainer.reference is None,
        "_stored_metrics": lambda trainer: trainer._metrics,
    }
)
"""Attributes that may be read where the trainer or its subclass has none of that name."""


class ScriptableTrainer(ResumableTrainer):
    """The attributes of a trainer that scripts read and set; see the module."""

    _tag_names: ClassVar[list[str]] = list(TAGS)
    """Tags of the model and its card; a subclass may have its own."""

    beta = OfOption("beta", can_change=True)
    loss_type = OfOption("loss_type", _one_or_list)
    loss_types = OfOption("loss_type", lambda args: args.loss_types)
    loss_weights = OfOption("loss_weights", lambda args: args.loss_weights or [1.0] * len(args.loss_types))
    label_smoothing = OfOption("label_smoothing")
    f_divergence_type = OfOption("f_divergence_type")
    f_alpha_divergence_coef = OfOption("f_alpha_divergence_coef")
    ld_alpha = OfOption("ld_alpha")
    use_weighting = OfOption("use_weighting")
    max_length = OfOption("max_length")
    truncation_mode = OfOption("truncation_mode")
    padding_free = OfOption("padding_free")
    dataset_num_proc = OfOption("dataset_num_proc")
    precompute_ref_log_probs = OfOption("precompute_ref_log_probs")
    precompute_ref_logps = OfOption("precompute_ref_log_probs")
    model_adapter_name = OfOption("model_adapter_name")
    ref_adapter_name = OfOption("ref_adapter_name")

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """`UnknownNameError` where a user's subclass overrides what is never called; see `never_called`."""
        super().__init_subclass__(**kwargs)
        base = next(part for part in cls.__mro__ if part.__module__.startswith("holdfast."))
        if base is not cls:
            check_hooks(cls, base)

    def __getattr__(self, name: str) -> Any:
        if name in READABLE and _MADE_LAST in self.__dict__:
            return READABLE[name](self)
        kind = type(self).__name__
        if name in NEVER_CALLED:
            raise AttributeError(f"{kind} has no method {name!r}; {NEVER_CALLED[name]}.")
        if name in _MADE_HERE and "accelerator" in self.__dict__:
            raise AttributeError(_not_made(kind, f"so it has no {name!r}"))
        raise AttributeError(f"{kind!r} object has no attribute {name!r}")

    @cached_property
    def _metrics(self) -> defaultdict[str, defaultdict[str, list[Any]]]:
        """Numbers of a subclass, to be logged as their means: `train` at the next log, `eval` after an evaluation."""
        return defaultdict(partial(defaultdict, list))

    # --- set before the constructor ran -------------------------------------------------------------------------------

    @property
    def ref_model(self) -> nn.Module | None:
        """The reference's own module where one is held, else None."""
        if "ref_model" in _early(self):
            return _early(self)["ref_model"]
        return self.reference.module if self.reference is not None else None

    @ref_model.setter
    def ref_model(self, value: Any) -> None:
        if _MADE_LAST in self.__dict__:
            if value is not self.ref_model:
                found = "None" if value is None else f"a {type(value).__name__}"
                raise ValueError(
                    f"`trainer.ref_model` was set to {found} once the trainer was made, when its reference was "
                    "captured and its data may have been scored. Pass the model as `ref_model` to DPOTrainer."
                )
        elif "accelerator" in self.__dict__:
            raise TypeError(_not_made(type(self).__name__, "and sets `ref_model`"))
        else:
            self.__dict__.setdefault(_EARLY, {})["ref_model"] = value

    def _early_ref_model(self, ref_model: Any) -> Any:
        """The reference: the argument, or what a subclass has set before. ValueError where both are given."""
        early = _early(self).pop("ref_model", None)
        if early is not None and ref_model is not None and early is not ref_model:
            raise ValueError(
                "`self.ref_model` was set before `super().__init__`, which was given another `ref_model`. Give one of "
                "them."
            )
        return ref_model if early is None else early

    def _early_options(self, args: DPOConfig) -> DPOConfig:
        """`args` with the options that a subclass has set before, checked again. ValueError where `args` say another
        value, which is not the default."""
        early = self.__dict__.pop(_EARLY, {})
        if not early:
            return args
        defaults = {
            field.name: field.default_factory() if field.default_factory is not MISSING else field.default
            for field in fields(args)
        }
        changed = copy.copy(args)
        for name, value in early.items():
            attribute: OfOption = vars(ScriptableTrainer)[name]
            option, found = attribute.option, attribute.__get__(_Holder(args))
            if value == found or value == getattr(args, option):
                continue
            if getattr(args, option) != defaults[option]:
                raise ValueError(
                    f"`self.{name}` was set to {value!r} before `super().__init__`, and DPOConfig has "
                    f"{option}={getattr(args, option)!r}. Keep one of them."
                )
            setattr(changed, option, value)
        changed.check()
        return changed

    # --- numbers of a subclass ----------------------------------------------------------------------------------------

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """See `transformers.Trainer.log`; with the means of the numbers that a subclass has put into `_metrics`."""
        if "loss" in logs or "train_loss" in logs:
            logs = logs | self._own_means("train")
        super().log(logs, *args, **kwargs)

    def evaluation_loop(self, dataloader: Any, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> Any:
        """See `transformers.Trainer.evaluation_loop`; with the means of the numbers in `_metrics`."""
        self._own_means("eval")  # of an evaluation that did not end
        output = super().evaluation_loop(dataloader, *args, metric_key_prefix=metric_key_prefix, **kwargs)
        own = {f"{metric_key_prefix}_{name}": mean for name, mean in self._own_means("eval").items()}
        self._check_numbers(own, "The evaluation")
        output.metrics.update(own)
        return output

    def _own_means(self, mode: str) -> dict[str, float]:
        """The mean of each number since they were last asked for, over all processes in a subclass."""
        numbers: Any = self._metrics.get(mode) or {}
        own = {name: (sum(map(float, values)), len(values)) for name, values in numbers.items() if len(values)}
        numbers.clear()
        parts = [own]
        if self.accelerator.num_processes > 1 and not type(self).__module__.startswith("holdfast."):
            parts = gather_object(parts)
        totals: dict[str, tuple[float, int]] = {}
        for name, (total, count) in (item for part in parts for item in part.items()):
            before, num_before = totals.get(name, (0.0, 0))
            totals[name] = before + total, num_before + count
        return {name: total / count for name, (total, count) in totals.items()}


_MADE_HERE = (
    "_tallies",
    "_preparation",
    "_interruption",
    "_startup",
    "_full_eval",
    "_look_ahead",
    "_rows",
    "_by_source",
    "_watch",
)
"""Attributes that `DPOTrainer.__init__` makes."""


class _Holder:
    """Something that has `args`."""

    def __init__(self, args: DPOConfig) -> None:
        self.args = args


def _not_made(kind: str, what: str) -> str:
    return (
        f"{kind} calls `Trainer.__init__` instead of the constructor of DPOTrainer, {what}: there is no reference, and "
        "the data are not prepared. Call `super().__init__(model=..., ref_model=..., args=..., train_dataset=...)`."
    )
