"""What a report says of the same pairs after training: what flipped, what moved, what is displaced or memorised."""

from collections.abc import Sequence

from holdfast.inspect.ranking.counts import Counts
from holdfast.inspect.ranking.groups import Group
from holdfast.inspect.ranking.movement import MEMORISED, Flips, Movement
from holdfast.inspect.ranking.reference_sections import groups_section
from holdfast.inspect.ranking.sections import Histogram, Section, Table, spread_table
from holdfast.inspect.ranking.shares import Share
from holdfast.inspect.ranking.written import counted, number, percent, with_error

_ACCURACY = ": `rewards/accuracies` of these pairs"
_USUAL = (
    "Both fall and the margin rises: the usual squeeze of DPO. It is no fault while the chosen completion falls by "
    "little per token; add `sft` to loss_type, lower the learning rate or raise beta where it does not."
)


def training_sections(whole: Group, sources: Sequence[Group], lengths: Sequence[Group]) -> tuple[Section, ...]:
    """The sections of a dataset, its sources and its lengths; none before training."""
    if whole.movement is None or whole.policy is None:
        return ()
    return (
        _flips(whole.movement, whole.reference, whole.policy),
        _moves(whole.movement),
        *groups_section("Training by source and length", sources, lengths, _groups),
    )


def _flips(movement: Movement, before: Counts, after: Counts) -> Section:
    flips = movement.by_sum
    said = [
        f"Ranked wrongly by the sum of log-probs: {with_error(before.by_sum.wrong)} before training, "
        f"{with_error(after.by_sum.wrong)} after; per token {with_error(before.per_token.wrong)} before, "
        f"{with_error(after.per_token.wrong)} after.",
        f"Of the pairs that were wrong by sum, {counted(flips.flipped_of_wrong)} flipped. The margin of "
        f"{flips.towards.count:,} more rose without flipping. {flips.unflipped.count:,} were right and are wrong now.",
    ]
    head = ("of all pairs", "flipped", "unflipped", "still wrong", "still right")
    rows = (("by sum", *_flip_cells(movement.by_sum)), ("per token", *_flip_cells(movement.per_token)))
    return Section(title="What flipped", sentences=tuple(said), tables=(Table(head=head, rows=rows),))


def _flip_cells(flips: Flips) -> tuple[str, ...]:
    shares: tuple[Share, ...] = (flips.flipped, flips.unflipped, flips.still_wrong, flips.still_right)
    return tuple(f"{share.count:,} ({percent(share.share)})" for share in shares)


def _moves(movement: Movement) -> Section:
    said = [
        f"The margin rose in {counted(movement.rose)}{_ACCURACY if movement.loss is not None else ''}.",
        f"Displaced, the chosen completion lost log-prob: {counted(movement.displaced)}; its margin rose all the same "
        f"in {counted(movement.squeezed)}. Both completions fell in {counted(movement.both_fell)}, and the rejected "
        f"one rose in {counted(movement.rejected_rose)}.",
    ]
    if (movement.squeezed.share or 0) > 0.5:
        said.append(_USUAL)
    said.append(
        f"Memorised, the chosen completion now has a probability per token of {MEMORISED} or more, and had less: "
        f"{counted(movement.memorised)}."
    )
    if movement.length_correlation is not None:
        said.append(
            "Correlation of the margin's change with the difference of lengths: "
            f"{number(movement.length_correlation)}. Far from 0, length is part of what was learnt."
        )
    if movement.normalised_ches_correlation is not None:
        said.append(
            "Correlation of ranks between CHES and the chosen completion's change (below 0: the higher CHES, the more "
            f"it fell): {number(movement.ches_correlation)}, per token with normalised CHES "
            f"{number(movement.normalised_ches_correlation)}."
        )
    spreads = [
        ("chosen", movement.chosen),
        ("rejected", movement.rejected),
        ("margin", movement.margins),
        ("chosen per token", movement.chosen_per_token),
        ("rejected per token", movement.rejected_per_token),
        ("DPO loss", movement.loss),
    ]
    return Section(
        title="What moved",
        sentences=tuple(said),
        tables=(spread_table(spreads, "change, nats", "policy minus reference"),),
        histograms=(
            Histogram(title="pairs by the change of the chosen log-prob, nats", bins=movement.chosen.histogram),
        ),
    )


def _groups(groups: Sequence[Group], of: str) -> Table:
    head = (of, "pairs", "wrong before", "after", "flipped", "rose", "displaced", "memorised", "chosen", "rejected")
    rows = tuple(
        (group.name, f"{group.reference.num_pairs:,}", *_cells(group.reference, group.policy, group.movement))
        for group in groups
        if group.policy is not None and group.movement is not None
    )
    return Table(head=head, rows=rows, caption="wrong by sum; flipped of the wrong ones; changes are medians, in nats")


def _cells(before: Counts, after: Counts, movement: Movement) -> tuple[str, ...]:
    return (
        with_error(before.by_sum.wrong),
        with_error(after.by_sum.wrong),
        percent(movement.by_sum.flipped_of_wrong.share),
        percent(movement.rose.share),
        percent(movement.displaced.share),
        percent(movement.memorised.share),
        number(movement.chosen.quantiles[0.5]),
        number(movement.rejected.quantiles[0.5]),
    )
