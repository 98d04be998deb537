"""What the trainer holds: the reference, which asks its sources in turn, then its scorer.

A source may know a batch's log-probs already: the batch carries them, the user gave them, or they are stored. The
scorer computes them, in one of the ways of this package. Whether there is a scorer, a source, a window or a motion is
decided once, in `reference.build`; nothing else asks which way it is.
"""

import contextlib
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol, final

import torch
from torch import Tensor, nn

from holdfast.batch import PairBatch, SequenceLogps
from holdfast.data.completions import CompletionsToScore
from holdfast.reference.base import Captured, Moving, Scorer
from holdfast.reference.identity.identity import Identity
from holdfast.reference.sources.stored import PrecomputedReference
from holdfast.reference.sources.user_logps import UserLogps
from holdfast.reference.sources.window import Window

PER_BATCH, AHEAD = "asked per batch", "asked ahead"


class Source(Protocol):
    """What may know a batch's log-probs already."""

    kind: ClassVar[str]
    """What a checkpoint's manifest calls a reference that has this source."""

    def find(self, batch: PairBatch) -> SequenceLogps | None:
        """The batch's log-probs, or None where they are not all known."""
        ...


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Roles:
    """One way to hold a reference, by what it can do: it scores, may move, and may be the policy until that changes."""

    scorer: Scorer
    moving: Moving | None = None
    captured: Captured | None = None


