"""Whether progress bars are shown while data and models are loaded and prepared: `disable_tqdm` of a run, for the bars
of `datasets`, `transformers` and `huggingface_hub` too.

Each of them has one switch for the whole process, which is put back as it was.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import datasets
from huggingface_hub import utils as hub
from transformers.utils import logging as transformers


@contextmanager
def bars(*, are_shown: bool) -> Iterator[None]:
    """A context in which progress bars are shown or not. Those that the user has switched off stay off."""
    if are_shown:
        yield
        return
    with ExitStack() as stack:
        if not hub.are_progress_bars_disabled():
            stack.callback(hub.enable_progress_bars)
        else:
            stack.callback(hub.disable_progress_bars)  # the switch of transformers moves this one too
        if transformers.is_progress_bar_enabled():
            stack.callback(transformers.enable_progress_bar)
        if not datasets.are_progress_bars_disabled():
            stack.callback(datasets.enable_progress_bars)
        transformers.disable_progress_bar()
        datasets.disable_progress_bars()
        yield
