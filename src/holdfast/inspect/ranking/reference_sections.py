"""What a report says of pairs under the reference: how they are ranked, what it takes to flip them, lengths, CHES."""

from collections.abc import Callable, Sequence

from holdfast.inspect.ranking.counts import Counts, Flipping, Likeness
from holdfast.inspect.ranking.flipping import Objective
from holdfast.inspect.ranking.groups import Group
from holdfast.inspect.ranking.sections import Histogram, Section, Table, spread_table
from holdfast.inspect.ranking.written import counted, number, percent, with_error

_LN_2 = "ln 2 = 0.693"
TableOf = Callable[[Sequence[Group], str], Table]
"""Makes a table of groups; the text is what the groups are of."""


def reference_sections(
    whole: Group, sources: Sequence[Group], lengths: Sequence[Group], objective: Objective | None, losses: str
) -> tuple[Section, ...]:
    """The sections of a dataset, its sources and its lengths. `losses` are the names of the run's losses."""
    counts = whole.reference
    return (
        _ranking(counts),
        _flipping(counts.flipping, objective, losses),
        _length(counts),
        _likeness(counts.likeness, counts.num_pairs),
        *groups_section("The reference by source and length", sources, lengths, _groups),
    )


def groups_section(
    title: str, sources: Sequence[Group], lengths: Sequence[Group], table_of: TableOf
) -> tuple[Section, ...]:
    """The tables of sources and lengths, as far as there are several groups."""
    tables = [
        table_of(groups, of)
        for groups, of in ((sources, "source"), (lengths, "tokens of the longer"))
        if len(groups) > 1
    ]
    return (Section(title=title, sentences=(), tables=tuple(tables)),) if tables else ()


def _ranking(counts: Counts) -> Section:
    by_sum, per_token = counts.by_sum, counts.per_token
    said = [
        f"Ranked wrongly by the sum of log-probs: {counted(by_sum.wrong)}. Per token: {counted(per_token.wrong)}. A "
        "coin would have 50 %."
    ]
    if by_sum.tied.count or per_token.tied.count:
        said.append(f"Ties, which count as right: {by_sum.tied.count:,} by sum, {per_token.tied.count:,} per token.")
    if (alone := counts.length.wrong_by_length).count:
        said.append(f"Wrong by the sum and right per token, since the chosen completion is longer: {counted(alone)}.")
    spreads = [
        ("margin of sums", by_sum.margins),
        ("margin per token", per_token.margins),
        ("chosen per token", counts.chosen),
        ("rejected per token", counts.rejected),
    ]
    return Section(
        title="How the reference ranks the pairs",
        sentences=tuple(said),
        tables=(spread_table(spreads, "nats", "margin: log p(chosen) - log p(rejected)"),),
        histograms=(Histogram(title="pairs by the margin of sums, nats", bins=by_sum.margins.histogram),),
    )


def _flipping(flipping: Flipping | None, objective: Objective | None, losses: str) -> Section:
    title = "What it takes to flip the wrong pairs"
    if flipping is None or objective is None:
        return Section(title=title, sentences=(f"Nothing is said of it: {losses} compares with no reference.",))
    if flipping.loss is None:
        return Section(title=title, sentences=("No pair is ranked wrongly by the sum of log-probs.",))
    beta = f"{objective.options.beta:g}"
    said = [
        f"Every pair's DPO loss starts at {_LN_2} (beta {beta}). The policy ranks a pair right once its loss is at "
        "most -log sigma(beta c), where the reference is wrong by c nats (Chen et al. 2024, Theorem 4.1).",
        f"Half of the {flipping.loss.num_values:,} wrong pairs flip only at a loss of "
        f"{number(flipping.loss.quantiles[0.5])} "
        "or less. " + " ".join(f"Below {limit}: {counted(share)}." for limit, share in flipping.only_below.items()),
        "The optimum of DPO would rank wrongly, if a share of raters prefers chosen: "
        + ", ".join(
            f"{with_error(share)} at {100 * agreement:.0f} %" for agreement, share in flipping.at_optimum.items()
        )
        + ".",
        *_own_loss(flipping, objective, losses),
    ]
    spreads = [("DPO loss to flip", flipping.loss), ("the run's loss", flipping.own_loss)]
    return Section(title=title, sentences=tuple(said), tables=(spread_table(spreads, "of wrong pairs"),))


