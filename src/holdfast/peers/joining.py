"""How a process joins the others of its run, when its options are made.

transformers makes the process group as soon as it asks for the device. On a CPU it leaves `ddp_timeout` out, so the
group is made here first; what transformers does then is the same as in a script that has made it.
"""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, Protocol

from holdfast.peers import own_watch
from holdfast.peers.phase import doing

logger = logging.getLogger(__name__)

MEETING_SECONDS = 10.0


class JoiningOptions(Protocol):
    """The options that joining reads."""

    use_cpu: bool
    ddp_backend: str | None
    ddp_timeout: int
    accelerator_config: Any
    peer_timeout: float


@contextmanager
def joining(options: JoiningOptions) -> Iterator[None]:
    """A context for what makes the group of the run's processes; nothing in a run of one.

    Before it, the process begins to watch the others, and makes the group itself on a CPU, unless there is one. At its
    end it waits a moment until it knows those that it watches."""
    if not _is_one_of_several():
        yield
        return
    _join(options)
    yield
    _meet()


def _join(options: JoiningOptions) -> None:
    own_watch.begin()
    if (own := own_watch.current()) is not None:
        own.limit = float(options.peer_timeout)
    import torch.distributed

    is_on_cpu = options.use_cpu or os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes", "y", "on")
    config: Any = options.accelerator_config
    is_made_by_user = isinstance(config, dict) and config.get("use_configured_state", False)
    if is_on_cpu and not is_made_by_user and not torch.distributed.is_initialized():
        from accelerate import PartialState

        with doing("joining the other processes", waits=True):
            timeout = timedelta(seconds=options.ddp_timeout)
            PartialState(cpu=True, backend=options.ddp_backend, timeout=timeout)


def _meet() -> None:
    """Waits a moment until this process and those that it watches know each other, once all have joined. A warning
    names those that it cannot reach: their end is then noticed by others, or by `ddp_timeout`."""
    import torch.distributed

    own = own_watch.current()
    if own is None or not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return
    if missing := own.meet(MEETING_SECONDS):
        logger.warning(
            "Rank %d cannot reach the ranks %s on their own ports, so it will not notice when they end. A firewall may "
            "be between them.", own.rank, missing,
        )  # fmt: skip


def _is_one_of_several() -> bool:
    text = os.environ.get("WORLD_SIZE", "1")
    return text.isdecimal() and int(text) > 1
