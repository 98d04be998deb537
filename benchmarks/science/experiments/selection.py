"""A quarter of the pairs, chosen by the margin of a trained policy, of the reference or of the true reward.

Each choice has as many pairs, seen twice in as many steps, at one beta. It stands beside a random quarter: at the same
beta, and at the same KL, where the random quarter is trained with several betas. All of it is done twice: with labels
that err as people do, and with labels that never err.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from science.choosing import ALL, trained_on_chosen
from science.curves import below_at
from science.drawing import MARKERS, SERIES, drawn, two_panels
from science.records import Claim, Results, Run
from science.settings import Scale
from science.statistics import Mean, paired

NAME = "selection"
ANCHOR = "a-part-of-the-pairs"
KINDS = {"noisy": "labels that err", "certain": "labels that never err"}
RANDOM_BETAS = (1, 0.5, 0.25, 0.1)
CHOICES: Mapping[str, tuple[str, str]] = {
    "smallest implicit": ("implicit", "smallest"),
    "largest implicit": ("implicit", "largest"),
    "smallest reference": ("reference", "smallest"),
    "largest reference": ("reference", "largest"),
    "smallest true": ("explicit", "smallest"),
    "largest true": ("explicit", "largest"),
    "largest joint": ("joint", "largest"),
    "largest potential": ("potential", "largest"),
}
"""By the words of the table: the score, and which end of it is kept."""
QI: Mapping[str, Any] = {"paper": "Qi et al. 2025", "arxiv": "2508.04149"}
DENG: Mapping[str, Any] = {"paper": "Deng et al. 2025", "arxiv": "2502.14560"}
HUANG: Mapping[str, Any] = {"paper": "Huang et al. 2025", "arxiv": "2503.01864"}


def runs(scale: Scale) -> Sequence[Run]:
    return [run for kind in KINDS for run in _runs_of(kind)]


def _runs_of(kind: str) -> list[Run]:
    def run(name: str, by: str, keep: str, **options: Any) -> Run:
        shared = {"labels": kind, "by": by, "keep": keep, "share": 0.25, "loss_type": "sigmoid", "beta": 1}
        return Run(name=name, perform=trained_on_chosen, options=shared | {"num_train_epochs": 2} | options)

    chosen = [run(named(kind, words), by, keep) for words, (by, keep) in CHOICES.items()]
    random = [
        run(name, "random", "smallest", beta=beta) for name, beta in zip(random_sweep(kind), RANDOM_BETAS, strict=True)
    ]
    # One pass over all pairs takes twice the steps of two passes over a quarter.
    return [*chosen, *random, run(named(kind, ALL), ALL, "smallest", share=1.0, num_train_epochs=1)]


def named(kind: str, words: str) -> str:
    """The run of this choice among pairs of this kind."""
    return f"{kind}: {words}"


def random_sweep(kind: str) -> list[str]:
    """The runs on a random quarter, from the strongest anchor to the weakest."""
    return [named(kind, f"random, beta {beta:g}") for beta in RANDOM_BETAS]


def random_quarter(kind: str) -> str:
    return named(kind, "random, beta 1")


def claims(results: Results) -> list[Claim]:
    return [
        *(_than_random(results, kind, "smallest implicit", QI) for kind in KINDS),
        *(_at_equal_kl(results, kind, "smallest implicit", QI) for kind in KINDS),
        *(_than(results, kind, "smallest implicit", "largest implicit", QI) for kind in KINDS),
        _than_random(results, "noisy", "largest joint", DENG),
        _at_equal_kl(results, "noisy", "largest joint", DENG),
        _than(results, "noisy", "largest joint", ALL, DENG),
        _than_random(results, "noisy", "largest potential", HUANG),
        _at_equal_kl(results, "noisy", "largest potential", HUANG),
        _than(results, "noisy", "largest potential", "largest true", HUANG),
    ]


def _than_random(results: Results, kind: str, words: str, paper: Mapping[str, Any]) -> Claim:
    return _reward_claim(results, kind, words, random_quarter(kind), "a random quarter", paper)


def _than(results: Results, kind: str, words: str, other: str, paper: Mapping[str, Any]) -> Claim:
    label = "all pairs" if other == ALL else f"the {other}"
    return _reward_claim(results, kind, words, named(kind, other), label, paper)


def _reward_claim(
    results: Results, kind: str, words: str, other: str, other_words: str, paper: Mapping[str, Any]
) -> Claim:
    """Of the reward of two runs on pairs of one kind."""
    first, second = (results.values(run, "reward") for run in (named(kind, words), other))
    return Claim(
        text=f"With {KINDS[kind]}, the {words} margins are better to train on than {other_words}",
        **paper,
        seen=f"reward {Mean.of(first).mean:.2f} and {Mean.of(second).mean:.2f}",
        difference=paired(first, second),
    )


def _at_equal_kl(results: Results, kind: str, words: str, paper: Mapping[str, Any]) -> Claim:
    """Of the distance below the ceiling at the KL of the chosen quarter."""
    run = named(kind, words)
    below, of_random = results.values(run, "below"), below_at(results, random_sweep(kind), results.values(run, "kl"))
    return Claim(
        text=f"With {KINDS[kind]}, the {words} margins are better than a random quarter at the same KL",
        **paper,
        seen=f"at {results.mean(run, 'kl').mean:.2f} nats {Mean.of(below).mean:.3f} below the ceiling, the random "
        f"quarter {Mean.of(of_random).mean:.3f}",
        difference=paired(of_random, below),
    )


def table(results: Results) -> list[list[str]]:
    measures = {
        "reward": "true reward", "kl": "KL", "below": "below the ceiling", "accuracy": "accuracy",
        "right_labels": "right labels",
    }  # fmt: skip
    return [["pairs", *measures.values()]] + [
        [run, *(results.shown(run, each) for each in measures)] for run in results.runs
    ]


def draw(results: Results, path: Path) -> None:
    """A panel for each kind of labels: the reward of each choice, less that of a random quarter."""
    description = "; ".join(
        f"{run}: reward {results.mean(run, 'reward').mean:.2f}, KL {results.mean(run, 'kl').mean:.2f}"
        for run in results.runs
    )
    words = [ALL, "random, beta 1", *list(CHOICES)[::-1]]
    for panels in two_panels(path, title="A quarter of the pairs", description=description):
        for place, (kind, panel) in enumerate(zip(KINDS, panels, strict=True)):
            random = results.values(random_quarter(kind), "reward")
            means = [paired(results.values(named(kind, each), "reward"), random) for each in words]
            panel.errorbar(
                [each.mean for each in means], words, xerr=[drawn(each.error) for each in means],
                color=SERIES[place], marker=MARKERS[place], linestyle="none",
            )  # fmt: skip
            panel.axvline(0, color=SERIES[place], linewidth=0.8)
            panel.set(title=KINDS[kind], xlabel="true reward, less that of a random quarter")
            panel.grid(axis="y")
