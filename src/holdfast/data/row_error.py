"""`RowError`: which row of a dataset is at fault, and in which file and line it stands where that is known."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, final

from holdfast.data.files.places import Places


@final
class RowError(ValueError):
    """The row of that number (counted from 0) of the dataset `name` cannot be used. `place` is its file and line."""

    def __init__(self, name: str, row: int, problem: str, place: str | None = None) -> None:
        super().__init__(name, row, problem, place)
        self.name, self.row, self.problem, self.place = name, row, problem, place

    def __str__(self) -> str:
        place = f" ({self.place})" if self.place else ""
        return f"{self.name} dataset, row {self.row}{place}: {self.problem}"


@contextmanager
def naming_places(places: Places | None, values: Mapping[str, Any] | None = None) -> Iterator[None]:
    """A context in which a `RowError` gets the file and line of its row, for a dataset whose rows have these places.
    `values` is the only row that it can be about."""
    try:
        yield
    except RowError as error:
        place = places.of(error.row, values) if places is not None and error.place is None else None
        if place is None:
            raise
        raise RowError(error.name, error.row, error.problem, place) from error
