"""Beta: how far a policy goes, what its reward is there, and what is the most that it could be."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from science.records import Claim, Results, Run
from science.settings import Scale
from science.training import trained_and_measured

NAME = "beta"
ANCHOR = "how-strong-the-anchor-is"
BETAS: Mapping[str, tuple[float, ...]] = {"sigmoid": (4, 2, 1, 0.5, 0.25, 0.1, 0.05)}


def runs(scale: Scale) -> Sequence[Run]:
    return [
        Run(name=f"{loss}-{beta}", perform=trained_and_measured, options=options(loss, beta))
        for loss, betas in BETAS.items()
        for beta in betas
    ]


def options(loss: str, beta: float) -> dict[str, Any]:
    return {"loss_type": loss, "beta": beta}


def claims(results: Results) -> list[Claim]:
    return []


def table(results: Results) -> list[list[str]]:
    return [["run"]] + [[run] for run in results.runs]


def draw(results: Results, path: Path) -> None:
    path.write_text("<svg/>\n", encoding="utf-8")
