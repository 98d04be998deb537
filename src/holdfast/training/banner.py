"""The six lines that a run begins with: model, data, reference, layout, memory, results.

They say what a person would otherwise look up in five places, before hours are spent. All of it is in the run's record
too. On a terminal a line that is too long goes on below its own beginning; a file gets six lines.
"""

import os
import sys
import textwrap
from collections.abc import Mapping

from holdfast.record import Dataset, Facts, Memory, Model
from holdfast.visible import visible

_INDENT = 11
_MOST_SOURCES = 6
_SIDES = ("weights", "reference", "gradients", "optimizer")


def banner(facts: Facts, introduction: str | None, results: str, *, width: int | None = None) -> str:
    """The lines about a run that begins. `introduction` is what is said of its reference, None without one, and
    `results` where they go. With `width`, lines are wrapped to so many columns."""
    reference = introduction or f"none: {', '.join(facts.loss_types)} compares with none"
    lines = {
        "model": _model(facts.model, facts),
        "data": _data(facts.data),
        "reference": reference.removeprefix("Reference: "),
        "layout": f"{facts.layout.name}: {facts.layout.line}",
        "memory": _memory(facts.memory),
        "results": results,
    }
    return "\n".join(_line(name, visible(text), width) for name, text in lines.items())


def terminal_width() -> int | None:
    """The columns of the terminal that messages go to; None where they go elsewhere."""
    try:
        return os.get_terminal_size(sys.stderr.fileno()).columns if sys.stderr.isatty() else None
    except (OSError, ValueError, AttributeError):  # a stream that stands in for it
        return None


def count(number: int) -> str:
    """A number of things in three digits: 950, 1.24 k, 494 M."""
    size, unit = float(number), ""
    for unit in ("", " k", " M", " G", " T"):
        if size < 999.5 or unit == " T":
            break
        size /= 1000
    return f"{number}" if not unit else f"{size:.3g}{unit}"


def size(num_bytes: int) -> str:
    """A number of bytes in three digits: 512 B, 1.5 GiB."""
    amount, unit = float(num_bytes), "B"
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if amount < 999.5 or unit == "TiB":
            break
        amount /= 1024
    return f"{num_bytes} B" if unit == "B" else f"{amount:.3g} {unit}"


def _model(model: Model, facts: Facts) -> str:
    share = 100 * model.num_trainable / max(1, model.num_parameters)
    trained = "all trained" if share == 100 else f"{count(model.num_trainable)} trained ({share:.2g} %)"
    adapter = "" if model.adapter is None else f", adapter {model.adapter}"
    kind = "" if model.name == model.class_name else f" ({model.class_name})"
    where = f"{facts.num_processes} x {facts.device}" if facts.num_processes > 1 else facts.device
    size = f"{count(model.num_parameters)} parameters, {trained}"
    return f"{model.name}{kind}: {size}{adapter}, {model.dtype}, on {where}"


def _data(data: Mapping[str, Dataset]) -> str:
    return "; ".join(f"{name} {_dataset(dataset)}" for name, dataset in data.items())


def _dataset(dataset: Dataset) -> str:
    if dataset.num_used is None or dataset.num_rows is None:
        return "a stream"
    text = f"{dataset.num_used:,} of {dataset.num_rows:,} pairs"
    if left_out := dataset.left_out:
        text += f" (left out: {', '.join(f'{number:,} {reason}' for reason, number in left_out.items())})"
    if sources := dataset.sources:
        first = sorted(sources.items(), key=lambda item: -item[1])[:_MOST_SOURCES]
        more = f" and {len(sources) - len(first)} more" if len(sources) > len(first) else ""
        text += f" from {', '.join(f'{name} {number:,}' for name, number in first)}{more}"
    return text


def _memory(memory: Memory) -> str:
    parts = [(name, getattr(memory, name)) for name in _SIDES]
    known = sum(amount for _, amount in parts if amount is not None)
    each = ", ".join(f"{name} {'unknown' if amount is None else size(amount)}" for name, amount in parts)
    return f"{size(known)} without activations: {each}"


def _line(name: str, text: str, width: int | None) -> str:
    line = f"{name:<{_INDENT}}{text}"
    if width is None or len(line) <= width:
        return line
    width = max(width, 2 * _INDENT)
    return "\n".join(textwrap.wrap(line, width, subsequent_indent=" " * _INDENT, break_on_hyphens=False))
