"""Whether progress bars are shown while data and models are loaded and prepared: `disable_tqdm` of a run, for the bars
of `datasets`, `transformers` and `huggingface_hub` too. In a file or a pipe there are none: they redraw a line.

Each of them has one switch for the whole process, which is put back as it was.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import datasets
from huggingface_hub import utils as hub
from transformers.utils import logging as transformers

from holdfast.progress import is_notebook, is_terminal


@contextmanager
def bars(*, are_shown: bool) -> Iterator[None]:
    """A context in which progress bars are shown or not. Those that the user has switched off stay off."""
    if are_shown and (is_terminal() or is_notebook()):
        yield
        return
    were_shown = (
        not datasets.are_progress_bars_disabled(),
        transformers.is_progress_bar_enabled(),
        not hub.are_progress_bars_disabled(),
    )
    datasets.disable_progress_bars()
    transformers.disable_progress_bar()  # and that of the hub
    try:
        yield
    finally:
        _show(*were_shown)


def _show(of_datasets: bool, of_transformers: bool, of_hub: bool) -> None:
    if of_datasets:
        datasets.enable_progress_bars()
    if of_transformers:
        with warnings.catch_warnings():  # of an environment variable that keeps the hub's off
            warnings.simplefilter("ignore")
            transformers.enable_progress_bar()
        if not of_hub:
            hub.disable_progress_bars()
    elif of_hub:
        hub.enable_progress_bars()
