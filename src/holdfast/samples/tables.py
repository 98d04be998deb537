"""Samples shown by the trackers of a run: as a table (trackio, wandb), as text (TensorBoard).

The trackers are those that transformers has set up for `report_to`. What a model says is other people's text: it is
made visible, and what would be markup there is shown as it stands.
"""

import html
import logging
import sys
from collections.abc import Iterable, Sequence
from typing import Any

from transformers import TrainerCallback
from transformers.integrations import TensorBoardCallback, TrackioCallback, WandbCallback

from holdfast.record.entries import Sample
from holdfast.visible import visible

logger = logging.getLogger(__name__)

COLUMNS = ("step", "row", "prompt", "policy", "reference", "chosen", "rejected")


def show_samples(samples: Sequence[Sample], callbacks: Iterable[TrainerCallback]) -> None:
    """Shows the samples of one evaluation set at one step in each tracker among `callbacks`. A tracker that fails is
    named in a warning: it does not end a run."""
    for callback in callbacks if samples else ():
        show = next((show for kind, show in _TRACKERS if isinstance(callback, kind)), None)
        if show is None:
            continue
        try:
            show(callback, samples)
        except Exception as error:  # whatever a tracker raises
            logger.warning(
                "Samples of step %d could not be shown by %s: %s: %s", samples[0].step, type(callback).__name__,
                type(error).__name__, error,
            )  # fmt: skip


def as_rows(samples: Sequence[Sample]) -> list[list[Any]]:
    """A row of `COLUMNS` for each sample, its text made visible."""
    rows = [[getattr(sample, name) for name in COLUMNS] for sample in samples]
    return [[visible(cell, keeps_lines=True) if isinstance(cell, str) else cell for cell in row] for row in rows]


def as_markdown(samples: Sequence[Sample]) -> str:
    """The samples as Markdown: a heading for each, and each text as it stands."""
    parts: list[str] = []
    for sample in samples:
        parts.append(f"### row {sample.row}")
        for name in COLUMNS[2:]:
            text = getattr(sample, name)
            if text is not None:
                parts += [f"**{name}**", fenced(text)]
    return "\n\n".join(parts)


def fenced(text: str) -> str:
    """The text in a Markdown fence that it cannot end."""
    shown = visible(text, keeps_lines=True)
    fence = "~~~"
    while fence in shown:
        fence += "~"
    return f"{fence}text\n{shown}\n{fence}"


def _in_tensorboard(callback: Any, samples: Sequence[Sample]) -> None:
    if callback.tb_writer is not None:
        callback.tb_writer.add_text(_name(samples), as_markdown(samples), samples[0].step)
        callback.tb_writer.flush()


def _in_wandb(callback: Any, samples: Sequence[Sample]) -> None:
    wandb = sys.modules.get("wandb")
    if wandb is not None and wandb.run is not None:
        table = wandb.Table(columns=[*COLUMNS], data=as_rows(samples))
        wandb.log({_name(samples): table, "train/global_step": samples[0].step})


def _in_trackio(callback: Any, samples: Sequence[Sample]) -> None:
    trackio = sys.modules.get("trackio")
    if trackio is not None:  # its cells are Markdown
        rows = [[_plain(cell) if isinstance(cell, str) else cell for cell in row] for row in as_rows(samples)]
        table = trackio.Table(columns=[*COLUMNS], data=rows)
        trackio.log({_name(samples): table, "train/global_step": samples[0].step})  # it counts logs itself


def _plain(text: str) -> str:
    """Text that Markdown shows as it stands, without links, pictures or tags."""
    return html.escape(text, quote=False).replace("[", "\\[")


def _name(samples: Sequence[Sample]) -> str:
    return f"samples/{samples[0].dataset}"


_TRACKERS = (
    (TensorBoardCallback, _in_tensorboard),
    (WandbCallback, _in_wandb),
    (TrackioCallback, _in_trackio),
)
