"""References that are policies of their own: a guide (Pre-DPO), and rounds that each have a reference.

Whoever trains against a policy that was trained already goes further, as one does with a smaller beta. So each stands
beside DPO at the same beta and at the same KL, and Pre-DPO beside DPO that is trained for twice as long, since its
guide costs as much.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from science.curves import below_at
from science.experiments.beta import draw_reward_and_shortfall
from science.guiding import guided, in_rounds
from science.ranking import ranked
from science.records import Claim, Results, Run
from science.settings import Scale
from science.statistics import Mean, paired
from science.training import trained_and_measured

NAME = "guides"
ANCHOR = "guides-and-rounds"
ONCE = (4, 1, 0.5, 0.25, 0.1, 0.05)
TWICE = (1, 0.5, 0.25)
GUIDED = (1, 0.25)
FRESH_BASE = (1, 0.5, 0.25)
FRESH_BEFORE = (3, 1)
SIMPO: Mapping[str, Any] = {
    "loss_type": "simpo", "beta": 1, "reference": "none", "reference_store": None, "precompute_ref_batch_size": None,
}  # fmt: skip
PAN: Mapping[str, Any] = {"paper": "Pan et al. 2025", "arxiv": "2504.15843"}
DONG: Mapping[str, Any] = {"paper": "Dong et al. 2024", "arxiv": "2405.07863"}
KIM: Mapping[str, Any] = {"paper": "Kim et al. 2024", "arxiv": "2403.19270"}
PARTS = "Rounds on parts of the pairs, each against the policy before,"
BEFORE = "With fresh pairs, the policy before is a better reference than the first"


def runs(scale: Scale) -> Sequence[Run]:
    return [
        *(Run(name=f"dpo-{beta:g}", perform=ranked, options=_dpo(beta)) for beta in ONCE),  # those of `hypo`
        *(
            Run(name=f"twice-{beta:g}", perform=trained_and_measured, options=_dpo(beta) | {"num_train_epochs": 2})
            for beta in TWICE
        ),
        *(Run(name=f"guided-{beta:g}", perform=guided, options=_dpo(beta) | {"guide": _dpo(beta)}) for beta in GUIDED),
        Run(name="simpo", perform=trained_and_measured, options=SIMPO),
        Run(name="guided-by-simpo", perform=guided, options=_dpo(1) | {"guide": dict(SIMPO)}),
        *(_rounds(f"fresh-base-{beta:g}", "fresh", "base", beta) for beta in FRESH_BASE),
        *(_rounds(f"fresh-before-{beta:g}", "fresh", "before", beta) for beta in FRESH_BEFORE),
        _rounds("parts-base-1", "parts", "base", 1),
        _rounds("parts-before-1", "parts", "before", 1),
    ]


def _dpo(beta: float) -> dict[str, Any]:
    return {"loss_type": "sigmoid", "beta": beta}


def _rounds(name: str, pairs: str, reference: str, beta: float) -> Run:
    options = _dpo(beta) | {"num_rounds": 3, "pairs": pairs, "reference": reference}
    return Run(name=name, perform=in_rounds, options=options)


def sweep(kind: str, betas: Sequence[float]) -> list[str]:
    """The runs of this kind, from the strongest anchor to the weakest."""
    return [f"{kind}-{beta:g}" for beta in betas]


def claims(results: Results) -> list[Claim]:
    once, twice, base = sweep("dpo", ONCE), sweep("twice", TWICE), sweep("fresh-base", FRESH_BASE)
    rewards: list[tuple[str, str, str, Mapping[str, Any]]] = [
        ("guided-1", "dpo-1", "Pre-DPO has more reward than DPO at the same beta", PAN),
        ("guided-1", "twice-1", "Pre-DPO has more reward than DPO of twice the length at the same beta", PAN),
        ("guided-by-simpo", "simpo", "Pre-DPO with SimPO's result as the guide has more reward than SimPO", PAN),
        ("fresh-base-1", "dpo-1", "Three rounds with fresh pairs have more reward than one run at the same beta", DONG),
        ("parts-before-1", "dpo-1", f"{PARTS} have more reward than one run on all at the same beta", KIM),
        ("fresh-before-1", "fresh-base-1", f"{BEFORE} at the same beta", KIM),
    ]
    at_equal_kl: list[tuple[str, Sequence[str], str, Mapping[str, Any]]] = [
        ("guided-1", once, "Pre-DPO is better than DPO at the same KL", PAN),
        ("guided-1", twice, "Pre-DPO is better than DPO of twice the length at the same KL", PAN),
        ("fresh-base-0.25", once, "Three rounds with fresh pairs are better than one run at the same KL", DONG),
        ("parts-before-1", once, f"{PARTS} are better than one run on all at the same KL", KIM),
        ("fresh-before-1", base, f"{BEFORE} at the same KL", KIM),
    ]
    return [
        *(_more_reward(results, *each) for each in rewards),
        *(_more_at_equal_kl(results, *each) for each in at_equal_kl),
        _like_half_of_beta(results),
    ]


def _more_reward(results: Results, run: str, rival: str, text: str, paper: Mapping[str, Any]) -> Claim:
    first, second = results.values(run, "reward"), results.values(rival, "reward")
    return Claim(
        text=text,
        **paper,
        seen=f"reward {Mean.of(first).mean:.2f} and {Mean.of(second).mean:.2f}, at KLs of "
        f"{results.mean(run, 'kl').mean:.2f} and {results.mean(rival, 'kl').mean:.2f}",
        difference=paired(first, second),
    )


def _more_at_equal_kl(results: Results, run: str, rivals: Sequence[str], text: str, paper: Mapping[str, Any]) -> Claim:
    below, of_rivals = results.values(run, "below"), below_at(results, rivals, results.values(run, "kl"))
    return Claim(
        text=text,
        **paper,
        seen=f"at {results.mean(run, 'kl').mean:.2f} nats {Mean.of(below).mean:.3f} below the ceiling, and "
        f"{Mean.of(of_rivals).mean:.3f}",
        difference=paired(of_rivals, below),
    )


def _like_half_of_beta(results: Results) -> Claim:
    """By Rafailov et al., DPO at beta multiplies the reference by exp(r / beta): after the guide, a second time."""
    guided, whole, half = (results.values(run, "kl") for run in ("guided-1", "dpo-1", "dpo-0.5"))
    to_whole = [abs(one - other) for one, other in zip(guided, whole, strict=True)]
    to_half = [abs(one - other) for one, other in zip(guided, half, strict=True)]
    return Claim(
        text="Pre-DPO goes about as far as DPO with half of its beta: optimum over optimum is exp(2 r / beta)",
        paper="Rafailov et al. 2023",
        arxiv="2305.18290",
        seen=f"KL {Mean.of(guided).mean:.2f}; DPO {Mean.of(half).mean:.2f} at half of beta, {Mean.of(whole).mean:.2f} "
        "at beta",
        difference=paired(to_whole, to_half),
    )


def table(results: Results) -> list[list[str]]:
    measures = {
        "reward": "true reward", "kl": "KL", "below": "below the ceiling", "accuracy": "accuracy", "ranking": "ranking",
    }  # fmt: skip
    return [["run", *measures.values()]] + [
        [f"`{run}`", *(results.shown(run, each) for each in measures)] for run in results.runs
    ]


def draw(results: Results, path: Path) -> None:
    series = {
        "DPO": sweep("dpo", ONCE),
        "DPO, twice as long": sweep("twice", TWICE),
        "Pre-DPO": sweep("guided", GUIDED),
        "rounds, the first reference": sweep("fresh-base", FRESH_BASE),
        "rounds, the policy before": sweep("fresh-before", FRESH_BEFORE),
        "parts, the policy before": ["parts-before-1"],
    }
    draw_reward_and_shortfall(results, path, title="Guides and rounds", series=series)
