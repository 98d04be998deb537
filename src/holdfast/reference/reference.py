"""The reference that the trainer holds: it asks its sources in turn, then its scorer.

A source may know a batch's log-probs already: the batch carries them, the user gave them, or they are stored. A scorer
computes them. `reference.build` decides once which scorer and sources there are, and whether there is a window or a
motion. No other module asks how the reference is held.
"""

import contextlib
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol, final

import torch
from torch import Tensor, nn

from holdfast.agreement import any_of_all, largest_of_all, raised_together
from holdfast.batch import PairBatch, SequenceLogps
from holdfast.data.completions import CompletionsToScore
from holdfast.reference.base import LateCopy, Moving, Scorer, Share
from holdfast.reference.identity.identity import Identity
from holdfast.reference.sources.stored import PrecomputedReference
from holdfast.reference.sources.user_logps import UserLogps
from holdfast.reference.sources.window import Window

PER_BATCH, AHEAD = "asked per batch", "asked ahead"


class Source(Protocol):
    """An object that may know a batch's log-probs already."""

    kind: ClassVar[str]
    """The name of a reference with this source in a checkpoint's manifest."""

    def find(self, batch: PairBatch) -> SequenceLogps | None:
        """The batch's log-probs; None where the source lacks some of them."""
        ...


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Roles:
    """The roles that one reference has: a scorer always, and motion or a late copy where it can do that as well."""

    scorer: Scorer
    moving: Moving | None = None
    late_copy: LateCopy | None = None


