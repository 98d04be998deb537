"""Where the time of training goes: seconds by part since the last log, on the device where there is one.

A part begins and ends at a border: `with pace.part("reference")`. Parts within parts count for themselves alone. On
CUDA a border is an event in the stream, read at the log, so nothing waits for the device; elsewhere it is the host's
clock. A part of a CUDA device is then the time between its borders there: data that are read while the device still
computes take none. Given up: time on other streams, and work of the device that a border does not see.
"""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, final

import torch

PARTS = ("data", "reference", "policy", "other")
"""The parts of an optimizer step. `data`: waiting for batches; `reference`: its log-probs and syncs; `policy`: forward
and backward passes and the loss; `other`: the optimizer, logs, callbacks."""
ASIDE = ("evaluation", "checkpoint")
"""Parts that are no part of a step: they are left out of times and speeds."""
_REST = "other"
_NUM_WAITING = 512
"""So many events wait to be read before those that have happened are read between logs."""


@final
class Pace:
    """Times the parts of training on this process. It counts nothing before `begin` and after `end`."""

    def __init__(self, device: torch.device) -> None:
        self._has_events = device.type == "cuda"
        self._is_running = False
        self._restart()

    def begin(self, step: int) -> None:
        """Begins to count, at the optimizer step that was finished last."""
        self._is_running = True
        self._restart(step)
        self._border(_REST)

    def end(self) -> None:
        """Stops counting."""
        self._is_running = False

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """A context whose time counts for this part."""
        if not self._is_running:
            yield
            return
        before = self._current
        self._border(name)
        try:
            yield
        finally:
            if self._is_running:
                self._border(before)

    def read(self, step: int, num_pairs: float, num_tokens: float, since_step: int) -> dict[str, float]:
        """What is logged of the steps since the last reading: `time/<part>` in seconds per step, and `speed/*` per
        second. `num_pairs` and `num_tokens` are those of all processes since the step `since_step`, which a resumed run
        has not timed from. Then they begin anew."""
        if not self._is_running or step <= self._step:
            return {}
        self._border(self._current)
        self._fold()
        num_steps = step - self._step
        seconds = sum(self._on_host[name] for name in PARTS)
        of_device = self._on_device if self._has_events else self._on_host
        found = {f"time/{name}": of_device[name] / num_steps for name in PARTS}
        if seconds > 0 and step > since_step:
            share = num_steps / (step - since_step)
            found["speed/pairs_per_second"] = num_pairs * share / seconds
            found["speed/tokens_per_second"] = num_tokens * share / seconds
        waiting, current = self._events, self._current
        self._restart(step)
        self._events, self._current = waiting, current
        return found

    def _restart(self, step: int = 0) -> None:
        self._step = step
        self._current: str = _REST
        self._since = time.perf_counter()
        self._on_host: dict[str, float] = dict.fromkeys((*PARTS, *ASIDE), 0.0)
        self._on_device = dict(self._on_host)
        self._events: list[tuple[str, Any]] = []  # the part that begins at each

    def _border(self, begins: str) -> None:
        """The current part ends here, and another begins."""
        now = time.perf_counter()
        self._on_host[self._current] += now - self._since
        self._since, self._current = now, begins
        if self._has_events:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._events.append((begins, event))
            if len(self._events) > _NUM_WAITING:
                self._fold()

    def _fold(self) -> None:
        """Adds up the time between events that have happened, and forgets them, but for the last."""
        while len(self._events) > 1 and self._events[1][1].query():
            (name, begin), (_, end) = self._events[:2]
            self._on_device[name] += begin.elapsed_time(end) / 1000
            del self._events[0]


def peak_bytes(device: torch.device) -> int | None:
    """The most bytes that this process has held so far: allocated on a CUDA device, else in host memory. None where
    the system does not say."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "win32":
        return None
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
