"""Methods of a subclass that transformers calls in another way than they can be called.

Scripts override methods of `Trainer` with the parameters that an older version had. Python's own error comes at the
first step, from inside of transformers. Given up: methods that are called from one place with nothing.
"""

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from types import FunctionType
from typing import final


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class _Call:
    """How a method is called: the names of what it gets by position, and of what it gets by name."""

    by_position: tuple[str, ...] = ()
    by_name: tuple[str, ...] = ()


_LOOP = ("description", "prediction_loss_only", "ignore_keys", "metric_key_prefix")

CALLS: Mapping[str, _Call] = {
    "compute_loss": _Call(by_position=("model", "inputs"), by_name=("num_items_in_batch", "return_outputs")),
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

_INSTEAD: Mapping[str, str] = {"get_batch_samples": "to generate completions, use a callback's `on_evaluate`"}


def wrong_signatures(functions: Mapping[str, FunctionType]) -> list[str]:
    """A line for each method that cannot be called as it is called, of a subclass's own methods by name."""
    return [
        f"- {name}: it is called with ({', '.join((*call.by_position, *call.by_name))}), which it does not take "
        f"({error}); {_INSTEAD.get(name, 'give it these parameters, or *args and **kwargs')}."
        for name, call in CALLS.items()
        if name in functions and (error := _mismatch(functions[name], call)) is not None
    ]


def _mismatch(function: FunctionType, call: _Call) -> str | None:
    """What Python says of such a call; None where it can be made."""
    try:
        inspect.signature(function).bind("self", *call.by_position, **dict.fromkeys(call.by_name))
    except TypeError as error:
        return str(error)
    return None
