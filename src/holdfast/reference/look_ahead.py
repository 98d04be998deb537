"""The trainer's batches, read a window ahead and given the reference's log-probs.

This is the trainer's side of a window: how many batches an optimizer step takes, and at which step the run is. The
reference's side is in `sources.window`, and reading ahead in `data.loader.lookahead`. Given up: a window whose batches
would take more than 256 MiB ends early.
"""

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any, final

from accelerate import Accelerator
from transformers import TrainerState, TrainingArguments

from holdfast.batch import PairBatch
from holdfast.data.loader.lookahead import Batch, read_ahead
from holdfast.reference.reference import Reference
from holdfast.reference.sources.window import Window

WAITING_BYTES = 2**28
"""A window ends where its batches take this many bytes."""


@final
class LookAhead:
    """Reads batches ahead for a `reference` that has a window, and scores them within `as_trained()`. For a reference
    without a window, and for none, batches pass unchanged."""

    def __init__(
        self,
        reference: Reference | None,
        accelerator: Accelerator,
        pair_batch: Callable[[Batch], PairBatch],
        args: TrainingArguments,
        as_trained: Callable[[], AbstractContextManager[None]] = contextlib.nullcontext,
    ) -> None:
        self._reference = reference
        self._window: Window | None = None if reference is None else reference.window
        self._accelerator = accelerator
        self._pair_batch = pair_batch
        self._as_trained = as_trained
        self._batches_per_step = args.gradient_accumulation_steps
        self._source: Any = None
        self._ahead: Any = None

    def of_training(self, batches: Iterator[Batch], state: TrainerState) -> Iterator[Batch]:
        """`batches` with log-probs, read a window ahead. The same `batches` give the same iterator again. A window ends
        at a sync and at the end of the run."""
        window = self._window
        if window is None:
            return batches

        def size() -> int:
            steps = min(window.next_steps(state.global_step), state.max_steps - state.global_step)
            return max(1, steps) * self._batches_per_step

        if self._source is not batches:
            self._source = batches
            self._ahead = self._read(batches, size)
        return self._ahead

    def of_evaluation(self, loader: Any) -> Any:
        """The data loader, with batches that have log-probs and are read a window ahead."""
        window = self._window
        if window is None:
            return loader
        return _AheadLoader(
            loader, lambda batches: self._read(batches, lambda: window.num_steps * self._batches_per_step)
        )

    def _read(self, batches: Iterator[Batch], size: Callable[[], int]) -> Iterator[Batch]:
        unit = self._batches_per_step
        assert self._reference is not None
        return read_ahead(
            batches, self._accelerator, size, self._complete, unit=unit, most_bytes=WAITING_BYTES,
            in_lockstep=self._reference.in_lockstep,
        )  # fmt: skip

    def _complete(self, window: list[Batch]) -> None:
        assert self._reference is not None
        with self._as_trained():
            each = self._reference.score_window(map(self._pair_batch, window), len(window) / self._batches_per_step)
        for tensors, logps in zip(window, each, strict=True):
            tensors["reference_logps"] = logps


@final
class _AheadLoader:
    """A data loader whose batches go through `ahead`."""

    def __init__(self, loader: Any, ahead: Callable[[Iterator[Batch]], Iterator[Batch]]) -> None:
        self._loader = loader
        self._ahead = ahead

    def __iter__(self) -> Iterator[Batch]:
        return self._ahead(iter(self._loader))

    def __len__(self) -> int:
        return len(self._loader)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)
