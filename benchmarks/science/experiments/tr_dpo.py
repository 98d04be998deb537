"""TR-DPO: a reference that moves to the policy, over alpha and tau, against DPO with a smaller beta at the same KL.

A moving reference lets the policy go further, and so does a smaller beta. So the rival of each run is the curve of
DPO's sweep over beta, at the KL of the run.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from science.curves import below_at
from science.experiments import beta
from science.records import Claim, Results, Run
from science.settings import Scale
from science.statistics import Mean, paired
from science.training import trained_and_measured

NAME = "tr_dpo"
ANCHOR = "a-reference-that-moves"
BETA = 1
ALPHAS = (0.3, 0.6, 1.0)
TAUS = (10, 25, 50)
"""Steps between two moves of the reference, of a run of 100."""
FURTHEST = (1.0, 10)
_PAPER, _ARXIV = "Gorbatovski et al. 2024", "2404.09656"


def runs(scale: Scale) -> Sequence[Run]:
    rivals = [run for run in beta.runs(scale) if run.name in _rivals()]
    moving = [
        Run(name=name(alpha, tau), perform=trained_and_measured, options=options(alpha, tau, scale))
        for alpha in ALPHAS
        for tau in TAUS
    ]
    return [*rivals, *moving]


def name(alpha: float, tau: int) -> str:
    return f"alpha-{alpha:g}-tau-{tau}"


def options(alpha: float, tau: int, scale: Scale) -> dict[str, Any]:
    return {
        **beta.options("sigmoid", BETA),
        "reference": "model",
        "reference_store": None,
        "precompute_ref_batch_size": None,
        "sync_ref_model": True,
        "ref_model_mixup_alpha": alpha,
        "ref_model_sync_steps": max(1, scale.num_train_steps * tau // 100),
    }


def claims(results: Results) -> list[Claim]:
    return [_at_the_same_beta(results), _at_the_same_kl(results), _far_out(results), _which(results)]


def _at_the_same_beta(results: Results) -> Claim:
    fixed = beta.name("sigmoid", BETA)
    rewards = _mean_of_grid([results.values(run, "reward") for run in _grid()])
    kls = _mean_of_grid([results.values(run, "kl") for run in _grid()])
    return Claim(
        text="At the same beta, TR-DPO has more reward than DPO",
        paper=_PAPER,
        arxiv=_ARXIV,
        seen=f"beta {BETA}: reward {Mean.of(rewards).mean:.2f} at {Mean.of(kls).mean:.2f} nats on average over alpha "
        f"and tau, {results.mean(fixed, 'reward').mean:.2f} at {results.mean(fixed, 'kl').mean:.2f} nats with DPO",
        difference=paired(rewards, results.values(fixed, "reward")),
    )


def _at_the_same_kl(results: Results) -> Claim:
    below = _mean_of_grid([results.values(run, "below") for run in _grid()])
    rivals = _mean_of_grid([_rival(results, run) for run in _grid()])
    return Claim(
        text="TR-DPO is more than a smaller beta: at the same KL it has more reward than DPO",
        paper=_PAPER,
        arxiv=_ARXIV,
        seen=f"on average over alpha and tau {Mean.of(below).mean:.3f} below the ceiling, DPO at the same KL "
        f"{Mean.of(rivals).mean:.3f}",
        difference=paired(rivals, below),
    )


def _far_out(results: Results) -> Claim:
    run = name(*FURTHEST)
    rivals = _rival(results, run)
    return Claim(
        text="Far from the start policy, TR-DPO is less over-optimised than DPO",
        paper=_PAPER,
        arxiv=_ARXIV,
        seen=f"alpha {FURTHEST[0]:g}, tau {FURTHEST[1]}, {results.mean(run, 'kl').mean:.2f} nats: "
        f"{results.mean(run, 'below').mean:.2f} below the ceiling, DPO there {Mean.of(rivals).mean:.2f}",
        difference=paired(rivals, results.values(run, "below")),
    )


def _which(results: Results) -> Claim:
    """The best alpha and tau of a seed are chosen on the other seeds, so they have no advantage from chance."""
    gains = {
        run: [rival - own for rival, own in zip(_rival(results, run), results.values(run, "below"), strict=True)]
        for run in _grid()
    }
    chosen = [beta.best_elsewhere(gains, place) for place in range(len(results.seeds))]
    best = [gains[run][place] for place, run in enumerate(chosen)]
    average = _mean_of_grid(list(gains.values()))
    return Claim(
        text="There is a best alpha and tau: at its KL it gains more over DPO than the average choice",
        paper=_PAPER,
        arxiv=_ARXIV,
        seen=f"gain {Mean.of(best).mean:.3f} with the best ({', '.join(sorted({*chosen}))}), "
        f"{Mean.of(average).mean:.3f} on average",
        difference=paired(best, average),
    )


def table(results: Results) -> list[list[str]]:
    rows = [["run", "true reward", "KL", "below the ceiling", "DPO at that KL", "accuracy", "ranking"]]
    for run in results.runs:
        reward, kl, below, accuracy, ranking = (
            results.shown(run, measure) for measure in ("reward", "kl", "below", "accuracy", "ranking")
        )
        rival = f"{Mean.of(_rival(results, run)).mean:.2f}" if run in _grid() else ""
        rows.append([f"`{run}`", reward, kl, below, rival, accuracy, ranking])
    return rows


def draw(results: Results, path: Path) -> None:
    """Left: reward against KL, under the frontier. Right: how far below the ceiling."""
    series = {"DPO, beta 4 to 0.02": _rivals()}
    series |= {f"TR-DPO, alpha {alpha:g}": [name(alpha, tau) for tau in reversed(TAUS)] for alpha in ALPHAS}
    beta.draw_reward_and_shortfall(results, path, title="TR-DPO and DPO", series=series)


def _grid() -> list[str]:
    """The runs with a moving reference."""
    return [name(alpha, tau) for alpha in ALPHAS for tau in TAUS]


def _rivals() -> list[str]:
    """The runs with a fixed one."""
    return beta.sweep("sigmoid")


def _rival(results: Results, run: str) -> list[float]:
    """Of each seed, how far DPO is below the ceiling at the KL of this run."""
    return below_at(results, _rivals(), results.values(run, "kl"))


def _mean_of_grid(values: Sequence[Sequence[float]]) -> list[float]:
    """Of each seed, the mean over the runs of the grid."""
    return [sum(of_seed) / len(of_seed) for of_seed in zip(*values, strict=True)]
