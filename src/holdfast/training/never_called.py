"""Methods that subclasses override and that nothing here calls: refused by name, each with what to override instead.

They are hooks of the common DPO trainer, of all its versions. A run with such a subclass would compute the loss of this
package, and not the one that the subclass says. A method that the subclass calls by itself, from one that is called
here, is its own affair and stays. So does one that is merely added. Given up: calls by other names than the method's
own (`getattr`), and hooks of other packages.
"""

import inspect
from collections.abc import Iterator, Mapping
from types import CodeType, FunctionType, MappingProxyType
from typing import Any

from holdfast.options.script import lines_of_config_calls, lines_of_trainer_calls
from holdfast.options.unknown import unknown_names
from holdfast.training.signatures import wrong_signatures
from holdfast.training.unknown_arguments import OPTION_NAMES

_LOSS = "override `compute_loss`"
_ROWS = "map the dataset first; rows of prompt_ids, chosen_ids and rejected_ids are taken as they are"
_BATCH = "pass a `data_collator`"
_REFERENCE = "pass `ref_model`, or give the dataset the columns ref_chosen_logps and ref_rejected_logps"
_MODEL = "prepare the model before it is handed over"
_GENERATE = "set generate_samples, which completes prompts at evaluations"
_METRICS = 'append numbers to `self._metrics["train"][name]`, or override `log`'

NEVER_CALLED: Mapping[str, str] = MappingProxyType(
    {
        **dict.fromkeys(
            (
                "dpo_loss", "concatenated_forward", "get_batch_loss_metrics", "get_batch_logps", "_get_batch_logps",
                "_compute_loss", "_compute_loss_liger", "compute_preference_loss", "odds_ratio_loss", "simpo_loss",
            ),
            _LOSS,
        ),
        **dict.fromkeys(
            ("tokenize_row", "process_row", "build_tokenized_answer", "_tokenize", "_prepare_dataset",
             "_truncate_inputs", "tokenize_batch_element", "_prepare_row"),
            _ROWS,
        ),
        **dict.fromkeys(("concatenated_inputs", "_collate_batch", "_prepare_batch"), _BATCH),
        **dict.fromkeys(
            ("compute_reference_log_probs", "compute_ref_log_probs", "_precompute_ref_logps", "_prepare_deepspeed",
             "_prepare_fsdp", "_create_ref_model"),
            _REFERENCE,
        ),
        **dict.fromkeys(
            ("_create_model_from_path", "_prepare_peft_model", "_prepare_gradient_checkpointing"), _MODEL
        ),
        **dict.fromkeys(("store_metrics", "get_batch_metrics"), _METRICS),
        "generate_from_model_and_ref": _GENERATE,
    }
)  # fmt: skip
"""What to do instead of overriding a hook."""


def check_hooks(kind: type, base: type) -> None:
    """`UnknownNameError` where the subclass `kind` of `base`, or a class that it mixes in, overrides a hook that is
    never called, or one with parameters that it is no longer called with."""
    own = {
        name: value for part in reversed(kind.__mro__) if part not in base.__mro__ for name, value in vars(part).items()
    }
    functions = {name: function for name, value in own.items() if (function := _function(value)) is not None}
    called = _called(functions, base)
    lines = [
        f"- {name}: nothing calls it; {advice}."
        for name, advice in NEVER_CALLED.items()
        if name in functions and name not in called
    ]
    lines += wrong_signatures(functions)
    if lines:
        raise unknown_names(
            f"{kind.__name__} overrides methods that would not work here:",
            lines,
            lines_of_config_calls(OPTION_NAMES),
            lines_of_trainer_calls(OPTION_NAMES),
        )


def check_patches(trainer: Any) -> None:
    """`UnknownNameError` where a script has put a hook that is never called onto the trainer, or onto its class."""
    places = [vars(trainer), *(vars(part) for part in type(trainer).__mro__ if part.__module__.startswith("holdfast."))]
    lines = [
        f"- {name}: nothing calls it; {advice}."
        for name, advice in NEVER_CALLED.items()
        if any(name in place for place in places)
    ]
    if lines:
        raise unknown_names(f"{type(trainer).__name__} was given methods that would not work here:", lines)


def _function(value: Any) -> FunctionType | None:
    value = value.__func__ if isinstance(value, staticmethod | classmethod) else value
    value = inspect.unwrap(value) if callable(value) else value
    return value if isinstance(value, FunctionType) else None


def _called(functions: Mapping[str, FunctionType], base: type) -> set[str]:
    """The methods that are called: those of `base`, `__init__` among them, and what these call of the subclass."""
    called, waiting = set[str](), [name for name in functions if hasattr(base, name)]
    while waiting:
        name = waiting.pop()
        if name not in called:
            called.add(name)
            waiting += [other for other in _names(functions[name].__code__) if other in functions]
    return called


def _names(code: CodeType) -> Iterator[str]:
    """The names of all attributes and globals that the code reads."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names(constant)
