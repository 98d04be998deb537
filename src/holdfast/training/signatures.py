"""Methods of a subclass that transformers calls in another way than they can be called: all named before a run.

Scripts override methods of `Trainer` with the parameters that an older version had. Python's own error comes at the
first step, from inside of transformers. Given up: methods that are called from one place with nothing.
"""

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, final


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class _Call:
    """How a method is called: the names of what it gets by position, and of what it gets by name."""

    by_position: tuple[str, ...] = ()
    by_name: tuple[str, ...] = ()


_LOOP = ("description", "prediction_loss_only", "ignore_keys", "metric_key_prefix")

CALLS: Mapping[str, _Call] = {
    "compute_loss": _Call(by_position=("model", "inputs"), by_name=("return_outputs", "num_items_in_batch")),
    "training_step": _Call(by_position=("model", "inputs", "num_items_in_batch")),
    "prediction_step": _Call(by_position=("model", "inputs", "prediction_loss_only"), by_name=("ignore_keys",)),
    "evaluation_loop": _Call(by_position=("dataloader",), by_name=_LOOP),
    "evaluate": _Call(by_name=("eval_dataset", "ignore_keys", "metric_key_prefix")),
    "get_train_dataloader": _Call(),
    "get_eval_dataloader": _Call(by_position=("eval_dataset",)),
    "get_batch_samples": _Call(by_position=("epoch_iterator", "num_batches", "device")),
    "create_optimizer": _Call(),
    "create_scheduler": _Call(by_name=("num_training_steps",)),
    "log": _Call(by_position=("logs", "start_time")),
    "save_model": _Call(by_position=("output_dir",), by_name=("_internal_call",)),
    "_get_train_sampler": _Call(by_position=("train_dataset",)),
    "_save_checkpoint": _Call(by_position=("model", "trial")),
}
"""Methods that scripts override, with what they are called with. Each is tried with all of it at once."""


def check_signatures(trainer: Any, own: type) -> None:
    """ValueError where the class of `trainer` overrides methods of `own` so that they cannot be called as they are
    called; all of them are named, each with what it lacks."""
    wrong = [line for name, call in CALLS.items() if (line := _mismatch(trainer, own, name, call)) is not None]
    if wrong:
        raise ValueError(
            f"{type(trainer).__name__} overrides methods that cannot be called as transformers calls them: "
            f"{'; '.join(wrong)}. Take these parameters (or `*args, **kwargs`) and hand them on to `super()`."
        )


def _mismatch(trainer: Any, own: type, name: str, call: _Call) -> str | None:
    if getattr(type(trainer), name, None) is getattr(own, name, None) and name not in vars(trainer):
        return None
    try:
        signature = inspect.signature(getattr(trainer, name))
    except (TypeError, ValueError):  # a callable that has none
        return None
    try:
        signature.bind(*call.by_position, **dict.fromkeys(call.by_name))
    except TypeError as error:
        asked = ", ".join((*call.by_position, *(f"{name}=" for name in call.by_name)))
        return f"{name}{signature} is called with ({asked}): {error}"
    return None
