"""Pictures as SVG that follow the reader's light or dark scheme, the same bytes for the same numbers.

There are two of each: panels side by side, and one below the other for narrow screens.
"""

import math
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from science.records import Results

# Written in the light colours, which are then exchanged for variables. Series are those of Okabe and Ito, made readable
# on both backgrounds.
LIGHT = {"back": "#fffffe", "ink": "#1b1b1c", "faint": "#61656a", "line": "#dcdfe4"}
DARK = {"back": "#16181b", "ink": "#e8e6e3", "faint": "#a3a7ad", "line": "#3a3d42"}
SERIES = ("#0072b2", "#d55e00", "#00835f", "#a8457f", "#7a6400", "#5b5bd6")
_SERIES_DARK = ("#56b4e9", "#ff8f45", "#3ccf9f", "#e591c2", "#e0c341", "#a9a9ff")
MARKERS = ("o", "s", "D", "^", "v", "X")


def two_panels(path: Path, *, title: str, description: str) -> Iterator[tuple[Axes, Axes]]:
    """Two panels to draw on, twice: for `NAME.svg` and, one below the other, for `NAME-narrow.svg`."""
    for suffix, shape, size in (("", (1, 2), (9, 4.4)), ("-narrow", (2, 1), (4.6, 8))):
        narrow = path.with_name(f"{path.stem}{suffix}.svg")
        with picture(narrow, title=title, description=description, size=size) as figure:
            first, second = figure.subplots(*shape)
            yield first, second


@contextmanager
def picture(path: Path, *, title: str, description: str, size: tuple[float, float]) -> Iterator[Figure]:
    """A figure to draw on, written to `path` afterwards. `description` is for readers who do not see it."""
    settings = {
        "svg.fonttype": "none", "svg.hashsalt": "holdfast", "font.family": "sans-serif", "font.size": 10,
        "text.color": LIGHT["ink"], "axes.labelcolor": LIGHT["faint"], "axes.edgecolor": LIGHT["line"],
        "xtick.color": LIGHT["faint"], "ytick.color": LIGHT["faint"], "grid.color": LIGHT["line"],
        "axes.facecolor": LIGHT["back"], "figure.facecolor": LIGHT["back"], "legend.frameon": False,
        "axes.titlesize": 10, "axes.titlelocation": "left", "axes.spines.top": False, "axes.spines.right": False,
    }  # fmt: skip
    with mpl.rc_context(rc=cast("Any", settings)):
        figure = Figure(figsize=size, layout="constrained")
        yield figure
        figure.savefig(path, format="svg", metadata={"Date": None, "Creator": None, "Title": title})
    path.write_text(_themed(path.read_text(encoding="utf-8"), description), encoding="utf-8")


def points(axes: Axes, results: Results, runs: Sequence[str], measure: str, *, place: int, label: str) -> None:
    """`measure` of these runs against their KL, in the colour of this place.

    Bars are standard errors over seeds; a reward has the one of how far it is below the ceiling. Rewards themselves
    differ between worlds by what all runs have in common.
    """
    compared = "below" if measure == "reward" else measure
    kls, values, spread = ([results.mean(run, each) for run in runs] for each in ("kl", measure, compared))
    axes.errorbar(
        [each.mean for each in kls], [each.mean for each in values],
        xerr=[drawn(each.error) for each in kls], yerr=[drawn(each.error) for each in spread],
        color=SERIES[place], marker=MARKERS[place], markersize=5, linewidth=1.2, elinewidth=1, label=label,
    )  # fmt: skip


def draw_frontier(axes: Axes, results: Results, *, largest_kl: float) -> None:
    """The largest reward that a policy of each KL can have, a mean over seeds."""
    kls = [largest_kl * (step / 100) ** 2 for step in range(1, 101)]
    frontiers = results.frontiers()
    ceilings = [sum(each.reward_ceiling(kl).value for each in frontiers) / len(frontiers) for kl in kls]
    axes.plot(kls, ceilings, color=LIGHT["faint"], linewidth=1.2, linestyle="--", label="largest possible")


def drawn(error: float) -> float:
    """No bar for one seed, which has no error."""
    return error if math.isfinite(error) else 0.0


def _themed(svg: str, description: str) -> str:
    """The picture with its colours as variables, light by default and dark where the reader's scheme is."""
    pairs = {**{LIGHT[name]: DARK[name] for name in LIGHT}, **dict(zip(SERIES, _SERIES_DARK, strict=True))}
    names = {light: f"--c{place}" for place, light in enumerate(pairs)}
    svg = re.sub("|".join(names), lambda found: f"var({names[found[0]]})", svg)
    svg = re.sub(r"[ \t]+$", "", svg, flags=re.MULTILINE)
    light = "".join(f"{name}:{color};" for color, name in names.items())
    dark = "".join(f"{name}:{pairs[color]};" for color, name in names.items())
    style = f"<style>:root{{{light}}}@media (prefers-color-scheme: dark){{:root{{{dark}}}}}</style>"
    head, rest = re.split(r"(?<=>)", svg[svg.index("<svg") :], maxsplit=1)
    return f'{head[:-1]} role="img">\n <desc>{description}</desc>\n {style}{rest}'
