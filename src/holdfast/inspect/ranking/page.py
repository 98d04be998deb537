"""An inspection of pairs as one HTML file, on the kit of all pages: the report's words and tables, charts, and
texts.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from holdfast.inspect.ranking.flipping import loss_to_flip
from holdfast.inspect.ranking.groups import Group
from holdfast.inspect.ranking.inspection import DatasetRanking, RankingInspection
from holdfast.inspect.ranking.margins import length_differences, margins, margins_per_token
from holdfast.inspect.ranking.movement import changes
from holdfast.inspect.ranking.pair_facts import facts_of_pair
from holdfast.inspect.ranking.picks import Pick
from holdfast.inspect.ranking.report import about, remarks, sections_of
from holdfast.inspect.ranking.sections import Section
from holdfast.inspect.ranking.written import SHARE, with_error
from holdfast.pages.charts.bars import bars
from holdfast.pages.charts.histogram import histogram
from holdfast.pages.charts.lines import Level
from holdfast.pages.charts.scatter import Points, scatter
from holdfast.pages.markup import Html, element, joined
from holdfast.pages.page import page as whole_page
from holdfast.pages.tables import facts, table
from holdfast.store.files import write_durably

_STYLE = """
.share { white-space: nowrap; }
main td:not(:first-child) { white-space: nowrap; }
.pair { border: 1px solid var(--line); border-radius: 6px; margin: .8rem 0; padding: .6rem .9rem; }
.pair > summary { font-weight: 600; }
.text { white-space: pre-wrap; overflow-wrap: anywhere; background: var(--panel); padding: .5rem .7rem;
  border-radius: 4px; font: 13px/1.6 ui-monospace, monospace; max-height: 24rem; overflow-y: auto; }
.part { margin: .5rem 0 .2rem; color: var(--faint); font-size: .85rem; }
.sides { display: grid; grid-template-columns: 1fr 1fr; gap: .8rem; } .sides > div { min-width: 0; }
@media (max-width: 760px) { .sides { grid-template-columns: 1fr; } }
@media print { .text { max-height: none; } }
"""
_LEAST_LOG = -12.0
"""The least power of ten of a loss that is drawn."""
_MOST_BARS = 30


def write_page(inspection: RankingInspection, path: Path) -> None:
    """Writes the page."""
    write_durably(path, page(inspection).encode())


def page(inspection: RankingInspection) -> str:
    """The page's HTML."""
    title = "What training did to the pairs" if inspection.policy is not None else "How the reference ranks the pairs"
    said = (element("p", text, kind="note") for text in remarks(inspection))
    datasets = joined(_dataset(each, inspection) for each in inspection.datasets)
    return whole_page(
        title, element("h1", title), facts(about(inspection)), *said, element("main", datasets), style=_STYLE
    )


def _dataset(dataset: DatasetRanking, inspection: RankingInspection) -> Html:
    first, *others = (_section(section) for section in sections_of(dataset, inspection))
    return joined([
        element("h2", f"{dataset.name}: {len(dataset.reference):,} pairs"),
        first,
        element("div", *_charts(dataset, inspection), kind="charts"),
        *others,
        *(_pick(pick, dataset, inspection) for pick in dataset.picks),
    ])  # fmt: skip


def _section(section: Section) -> Html:
    tables = [table(each.head, each.rows, caption=each.caption or None) for each in section.tables]
    return joined([element("h3", section.title), *map(_sentence, section.sentences), *tables])


def _sentence(text: str) -> Html:
    """A paragraph in which no line ends within a share and its error."""
    parts = SHARE.split(text)  # every second one is a share
    return element("p", *(element("span", part, kind="share") if at % 2 else part for at, part in enumerate(parts)))


# Charts --------------------------------------------------------------------------------------------------------------


def _charts(dataset: DatasetRanking, inspection: RankingInspection) -> Iterator[Html]:
    reference, policy = dataset.reference, dataset.policy
    models = {"reference": reference, **({} if policy is None else {"policy": policy})}
    zero = Level(y=0.0, text="0: to the left, ranked wrongly")
    of_sums = {name: margins(numbers) for name, numbers in models.items()}
    yield histogram(of_sums, title="Margins of sums", x_label="nats", marks=[zero])
    of_means = {name: margins_per_token(numbers) for name, numbers in models.items()}
    yield histogram(of_means, title="Margins per token", x_label="nats per token", marks=[zero])
    if policy is not None:
        yield from _charts_of_training(dataset)
    if inspection.objective is not None:
        yield from _flips(of_sums["reference"], inspection.objective.options.beta)
    yield scatter(
        [Points(name="pairs", x=length_differences(reference), y=of_sums["reference"], texts=_rows(dataset))],
        title="Margins and lengths", x_label="tokens, chosen minus rejected", y_label="margin, nats",
        levels=[Level(y=0.0, text="0: below, ranked wrongly")],
    )  # fmt: skip
    known = reference.normalised_ches[np.isfinite(reference.normalised_ches)]
    if len(known):
        yield histogram({"pairs": known}, title="Likely displacement", x_label="normalised CHES")
    for groups, of in ((dataset.by_source, "source"), (dataset.by_length, "tokens of the longer")):
        if len(groups) > 1:
            yield _wrong_bars(groups, of)


