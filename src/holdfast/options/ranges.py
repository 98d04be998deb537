"""The range of every numeric option: one table, from the option's name to the numbers that it may be.

`RANGES` holds the options of `DPOConfig` that are numbers, its own and those of `transformers.TrainingArguments`, but
for those of the losses, which declare their range beside the loss (`losses.options`). `transformers` checks few of
them, and late: a negative count trains nothing without a word, and a rate of NaN fails or trains to NaN after the model
was loaded and the data were tokenized. `tests/unit/test_ranges.py` compares the table with the fields, so a number that
a newer `transformers` adds fails there until somebody has looked at what it does.

Given up: numbers as text. `"1e-6"` could be read as one, but the next such text would be a typing error.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from types import MappingProxyType
from typing import Any, final

import numpy as np

from holdfast.losses import LossOptions, ModifierOptions
from holdfast.losses.options import LARGEST, SMALLEST, is_finite_number, rules, shown

MOST = 2**53
"""The largest count: every whole number up to it is a float as well."""


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Range:
    """The numbers that an option may be: from `lowest` to `highest`, both included, and those in `also`."""

    demand: str
    """What the option is, as a clause after `it`: `counts from 1`."""
    remedy: str
    """What to do instead: a full sentence."""
    lowest: float
    highest: float
    is_whole: bool = False
    has_fractions: bool = False
    """Whether a number between 0 and 1, a fraction of the run, is meant too where the numbers are whole."""
    is_below_highest: bool = False
    also: tuple[float | None, ...] = ()

    def of(self, name: str, value: Any) -> Any:
        """`value` as Python's own number, for the option `name`. ValueError where it is none of the range."""
        number = value.item() if isinstance(value, np.generic) else value
        if number is None and None in self.also:
            return None
        if is_finite_number(number):
            number = int(number) if self.is_whole and number == int(number) else number
            if number in self.also or self._holds(number):
                return int(number) if self.is_whole and number == int(number) else float(number)
        remedy = "Write it as a number, without quotes." if _is_number_in_quotes(value) else self.remedy
        raise ValueError(f"{name}={shown(value)} was asked for; it {self.demand}. {remedy}")

    def _holds(self, number: float) -> bool:
        if self.has_fractions and 0 < number < 1:
            return True
        if self.is_whole and not isinstance(number, int):
            return False
        return self.lowest <= number <= self.highest and not (self.is_below_highest and number == self.highest)


def _is_number_in_quotes(value: Any) -> bool:
    if not isinstance(value, str):
        return False
    try:
        float(value)
    except ValueError:
        return False
    return True


def count(
    lowest: int = 1, highest: int = MOST, *, also: tuple[float | None, ...] = (), remedy: str = "Use a larger number."
) -> Range:
    """Whole numbers from `lowest`."""
    up_to = f" and goes to {highest}" if highest != MOST else ""
    if up_to and remedy == "Use a larger number.":
        remedy = "Use a whole number between them."
    return Range(
        demand=f"counts from {lowest}{up_to}", remedy=remedy, lowest=lowest, highest=highest, is_whole=True, also=also
    )


def rate(*, also: tuple[float | None, ...] = (), remedy: str, lowest: float = 0.0, highest: float = LARGEST) -> Range:
    """Finite numbers from `lowest`; a `lowest` of `SMALLEST` means above 0."""
    demand = "is a finite number above 0" if lowest == SMALLEST else f"is a finite number of at least {lowest:g}"
    if highest != LARGEST:
        demand += f" and at most {highest:g}"
    return Range(demand=demand, remedy=remedy, lowest=lowest, highest=highest, also=also)


def share(remedy: str, also: tuple[float | None, ...] = ()) -> Range:
    """Numbers from 0 to below 1."""
    demand = "lies in [0, 1)"
    return Range(demand=demand, remedy=remedy, lowest=0.0, highest=1.0, is_below_highest=True, also=also)


def steps(lowest: int = 1, *, also: tuple[float | None, ...] = ()) -> Range:
    """Optimizer steps, or a fraction of the run below 1."""
    return Range(
        demand=f"counts optimizer steps from {lowest}, or is a fraction of the run between 0 and 1",
        remedy="Use a whole number of steps, or such a fraction.",
        lowest=lowest,
        highest=MOST,
        is_whole=True,
        has_fractions=True,
        also=also,
    )


def seed(*, also: tuple[float | None, ...] = ()) -> Range:
    """Seeds that random, numpy and torch all take."""
    return count(0, 2**32 - 1, also=also)


_OPTIONAL = count(also=(None,))
_MOST_PROCESSES = 1024
_MOST_SECONDS = 2**31 - 1

