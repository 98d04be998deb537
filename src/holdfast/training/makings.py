"""What the models of a run are made from, so that they can be made again: `model_init` gives each run a fresh policy.

Each trial of a hyperparameter search trains a policy of its own, and its reference is that policy as it starts, with
the options of the trial. A model that was handed over is not loaded again, so it must not have moved. Given up: holding
a reference model for trials where no `model_init` was passed to the trainer, since it may be let go.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, final

from peft import PeftConfig
from torch import nn

from holdfast.config import DPOConfig
from holdfast.policy.prepare import make_policy
from holdfast.reference.load import RefModel, ref_model_entries
from holdfast.reference.reference import Reference
from holdfast.scoring.causal_lm import unwrap

ModelInit = Callable[..., nn.Module]
"""Returns a fresh model; may take the trial of a hyperparameter search."""


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Makings:
    """`ref_model` as the user named it, but for modules, which are kept only where `keeps_modules`."""

    ref_model: RefModel | Sequence[RefModel]
    quantization_config: Any
    peft_config: PeftConfig | None
    has_own_collator: bool
    keeps_modules: bool

    @classmethod
    def of(
        cls,
        ref_model: RefModel | Sequence[RefModel],
        quantization_config: Any,
        peft_config: PeftConfig | None,
        data_collator: Any,
        model_init: ModelInit | None,
    ) -> "Makings":
        """The makings of a run with these arguments of the trainer."""
        keeps_modules = model_init is not None or not _has_module(ref_model)
        return cls(
            ref_model=ref_model if keeps_modules else None,
            quantization_config=quantization_config,
            peft_config=peft_config,
            has_own_collator=data_collator is not None,
            keeps_modules=keeps_modules,
        )

    def policy(self, model: str | nn.Module, args: DPOConfig, *, before: nn.Module | None = None) -> nn.Module:
        """The policy ready to train, of a model or its path. ValueError where it is that of the run `before`."""
        if before is not None and isinstance(model, nn.Module) and unwrap(model) is unwrap(before):
            raise ValueError(
                "`model_init` returned the model that was trained already, so the run would start where that one "
                "ended, and its reference with it. Load or make the model inside of `model_init`."
            )
        return make_policy(model, args, self.quantization_config, self.peft_config)

    def ref_model_again(self, reference: Reference | None, args: DPOConfig) -> RefModel | Sequence[RefModel]:
        """The `ref_model` for another run. ValueError where a module has moved or is no longer held."""
        if self.keeps_modules and not (args.sync_ref_model and _has_module(self.ref_model)):
            return self.ref_model
        held = reference.module if reference is not None else None
        if held is None or (reference is not None and reference.version > 0):
            raise ValueError(
                "`model_init` was to make another run's policy, but the `ref_model` that was handed over as a module "
                f"{'has moved' if held is not None else 'was let go'} in the run before. Pass its path, from which "
                "each run loads it."
            )
        return held


def check_model(model: Any, model_init: ModelInit | None, optimizers: tuple[Any, Any] = (None, None)) -> None:
    """ValueError where a trainer has no model, or two sources of one, or an optimizer of tensors that it replaces."""
    if model is None and model_init is None:
        raise ValueError(
            "`model` is None, so there is nothing to train. Pass a causal language model, a PEFT model, the path or "
            "hub id of one, or a `model_init` that returns one."
        )
    if model is not None and model_init is not None:
        raise ValueError(
            "`model` and `model_init` were both given, and each run would train what `model_init` returns. Pass one "
            "of them."
        )
    if model_init is not None and any(part is not None for part in optimizers):
        raise ValueError(
            "`optimizers` were given together with `model_init`, whose models have other tensors. Set `optim` and "
            "lr_scheduler_type, or override `create_optimizer`."
        )


def _has_module(ref_model: RefModel | Sequence[RefModel]) -> bool:
    return any(isinstance(entry, nn.Module) for entry in ref_model_entries(ref_model))
