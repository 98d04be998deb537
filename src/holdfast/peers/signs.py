"""Signs of life of this process, as seen by a thread of it.

A process lives while it computes: when it, and the processes that it has started, used more than `SHARE` of a core
within the last `WINDOW_SECONDS`, or when its main thread can run, or any of its threads waits for a disk. The thread
that looks does not count. A process that shows none of these signs may still be all right: it may wait for the others,
or for the network. So a look also says whether the main thread sleeps (it called `sleep` or `pause`), or is locked (it
sleeps, or waits for another thread).

Given up: systems without `/proc`. There only the processor time of the process itself is known.
"""

import os
import sys
import threading
import time
from collections import deque
from pathlib import Path
from typing import final

SHARE, WINDOW_SECONDS = 0.02, 5.0
_TICKS = os.sysconf("SC_CLK_TCK") if hasattr(os, "sysconf") else 100

_SLEEPS = {"x86_64": {34, 35, 128, 130, 230}, "aarch64": {101, 115, 133, 137}}
"""Numbers of the system calls nanosleep, clock_nanosleep, pause, rt_sigsuspend and rt_sigtimedwait."""
_LOCKS = {"x86_64": {202}, "aarch64": {98}}
"""Numbers of futex, in which a thread waits for another one."""


@final
class Signs:
    """What was seen of this process. `look` is called about once a second, always by the same thread."""

    def __init__(self) -> None:
        now = time.monotonic()
        self._times: deque[tuple[float, float]] = deque()
        self._alive_at = self._awake_at = self._unlocked_at = now
        self._children, self._seen_of_children, self._children_at = 0.0, 0.0, now
        self._machine = os.uname().machine if hasattr(os, "uname") else ""

    def look(self) -> None:
        """Notes which signs of life there are now."""
        now = time.monotonic()
        if now - self._children_at >= WINDOW_SECONDS / 2:
            seconds = _seconds_of_children()
            self._children += max(0.0, seconds - self._seen_of_children)  # less where one of them has ended
            self._seen_of_children, self._children_at = seconds, now
        used = time.process_time() - time.thread_time() + self._children
        self._times.append((now, used))
        while len(self._times) > 2 and self._times[1][0] <= now - WINDOW_SECONDS:
            self._times.popleft()
        began, before = self._times[0]
        if used - before > SHARE * max(now - began, 1.0) or _is_any_thread_at_work():
            self._alive_at = now
        call = _system_call_of_main_thread()
        is_asleep = call in _SLEEPS.get(self._machine, set())
        if not is_asleep:
            self._awake_at = now
        if not is_asleep and call not in _LOCKS.get(self._machine, set()):
            self._unlocked_at = now

    @property
    def idle(self) -> float:
        """Seconds without a sign of life."""
        return time.monotonic() - self._alive_at

    @property
    def asleep(self) -> float | None:
        """Seconds for which the main thread was asleep at every look; None where that cannot be seen."""
        return None if not self._is_seen() else time.monotonic() - self._awake_at

    @property
    def locked(self) -> float | None:
        """Seconds for which the main thread was asleep or waited for another thread at every look; None as above."""
        return None if not self._is_seen() else time.monotonic() - self._unlocked_at

    def _is_seen(self) -> bool:
        return self._machine in _SLEEPS and _system_call_of_main_thread() is not None

    def place(self) -> str:
        """Where in the code the main thread is: `train.py:12, in on_step_end`."""
        frame = sys._current_frames().get(threading.main_thread().ident or 0)
        if frame is None:
            return ""
        code = frame.f_code
        return f"{os.path.basename(code.co_filename)}:{frame.f_lineno}, in {code.co_name}"


def _system_call_of_main_thread() -> int | None:
    """The number of the system call in which the main thread is; -1 where it is in none, None where unknown."""
    try:
        text = Path(f"/proc/self/task/{threading.main_thread().native_id}/syscall").read_text()
        return -1 if text.startswith("running") else int(text.split()[0])
    except (OSError, ValueError, IndexError):
        return None


def _is_any_thread_at_work() -> bool:
    """Whether the main thread can run, or any thread waits for a disk."""
    try:
        states = {name: state_of(f"self/task/{name}") for name in os.listdir("/proc/self/task")}
    except OSError:
        return False
    return states.get(str(threading.main_thread().native_id)) == "R" or "D" in states.values()


def _seconds_of_children() -> float:
    """Processor time of all processes that this one has started, and that these have started, while they live."""
    parents: dict[int, int] = {}
    seconds: dict[int, float] = {}
    try:
        numbers = [int(name) for name in os.listdir("/proc") if name.isdecimal()]
    except OSError:
        return 0.0
    for number in numbers:
        fields = _fields(str(number))
        if len(fields) > 12:
            parents[number] = int(fields[1])
            seconds[number] = (int(fields[11]) + int(fields[12])) / _TICKS
    own = {os.getpid()}
    while found := {number for number, parent in parents.items() if parent in own} - own:
        own |= found
    return sum(seconds[number] for number in own - {os.getpid()})


def _fields(process: str) -> list[str]:
    """The fields of `/proc/<process>/stat` from the state on; none where there is no such process."""
    try:
        # "number (command) state ..."; a command may itself have brackets and spaces.
        return Path(f"/proc/{process}/stat").read_text(errors="replace").rpartition(")")[2].split()
    except OSError:
        return []


def state_of(process: int | str) -> str:
    """The state of a process or thread of this machine, as the letter that `ps` prints; empty where there is none."""
    return next(iter(_fields(str(process))), "")


def born(process: int | str) -> str:
    """When a process of this machine began, in ticks since the machine did; empty where there is none."""
    fields = _fields(str(process))
    return fields[19] if len(fields) > 19 else ""


def seconds_used(process: int) -> float:
    """Processor time of a process of this machine; 0 where there is none."""
    fields = _fields(str(process))
    return (int(fields[11]) + int(fields[12])) / _TICKS if len(fields) > 12 else 0.0
