"""Private names of accelerate: what an accelerator remembers of models and optimizers that it has prepared."""

from accelerate import Accelerator
from torch import nn

from holdfast.internals.moved import looked_up

_IS_PREPARED = "_is_accelerate_prepared"


def forget_optimizers(accelerator: Accelerator) -> None:
    """Takes all prepared optimizers from `accelerator`, and leaves its models."""
    looked_up("accelerate", accelerator, "_optimizers").clear()


def is_prepared(model: nn.Module) -> bool:
    """Whether accelerate has prepared the model, so that it takes it as it is when it is to prepare it again."""
    return getattr(model, _IS_PREPARED, False)


def forget_preparation(accelerator: Accelerator, model: nn.Module) -> None:
    """Undoes what `prepare_model(model, evaluation_mode=True)` did, so that `prepare` wraps the model for training."""
    accelerator.unwrap_model(model, keep_fp32_wrapper=False)
    setattr(model, _IS_PREPARED, False)
