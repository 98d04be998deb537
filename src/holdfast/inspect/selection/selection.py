"""`Selection`: pairs that were chosen by a margin, and what is to be said of them."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import final

import numpy as np
from numpy.typing import NDArray

from holdfast.inspect.lines import WARNING, Line
from holdfast.inspect.ranking.shares import Values
from holdfast.inspect.ranking.written import heading, number, percent, sentence, table
from holdfast.inspect.run_numbers import DatasetNumbers, RunNumbers
from holdfast.inspect.selection.choice import chosen
from holdfast.inspect.selection.margins import are_one_model, margins_by
from holdfast.inspect.selection.request import By, Keep, Request


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Selection:
    """The chosen ones of P pairs. `margins` are those of all pairs, with their signs, and `places` the chosen ones
    among them, in order. `source` and `sources` are as in `PairNumbers`. `rows` are the rows of the chosen pairs in the
    dataset as it was loaded, and `num_rows` all its rows; those beyond P are not used by the run."""

    request: Request
    dataset: str
    beta: float
    margins: Values
    places: NDArray[np.int64]
    source: NDArray[np.int64]
    sources: Sequence[str]
    rows: NDArray[np.int64]
    num_rows: int

    @property
    def values(self) -> Values:
        """[P], the numbers by which pairs were chosen."""
        return np.abs(self.margins) if self.request.is_absolute else self.margins


def select(numbers: RunNumbers, dataset: DatasetNumbers, request: Request) -> Selection:
    """The pairs of the dataset that are asked for. ValueError where the margins cannot tell pairs apart."""
    reference, policy = dataset.reference, dataset.policy
    margins = margins_by(request.by, reference, policy, beta=numbers.beta, per_token=request.per_token)
    is_drawn = request.keep is Keep.RANDOM
    if request.by is By.IMPLICIT and not is_drawn and policy is not None and are_one_model(reference, policy):
        raise ValueError(
            f"pairs were to be chosen by how far the policy {numbers.policy} has moved from the reference "
            f"{numbers.reference}, but both give the same log-probs, so every implicit margin is 0. Name the output "
            "folder of a run that was trained from this reference, or choose by another margin (--by)."
        )
    values = np.abs(margins) if request.is_absolute else margins
    places = chosen(values, request.share, request.keep, seed=request.seed)
    return Selection(
        request=request,
        dataset=dataset.name,
        beta=numbers.beta,
        margins=margins,
        places=places,
        source=reference.source,
        sources=reference.sources,
        rows=reference.row[places],
        num_rows=len(dataset.loaded),
    )


def selection_lines(selection: Selection, notes: Sequence[str], width: int | None) -> Iterator[Line]:
    """What was chosen, and the notes, in lines of at most so many columns."""
    for note in notes:
        yield from sentence(note, width, "", WARNING)
    request, values = selection.request, selection.values
    unit = f"beta {number(selection.beta)}" if request.by is By.IMPLICIT else "nats"
    kept = values[selection.places]
    drawn = f"drawn by seed {request.seed}" if request.keep is Keep.RANDOM else request.keep.value
    yield from heading(f"{selection.dataset}: {len(kept):,} of {len(values):,} pairs, {drawn}", width)
    yield from sentence(f"{request.title} ({unit}): {_range(values)}; of the chosen ones {_range(kept)}", width)
    if (unused := selection.num_rows - len(values)) > 0:
        yield from sentence(f"{unused:,} of {selection.num_rows:,} rows are not used by the run, and not chosen", width)
    if selection.sources:
        head = ("source", "pairs", "chosen", "share", "least margin", "most")
        yield from table(head, [*_by_source(selection)], width, "  ")


def _range(values: Values) -> str:
    return f"{number(float(values.min()))} to {number(float(values.max()))}, median {number(float(np.median(values)))}"


def _by_source(selection: Selection) -> Iterator[tuple[str, ...]]:
    is_chosen = np.zeros(len(selection.margins), dtype=bool)
    is_chosen[selection.places] = True
    for code, name in [*enumerate(selection.sources), (-1, "(none)")]:
        is_of_source = selection.source == code
        if not is_of_source.any():
            continue
        kept = selection.values[is_of_source & is_chosen]
        least, most = (number(float(each)) for each in (kept.min(), kept.max())) if len(kept) else ("-", "-")
        of = int(is_of_source.sum())
        yield name, f"{of:,}", f"{len(kept):,}", percent(len(kept) / of), least, most
