"""The option about the processes of a run, which watch each other (`holdfast.peers`)."""

from dataclasses import dataclass

from holdfast.losses.options import option


@dataclass(kw_only=True)
class ProcessOptions:
    """Options about several processes. `DPOConfig` inherits them."""

    peer_timeout: float = option(
        30.0,
        "In a run of several processes: seconds after which one that is silent, or that only sleeps while the others "
        "wait for it, ends the run on all. 0: only one that has ended does, and `ddp_timeout` ends the rest.",
    )
