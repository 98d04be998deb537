"""The error of a process that cannot go on, since another one is lost."""

from typing import final

from holdfast.peers.beat import Verdict


@final
class LostPeerError(RuntimeError):
    """The run ends on this process, since another one is lost: its rank, host and process number, what it was doing,
    and how to go on. `verdict` says which."""

    def __init__(self, line: str, verdict: Verdict) -> None:
        super().__init__(line)
        self.verdict = verdict
