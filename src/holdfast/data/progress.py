"""Whether progress bars are shown while data are read and prepared: `disable_tqdm` of a run, for `datasets`' bars too.

`datasets` has one switch for the whole process, which is put back as it was.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from datasets import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars


@contextmanager
def bars(*, are_shown: bool) -> Iterator[None]:
    """A context in which bars of `datasets` are shown or not. Where the user has switched them off, they stay off."""
    if are_shown or are_progress_bars_disabled():
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()
