"""Beta, with DPO and IPO: how far a policy goes, what its reward is there, and what is the most that it could be.

Besides the two sweeps: fine-tuning on the chosen texts, for what DPO adds; one weak anchor measured on the way through
its only epoch; and the strongest anchor with labels that never err, for what is left of it then.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from science.curves import below_at, reach
from science.drawing import draw_frontier, points, two_panels
from science.records import Claim, Results, Run
from science.settings import Scale
from science.statistics import Mean, paired
from science.training import trained_and_measured
from science.variants import watched_halfway, with_certain_labels

NAME = "beta"
ANCHOR = "how-strong-the-anchor-is"
LOSSES = {"sigmoid": "DPO", "ipo": "IPO"}
BETAS: Mapping[str, tuple[float, ...]] = {
    "sigmoid": (4, 1, 0.5, 0.35, 0.25, 0.15, 0.1, 0.05, 0.02),
    "ipo": (4, 1, 0.5, 0.35, 0.25, 0.1, 0.05),
}
"""From the strongest anchor to the weakest. At the same KL, IPO's beta is about twice DPO's."""
WATCHED_BETA = 0.05
COMPARED_KL = 4.0
"""Nats, at which DPO and IPO are compared: both still gain reward there, and are well below the frontier."""
CERTAIN_BETA = 4
NO_REFERENCE = {"reference": "none", "reference_store": None, "precompute_ref_batch_size": None}


def runs(scale: Scale) -> Sequence[Run]:
    sweeps = [
        Run(name=name(loss, beta), perform=trained_and_measured, options=options(loss, beta))
        for loss, betas in BETAS.items()
        for beta in betas
    ]
    certain = [
        Run(
            name=f"{name(loss, CERTAIN_BETA)}-certain", perform=with_certain_labels, options=options(loss, CERTAIN_BETA)
        )
        for loss in BETAS
    ]
    fine_tuned = Run(name="sft", perform=trained_and_measured, options={"loss_type": "sft", **NO_REFERENCE})
    watched = Run(
        name=f"{name('sigmoid', WATCHED_BETA)}-watched",
        perform=watched_halfway,
        options=options("sigmoid", WATCHED_BETA),
    )
    return [*sweeps, fine_tuned, watched, *certain]


def name(loss: str, beta: float) -> str:
    return f"{loss}-{beta}"


def options(loss: str, beta: float) -> dict[str, Any]:
    return {"loss_type": loss, "beta": beta}


def sweep(loss: str) -> list[str]:
    """The runs of a loss, from the strongest anchor to the weakest."""
    return [name(loss, beta) for beta in BETAS[loss]]


def claims(results: Results) -> list[Claim]:
    return [
        _over_fine_tuning(results),
        _hump(results),
        _within_an_epoch(results),
        _ipo_at_equal_kl(results),
        _certain_labels(results),
    ]


def _over_fine_tuning(results: Results) -> Claim:
    below = results.values("sft", "below")
    of_dpo = below_at(results, sweep("sigmoid"), results.values("sft", "kl"))
    return Claim(
        text="At the same KL, DPO has more reward than fine-tuning on the chosen texts",
        paper="Rafailov et al. 2023",
        arxiv="2305.18290",
        seen=f"at {results.mean('sft', 'kl').mean:.2f} nats, fine-tuning is {Mean.of(below).mean:.3f} below the "
        f"ceiling, DPO {Mean.of(of_dpo).mean:.3f}",
        difference=paired(below, of_dpo),
    )


def _hump(results: Results) -> Claim:
    """The best beta of a seed is chosen on the other seeds, so it has no advantage from chance."""
    rewards = {run: results.values(run, "reward") for run in sweep("sigmoid")}
    weakest = sweep("sigmoid")[-1]
    best = [best_elsewhere(rewards, place) for place in range(len(results.seeds))]
    at_best = [rewards[run][place] for place, run in enumerate(best)]
    return Claim(
        text="As beta falls, the true reward rises and then falls",
        paper="Rafailov et al. 2024",
        arxiv="2406.02900",
        seen=f"reward {Mean.of(at_best).mean:.2f} at the best beta, {results.mean(weakest, 'reward').mean:.2f} at "
        f"{BETAS['sigmoid'][-1]:g}",
        difference=paired(at_best, rewards[weakest]),
    )


def best_elsewhere(values: Mapping[str, Sequence[float]], place: int) -> str:
    """The run with the largest mean over all seeds but the one at `place`; with one seed, over that."""
    places = [other for other in range(len(next(iter(values.values())))) if other != place] or [place]
    return max(values, key=lambda run: sum(values[run][other] for other in places))


def _within_an_epoch(results: Results) -> Claim:
    run = f"{name('sigmoid', WATCHED_BETA)}-watched"
    halfway, at_end = results.values(run, "reward_halfway"), results.values(run, "reward")
    return Claim(
        text="With a weak anchor the true reward falls before one epoch is over",
        paper="Rafailov et al. 2024",
        arxiv="2406.02900",
        seen=f"beta {WATCHED_BETA:g}: reward {Mean.of(halfway).mean:.2f} halfway, {Mean.of(at_end).mean:.2f} at "
        "the end",
        difference=paired(halfway, at_end),
    )


def _ipo_at_equal_kl(results: Results) -> Claim:
    kl = min(COMPARED_KL, *(kl for loss in BETAS for kl in reach(results, sweep(loss))))
    kls = [kl] * len(results.seeds)
    below = {loss: below_at(results, sweep(loss), kls) for loss in BETAS}
    return Claim(
        text="Far from the reference, IPO overfits less than DPO",
        paper="Azar et al. 2023",
        arxiv="2310.12036",
        seen=f"at {kl:.3g} nats, DPO is {Mean.of(below['sigmoid']).mean:.2f} below the ceiling, IPO "
        f"{Mean.of(below['ipo']).mean:.2f}",
        difference=paired(below["sigmoid"], below["ipo"]),
    )


def _certain_labels(results: Results) -> Claim:
    growth = {
        loss: [
            certain / noisy
            for certain, noisy in zip(
                results.values(f"{name(loss, CERTAIN_BETA)}-certain", "kl"),
                results.values(name(loss, CERTAIN_BETA), "kl"),
                strict=True,
            )
        ]
        for loss in BETAS
    }
    return Claim(
        text="If preferences are certain, DPO's anchor no longer holds and IPO's does",
        paper="Azar et al. 2023",
        arxiv="2310.12036",
        seen=f"with labels that never err, the KL at beta {CERTAIN_BETA:g} grows {Mean.of(growth['sigmoid']).mean:.1f} "
        f"times with DPO, {Mean.of(growth['ipo']).mean:.1f} times with IPO",
        difference=paired(growth["sigmoid"], growth["ipo"]),
    )


def table(results: Results) -> list[list[str]]:
    rows = [["run", "true reward", "KL", "below the ceiling", "accuracy", "ranking", "KL to the optimum"]]
    for run in results.runs:
        measures = ("reward", "kl", "below", "accuracy", "ranking")
        cells = [results.shown(run, measure) for measure in measures]
        rows.append([f"`{run}`", *cells, results.shown(run, "to_optimum") if results.has(run, "to_optimum") else ""])
    return rows


def draw(results: Results, path: Path) -> None:
    series = {label: sweep(loss) for loss, label in LOSSES.items()} | {"fine-tuning on chosen texts": ["sft"]}
    draw_reward_and_shortfall(results, path, title="DPO and IPO by beta", series=series)


def draw_reward_and_shortfall(
    results: Results, path: Path, *, title: str, series: Mapping[str, Sequence[str]]
) -> None:  # fmt: skip
    """Two panels against KL: the true reward under the frontier, and how far it is below."""
    sentences = [
        f"{run}: KL {results.mean(run, 'kl').mean:.2f}, reward {results.mean(run, 'reward').mean:.2f}"
        for runs in series.values()
        for run in runs
    ]
    largest_kl = max(results.mean(run, "kl").mean for runs in series.values() for run in runs)
    for reward, shortfall in two_panels(path, title=title, description="; ".join(sentences)):
        draw_frontier(reward, results, largest_kl=1.05 * largest_kl)
        for place, (label, runs) in enumerate(series.items()):
            points(reward, results, runs, "reward", place=place, label=label)
            points(shortfall, results, runs, "below", place=place, label=label)
        reward.set(title="true reward", xlabel="KL to the start policy (nats)")
        shortfall.set(
            title="below the largest reward of that KL", xlabel="KL to the start policy (nats)", ylim=(0, None)
        )
        reward.legend(loc="lower right")