RANGES: Mapping[str, Range] = MappingProxyType(
    {
        # batches and length of the run
        "per_device_train_batch_size": count(),
        "per_device_eval_batch_size": count(),
        "gradient_accumulation_steps": count(),
        "eval_accumulation_steps": _OPTIONAL,
        "num_train_epochs": rate(lowest=SMALLEST, highest=1e9, remedy="Use 3, or set max_steps."),
        "max_steps": count(also=(-1,), remedy="Use -1 to go by num_train_epochs."),
        # learning
        "learning_rate": rate(remedy="1e-6 is a usual value; 0 is a run that trains nothing, to try it out."),
        "warmup_steps": steps(0),
        "warmup_ratio": share("Use a fraction of the run, or warmup_steps.", also=(None,)),
        "weight_decay": rate(remedy="Use 0 for none."),
        "adam_beta1": share("0.9 is a usual value."),
        "adam_beta2": share("0.999 is a usual value."),
        "adam_epsilon": rate(lowest=SMALLEST, highest=1.0, remedy="1e-8 is a usual value."),
        "max_grad_norm": rate(remedy="1 is a usual value; 0 clips no gradient."),
        "neftune_noise_alpha": rate(also=(None,), remedy="5 is a usual value; None adds no noise."),
        "label_smoothing_factor": share("Use label_smoothing, the probability that a pair's label is flipped."),
        "router_aux_loss_coef": rate(
            also=(None,), remedy="Use 0 for no such loss, or None for the model's own weight."
        ),
        # logs, evaluation and checkpoints; 0 is a number of steps only where nobody counts them (`check_intervals`)
        "logging_steps": steps(also=(0,)),
        "eval_steps": steps(also=(0, None)),
        "save_steps": steps(also=(0,)),
        "eval_delay": rate(remedy="Use 0 to evaluate from the beginning."),
        "save_total_limit": count(also=(None,), remedy="Use None to keep all checkpoints."),
        "torch_empty_cache_steps": _OPTIONAL,
        "generate_samples": count(0, 2**20, remedy="Use 0 for none."),
        "samples_max_new_tokens": count(),
        # seeds, processes and loaders
        "seed": seed(),
        "data_seed": seed(also=(None,)),
        "local_rank": count(0, 2**31 - 1, also=(-1,), remedy="The launcher sets it; leave it out."),
        "dataloader_num_workers": count(0, _MOST_PROCESSES, remedy="Use 0 to load in the process that trains."),
        "dataloader_prefetch_factor": count(1, 2**16, also=(None,)),
        "dataset_num_proc": count(1, _MOST_PROCESSES, also=(None,)),
        "ddp_bucket_cap_mb": count(1, 2**20, also=(None,)),
        "peer_timeout": rate(lowest=5.0, also=(0,), remedy="Use 30, or 0 to end no process for its silence."),
        "ddp_timeout": count(1, _MOST_SECONDS, remedy="Use a number of seconds; 1800 is the default."),
        # the data
        "max_length": count(2, also=(None,)),
        "tokens_per_batch": _OPTIONAL,
        "pad_to_multiple_of": count(1, 2**16, also=(None,)),
        # the reference
        "reference_window": _OPTIONAL,
        "precompute_ref_batch_size": _OPTIONAL,
        "ref_model_sync_steps": count(),
        "ref_model_mixup_alpha": Range(
            demand="is out of range: alpha lies in (0, 1], and at 0 the reference would never move",
            remedy="Use sync_ref_model=False for a fixed one.",
            lowest=SMALLEST,
            highest=1.0,
        ),
    }
)

LISTS: Mapping[str, Range] = MappingProxyType(
    {
        "loss_weights": Range(
            demand="is a finite number for each loss", remedy="Use 1 for each.", lowest=-LARGEST, highest=LARGEST
        ),
        "ref_model_weights": Range(
            demand="is no weight: the weights of a mixture are positive numbers",
            remedy="Leave a reference that should not count out of `ref_model`.",
            lowest=SMALLEST,
            highest=LARGEST,
        ),
    }
)
"""The range of each entry of an option that is a list of numbers."""


def normalise_numbers(args: Any) -> None:
    """Makes each numeric option of `args` Python's own number: numpy's become that, `8.0` becomes 8 where numbers are
    whole. ValueError for the first one out of its range; see `RANGES`, and for those of losses the losses' own."""
    names = {field.name for field in fields(args)}
    if isinstance(multiple := args.pad_to_multiple_of, str):  # parsers of command lines give a text
        if multiple.lower() in ("auto", "none", "null"):  # values of the common trainer's
            args.pad_to_multiple_of = None
        elif multiple.isdecimal() and len(multiple) < 20:
            args.pad_to_multiple_of = int(multiple)
    for name, rule in {**rules(LossOptions), **rules(ModifierOptions)}.items():
        value = getattr(args, name)
        number = value.item() if isinstance(value, np.generic) else value
        rule.check(name, number)
        setattr(args, name, float(number) if isinstance(number, int) else number)
    for name, allowed in RANGES.items():
        if name in names:
            setattr(args, name, allowed.of(name, getattr(args, name)))
    for name, of_entry in LISTS.items():
        value = getattr(args, name)
        if value is not None:
            if isinstance(value, str) or not hasattr(value, "__iter__"):
                raise ValueError(f"{name}={shown(value)} was asked for; it is a list of numbers. Write [0.5, 0.5].")
            setattr(args, name, [of_entry.of(f"{name}[{i}]", entry) for i, entry in enumerate(value)])