def _own_loss(flipping: Flipping, objective: Objective, losses: str) -> list[str]:
    """What is said of losses other than DPO's own."""
    if objective.obstacle is not None:
        return [f"How low the loss of this run must go cannot be stated: {objective.obstacle}."]
    if objective.is_plain or flipping.out_of_reach is None:
        return []
    kind = "means over tokens" if objective.is_per_token else "sums"
    if flipping.out_of_reach.count == 0:
        return [f"Of {losses}, with margins of {kind}, no wrong pair is out of reach."]
    return [
        f"Out of reach: {losses} stops pulling once beta times the margin (of {kind}) has risen by "
        f"{number(objective.rest)}, where {counted(flipping.out_of_reach)} of the wrong pairs are still wrong."
    ]


def _length(counts: Counts) -> Section:
    bias = counts.length
    said = [
        f"Scored tokens: chosen {number(bias.mean_chosen)}, rejected {number(bias.mean_rejected)} "
        f"({bias.mean_difference:+,.2f}). Chosen is longer in {percent(bias.longer.share)}, as long in "
        f"{percent(bias.equal.share)}.",
        f"By sum the reference prefers the shorter completion in {counted(bias.prefers_shorter)}, per token the "
        f"longer one in {counted(bias.prefers_longer_per_token)}, of pairs whose lengths differ.",
        f"Wrong where chosen is longer: {counted(bias.wrong_where_longer)}; where it is shorter: "
        f"{counted(bias.wrong_where_shorter)}.",
    ]
    if bias.correlation is not None:
        said.append(
            f"A token more of difference (chosen minus rejected) changes the margin by {number(bias.nats_per_token)} "
            f"nats. Correlation {number(bias.correlation)}, of ranks {number(bias.rank_correlation)}; per token "
            f"{number(bias.correlation_per_token)}."
        )
    return Section(title="Length", sentences=tuple(said))


def _likeness(likeness: Likeness | None, num_pairs: int) -> Section:
    title = "Likely displacement"
    if likeness is None:
        return Section(title=title, sentences=("No CHES is known of these pairs.",))
    known = "" if likeness.num_known == num_pairs else f" It is known of {likeness.num_known:,} of {num_pairs:,} pairs."
    said = (
        "CHES says how alike both completions are to the model: the higher, the likelier training lowers the chosen "
        f"one too (Razin et al. 2024). Above 0: {counted(likeness.above_zero)}.{known}",
    )
    spreads = [("CHES", likeness.ches), ("normalised", likeness.normalised)]
    return Section(title=title, sentences=said, tables=(spread_table(spreads, "CHES"),))


def _groups(groups: Sequence[Group], of: str) -> Table:
    head = (of, "pairs", "wrong, sum", "wrong, token", "margin", "loss to flip", "longer", "norm. CHES")
    rows = tuple((group.name, f"{group.reference.num_pairs:,}", *_cells(group.reference)) for group in groups)
    return Table(head=head, rows=rows, caption="margin, loss to flip and CHES are medians; longer: chosen is longer")


def _cells(counts: Counts) -> tuple[str, ...]:
    to_flip = None if counts.flipping is None or counts.flipping.loss is None else counts.flipping.loss.quantiles[0.5]
    return (
        with_error(counts.by_sum.wrong),
        with_error(counts.per_token.wrong),
        number(counts.by_sum.margins.quantiles[0.5]),
        number(to_flip),
        percent(counts.length.longer.share),
        number(None if counts.likeness is None else counts.likeness.normalised.quantiles[0.5]),
    )
