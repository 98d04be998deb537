"""`WatchedTrainer`: what a run takes its time for, and what is written down of it; see `run_watch`."""

import contextlib
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import nn
from transformers import ProgressCallback

from holdfast.checkpoint.manifest import recorded
from holdfast.metrics import tokens_logged
from holdfast.record import RecordWriter
from holdfast.training.half_weights_trainer import HalfWeightsTrainer
from holdfast.training.progress_callback import RunProgress
from holdfast.training.run_watch import RunWatch
from holdfast.training.startup import Startup

logger = logging.getLogger(__name__)


class WatchedTrainer(HalfWeightsTrainer):
    """Times the parts of a run, and has it watched."""

    _watch: RunWatch
    _startup: Startup
    _is_reference_chosen: bool

    def _begin_watching(self) -> None:
        self._watch = RunWatch(self)
        callbacks = self.callback_handler.callbacks
        callbacks[:] = [RunProgress() if type(each) is ProgressCallback else each for each in callbacks]
        callbacks.insert(0, self._watch)  # before trackers, which log what it adds

    def _reference_digest(self) -> str | None:
        """The digest of the weights that the reference was made from."""
        return None if self._provenance is None else self._provenance.weights

    def _say_reference(self) -> None:
        """Says which reference it is, of a run that does not train; one that does begins with the banner."""
        line = self._startup.introduction
        if line is not None and not self._startup.has_said and self.is_world_process_zero():
            logger.warning(line)  # at the level that shows where nobody has configured logging
        self._startup.has_said = True

    @contextlib.contextmanager
    def _as_reference(self) -> Iterator[None]:
        """A context in which the reference is asked: weights are as in training, and the time is its own."""
        with self._watch.pace.part("reference"), self._full_eval.as_trained():
            yield

    @contextlib.contextmanager
    def _syncing(self) -> Iterator[None]:
        """A context in which the reference moves."""
        with self._watch.pace.part("reference"):
            yield
        self._watch.synced(self.state.global_step)

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """See `transformers.Trainer.train`; the run is watched."""
        trial = kwargs.get("trial", next(iter(args), None))
        self._watch.open(Path(self._get_output_dir(trial)))
        error: BaseException | None = None
        try:
            return super().train(resume_from_checkpoint, *args, **kwargs)
        except BaseException as caught:
            error = caught
            raise
        finally:
            self._interruption.close_progress()
            self._watch.close(error)

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        """See `transformers.Trainer.get_batch_samples`."""
        with self._watch.pace.part("data"):
            return super().get_batch_samples(*args, **kwargs)

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """See `transformers.Trainer.training_step`."""
        with self._watch.pace.part("policy"):
            return super().training_step(*args, **kwargs)

    def evaluate(self, *args: Any, **kwargs: Any) -> Any:
        """See `transformers.Trainer.evaluate`."""
        with self._watch.pace.part("evaluation"):
            return super().evaluate(*args, **kwargs)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        with self._watch.pace.part("checkpoint"):
            super()._save_checkpoint(model, trial)

    def _with_metrics(self, logs: dict[str, float]) -> dict[str, float]:
        before = tokens_logged(self.state.log_history)
        logs = super()._with_metrics(logs)
        self._watch.counted(self._num_pairs_logged, logs.get("num_tokens", before) - before)
        return logs

    def _sample_record(self) -> RecordWriter | None:
        return self._watch.writer

    # --- what a checkpoint says of the record -------------------------------------------------------------------------

    def _run_record(self) -> dict[str, Any]:
        writer = self._watch.writer
        return {**super()._run_record(), **({} if writer is None else {"record": writer.num_lines()})}

    def _record_lines(self, checkpoint: Path) -> Mapping[str, int]:
        """How many lines each file of the record had when the checkpoint was written."""
        found = recorded(checkpoint).get("record")
        return found if isinstance(found, Mapping) else {}
