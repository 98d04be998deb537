"""Pictures as SVG that follow the reader's light or dark scheme, the same bytes for the same numbers."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

# Written in the light colours, which are then exchanged for variables. Series are those of Okabe and Ito, made readable
# on both backgrounds.
LIGHT = {"back": "#fffffe", "ink": "#1b1b1c", "faint": "#61656a", "line": "#dcdfe4"}
DARK = {"back": "#16181b", "ink": "#e8e6e3", "faint": "#a3a7ad", "line": "#3a3d42"}
SERIES = ("#0072b2", "#d55e00", "#00835f", "#a8457f", "#7a6400", "#5b5bd6")
_SERIES_DARK = ("#56b4e9", "#ff8f45", "#3ccf9f", "#e591c2", "#e0c341", "#a9a9ff")
MARKERS = ("o", "s", "D", "^", "v", "X")


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
    with mpl.rc_context(settings):
        figure = Figure(figsize=size, layout="constrained")
        yield figure
        figure.savefig(path, format="svg", metadata={"Date": None, "Creator": None, "Title": title})
    path.write_text(_themed(path.read_text(encoding="utf-8"), description), encoding="utf-8")


def points(
    axes: Axes, x: list[float], y: list[float], *, x_errors: list[float], y_errors: list[float], place: int, label: str,
    is_line: bool = True,
) -> None:  # fmt: skip
    """A series with error bars, in the colour and with the marker of its place."""
    axes.errorbar(
        x, y, xerr=x_errors, yerr=y_errors, color=SERIES[place], marker=MARKERS[place], markersize=5, label=label,
        linestyle="-" if is_line else "none", linewidth=1.2, elinewidth=1,
    )  # fmt: skip


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
