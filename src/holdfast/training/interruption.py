"""How training ends when the process is asked to: after a step, with a complete checkpoint, and never as if finished.

The step under way is finished and logged, then a checkpoint is written: also with `save_strategy="no"`, since the run
would be lost, and with its optimizer in spite of `save_only_model`. The run ends by `Interrupted`, so nothing of what
follows training happens: no best model is loaded, and no checkpoint deleted. An evaluation that is due or under way is
left to the resumed run, which begins with it. So a resumed run logs what an uninterrupted one does. Several processes
agree at the end of each step on whether to end, and by which signal. Given up: the steps before the first one's
beginning, such as loading a checkpoint; there a signal ends the run at once, since nothing is lost.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor
from transformers import TrainerCallback

from holdfast import interruption
from holdfast.checkpoint.manifest import complete_checkpoints, recorded
from holdfast.interruption import SIGNALS, Interrupted, interruption_behind
from holdfast.peers.guard import advise
from holdfast.peers.phase import at_step

NOTICE = "the step is finished and a checkpoint is written, then the run ends. A second signal ends it at once."
PREDICTIONS_BETWEEN = 10
"""While they evaluate, several processes agree once in so many batches."""


@final
class InterruptionCallback(TrainerCallback):
    """Ends the training of `trainer` when the process is asked to end."""

    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer
        self._accelerator = trainer.accelerator
        self._first_step: int | None = None
        self._saved_step: int | None = None
        self._agreed: int | None = None
        self._votes: Tensor | None = None
        self._num_predictions = 0
        self._record: dict[str, Any] = {}
        self._is_at_epoch_end = self._was_at_epoch_end = False
        self._is_evaluating = self._is_within_step = False
        self.is_evaluation_due = False
        """Whether the evaluation of the last step is left to the resumed run."""

    @contextmanager
    def run(self, checkpoint: Path | None, trial: Any) -> Iterator[None]:
        """A context for one run, resumed from `checkpoint` if there is one. An `Interrupted` that leaves it says what
        was done; the checkpoint is written that was still missing."""
        self._first_step = self._saved_step = self._agreed = None
        self._record = recorded(checkpoint)
        self.is_evaluation_due = bool(self._record.get("evaluation_due"))
        self._is_at_epoch_end, self._was_at_epoch_end = False, bool(self._record.get("epoch_end"))
        folder = Path(self._trainer._get_output_dir(trial))
        advise(partial(_advice, folder), is_default=True)
        try:
            interruption.at_once()
            yield
            if self._accelerator.num_processes > 1:  # a signal may have come since the vote of the last step
                self._count(self._vote())
            interruption.check()
            return
        except BaseException as error:
            interrupted = interruption_behind(error) or self._lost_peer(error)
            if interrupted is None:
                raise
            is_between_steps = interrupted is error
        interruption.caught()
        if is_between_steps and self._is_unsaved():  # an error of this save is no part of the interruption
            self._trainer._save_checkpoint(self._trainer.model_wrapped, trial)
            self._saved_step = self._trainer.state.global_step
            self._accelerator.wait_for_everyone()
        self.close_progress()
        self._describe(interrupted, checkpoint, folder)
        raise interrupted

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """A context for an evaluation that belongs to the training, between two steps of it. It may be abandoned."""
        self._is_evaluating = True
        try:
            yield
        finally:
            self._is_evaluating = False

    def record(self) -> dict[str, bool]:
        """What a checkpoint's manifest says: whether its step's evaluation is left to the resumed run, and whether what
        happens at the end of an epoch was done."""
        return {"evaluation_due": self.is_evaluation_due, "epoch_end": self._is_at_epoch_end}

    @property
    def is_ending(self) -> bool:
        """Whether the run ends after this step."""
        return interruption.is_asked() if self._accelerator.num_processes == 1 else self._agreed is not None

    # --- the events of a run ------------------------------------------------------------------------------------------

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Notes where the run begins. See `transformers.TrainerCallback` for this and the other events."""
        self._first_step = self._saved_step = state.global_step
        self._trainer._restore_unlogged(self._record.get("unlogged", []))
        if state.global_step >= state.max_steps:  # no step follows that an evaluation could precede
            self.evaluate_if_due()

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """From now on signals wait for the end of a step."""
        self._is_at_epoch_end = self._was_at_epoch_end = False
        self._is_within_step = True
        at_step(state.global_step + 1)
        interruption.wait(NOTICE)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Several processes vote; the votes are read when the optimizer has stepped."""
        if self._accelerator.num_processes > 1:
            self._votes = self._vote()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Asks for the checkpoint, which is written once the step is logged."""
        self._count(self._votes)
        self._votes, self._is_within_step = None, False
        if self.is_ending and not _ends_epoch(args, state):
            self._end_with_checkpoint(control)

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """As `on_step_end`, where an epoch has logs, evaluations or checkpoints of its own. A stream's pass may end
        within a step, whose gradients no checkpoint holds: then the run goes on to the end of that step."""
        self._is_at_epoch_end = True
        if self._was_at_epoch_end:  # resumed after its last step
            control.should_log = control.should_evaluate = control.should_save = False
        if self.is_ending and not self._is_within_step:
            if self._saved_step == state.global_step and not (control.should_log or control.should_evaluate):
                self._raise()
            self._end_with_checkpoint(control)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Ends the run, now that the checkpoint is complete."""
        self._saved_step = state.global_step
        if self.is_ending and (self._is_at_epoch_end or not _ends_epoch(args, state)):
            self._accelerator.wait_for_everyone()
            self._raise()

    def on_prediction_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Abandons an evaluation that belongs to the training."""
        if not self._is_evaluating:
            return
        self._num_predictions += 1
        if self._accelerator.num_processes > 1 and self._num_predictions % PREDICTIONS_BETWEEN == 0:
            self._count(self._vote())
        if self.is_ending:
            self.is_evaluation_due = True
            self._raise()

    def evaluate_if_due(self) -> None:
        """Makes the evaluation that the interrupted run has left, as that run would have."""
        if self.is_evaluation_due:
            self.is_evaluation_due = False
            self._trainer._evaluate_after_step()

    # --- agreeing, ending and telling ---------------------------------------------------------------------------------

    def _vote(self) -> Tensor:
        """How many processes were asked to end, by each of `SIGNALS`. The device is not waited for."""
        own = [float(number == interruption.asked_signal()) for number in SIGNALS]
        return self._accelerator.reduce(torch.tensor(own, device=self._accelerator.device), reduction="sum")

    def _count(self, votes: Tensor | None) -> None:
        asked = [] if votes is None else [number for number, n in zip(SIGNALS, votes.tolist(), strict=True) if n > 0]
        if asked:
            self._agreed = asked[0]
            interruption.ask(asked[0])

    def _end_with_checkpoint(self, control: Any) -> None:
        self.is_evaluation_due = control.should_evaluate
        control.should_evaluate, control.should_save = False, True

    def _raise(self) -> None:
        interruption.check()
        assert self._agreed is not None
        raise Interrupted(self._agreed)  # in a thread, where nothing is handled

    def _is_unsaved(self) -> bool:
        """Whether steps were made that no checkpoint has, and the policy is still the one that they came to."""
        state, args = self._trainer.state, self._trainer.args
        if self._first_step is None or self._saved_step is None or state.global_step <= self._saved_step:
            return False
        return not (args.load_best_model_at_end and state.global_step >= state.max_steps)

    def _lost_peer(self, error: BaseException) -> Interrupted | None:
        """What an error stands for that came since another process had ended before this one."""
        number = interruption.asked_signal()
        is_consequence = self._accelerator.num_processes > 1 and isinstance(error, RuntimeError)
        return Interrupted(number) if is_consequence and number is not None else None

    def close_progress(self) -> None:
        """Ends the lines of progress bars."""
        for callback in self._trainer.callback_handler.callbacks:
            for name in ("prediction_bar", "training_bar"):
                if getattr(callback, name, None) is not None:
                    getattr(callback, name).close()
                    setattr(callback, name, None)

    def _describe(self, interrupted: Interrupted, resumed: Path | None, folder: Path) -> None:
        state = self._trainer.state
        step, complete = state.global_step, complete_checkpoints(folder)
        own = [path for path in complete if path.name == f"checkpoint-{self._saved_step}"]
        has_trained = self._first_step is not None and step > self._first_step
        if not has_trained:
            kept = "nothing is trained yet." if resumed is None else f"nothing new is trained since {resumed}."
            interrupted.done = f"{interrupted.done} {kept[0].upper()}{kept[1:]}".strip()
        else:
            interrupted.done = f"Step {step} of {state.max_steps} is finished"
            interrupted.done += f", and {own[0]} is complete." if own else "."
            if self.is_evaluation_due:
                interrupted.done += " Its evaluation is left to the resumed run."
        interrupted.checkpoint = next(iter(own), resumed if not has_trained else None)
        if interrupted.checkpoint is None:
            interrupted.advice = "Run it again."
        else:
            is_newest = bool(complete) and complete[-1] == interrupted.checkpoint
            value = True if is_newest else str(interrupted.checkpoint)
            interrupted.advice = f"To go on: trainer.train(resume_from_checkpoint={value!r})"


def _advice(folder: Path) -> str:
    """How a run from Python goes on after one of its processes was lost."""
    complete = complete_checkpoints(folder)
    if not complete:
        return f"There is no complete checkpoint in {folder}: run it again."
    return f"{complete[-1]} is complete. To go on: trainer.train(resume_from_checkpoint=True)"


def _ends_epoch(args: Any, state: Any) -> bool:
    """Whether the last step was an epoch's or the run's last, at whose end something is logged, evaluated or saved."""
    is_last = state.global_step >= state.max_steps or (state.epoch is not None and float(state.epoch).is_integer())
    return is_last and "epoch" in (args.logging_strategy, args.eval_strategy, args.save_strategy)
