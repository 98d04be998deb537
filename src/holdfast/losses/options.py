"""How a loss declares an option: a dataclass field with its default, its rule and its help text.

The options of a loss are a small dataclass just above the loss. `objective.LossOptions` inherits all of them, and
`DPOConfig` inherits `LossOptions`. So one declaration gives the field of the config, its help text, the check of its
value, the row in docs/losses.md, and the names of the losses that read it. Options of several losses are declared here
or, for modifiers, in `modifiers`. A rule is part of the annotation and not of the field's metadata, because
`HfArgumentParser` passes all metadata to `argparse`.

Given up: frozen records. `TrainingArguments`, the other base of `DPOConfig`, is not frozen, and Python lets no frozen
dataclass be mixed with one that is not.
"""

import difflib
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, fields
from numbers import Real
from typing import Annotated, Any, TypeGuard, TypeVar, final, get_type_hints

T = TypeVar("T")

LARGEST = 3.4e38
"""The largest number of an option: fp32, in which models and optimizers compute, has none beyond it."""
SMALLEST = 1.2e-38
"""The smallest above 0: fp32 computes with 0 instead of smaller ones."""


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """Which values an option may have, and which losses must read it. It is part of the option's annotation."""

    allows: Callable[[Any], bool]
    demand: str
    """What a value must be, as a phrase that follows the option's name: `must be a finite number above 0`."""
    remedy: str
    """What to do instead: a full sentence."""
    choices: tuple[str, ...] = ()
    """The values of an option that is one of several names; empty for a number."""
    concerns_all_losses: bool = False
    """Whether every loss of a run must read the option, rather than at least one."""
    read_under: tuple[str, str] | None = None
    """Another option and the value that it must have for this option to be read."""
    other_defaults: tuple[Any, ...] = ()
    """Defaults of other trainers, which their scripts spell out where nothing reads the option."""

    def check(self, name: str, value: Any) -> None:
        """ValueError where the option `name` may not have this value."""
        if self.choices:
            require_known(name, value, self.choices)
        elif not self.allows(value):
            raise ValueError(f"{name} {self.demand}, got {shown(value)}. {self.remedy}")


def is_finite_number(value: object) -> TypeGuard[float]:
    """Whether the value is a number that fp32 can hold, and no truth value. A number above 0 that fp32 rounds to 0 is
    none: it would act as 0."""
    if isinstance(value, bool) or not isinstance(value, Real):
        return False
    number: Any = value
    return number == 0 or bool(SMALLEST <= abs(number) <= LARGEST)


def shown(value: Any) -> str:
    """The value for a message: a text in quotes, a whole number of many digits by their number."""
    if isinstance(value, int) and abs(value) >= 10**20:
        return f"a whole number of about {round(value.bit_length() * math.log10(2))} digits"
    text = repr(value) if isinstance(value, str | bool | None) else f"{value}"
    return text if len(text) <= 80 else f"{text[:80]}..."


def number(
    words: str,
    allows: Callable[[float], bool],
    remedy: str,
    *,
    read_under: tuple[str, str] | None = None,
    other_defaults: tuple[float, ...] = (),
) -> Rule:
    """The rule of a finite number; `words` names the numbers that `allows` accepts, as in `above 0`."""
    return Rule(
        allows=lambda value: is_finite_number(value) and allows(value),
        demand=f"must be a finite number {words}".rstrip(),
        remedy=remedy,
        read_under=read_under,
        other_defaults=other_defaults,
    )


def choice(choices: Sequence[str], *, concerns_all_losses: bool = False) -> Rule:
    """The rule of an option that is one of several names."""
    return Rule(
        allows=lambda value: value in choices,
        demand=f"must be one of {', '.join(choices)}",
        remedy="Choose one of them.",
        choices=tuple(choices),
        concerns_all_losses=concerns_all_losses,
    )


def option(default: T, help: str) -> T:
    """A dataclass field; `help` is its line in `--help` and in docs/losses.md. The return type is the default's, so
    that a type checker compares it with the annotation."""
    dataclass_field: Any = field(default=default, metadata={"help": help})
    return dataclass_field


@dataclass(kw_only=True)
class Options:
    """The options of a loss that has none, and the base class of all other options."""


@dataclass(kw_only=True)
class BetaOptions(Options):
    """The options of a loss that reads beta alone. The logged rewards read it as well, whatever the loss."""

    beta: Annotated[float, number("above 0", lambda value: value > 0, "0.1 is a usual value.")] = option(
        0.1, "Strength of the pull to the reference; IPO's tau, ORPO's lambda."
    )


@dataclass(kw_only=True)
class SmoothingOptions(BetaOptions):
    """The options of a loss that allows for wrong labels."""

    label_smoothing: Annotated[
        float, number("in [0, 0.5)", lambda value: 0 <= value < 0.5, "If most labels are wrong, swap the columns.")
    ] = option(0.0, "Probability that a label is flipped; EXO's epsilon.")


def option_names(options: type[Options]) -> list[str]:
    """The names of the options that the class declares or inherits."""
    return [each.name for each in fields(options)]


def rules(options: type[Options]) -> dict[str, Rule]:
    """The rules of the options that the class declares or inherits, by name; without those that need none."""
    hints = get_type_hints(options, include_extras=True)
    annotated = {name: getattr(hints[name], "__metadata__", ()) for name in option_names(options)}
    return {name: rule for name, extras in annotated.items() for rule in extras if isinstance(rule, Rule)}


def check_values(options: Options) -> None:
    """ValueError where the value of an option breaks its rule."""
    for name, rule in rules(type(options)).items():
        rule.check(name, getattr(options, name))


def require_known(option: str, name: str, choices: Iterable[str]) -> None:
    """ValueError where `name` is none of the `choices` of an option; the message names the nearest, if one is near."""
    if name not in (names := list(choices)):
        hint = f" Did you mean '{near}'?" if (near := nearest(str(name), names)) is not None else ""
        raise ValueError(f"{option} '{name}' is unknown.{hint} There are {', '.join(names)}.")


def nearest(name: str, names: Sequence[str]) -> str | None:
    """The one of `names` that is spelled most like `name`, or that has all its letters in their order; None where there
    is no such one."""
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.65)
    longer = [each for each in names if len(name) > 1 and _is_within(name, each)]
    return next(iter(near or difflib.get_close_matches(name, longer, n=1, cutoff=0)), None)


def _is_within(name: str, longer: str) -> bool:
    letters = iter(longer)
    return all(letter in letters for letter in name)
