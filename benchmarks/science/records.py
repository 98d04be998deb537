"""What an experiment consists of, what was found, and the JSON that holds it."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol, cast, final

from holdfast.demo.frontier import Frontier, Optimum
from holdfast.demo.policy import Estimate
from science.settings import Scale, Setting
from science.statistics import Mean, verdict

NUM_DIGITS = 5
"""Digits behind the point of every number that is kept."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One run of every seed: `perform(setting, options)` gives its numbers, in a process of its own.

    `perform` is a function of a module, and `options` are plain JSON: both, with the setting, define the run. Runs that
    are defined alike are performed once, whatever experiments they are in.
    """

    name: str
    perform: Callable[[Setting, Mapping[str, Any]], Mapping[str, float]]
    options: Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Claim:
    """A claim of a paper, and the number per seed that is positive if it holds: `difference`.

    `text` is the claim in a sentence, `seen` what was found, with its figures.
    """

    text: str
    paper: str
    arxiv: str
    seen: str
    difference: Mean

    @property
    def verdict(self) -> str:
        return verdict(self.difference)


@final
class Results:
    """The numbers of an experiment over its seeds."""

    def __init__(self, document: Mapping[str, Any]) -> None:
        self.document = document

    @property
    def seeds(self) -> list[int]:
        return self.document["seeds"]

    @property
    def runs(self) -> list[str]:
        return list(self.document["runs"])

    def options(self, run: str) -> Mapping[str, Any]:
        return self.document["runs"][run]["options"]

    def values(self, run: str, measure: str) -> list[float]:
        """One number per seed."""
        return self.document["runs"][run]["numbers"][measure]["values"]

    def mean(self, run: str, measure: str) -> Mean:
        return Mean.of(self.values(run, measure))

    def has(self, run: str, measure: str) -> bool:
        return measure in self.document["runs"][run]["numbers"]

    def shown(self, run: str, measure: str) -> str:
        """`3.57 ± 0.02`: mean and standard error over seeds, as the page shows them."""
        mean = self.mean(run, measure)
        return f"{mean.mean:.2f} ± {mean.error:.2f}" if len(mean.values) > 1 else f"{mean.mean:.2f}"

    def of_settings(self, measure: str) -> list[float]:
        """A number of each seed's setting: `start_reward`, `best_accuracy` or `wrong_share`."""
        return [each[measure] for each in self.document["settings"]]

    def frontiers(self) -> list[Frontier]:
        """The best possible policies of each seed; errors are not kept."""
        return [_frontier(each["optima"]) for each in self.document["settings"]]


class Experiment(Protocol):
    """What a module of `experiments` has."""

    NAME: str
    ANCHOR: str
    """Of the section of docs/science.md that it is about."""

    def runs(self, scale: Scale) -> Sequence[Run]:
        """The runs of every seed, each with a name of its own."""
        ...

    def claims(self, results: Results) -> list[Claim]:
        """The claims of papers that these results speak of."""
        ...

    def table(self, results: Results) -> list[list[str]]:
        """The rows of the page's table of runs, headings first."""
        ...

    def draw(self, results: Results, path: Path) -> None:
        """Writes the picture as SVG."""
        ...


def as_experiment(module: ModuleType) -> Experiment:
    return cast("Experiment", module)


def document(
    experiment: Experiment, scale: Scale, seeds: Sequence[int], settings: Sequence[Mapping[str, Any]],
    numbers: Mapping[str, Sequence[Mapping[str, float]]], made_with: Mapping[str, Any],
) -> dict[str, Any]:  # fmt: skip
    """The content of a result file: `numbers[run][place of the seed][measure]`, summed up, and the claims."""
    found = {
        "experiment": experiment.NAME,
        **made_with,
        "seeds": list(seeds),
        "scale": asdict(scale),
        "settings": [rounded(each) for each in settings],
        "runs": {
            run.name: {"options": dict(run.options), "numbers": _summed_up(numbers[run.name])}
            for run in experiment.runs(scale)
        },
    }
    return found | {"claims": [claim_entry(claim) for claim in experiment.claims(Results(found))]}


def claim_entry(claim: Claim) -> dict[str, Any]:
    """A claim as a result file has it."""
    entry = {name: getattr(claim, name) for name in ("text", "paper", "arxiv", "seen", "verdict")}
    return entry | {"difference": mean_entry(claim.difference)}


def mean_entry(mean: Mean) -> dict[str, Any]:
    numbers = rounded(asdict(mean))
    # JSON has no infinity: one seed has no error.
    return numbers if len(mean.values) > 1 else {"values": numbers["values"], "mean": numbers["mean"]}


def rounded(value: Any) -> Any:
    """The same with every number rounded to `NUM_DIGITS`, so that a file does not show what has no meaning."""
    if isinstance(value, float):
        return round(value, NUM_DIGITS)
    if isinstance(value, Mapping):
        return {name: rounded(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(each) for each in value]
    return value


def _summed_up(of_seeds: Sequence[Mapping[str, float]]) -> dict[str, Any]:
    return {name: mean_entry(Mean.of([rounded(each[name]) for each in of_seeds])) for name in of_seeds[0]}


def _frontier(optima: Sequence[Mapping[str, float]]) -> Frontier:
    def exactly(value: float) -> Estimate:
        return Estimate(value=value, error=0.0)

    return Frontier(
        optima=tuple(
            Optimum(
                beta=each["beta"], reward=exactly(each["reward"]), kl=exactly(each["kl"]), fluency=exactly(0.0),
                log_partition=exactly(each["log_partition"]), effective_texts=0.0,
            )
            for each in optima
        )
    )  # fmt: skip
