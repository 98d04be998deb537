"""The picture of a recipe: four curves of each run, as SVG that follows the reader's light or dark scheme.

There are two of each: four panels in a square, and in one column for narrow screens.
"""

import re
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("svg")

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

PANELS = {
    "rewards/accuracies": "share of held-out pairs ranked rightly",
    "rewards/margins": "margin of the rewards, held-out pairs",
    "logps/chosen": "log-prob of chosen, held-out pairs (nats)",
    "logps/rejected": "log-prob of rejected, held-out pairs (nats)",
}
# Written in these colours, and then exchanged for variables. Series are those of Okabe and Ito, made readable on both.
LIGHT = {"back": "#fffffe", "ink": "#1b1b1c", "faint": "#61656a", "line": "#dcdfe4"}
DARK = {"back": "#16181b", "ink": "#e8e6e3", "faint": "#a3a7ad", "line": "#3a3d42"}
SERIES_LIGHT = ("#0072b2", "#d55e00", "#00835f", "#a8457f")
SERIES_DARK = ("#56b4e9", "#ff8f45", "#3ccf9f", "#e591c2")
DASHES = ("-", "--", ":", "-.")


def draw(found: dict[str, Any], folder: Path) -> None:
    """Writes both pictures of what `run.py` publishes as JSON: `NAME.svg` and `NAME-narrow.svg`."""
    _draw(found, folder / f"{found['recipe']}.svg", num_columns=2, size=(9, 6))
    _draw(found, folder / f"{found['recipe']}-narrow.svg", num_columns=1, size=(4.6, 10))


def _draw(found: dict[str, Any], path: Path, *, num_columns: int, size: tuple[float, float]) -> None:
    settings = {
        "svg.fonttype": "none", "svg.hashsalt": "holdfast", "font.family": "sans-serif", "font.size": 10,
        "text.color": LIGHT["ink"], "axes.labelcolor": LIGHT["faint"], "axes.edgecolor": LIGHT["line"],
        "xtick.color": LIGHT["faint"], "ytick.color": LIGHT["faint"], "grid.color": LIGHT["line"],
        "axes.facecolor": LIGHT["back"], "figure.facecolor": LIGHT["back"],
    }  # fmt: skip
    with plt.rc_context(settings):
        figure, axes = plt.subplots(
            4 // num_columns, num_columns, figsize=size, sharex=True, squeeze=False, layout="constrained"
        )
        for (name, title), panel in zip(PANELS.items(), axes.flat, strict=True):
            _panel(panel, name, title, found["runs"])
        for panel in axes[-1]:
            panel.set_xlabel("optimizer step")
        runs = zip(found["runs"], SERIES_LIGHT, DASHES, strict=False)
        lines = [Line2D([], [], color=color, linestyle=dash, linewidth=2, label=run) for run, color, dash in runs]
        figure.legend(
            handles=lines, loc="outside upper center", ncols=len(lines) if num_columns > 1 else 2, frameon=False
        )
        figure.savefig(path, format="svg", metadata={"Date": None, "Creator": None, "Title": found["recipe"]})
        plt.close(figure)
    path.write_text(_themed(path.read_text(encoding="utf-8"), _description(found)), encoding="utf-8")


def _panel(panel: Axes, name: str, title: str, runs: dict[str, Any]) -> None:
    for curves, color, dash in zip(runs.values(), SERIES_LIGHT, DASHES, strict=False):
        steps, values, margins = (curves["eval"][key] for key in ("step", name, "rewards/margins"))
        if name == "rewards/accuracies":  # while policy and reference are one model, no pair is ranked
            steps, values = zip(*((s, v) for s, v, m in zip(steps, values, margins, strict=True) if m), strict=True)
        panel.plot(steps, values, color=color, linestyle=dash, linewidth=2)
    panel.set_title(title, loc="left", fontsize=10)
    panel.grid(axis="y")
    panel.spines[["top", "right"]].set_visible(False)


def _themed(svg: str, description: str) -> str:
    """The picture with its colours as variables, light by default and dark where the reader's scheme is."""
    pairs = {**{LIGHT[name]: DARK[name] for name in LIGHT}, **dict(zip(SERIES_LIGHT, SERIES_DARK, strict=True))}
    names = {light: f"--c{place}" for place, light in enumerate(pairs)}
    svg = re.sub("|".join(names), lambda found: f"var({names[found[0]]})", svg)
    svg = re.sub(r"[ \t]+$", "", svg, flags=re.MULTILINE)
    light = "".join(f"{name}:{color};" for color, name in names.items())
    dark = "".join(f"{name}:{pairs[color]};" for color, name in names.items())
    style = f"<style>:root{{{light}}}@media (prefers-color-scheme: dark){{:root{{{dark}}}}}</style>"
    head, rest = re.split(r"(?<=>)", svg[svg.index("<svg") :], maxsplit=1)
    return f'{head[:-1]} role="img">\n <desc>{description}</desc>\n {style}{rest}'


def _description(found: dict[str, Any]) -> str:
    """What a reader who does not see the picture is told: where each curve begins and ends."""
    words = []
    for run, curves in found["runs"].items():
        ends = [f"{name} {curves['eval'][name][0]:.3g} to {curves['eval'][name][-1]:.3g}" for name in PANELS]
        words.append(f"{run}: {', '.join(ends)}")
    return "; ".join(words)
