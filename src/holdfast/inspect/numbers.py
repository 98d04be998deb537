"""What is counted of a dataset, or of one of its sources: records, and how each is computed from `RowFacts`.

Lengths are those of all rows before truncation, since they say which `max_length` would fit. All other numbers are of
the rows that are used, as they are used.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import numpy as np

from holdfast.data.usability import UNUSABLE_REASONS
from holdfast.inspect.facts import RowFacts
from holdfast.inspect.lengths import Lengths
from holdfast.inspect.near_rows import nearly_repeated

NEARLY_EQUAL = 0.9
"""From this share of common tokens on, chosen and rejected are nearly the same."""
NUM_EXAMPLES = 5


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """How many rows something was found in, of how many, their share of these, and the first of them."""

    count: int
    num_rows: int
    share: float
    examples: tuple[int, ...]

    @classmethod
    def of(cls, rows: np.ndarray, num_rows: int) -> "Found":
        """The rows with these numbers, of so many."""
        examples = tuple(int(row) for row in rows[:NUM_EXAMPLES])
        share = len(rows) / num_rows if num_rows else 0.0
        return cls(count=len(rows), num_rows=num_rows, share=share, examples=examples)


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Tokens:
    """Tokens of an epoch, of both completions of each pair: `seen` by the model (the metric `num_tokens`), `scored`
    ones among them, those of completions that are `unscored`, and those `beyond` `max_length`."""

    seen: int
    scored: int
    unscored: int
    beyond: int


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Repeats:
    """Rows that say again what another row says. `identical` pairs repeat an earlier row, and
    `nearly_identical` ones nearly do (see `near_rows`; an estimate). A row of `contradictions` has
    another row beside it that prefers the other of the same two completions. `shared_prompts` counts prompts that
    several rows have, `most_pairs` the rows of the most frequent one, and `sharing` are the rows of all of these."""

    identical: Found
    nearly_identical: Found
    contradictions: Found
    num_prompts: int
    shared_prompts: int
    most_pairs: int
    sharing: Found


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class LengthBias:
    """What the number of scored tokens says about which completion was chosen. `mean_difference` is that of chosen
    minus rejected. `rule_accuracy` is how often a rule is right that prefers the longer completion: `longer`, and half
    of `equal`. 0.5 is chance."""

    mean_chosen: float
    mean_rejected: float
    mean_difference: float
    longer: float
    equal: float
    shorter: float
    rule_accuracy: float


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Numbers:
    """All that is counted of a set of rows.

    `lengths` are of `prompt`, `chosen`, `rejected` and `row`, the longer one of a pair's two sequences. `truncated` are
    used rows of which tokens are cut off. `mean_overlap` is the mean share of scored tokens that both completions have,
    and `nearly_equal` are pairs with at least `NEARLY_EQUAL` of it, the most similar first. Where no row is used, what
    is a mean over pairs is None.
    """

    num_rows: int
    num_used: int
    left_out: dict[str, Found]
    lengths: dict[str, Lengths]
    truncated: Found
    tokens: Tokens
    repeats: Repeats
    mean_overlap: float | None
    nearly_equal: Found
    length_bias: LengthBias | None


def numbers_of(facts: RowFacts) -> Numbers:
    """The numbers of these rows, of which there is at least one."""
    used = facts.usable()
    row = facts.prompt + np.maximum(facts.chosen, facts.rejected)
    lengths = {"prompt": facts.prompt, "chosen": facts.chosen, "rejected": facts.rejected, "row": row}
    is_near = used.overlap >= NEARLY_EQUAL
    by_overlap = np.argsort(-used.overlap[is_near], kind="stable")
    return Numbers(
        num_rows=len(facts),
        num_used=len(used),
        left_out={
            reason: Found.of(facts.index[facts.reason == code], len(facts))
            for code, reason in enumerate(UNUSABLE_REASONS)
            if (facts.reason == code).any()
        },
        lengths={name: Lengths.of(values) for name, values in lengths.items()},
        truncated=Found.of(used.index[used.num_beyond > 0], len(used)),
        tokens=Tokens(
            seen=int(used.num_tokens.sum()),
            scored=int(used.chosen_scored.sum() + used.rejected_scored.sum()),
            unscored=int(used.num_unscored.sum()),
            beyond=int(used.num_beyond.sum()),
        ),
        repeats=_repeats(used),
        mean_overlap=float(used.overlap.mean()) if len(used) else None,
        nearly_equal=Found.of(used.index[is_near][by_overlap], len(used)),
        length_bias=_length_bias(used) if len(used) else None,
    )


def by_source(facts: RowFacts, sources: Sequence[str]) -> dict[str, Numbers]:
    """The numbers of each source's rows."""
    return {name: numbers_of(facts.where(facts.source == code)) for code, name in enumerate(sources)}


def leaked(facts: RowFacts, training: RowFacts) -> Found:
    """The used rows of an evaluation set whose prompt is one of those that are trained on."""
    used = facts.usable()
    is_known = np.isin(used.prompt_key, training.usable().prompt_key)
    return Found.of(used.index[is_known], len(used))


def _repeats(used: RowFacts) -> Repeats:
    pairs = np.stack([used.prompt_key, used.chosen_key, used.rejected_key], axis=1)
    swapped = pairs[:, [0, 2, 1]]
    _, number_of, sizes = np.unique(used.prompt_key, return_inverse=True, return_counts=True)
    _, first, same = np.unique(pairs, axis=0, return_index=True, return_inverse=True)
    number_of_both = np.unique(np.concatenate([pairs, swapped]), axis=0, return_inverse=True)[1].reshape(-1)
    is_contradicted = np.isin(number_of_both[: len(used)], number_of_both[len(used) :])
    repeats_earlier = first[same.reshape(-1)] != np.arange(len(used))
    return Repeats(
        identical=Found.of(used.index[repeats_earlier], len(used)),
        nearly_identical=Found.of(used.index[nearly_repeated(used.signature) & ~repeats_earlier], len(used)),
        contradictions=Found.of(used.index[is_contradicted], len(used)),
        num_prompts=len(sizes),
        shared_prompts=int((sizes > 1).sum()),
        most_pairs=int(sizes.max(initial=0)),
        sharing=Found.of(used.index[sizes[number_of] > 1], len(used)),
    )


def _length_bias(used: RowFacts) -> LengthBias:
    difference = used.chosen_scored - used.rejected_scored
    longer, equal = float((difference > 0).mean()), float((difference == 0).mean())
    return LengthBias(
        mean_chosen=float(used.chosen_scored.mean()),
        mean_rejected=float(used.rejected_scored.mean()),
        mean_difference=float(difference.mean()),
        longer=longer,
        equal=equal,
        shorter=float((difference < 0).mean()),
        rule_accuracy=longer + equal / 2,
    )
