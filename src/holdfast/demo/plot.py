"""The demo's plot: reward and fluency of every policy against its KL to the start policy, beside the frontier.

KL has a square-root axis, on which the frontier starts as a straight line (to first order the reward gained is
`sqrt(2 KL var(r))`), so that the mild policies near 1 nat and the collapsed one beyond 10 are readable in one picture.
"""

import io
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from holdfast.demo.policy import Estimate, Measurement
from holdfast.demo.results import ArmResult, DemoResult
from holdfast.store.files import write_durably

_OPTIMAL, _START = "#555555", "#000000"
# The three fixed arms land on one point: their markers are nested, so that all three can be seen there.
_STYLES = {
    "model": {"color": "#56B4E9", "marker": "s", "markersize": 15, "markerfacecolor": "none", "markeredgewidth": 2},
    "adapter": {"color": "#0072B2", "marker": "o", "markersize": 9, "markerfacecolor": "none", "markeredgewidth": 2},
    "precomputed": {"color": "#002B49", "marker": "o", "markersize": 3},
    "tr-dpo": {"color": "#E69F00", "marker": "D", "markersize": 8},
    "none": {"color": "#D55E00", "marker": "X", "markersize": 10},
}
_NUM_ERRORS_SHOWN = 2


def plot_frontier(result: DemoResult, path: Path) -> None:
    """Writes the picture to `path`, in the format its suffix names."""
    figure = Figure(figsize=(12.5, 5.6), layout="constrained")
    reward_axes, fluency_axes = figure.subplots(1, 2)
    largest_kl = max(arm.measurement.kl.value for arm in result.arms) * 1.12
    _draw(reward_axes, result, "reward", largest_kl)
    _draw(fluency_axes, result, "fluency", largest_kl)
    reward_axes.set(ylabel="true reward (nats of preference)", title="Reward: nothing lies above the frontier")
    fluency_axes.set(
        ylabel="fluency (log-prob under the source, nats per token)", title="Fluency: what having no reference costs"
    )
    fluency_axes.axhline(result.source_fluency.value, color=_OPTIMAL, linewidth=0.8, linestyle=":")
    fluency_axes.annotate(
        "text of the source itself", (largest_kl, result.source_fluency.value), color=_OPTIMAL, fontsize=9,
        xytext=(-4, 4), textcoords="offset points", horizontalalignment="right",
    )  # fmt: skip
    reward_axes.legend(loc="upper left", frameon=False, fontsize=9, labelspacing=0.7)
    figure.suptitle(f"DPO at beta = {result.beta:g}, one start policy, four references and none (seed {result.seed})")
    figure.supxlabel(
        f"small dots and thin lines: the way there; bars: {_NUM_ERRORS_SHOWN} standard errors",
        fontsize=9,
        color=_OPTIMAL,
    )
    picture = io.BytesIO()
    figure.savefig(picture, dpi=150, format=path.suffix[1:])
    write_durably(path, picture.getvalue())


def _draw(axes: Axes, result: DemoResult, quantity: str, largest_kl: float) -> None:
    """One panel: `quantity` of the optimal policies, of the start policy and of every arm, against KL."""
    _draw_frontier(axes, result, quantity, largest_kl)
    start = getattr(result.start, quantity)
    axes.plot(0, start.value, color=_START, marker="o", markersize=6, linestyle="none", clip_on=False, zorder=5,
              label="start policy = reference")  # fmt: skip
    for arm in result.arms:
        _draw_arm(axes, arm, result.start, quantity)
    axes.set_xscale("function", functions=(lambda kl: np.sqrt(np.maximum(kl, 0)), np.square))
    ticks = [0, 0.25, 1, 2, 4, 6, 9, 12, 16, 20, 25]
    ticks = [tick for tick in ticks if tick <= largest_kl]
    axes.set_xticks(ticks, labels=[f"{tick:g}" for tick in ticks])
    axes.set_xlim(0, largest_kl)
    axes.set_xlabel("KL to the start policy (nats per text; square-root axis)")
    axes.grid(color="#e6e6e6", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _draw_frontier(axes: Axes, result: DemoResult, quantity: str, largest_kl: float) -> None:
    optima = result.frontier.optima
    kls = [0.0, *(optimum.kl.value for optimum in optima)]
    estimates: list[Estimate] = [getattr(result.start, quantity), *(getattr(optimum, quantity) for optimum in optima)]
    values = np.array([estimate.value for estimate in estimates])
    axes.plot(kls, values, color=_OPTIMAL, linewidth=1.5, label="optimal policies, pi_ref exp(r / beta) / Z")
    if quantity == "reward":
        top = values.max() + 0.12 * (values.max() - values.min())
        # Past the last optimum the line is not known, the ceiling is.
        kls.append(max(largest_kl, kls[-1]))
        bound = [*values, result.frontier.reward_ceiling(kls[-1]).value]
        axes.fill_between(kls, bound, top, color="#f2f2f2", linewidth=0)
        axes.set_ylim(top=top)
        axes.text(
            0.98, 0.98, "no policy can be here", transform=axes.transAxes, color=_OPTIMAL, fontsize=9,
            horizontalalignment="right", verticalalignment="top",
        )  # fmt: skip
    target = getattr(result.target, quantity)
    axes.plot(result.target.kl.value, target.value, color=_OPTIMAL, marker="*", markersize=14, linestyle="none",
              markerfacecolor="white", zorder=4, label=f"optimum at beta = {result.beta:g}")  # fmt: skip


def _draw_arm(axes: Axes, arm: ArmResult, start: Measurement, quantity: str) -> None:
    style = dict(_STYLES[arm.name])
    way = [start, *(waypoint.measurement for waypoint in arm.waypoints), arm.measurement]
    axes.plot(
        [measurement.kl.value for measurement in way], [getattr(measurement, quantity).value for measurement in way],
        color=style["color"], linewidth=0.8, marker=".", markersize=4, alpha=0.7,
    )  # fmt: skip
    final: Estimate = getattr(arm.measurement, quantity)
    axes.errorbar(
        arm.measurement.kl.value, final.value, xerr=_NUM_ERRORS_SHOWN * arm.measurement.kl.error,
        yerr=_NUM_ERRORS_SHOWN * final.error, color=style["color"], linestyle="none", elinewidth=1.5, zorder=6,
    )  # fmt: skip
    axes.plot(arm.measurement.kl.value, final.value, linestyle="none", zorder=7, label=arm.label, **style)
