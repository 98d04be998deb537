"""Metrics by source in evaluation: which data sets have them, and what is said where one has not."""

import logging
from collections.abc import Callable, Mapping
from typing import Any, final

from torch import Tensor

from holdfast.data.columns import SOURCE
from holdfast.data.mixing.source_column import (
    WithSources,
    are_sources,
    may_have_sources,
    why_not_by_source,
    why_not_these,
)
from holdfast.metrics import SourceTally, SumAndCount, means

logger = logging.getLogger(__name__)


@final
class BySource:
    """The metrics of an evaluation's pairs of each source. With `is_main` this process logs."""

    def __init__(self, *, is_main: bool) -> None:
        self._is_main = is_main
        self._said: set[str] = set()
        self.begin()

    def begin(self) -> None:
        """Begins an evaluation."""
        self._tally = SourceTally()

    def collator(self, collator: Any, dataset: Any, description: str, *, keeps_column: bool) -> Any:
        """The collator for a dataset that is evaluated: `collator` itself, or around it one that gives the sources."""
        if not may_have_sources(dataset):
            return collator
        reason = why_not_by_source(dataset)
        if reason is not None:
            self._say(description, reason)
        return collator if reason is not None else WithSources(collator, keeps_column=keeps_column)

    def add(self, names: tuple[str, ...], metrics: Mapping[str, SumAndCount]) -> None:
        """Adds the metrics of a batch, one for each of the names."""
        self._tally.add(names, metrics)

    def metrics(self, dataset: Any, sum_over_processes: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """`rewards/margins/maths`, ...: the metrics of the evaluation of this dataset, for each source. All processes
        must ask."""
        if not may_have_sources(dataset):
            return {}
        totals = self._tally.over_processes(sum_over_processes)
        reason = why_not_these(totals)
        if reason is not None:
            self._say("evaluation", reason)
        if reason is not None or not are_sources(totals):
            return {}
        return {
            f"{name}/{source}": value
            for source, of_source in totals.items()
            for name, value in means(of_source).items()
        }

    def _say(self, description: str, reason: str) -> None:
        message = f"The column {SOURCE!r} of the data of the {description.lower()} {reason}: no metrics by source."
        if message not in self._said and self._is_main:
            logger.warning(message)
        self._said.add(message)
