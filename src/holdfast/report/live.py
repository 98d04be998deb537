"""`LiveReport`: a callback that writes a run's page anew while it trains, at no more than a fiftieth of its time.

A page is written when a log comes and what has been spent on pages, with one more, is still within that share. So a
short run has none before its end, and a long one has a page that is seldom older than a minute. A browser that shows it
loads it again by itself. A page that cannot be written does not end a run: that is said once. Given up: the picture and
the JSON, which are written at the end.
"""

import logging
import time
from pathlib import Path
from typing import Any, final

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from holdfast.record.reading import has_record
from holdfast.report.files import NAME, write_page
from holdfast.report.run import read_run

logger = logging.getLogger(__name__)

SHARE = 0.02
REFRESH_SECONDS = 20
_FIRST_GUESS = 0.5
"""Seconds that a page is thought to take before the first one was written."""


@final
class LiveReport(TrainerCallback):
    """Writes `report.html` into the run's output folder while it trains, on the first process, in at most `share` of
    the time. The run must have a record (`run_record`)."""

    def __init__(self, share: float = SHARE, refresh_seconds: int = REFRESH_SECONDS) -> None:
        self.has_begun = False
        """Whether training has begun on this process, which is the first one."""
        self.num_written = 0
        self._share = share
        self._refresh_seconds = refresh_seconds
        self._began = self._spent = 0.0
        self._next = _FIRST_GUESS
        self._has_failed = False

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """See `transformers.TrainerCallback`: the time is counted from here."""
        self.has_begun = state.is_world_process_zero
        self._began, self._spent = time.monotonic(), 0.0

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """See `transformers.TrainerCallback`: writes the page where there is time for it."""
        now = time.monotonic()
        is_in_time = self._spent + self._next <= self._share * (now - self._began)
        if not (state.is_world_process_zero and is_in_time) or self._has_failed:
            return
        folder = Path(str(args.output_dir))
        try:
            if has_record(folder):
                write_page((read_run(folder),), folder / f"{NAME}.html", refresh_seconds=self._refresh_seconds)
                self.num_written += 1
        except Exception as error:  # whatever is wrong with a page, a run is not lost over it
            self._has_failed = True
            words = f"{type(error).__name__}: {error}"
            logger.warning("The report of the run in %s cannot be written (%s). The run goes on.", folder, words)
        self._next = time.monotonic() - now
        self._spent += self._next