@final
class Reference:
    """pi_ref: the anchor that the policy is compared with.

    `stored` holds log-probs that are computed ahead, and `window` says how many steps are scored together. Where
    `offload` is given, whole datasets are scored in `prepare`, and `offload()` then makes the scorer that takes the
    place of the first (None for no scorer). Without `offload`, a batch is scored when it is asked about.

    `in_lockstep` says that all processes make every forward pass together, since weights are spread over them. Then all
    ask about their batches together too, and where one process must score its batch, all score theirs.
    """

    def __init__(
        self,
        roles: Roles,
        *,
        stored: PrecomputedReference | None = None,
        window: Window | None = None,
        offload: Callable[[], Scorer | None] | None = None,
        in_lockstep: bool = False,
    ) -> None:
        self.in_lockstep = in_lockstep
        self.scorer: Scorer | None = roles.scorer
        self.stored = stored
        self.window = window
        self.user_logps: UserLogps | None = None
        self._moving = roles.moving
        self._late_copy = roles.late_copy
        self._scores_datasets = offload is not None
        self._offload = offload
        self._last_description = ""
        self._open_contexts: contextlib.ExitStack | None = None
        self.while_scoring_datasets: Callable[[], contextlib.AbstractContextManager[None]] = contextlib.nullcontext
        """Makes a context in which whole datasets are scored."""
        self.before_offload: Callable[[], object] = lambda: None
        """What is done with the scorer before it is let go or put away."""

    # --- log-probs --------------------------------------------------------------------------------------------------

    @property
    def sources(self) -> list[Source]:
        """The sources, in the order in which they are asked."""
        return [source for source in (self.window, self.user_logps, self.stored) if source is not None]

    def logps(self, batch: PairBatch) -> SequenceLogps:
        """`log pi_ref` (nats, fp32) of the batch's completion tokens; no gradients, eval mode, no dropout.

        Where the user gave log-probs, only sums over completions are meaningful. ValueError where no source has the
        log-probs and there is no scorer any more.
        """
        return self._find_or_score(self.sources, batch)

    def computed_logps(self, batch: PairBatch) -> SequenceLogps:
        """The same without log-probs that the user gave, so that each token's value is meaningful."""
        return self._find_or_score([source for source in self.sources if source is not self.user_logps], batch)

    def score_window(self, batches: Iterable[PairBatch], num_steps: float) -> list[Tensor]:
        """The log-probs per token `[N]` of each batch of `num_steps` optimizer steps. The weights are put in place
        once. Where the window's length is to be measured, the times that this took set it."""
        assert self.window is not None
        begin = time.perf_counter()
        with self.many_batches():
            _wait_for_device(self.window.is_measured)
            entered = time.perf_counter()
            per_token = [self.computed_logps(batch).per_token for batch in batches]
            _wait_for_device(self.window.is_measured)
        if self.window.is_measured:
            step_seconds = (time.perf_counter() - entered) / num_steps
            seconds = [entered - begin, step_seconds]
            exchange_seconds, step_seconds = largest_of_all(seconds) if self.in_lockstep else seconds
            self.window.measure(exchange_seconds=exchange_seconds, step_seconds=step_seconds)
        return per_token

    @contextlib.contextmanager
    def many_batches(self) -> Iterator[None]:
        """A context within which many batches are asked about, so that weights are put in place once. Where log-probs
        are stored, weights are put in place for the first batch that is not stored."""
        if self._open_contexts is not None:
            yield
            return
        with contextlib.ExitStack() as self._open_contexts:
            if self.stored is None and self.scorer is not None:
                self._open_contexts.enter_context(self.scorer.in_place())
            try:
                yield
            finally:
                self._open_contexts = None

    def _find_or_score(self, sources: Sequence[Source], batch: PairBatch) -> SequenceLogps:
        found = next((logps for source in sources if (logps := source.find(batch)) is not None), None)
        if not self._is_missed(batch, is_missed=found is None):
            assert found is not None
            return found
        logps = self._score(batch)
        if self.stored is not None:
            logps = self.stored.add(batch, logps, self._describe_scorer(PER_BATCH))
        return logps if found is None else found

    def _is_missed(self, batch: PairBatch, *, is_missed: bool) -> bool:
        """Whether batches are scored. In lockstep, that is where any process misses its batch; the batches of a window
        carry their log-probs on all processes or on none."""
        if not self.in_lockstep or batch.reference_logps is not None or (self.stored or self.user_logps) is None:
            return is_missed
        return any_of_all(is_missed)

    def _score(self, batch: PairBatch) -> SequenceLogps:
        if self.scorer is None:
            raise ValueError(
                "Log-probs of completions that were not precomputed were asked for, and the reference "
                f"({self._last_description}) is no longer in memory. Hand every dataset to the trainer when it is made "
                "(`eval_dataset` may be a dict of several), or use reference='model'."
            )
        if self._open_contexts is not None:
            self._open_contexts.enter_context(self.scorer.in_place())
        return self.scorer.logps(batch)

    # --- ahead of training ------------------------------------------------------------------------------------------

    @property
    def is_precomputed(self) -> bool:
        """Whether whole datasets are stored, so that batches find their log-probs there."""
        return self.stored is not None and self.window is None

    def prepare(self, datasets: Mapping[str, CompletionsToScore]) -> None:
        """Announces datasets that will be asked about. Where whole datasets are scored ahead, it scores them, and the
        scorer's memory is freed. Log-probs that the user gave are accepted once a sample of them was found right.

        ValueError where the user's log-probs are not what the reference gives, where a log-prob is not finite, or where
        the store cannot be written.
        """
        samples = self.user_logps.samples(datasets) if self.user_logps is not None else {}
        if self.stored is not None:
            self._store(self.stored, {**datasets, **samples})
        for name, sample in samples.items():
            assert self.user_logps is not None
            with raised_together(where=self.in_lockstep):
                self.user_logps.accept(name, sample, self.computed_logps, self._describe_computed())

    def _store(self, stored: PrecomputedReference, datasets: Mapping[str, CompletionsToScore]) -> None:
        if not stored.is_open:
            self._open(stored)
        stored.flush()
        if not self._scores_datasets:
            return
        with self.while_scoring_datasets(), self.many_batches():
            for name, data in datasets.items():
                stored.fill(name, data, self._score, self._describe_scorer(PER_BATCH))
        if self._offload is not None:
            self._last_description = self._describe_scorer(AHEAD)
            self.before_offload()
            self.scorer, self._offload = self._offload(), None

    def fill(self, datasets: Mapping[str, CompletionsToScore], *, whose: str = "Reference") -> None:
        """Scores all completions of these datasets now, where the run would ask for them later, and all of their pairs'
        products of hidden states. What is stored already is not scored. Log-probs must be stored, and the reference
        fixed. Messages say `whose` log-probs they are. ValueError as for `prepare`."""
        assert self.stored is not None and self._moving is None  # noqa: PT018
        if not self.stored.is_open:
            self._open(self.stored)
        with self.while_scoring_datasets(), self.many_batches():
            for name, data in datasets.items():
                if not self.stored.holds(data):
                    self.stored.fill(name, data, self._score, self._describe_scorer(PER_BATCH), whose)
                if self.scorer is not None and self.scorer.sums_states:
                    self.stored.fill_pairs(name, data, self._score)

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
        """Must be called before training changes the policy. Afterwards the policy's values are not the reference's."""
        if self._late_copy is not None:
            self._late_copy.before_policy_changes()

    def sync(self, mixup_alpha: float) -> None:
        """Moves the reference (see `Moving.sync`) and opens the store of its new version. ValueError where the
        reference is fixed."""
        if self._moving is None:
            raise ValueError(
                f"A sync (alpha {mixup_alpha}) was asked of a reference that stays as it is: {self.describe()}. Set "
                "sync_ref_model=True when the trainer is made; a mixture, or log-probs that came with the data, have "
                "no weights to move."
            )
        self._moving.sync(mixup_alpha)
        if self.stored is not None:
            self.stored.close_version()
            self._open(self.stored)

    def state_dict(self) -> dict[str, Tensor]:
        """The tensors that a checkpoint must hold (law L5). They are none for a fixed reference, which a resumed run
        makes again. New log-probs are written to the store, so that a resumed run finds the same numbers."""
        if self.stored is not None:
            self.stored.flush()
        return {} if self._moving is None else self._moving.state_dict()

    def parts(self) -> dict[str, Tensor]:
        """The tensors of `state_dict`, of each this process's part (see `Moving.parts`)."""
        return {} if self._moving is None else self._moving.parts()

    def load_state_dict(self, state: Mapping[str, Tensor], version: int, drift: float) -> None:
        """Restores the reference after `version` syncs, bit for bit. The last sync moved it by `drift`."""
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
        """Its name in a checkpoint's manifest: that of the user's log-probs, of another source, or of the scorer."""
        first: Source | Scorer | None = self.user_logps or next(iter(self.sources), None) or self.scorer
        assert first is not None
        return first.kind

    @property
    def module(self) -> nn.Module | None:
        """The reference's own module; None where it has none, or gives it up after scoring ahead."""
        return None if self.stored is not None or self.scorer is None else self.scorer.module

    def fixed_modules(self) -> list[nn.Module]:
        """The modules of its own that a reference computes with and never changes."""
        if self.scorer is None or self._moving is not None:
            return []
        return [part.module for part in (self.scorer, *self.scorer.parts) if part.module is not None]

    @contextlib.contextmanager
    def null_ref_context(self) -> Iterator[None]:
        """A context in which the policy's module computes as the reference, for a reference inside the policy."""
        with contextlib.nullcontext() if self.scorer is None else self.scorer.in_place(), torch.no_grad():
            yield

    @contextlib.contextmanager
    def computing(self) -> Iterator[Sequence[Share]]:
        """A context with the models that compute as the reference is now, each with its share in a mixture. There are
        none where it was let go."""
        if self.scorer is None:
            yield []
            return
        with self.scorer.in_place():
            yield self.scorer.models()

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """The tensors that the reference has in memory on top of the policy (see `Scorer.tensors`)."""
        if self.scorer is not None:
            yield from self.scorer.tensors()

    def identity(self) -> Identity:
        """Everything that the log-probs depend on beside the token ids. Where log-probs are stored, it is the identity
        from when the first store was opened. Else it must be read before training changes the policy."""
        if self.stored is not None:
            return self.stored.identity
        assert self.scorer is not None
        return self.scorer.identity()

    def fingerprint(self) -> str:
        """Digest of all weights that the log-probs depend on."""
        return self.identity().weights_digest

    def describe(self) -> str:
        """One line: which reference it is, where it is held, when it is asked, and whether it moves."""
        text = self._describe_computed()
        return text if self.user_logps is None else self.user_logps.describe(text)

    def _describe_computed(self) -> str:
        """The same without the user's log-probs."""
        if self.stored is None:
            return self._describe_scorer(PER_BATCH if self.window is None else self.window.describe())
        scorer = self._describe_scorer(AHEAD if self.window is None else self.window.describe())
        where = f" in {self.stored.store.folder}" if self.stored.is_open else ""
        return f"{scorer}; its log-probs stored{where}"

    def _describe_scorer(self, when: str) -> str:
        return self._last_description if self.scorer is None else self.scorer.describe(when)


def _wait_for_device(is_measured: bool) -> None:
    if is_measured and torch.cuda.is_available():
        torch.cuda.synchronize()
