"""The lengths of a dataset as pictures: of prompts and completions, of whole rows, and of chosen minus rejected."""

import io
import warnings
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from holdfast.inspect.data import DataInspection, DatasetInspection
from holdfast.inspect.facts import RowFacts
from holdfast.store.files import write_durably
from holdfast.visible import visible

_CHOSEN, _REJECTED, _PROMPT, _ROW, _LIMIT = "#0072B2", "#D55E00", "#777777", "#56B4E9", "#222222"
_NUM_BINS = 50
_SHOWN = 0.995
"""So many of the rows decide how far an axis goes: a single very long row would squeeze all others into one bar."""


def length_figure(inspections: tuple[DatasetInspection, ...], max_length: int | None) -> Figure:
    """A figure with a line of three histograms for each dataset."""
    figure = Figure(figsize=(12, 3.2 * len(inspections)), layout="constrained")
    axes = figure.subplots(len(inspections), 3, squeeze=False)
    for line, inspection in zip(axes, inspections, strict=True):
        _draw_sides(line[0], inspection.facts)
        _draw_rows(line[1], inspection.facts, max_length)
        _draw_differences(line[2], inspection.facts)
        line[0].set_ylabel(f"{visible(inspection.name)}\nrows", parse_math=False)
    return figure


def png(figure: Figure, dots_per_inch: int = 110) -> bytes:
    """The figure as a PNG file's content."""
    picture = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")  # of a dataset's name
        figure.savefig(picture, dpi=dots_per_inch, format="png")
    return picture.getvalue()


def write_png(inspection: DataInspection, path: Path) -> None:
    """Writes the picture of all datasets."""
    write_durably(path, png(length_figure(inspection.datasets, inspection.max_length)))


def _draw_sides(axes: Axes, facts: RowFacts) -> None:
    sides = {
        "prompt": (facts.prompt, _PROMPT),
        "chosen": (facts.chosen, _CHOSEN),
        "rejected": (facts.rejected, _REJECTED),
    }
    bins = _bins(np.concatenate([values for values, _ in sides.values()]))
    for name, (values, color) in sides.items():
        axes.hist(values.clip(bins[0], bins[-1]), bins, label=name, color=color, histtype="step", linewidth=1.4)
    axes.legend(frameon=False, fontsize=8)
    _label(axes, "prompt, chosen, rejected: tokens", bins)


def _draw_rows(axes: Axes, facts: RowFacts, max_length: int | None) -> None:
    rows = facts.prompt + np.maximum(facts.chosen, facts.rejected)
    bins = _bins(rows)
    axes.hist(rows.clip(bins[0], bins[-1]), bins, color=_ROW)
    if max_length is not None and max_length <= bins[-1]:
        axes.axvline(max_length, color=_LIMIT, linestyle="--", linewidth=1)
        axes.annotate(f" max_length {max_length}", (max_length, 0.97), xycoords=("data", "axes fraction"), fontsize=8,
                      verticalalignment="top")  # fmt: skip
    _label(axes, "prompt and the longer completion: tokens", bins)


def _draw_differences(axes: Axes, facts: RowFacts) -> None:
    used = facts.usable()
    difference = used.chosen_scored - used.rejected_scored
    most = max(1.0, float(np.quantile(np.abs(difference), _SHOWN)) if len(used) else 1.0)
    bins = np.linspace(-most, most, _NUM_BINS + 2).tolist()  # an odd number of bars: the middle one is around 0
    axes.hist(difference.clip(-most, most), bins, color=_CHOSEN)
    axes.axvline(0, color=_LIMIT, linewidth=0.8)
    _label(axes, "chosen minus rejected: scored tokens of used pairs", bins)


def _bins(values: np.ndarray) -> list[float]:
    most = int(np.quantile(values, _SHOWN, method="inverted_cdf"))
    width = max(1, -(-(most + 1) // _NUM_BINS))
    return np.arange(0.0, most + 1 + width, width).tolist()


def _label(axes: Axes, text: str, bins: list[float]) -> None:
    axes.set_xlabel(text, fontsize=9)
    axes.set_xlim(bins[0], bins[-1])
    axes.tick_params(labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)
