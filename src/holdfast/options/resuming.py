"""The option of a run that goes on from a checkpoint of another trainer."""

from dataclasses import dataclass

from holdfast.losses.options import option


@dataclass(kw_only=True)
class ResumeOptions:
    """Options about what is resumed. `DPOConfig` inherits them."""

    adopt_checkpoint: bool = option(
        False,
        "Resume a checkpoint that another trainer wrote, or an earlier version: the reference is captured from "
        "`model`, which must be what that run began with, and is recorded in the checkpoint.",
    )
