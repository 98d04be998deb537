"""How many rows each source of a mixture gives: what a weight means.

A weight is a source's share of the pairs, in proportion to the other weights, whatever the sources' numbers of rows.
With the weights 3 and 1 three of four pairs come from the first source. This is what `interleave_datasets` calls
probabilities. It is neither the fraction of a source's rows that is taken nor how often its rows are repeated: with the
numbers of rows, those follow from it, and are said.

Given up: shares drawn at random, which would be right on average only.
"""

import difflib
import math
from collections.abc import Collection, Mapping
from typing import Any, Literal, get_args

Stopping = Literal["first_exhausted", "all_exhausted"]
"""Where a mixture with weights ends: before a row comes twice, or once every row has come. The names are those of
`datasets.interleave_datasets`."""

STOPPINGS: tuple[str, ...] = get_args(Stopping)

MAX_REPEATS = 1_000
"""How often a mixture may hold the rows of a source."""


class WeightError(ValueError):
    """A weight that cannot be; `source` is the name of its source, None where all weights together are at fault."""

    def __init__(self, source: str | None, problem: str) -> None:
        super().__init__(source, problem)
        self.source, self.problem = source, problem

    def __str__(self) -> str:
        return self.problem


def check_weights(names: Collection[str], weights: Mapping[str, Any] | None) -> None:
    """`WeightError` where the weights are not one number of at least 0 for each of the sources `names`, or all 0."""
    if weights is None:
        return
    for name in weights:
        if name not in names:
            near = difflib.get_close_matches(str(name), names, n=1)
            hint = f"Did you mean {near[0]!r}?" if near else f"The sources are {sorted(names)}."
            raise WeightError(None, f"a weight was given for {name!r}, and there is no such source. {hint}")
    for name in names:
        if name not in weights:
            raise WeightError(
                name,
                f"the source {name!r} has no weight, and others have: {dict(weights)}. Weights are shares of the "
                "mixture, so give every source one, or none and every row is there once.",
            )
        weight = weights[name]
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 <= weight < math.inf:
            raise WeightError(
                name,
                f"the weight of the source {name!r} must be a number of at least 0; found {weight!r}. It is the "
                "source's share of the pairs, in proportion to the other weights.",
            )
    if not any(weights.values()):
        raise WeightError(None, f"all weights are 0: {dict(weights)}. Give one that is more, or leave them out.")


def check_stopping(stopping: Any, weights: Any) -> None:
    """ValueError where `stopping` is none of `STOPPINGS`, or was given without weights."""
    if stopping is None:
        return
    if stopping not in STOPPINGS:
        raise ValueError(f"stopping={stopping!r} was asked for; it is one of {list(STOPPINGS)}.")
    if weights is None:
        raise ValueError(
            f"stopping={stopping!r} was asked for without weights; then every row of every source is there once. Give "
            "weights, or leave it out."
        )


def rows_of_sources(
    lengths: Mapping[str, int], weights: Mapping[str, float] | None, stopping: Stopping
) -> dict[str, int]:
    """How many rows of the mixture come from each source, where `lengths` are the sources' numbers of rows.

    Without weights that is all of them, once. With weights the numbers are in proportion to them, to the nearest row:
    with "first_exhausted" as many as there can be without a row that comes twice, with "all_exhausted" as few as there
    can be with every row. `WeightError` where a weight of more than 0 gives no row, or rows would come more than
    `MAX_REPEATS` times.
    """
    if weights is None:
        return dict(lengths)
    rows_per_weight = {name: length / weights[name] for name, length in lengths.items() if weights[name]}
    scale = (min if stopping == "first_exhausted" else max)(rows_per_weight.values())
    counts = {}
    for name, length in lengths.items():
        exact = weights[name] * scale
        if exact > MAX_REPEATS * length:
            raise WeightError(
                name,
                f"with the weight {weights[name]:g} the {length} row(s) of the source {name!r} would each come "
                f"{exact / length:,.0f} times; {MAX_REPEATS} is the most. Lower the weight, or take "
                'stopping="first_exhausted".',
            )
        counts[name] = math.floor(exact + 0.5)
        if weights[name] and not counts[name]:
            raise WeightError(
                name,
                f"with the weight {weights[name]:g} the source {name!r} gives {exact:.2g} of a row, so none, to a "
                f"mixture that ends before a row comes twice. Raise the weight, set it to 0, or take "
                'stopping="all_exhausted".',
            )
    return counts


def counted(lengths: Mapping[str, int], counts: Mapping[str, int], weights: Mapping[str, float] | None) -> str:
    """What a mixture holds of each source, in one line."""
    total = sum(counts.values())
    parts = []
    for name, length in lengths.items():
        count = counts[name]
        share = f"{100 * count / total:.3g} %"
        of_all = f"all {length}" if count == length else f"{count} of {length}"
        if count > length:
            of_all = f"{count} from {length}"
        repeated = f", each {count / length:.3g} times on average" if count > length else ""
        weight = "" if weights is None else f", weight {weights[name]:g}"
        parts.append(f"{name!r} {of_all} rows ({share}{weight}{repeated})")
    return f"the mixture has {total} rows: {', '.join(parts)}"
