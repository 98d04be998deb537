"""How a run goes on, as a person sees it: a bar with what is left and how fast, and a line for each log.

In place of transformers' own bar, which prints each log as a dict of two dozen numbers. A line has those that a person
watches, and all that this package does not know; every number is in the run's record, in `log_history` and in trackers.
"""

import os
import re
import sys
import time
from collections.abc import Mapping
from typing import Any, final

from transformers import ProgressCallback

from holdfast.options.metric_names import EVAL_METRICS, LOSS_TERM
from holdfast.progress import Bar, clock, is_terminal, open_bar, time_left, write
from holdfast.visible import visible

_NOT_SHOWN = {
    *EVAL_METRICS, "grad_norm", "learning_rate", "epoch", "total_flos", "step", "num_input_tokens_seen",
    "model_preparation_time",
    "reference/version", "reference/age", "reference/drift",
}  # fmt: skip
_OF_TRAINING = ("loss", "rewards/margins")
_AT_THE_END = ("train_runtime", "train_loss")


@final
class RunProgress(ProgressCallback):
    """Shows the progress of training and of evaluations. It is a `ProgressCallback`, since scripts remove one by that
    name (`trainer.remove_callback(ProgressCallback)`)."""

    training_bar: Bar | None  # pyright: ignore[reportIncompatibleVariableOverride]
    prediction_bar: Bar | None  # pyright: ignore[reportIncompatibleVariableOverride]

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """See `transformers.TrainerCallback`, for this and the other events."""
        if state.is_world_process_zero:
            first = state.global_step
            self.training_bar = open_bar(
                state.max_steps, "training", "steps", is_shown=is_terminal(), done=first
            )  # in a file the lines of the logs say how far it is
        self.current_step = self._first = state.global_step
        self._begin = time.monotonic()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Moves the bar."""
        if self.training_bar is not None:
            self.training_bar.update(state.global_step - self.current_step)
            self.current_step = state.global_step

    def on_prediction_step(
        self, args: Any, state: Any, control: Any, eval_dataloader: Any = None, **kwargs: Any
    ) -> None:
        """Moves the bar of the evaluation."""
        if not state.is_world_process_zero or not _has_length(eval_dataloader):
            return
        if self.prediction_bar is None:
            is_lasting = self.training_bar is None
            self.prediction_bar = open_bar(
                len(eval_dataloader), "evaluating", "batches", is_shown=True, is_lasting=is_lasting
            )
        self.prediction_bar.update(1)

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Ends the bar of the evaluation."""
        if self.prediction_bar is not None:
            self.prediction_bar.close()
            self.prediction_bar = None

    def on_predict(self, args: Any, state: Any, control: Any, metrics: Any = None, **kwargs: Any) -> None:
        """Ends the bar of the predictions."""
        self.on_evaluate(args, state, control)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Prints the line of a log, and says beside the bar how fast it is."""
        if not state.is_world_process_zero or self.training_bar is None or not logs:
            return
        if "speed/pairs_per_second" in logs:
            self.training_bar.note(_speed(logs))
        left = ""
        if not is_terminal() and all(name in logs for name in _OF_TRAINING):
            done = state.global_step - self._first
            left = time_left(time.monotonic() - self._begin, done, state.max_steps - state.global_step)
        write(log_line(logs, state.global_step, state.max_steps, left=left, width=_width()))

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Ends the bar."""
        if self.training_bar is not None:
            self.training_bar.close()
            self.training_bar = None


def log_line(logs: Mapping[str, Any], step: int, max_steps: int, *, left: str = "", width: int | None = None) -> str:
    """One line about a log: the numbers that a person watches, then those that this package does not know. `left` is
    the time left. With `width`, what does not fit is left out."""
    prefix = next((name.removesuffix("loss") for name in logs if re.fullmatch(r"eval_(.*_)?loss", name)), "")
    named = {name.removeprefix(prefix): value for name, value in logs.items() if name.startswith(prefix)}
    if all(name in logs for name in _AT_THE_END):
        fields = [f"trained in {clock(float(logs['train_runtime']))}, mean loss {_number(logs['train_loss'], 4)}"]
    else:
        fields = [*([prefix.rstrip("_")] if prefix else []), *_fields(named), *([f"{left} left"] if left else [])]
    line = f"step {step:>{len(str(max_steps))}}/{max_steps}"
    for field in map(visible, fields):
        if width is not None and len(line) + 2 + len(field) > width:
            break
        line += f"  {field}"
    return line


def _fields(logs: Mapping[str, Any]) -> list[str]:
    """What is said of a log, the most important first."""
    names = {"loss": "loss", "rewards/margins": "margin", "rewards/accuracies": "accuracy"}
    shown = [(name, label) for name, label in names.items() if name in logs]
    fields = [f"{label} {_number(logs[name], 4 if name == 'loss' else 3)}" for name, label in shown]
    if "rewards/chosen" in logs and "rewards/rejected" in logs:
        fields.append(f"rewards {_number(logs['rewards/chosen'])} / {_number(logs['rewards/rejected'])}")
    if "learning_rate" in logs:
        fields.append(f"lr {logs['learning_rate']:.2g}")
    if "speed/pairs_per_second" in logs:
        fields.append(_speed(logs))
    return fields + [f"{name} {_number(value)}" for name, value in logs.items() if _is_unknown(name, value)]


def _is_unknown(name: str, value: Any) -> bool:
    """Whether a number is a user's own."""
    is_known = name in _NOT_SHOWN or name.startswith((LOSS_TERM, "time/", "speed/", "memory/"))
    of_source = any(name.startswith(f"{metric}/") for metric in EVAL_METRICS)
    is_of_training = name.startswith(("train_", "eval_"))
    return isinstance(value, int | float) and not (is_known or of_source or is_of_training)


def _number(value: Any, digits: int = 3) -> str:
    return f"{value:.{digits}g}" if isinstance(value, int | float) else str(value)


def _speed(logs: Mapping[str, Any]) -> str:
    pairs, tokens = logs["speed/pairs_per_second"], logs["speed/tokens_per_second"]
    return f"{pairs:.3g} pairs/s  {tokens:,.0f} tokens/s"


def _has_length(loader: Any) -> bool:
    try:
        return loader is not None and len(loader) >= 0
    except (TypeError, NotImplementedError):
        return False


def _width() -> int | None:
    """The columns of the terminal that lines are printed to; None for a file."""
    try:
        return os.get_terminal_size(1).columns if sys.stdout.isatty() else None
    except (OSError, ValueError, AttributeError):
        return None