def _charts_of_training(dataset: DatasetRanking) -> Iterator[Html]:
    assert dataset.policy is not None
    chosen, rejected = changes(dataset.reference, dataset.policy)
    before, after = margins(dataset.reference), margins(dataset.policy)
    yield histogram(
        {"chosen": chosen, "rejected": rejected}, title="What each completion gained",
        x_label="nats, policy minus reference", marks=[Level(y=0.0, text="0: to the left, it lost log-prob")],
    )  # fmt: skip
    yield scatter(
        [Points(name="pairs", x=before, y=after, texts=_rows(dataset))], title="Margins before and after",
        x_label="nats, reference", y_label="nats, policy", has_diagonal=True,
        levels=[Level(y=0.0, text="0: below, ranked wrongly")],
    )  # fmt: skip
    known = np.isfinite(dataset.reference.normalised_ches)
    if known.any():
        yield scatter(
            [Points(name="pairs", x=dataset.reference.normalised_ches[known],
                    y=(chosen / dataset.reference.chosen_tokens)[known],
                    texts=[text for text, is_known in zip(_rows(dataset), known, strict=True) if is_known])],
            title="CHES and displacement", x_label="normalised CHES", y_label="chosen, nats per token",
            levels=[Level(y=0.0, text="0: below, displaced")],
        )  # fmt: skip


def _flips(of_sums: np.ndarray, beta: float) -> Iterator[Html]:
    """The losses at which wrong pairs flip, as powers of ten."""
    wrong = of_sums[of_sums < 0]
    if len(wrong):
        losses = np.log10(np.maximum(loss_to_flip(wrong, beta), 10**_LEAST_LOG))
        yield histogram(
            {"wrong pairs": losses}, title="The DPO loss at which wrong pairs flip", x_label="log10 of the loss",
            y_label="wrong pairs", marks=[Level(y=float(np.log10(np.log(2))), text="ln 2, at the start")],
        )  # fmt: skip


def _wrong_bars(groups: Sequence[Group], of: str) -> Html:
    shown = groups[:_MOST_BARS]
    wrong = {group.name: group.reference.by_sum.wrong for group in shown}
    return bars(
        {name: 100 * (share.share or 0.0) for name, share in wrong.items()},
        title=f"Ranked wrongly by sum, by {of}", x_label="% of pairs, reference",
        texts={name: with_error(share) for name, share in wrong.items()},
        note="" if len(groups) <= _MOST_BARS else f"The first {_MOST_BARS} of {len(groups)}.",
    )  # fmt: skip


def _rows(dataset: DatasetRanking) -> list[str]:
    return [f"row {row}" for row in dataset.reference.row.tolist()]


# Single pairs --------------------------------------------------------------------------------------------------------


def _pick(pick: Pick, dataset: DatasetRanking, inspection: RankingInspection) -> Html:
    title = f"Pairs {pick.title}: {len(pick.places):,} of {pick.num_pairs:,}"
    reason = f"{pick.reason[:1].upper()}{pick.reason[1:]}"
    pairs = (_pair(place, dataset, inspection) for place in pick.places)
    return joined([element("h3", title), element("p", reason, kind="faint"), *pairs])


def _pair(place: int, dataset: DatasetRanking, inspection: RankingInspection) -> Html:
    text = dataset.texts[place]
    said = ", ".join(facts_of_pair(dataset, place, inspection.objective))
    sides: Mapping[str, str] = {"chosen": text.chosen, "rejected": text.rejected}
    return element(
        "details", element("summary", said), _text("prompt", text.prompt),
        element("div", *(element("div", _text(name, side)) for name, side in sides.items()), kind="sides"), kind="pair",
    )  # fmt: skip


def _text(name: str, text: str) -> Html:
    return joined([element("div", name, kind="part"), element("div", _with_lines(text), kind="text")])


def _with_lines(text: str) -> Html:
    return joined(text.split("\n"), Html("\n"))