@final
class Reference:
    """pi_ref: the anchor that the policy is compared with.

    `stored` are log-probs that were computed ahead, if any are, and `window` the steps that are scored together.
    `offload` turns the scorer into what is left of it once whole datasets were scored ahead, None for nothing; without
    it, batches are scored when they are asked about.
    """

    def __init__(
        self,
        roles: Roles,
        *,
        stored: PrecomputedReference | None = None,
        window: Window | None = None,
        offload: Callable[[], Scorer | None] | None = None,
    ) -> None:
        self.scorer: Scorer | None = roles.scorer
        self.stored = stored
        self.window = window
        self.user_logps: UserLogps | None = None
        self._moving = roles.moving
        self._captured = roles.captured
        self._scores_datasets = offload is not None
        self._offload = offload
        self._last_description = ""
        self._together: contextlib.ExitStack | None = None

    # --- log-probs --------------------------------------------------------------------------------------------------

    @property
    def sources(self) -> list[Source]:
        """Those that may know log-probs already, in the order in which they are asked."""
        return [source for source in (self.window, self.user_logps, self.stored) if source is not None]

    def logps(self, batch: PairBatch) -> SequenceLogps:
        """`log pi_ref` (nats, fp32) of the batch's completion tokens; no gradients, eval mode, no dropout.

        Of log-probs that the user gave, only the sums over completions are meaningful. ValueError where nobody knows
        the log-probs and the scorer is gone.
        """
        return self._asked(self.sources, batch)

    def computed_logps(self, batch: PairBatch) -> SequenceLogps:
        """The same, but never the user's: meaningful token by token."""
        return self._asked([source for source in self.sources if source is not self.user_logps], batch)

    def score_window(self, batches: Iterable[PairBatch], num_steps: float) -> list[Tensor]:
        """The log-probs of each of the batches of `num_steps` optimizer steps, per token `[N]`. The weights are put in
        place once, and the window learns what that cost."""
        assert self.window is not None
        begin = time.perf_counter()
        with self.many_batches():
            _wait_for_device(self.window.is_measured)
            in_place = time.perf_counter()
            scored = [self.computed_logps(batch).per_token for batch in batches]
            _wait_for_device(self.window.is_measured)
        if self.window.is_measured:
            scoring = (time.perf_counter() - in_place) / num_steps
            self.window.measure(exchange_seconds=in_place - begin, step_seconds=scoring)
        return scored

    @contextlib.contextmanager
    def many_batches(self) -> Iterator[None]:
        """A context within which many batches are asked about, so that weights are put in place once. Where log-probs
        are stored, that waits for the first batch that is not."""
        if self._together is not None:
            yield
            return
        with contextlib.ExitStack() as self._together:
            if self.stored is None and self.scorer is not None:
                self._together.enter_context(self.scorer.in_place())
            try:
                yield
            finally:
                self._together = None

    def _asked(self, sources: Sequence[Source], batch: PairBatch) -> SequenceLogps:
        for source in sources:
            if (found := source.find(batch)) is not None:
                return found
        scored = self._scored(batch)
        return scored if self.stored is None else self.stored.add(batch, scored, self._describe_scorer(PER_BATCH))

    def _scored(self, batch: PairBatch) -> SequenceLogps:
        if self.scorer is None:
            raise ValueError(
                "Log-probs of completions that were not precomputed were asked for, and the reference "
                f"({self._last_description}) is no longer in memory. Hand every dataset to the trainer when it is made "
                "(`eval_dataset` may be a dict of several), or use reference='model'."
            )
        if self._together is not None:
            self._together.enter_context(self.scorer.in_place())
        return self.scorer.logps(batch)

    # --- ahead of training ------------------------------------------------------------------------------------------

    @property
    def is_precomputed(self) -> bool:
        """Whether log-probs are stored, and found there batch by batch."""
        return self.stored is not None and self.window is None

    def prepare(self, datasets: Mapping[str, CompletionsToScore]) -> None:
        """Announces datasets that will be asked about. Log-probs that the user gave are taken over once a sample of
        them was found right. Where whole datasets are scored ahead, that is done here, and the scorer's memory let go.

        ValueError where the user's log-probs are not what the reference gives, where a log-prob is not finite, or where
        the store cannot be written.
        """
        samples = self.user_logps.samples(datasets) if self.user_logps is not None else {}
        if self.stored is not None:
            self._store(self.stored, {**datasets, **samples})
        for name, sample in samples.items():
            assert self.user_logps is not None
            self.user_logps.accept(name, sample, self.computed_logps, self._describe_computed())

    def _store(self, stored: PrecomputedReference, datasets: Mapping[str, CompletionsToScore]) -> None:
        if not stored.is_open:
            self._open(stored)
        stored.flush()
        if not self._scores_datasets:
            return
        with self.many_batches():
            for name, data in datasets.items():
                stored.fill(name, data, self._scored, self._describe_scorer(PER_BATCH))
        if self._offload is not None:
            self._last_description = self._describe_scorer(AHEAD)
            self.scorer, self._offload = self._offload(), None

    def _open(self, stored: PrecomputedReference) -> None:
        assert self.scorer is not None
        stored.open(self.scorer.identity(), None if self._moving is None else self._moving.version)

    # --- motion -----------------------------------------------------------------------------------------------------

    @property
    def version(self) -> int:
        """Number of syncs so far: 0 for a reference that never moved."""
        return 0 if self._moving is None else self._moving.version

    @property
    def drift(self) -> float:
        """L2 norm of the last move in weight space; 0 before the first."""
        return 0.0 if self._moving is None else self._moving.drift

    def before_policy_changes(self) -> None:
        """To be called whenever training is about to change the policy: the last moment to read it as the reference."""
        if self._captured is not None:
            self._captured.before_policy_changes()

    def sync(self, mixup_alpha: float) -> None:
        """Moves the reference (see `Moving.sync`); stored log-probs are those of the new version from then on.
        ValueError where it is fixed."""
        if self._moving is None:
            raise ValueError(
                f"A sync (alpha {mixup_alpha}) was asked of a reference that stays as it is: {self.describe()}. Set "
                "sync_ref_model=True when the trainer is made; a mixture, or log-probs that came with the data, have "
                "no weights to move."
            )
        self._moving.sync(mixup_alpha)
        if self.stored is not None:
            self.stored.leave()
            self._open(self.stored)

    def state_dict(self) -> dict[str, Tensor]:
        """What a checkpoint must hold to bring it back (law L5); empty for a fixed one, which is made again. Log-probs
        that were scored are written, so that a resumed run finds the same numbers."""
        if self.stored is not None:
            self.stored.flush()
        return {} if self._moving is None else self._moving.state_dict()

    def load_state_dict(self, state: Mapping[str, Tensor], version: int, drift: float) -> None:
        """Brings it back to where it was after `version` syncs, the last of length `drift`, bit for bit."""
        if self._moving is None:
            assert not state
            return
        is_other_version = version != self._moving.version
        self._moving.load_state_dict(state, version, drift)
        if self.stored is not None and is_other_version:
            self._open(self.stored)

    # --- what it is -------------------------------------------------------------------------------------------------

    @property
    def kind(self) -> str:
        """What a checkpoint's manifest calls it: by its first source, else by its scorer."""
        first: Source | Scorer | None = self.user_logps or next(iter(self.sources), None) or self.scorer
        assert first is not None
        return first.kind

    @property
    def module(self) -> nn.Module | None:
        """The reference's own module where one is held for good, else None."""
        return None if self.stored is not None or self.scorer is None else self.scorer.module

    @contextlib.contextmanager
    def null_ref_context(self) -> Iterator[None]:
        """A context in which the policy's module computes as the reference, where that is inside the policy."""
        with contextlib.nullcontext() if self.scorer is None else self.scorer.in_place(), torch.no_grad():
            yield

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """The tensors it holds in memory on top of the policy, under the policy's names where it has such."""
        if self.scorer is not None:
            yield from self.scorer.tensors()

    def identity(self) -> Identity:
        """All that its log-probs depend on beside the token ids; of stored ones, as they were first opened. Training
        must not have changed the policy yet."""
        if self.stored is not None:
            return self.stored.identity
        assert self.scorer is not None
        return self.scorer.identity()

    def fingerprint(self) -> str:
        """Digest of all weights that its log-probs depend on."""
        return self.identity().weights_digest

    def describe(self) -> str:
        """What it is, where it is held, when it is asked, and whether it moves, in one line."""
        found = self._describe_computed()
        return found if self.user_logps is None else self.user_logps.describe(found)

    def _describe_computed(self) -> str:
        """The same less what the user gave."""
        if self.stored is None:
            return self._describe_scorer(PER_BATCH if self.window is None else self.window.describe())
        found = self._describe_scorer(AHEAD if self.window is None else self.window.describe())
        where = f" in {self.stored.store.folder}" if self.stored.is_open else ""
        return f"{found}; its log-probs stored{where}"

    def _describe_scorer(self, when: str) -> str:
        return self._last_description if self.scorer is None else self.scorer.describe(when)


def _wait_for_device(is_measured: bool) -> None:
    if is_measured and torch.cuda.is_available():
        torch.cuda.synchronize()
