"""Private names of accelerate: the optimizers that an accelerator has prepared."""

from accelerate import Accelerator

from holdfast.internals.moved import looked_up


def forget_optimizers(accelerator: Accelerator) -> None:
    """Takes all prepared optimizers from `accelerator`, and leaves its models."""
    looked_up("accelerate", accelerator, "_optimizers").clear()
