"""A comparison as one HTML file, by the kit of all pages (`holdfast.pages`)."""

from collections.abc import Iterable, Sequence
from pathlib import Path

from holdfast.inspect.two_models.compare import Comparison
from holdfast.inspect.two_models.gaps import Gaps, LargeGap
from holdfast.inspect.two_models.sentences import (
    facts_of,
    num_equal,
    parting_sentence,
    recorded_sentence,
    start_sentence,
    where_of,
)
from holdfast.inspect.two_models.settings import Setting
from holdfast.inspect.two_models.tokenizers import Part, Tokenizers
from holdfast.inspect.two_models.verdict import SAME
from holdfast.inspect.two_models.weights import TensorDifference, Weights
from holdfast.pages.charts.bars import bars
from holdfast.pages.charts.lines import Series, line_chart
from holdfast.pages.markup import Content, Html, element, joined
from holdfast.pages.page import page as whole_page
from holdfast.pages.tables import facts, table
from holdfast.store.files import write_durably

_STYLE = """
.verdict { font-size: 1.1rem; } .token { background: var(--warn-back); color: var(--ink); font-weight: 600; }
.text { white-space: pre-wrap; overflow-wrap: anywhere; font: .9em/1.5 ui-monospace, monospace; }
.added { color: var(--good); } .removed { color: var(--bad); }
.models { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 420px), 1fr)); gap: 0 1.5rem; }
.models > * { min-width: 0; }
.diff { white-space: pre-wrap; overflow-wrap: anywhere; }
"""
_MOST_TENSORS, _MOST_DIFF = 400, 400


def write_page(comparison: Comparison, path: Path) -> None:
    """Writes the page."""
    write_durably(path, page(comparison).encode())


def page(comparison: Comparison) -> str:
    """The page's HTML."""
    verdict = comparison.verdict
    kind = "note good verdict" if verdict.outcome == SAME else "note warn verdict"
    remarks = [*verdict.remarks]
    if comparison.recorded is not None:
        remarks.insert(0, recorded_sentence(comparison.recorded))
    body = [
        element("h1", "Is this the reference you think it is?"),
        element("p", verdict.sentence, kind=kind),
        element("ul", *(element("li", remark) for remark in remarks)) if remarks else Html(""),
        element("div", *_both_models(comparison), kind="models"),
        *([] if comparison.gaps is None else _gaps(comparison.gaps)),
        *_parting(comparison),
        *_weights(comparison.weights),
        *_settings(comparison),
        *([] if comparison.tokenizers is None else _tokenizers(comparison.tokenizers)),
        *(element("p", message, kind="warn") for message in comparison.said),
    ]
    return whole_page(f"{comparison.model.path} and {comparison.reference.path}", *body, style=_STYLE)


def _both_models(comparison: Comparison) -> list[Html]:
    named = (("MODEL", comparison.model), ("REF", comparison.reference))
    return [element("section", element("h2", label), facts(facts_of(each))) for label, each in named]


def _gaps(gaps: Gaps) -> list[Html]:
    shares = list(range(len(gaps.curve)))
    is_log = min(gaps.curve[1:]) > 0
    chart = line_chart(
        [Series(name="gap", x=shares, y=gaps.curve)],
        title="Gaps of tokens, in order of size",
        x_label="share of tokens, %",
        y_label="nats",
        is_log_y=is_log,
    )
    names = ["mean", *gaps.quantiles, "largest"]
    values = [gaps.mean, *gaps.quantiles.values(), gaps.largest]
    nats = [
        [side, f"{each['model']:.4f}", f"{each['reference']:.4f}", f"{gaps.log_ratio[side]:+.3g}"]
        for side, each in gaps.nats_per_token.items()
    ]
    count = f"{gaps.num_tokens:,} tokens in {gaps.num_completions:,} completions of {gaps.num_pairs:,} pairs"
    return [
        element("h2", "Log-probs"),
        element("p", f"Of {count}. A gap is |log p by MODEL - log p by REF| of a token."),
        table(["gap in nats", *names], [["per token", *(f"{value:.3g}" for value in values)]]),
        table(["nats", "MODEL, a token", "REF, a token", "log ratio, a completion"], nats),
        element("p", start_sentence(gaps)),
        *([element("div", chart, kind="charts")] if gaps.largest > 0 else []),
        *([element("h3", "Largest gaps, one of a completion")] if gaps.examples else []),
        *map(_example, gaps.examples),
    ]


def _example(example: LargeGap) -> Html:
    title = (
        f"{abs(example.gap):.3g} nats: row {example.row}, {example.side}, scored token {example.place} (id "
        f"{example.token}): MODEL {example.model:.3f}, REF {example.reference:.3f}"
    )
    text = joined([_text(example.before), element("span", _text(example.text), kind="token"), _text(example.after)])
    return element("div", element("p", title), element("div", text, kind="text"), kind="note")


def _text(text: str) -> Html:
    """Text in which line breaks stay."""
    return joined((joined([line]) for line in text.split("\n")), Html("\n"))


def _parting(comparison: Comparison) -> list[Html]:
    parting = comparison.parting
    found = [element("h2", "Hidden states"), element("p", parting_sentence(comparison))]
    if parting is not None and parting.first is not None and parting.layers:
        values = {each.name: float("nan") if each.relative is None else each.relative for each in parting.layers}
        chart = bars(
            values, title="Relative distance after each layer", x_label="|a - b| / |a|", note=where_of(parting)
        )
        found.append(element("div", chart, kind="charts"))
    return found


def _weights(weights: Weights) -> list[Html]:
    found = [element("h2", "Tensors"), element("p", f"{num_equal(weights)}.")]
    if weights.groups:
        rows = [
            [
                group.pattern,
                f"{group.count:,} of {group.num_tensors:,}",
                _number(group.relative),
                _number(group.largest),
            ]
            for group in weights.groups
        ]
        found.append(table(["name", "differ", "mean |a - b| / |a|", "largest |a - b|"], rows))
        every = [_tensor(each) for each in weights.differing[:_MOST_TENSORS]]
        head = ["name", "MODEL", "REF", "values that differ", "|a - b| / |a|", "largest |a - b|", "cosine"]
        title = f"Each of the {len(weights.differing):,} tensors that differ"
        found.append(element("details", element("summary", title), table(head, every)))
    for label, names in (("MODEL", weights.only_model), ("REF", weights.only_reference)):
        if names:
            found.append(element("p", f"Only in {label}: {', '.join(names[:_MOST_TENSORS])}"))
    return found


def _tensor(each: TensorDifference) -> list[Content]:
    shapes = [f"{list(shape)} {dtype}" for shape, dtype in zip(each.shapes, each.dtypes, strict=True)]
    share = f"{each.num_differing:,} of {each.num_values:,}"
    return [each.name, *shapes, share, _number(each.relative), _number(each.largest), _number(each.cosine)]


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"


def _settings(comparison: Comparison) -> list[Html]:
    settings = comparison.settings
    titles = {
        "Settings that change log-probs": settings.counting,
        "Computed otherwise here": settings.numerics,
        "Entries of the configs that change no log-prob": settings.without_effect,
    }
    found: list[Html] = []
    for title, each in titles.items():
        if each:
            found += [element("h2", title), table(["setting", "MODEL", "REF"], map(_setting, each), kind="words")]
    return found


def _setting(setting: Setting) -> list[Content]:
    name = setting.name + (f" ({setting.count} times)" if setting.count > 1 else "")
    return [name, _value(setting.model), _value(setting.reference)]


def _value(value: str | None) -> str:
    return "(none)" if value is None else value


def _tokenizers(tokenizers: Tokenizers) -> list[Html]:
    found = [element("h2", "Tokenizer and chat template")]
    if tokenizers.missing is not None:
        return [*found, element("p", f"{tokenizers.missing} has no tokenizer; nothing to compare.")]
    if tokenizers.refusal is not None:
        found.append(element("p", f"REF's cannot read these rows: {tokenizers.refusal}", kind="warn"))
    else:
        count = f"{tokenizers.num_differing:,} of {tokenizers.num_rows:,} rows"
        found.append(element("p", f"{count} become other tokens by REF's."))
    found += _vocabulary(tokenizers)
    head = ["part", "MODEL", "REF"]
    for title, parts in (("Parts that may change tokens", tokenizers.counting),
                         ("Parts without effect on training", tokenizers.without_effect)):  # fmt: skip
        if parts:
            found.append(table(head, map(_part, parts), kind="words", caption=title))
    if (first := tokenizers.first) is not None:
        where = f"First difference: row {first.row}, {first.side}, token {first.place}, after {first.before!r}"
        rows = [["MODEL", " ".join(first.model)], ["REF", " ".join(first.reference)]]
        found += [element("p", where), table([], rows, kind="words")]
    if tokenizers.template_diff:
        found += [element("h3", "Chat template"), _diff(tokenizers.template_diff)]
    if (rendering := tokenizers.rendering) is not None:
        found += [element("h3", f"Row {rendering.row} as either writes it")]
        found += [_diff(rendering.diff)] if rendering.diff else [element("p", "Both write the same text.")]
        sides = [("MODEL", rendering.model), ("REF", rendering.reference)]
        texts = (
            element("section", element("h4", label), element("div", _text(text), kind="text")) for label, text in sides
        )
        found.append(element("details", element("summary", "whole"), element("div", *texts, kind="models")))
    return found


def _part(part: Part) -> list[Content]:
    return [part.name, _value(part.model), _value(part.reference)]


def _vocabulary(tokenizers: Tokenizers) -> Iterable[Html]:
    found = tokenizers.vocabulary
    if found is None or found.is_same:
        return []
    words = [f"Vocabulary: MODEL {found.num_model:,} tokens, REF {found.num_reference:,}."]
    words += (
        [f"{found.num_only_model:,} only in MODEL: {', '.join(map(repr, found.only_model))}."]
        if found.only_model
        else []
    )
    words += (
        [f"{found.num_only_reference:,} only in REF: {', '.join(map(repr, found.only_reference))}."]
        if found.only_reference else []
    )  # fmt: skip
    moved = ", ".join(f"{token!r} {ours} and {theirs}" for token, ours, theirs in found.moved)
    words += [f"{found.num_moved:,} have other ids: {moved}."] if moved else []
    return [element("p", " ".join(words))]


def _diff(diff: Sequence[str]) -> Html:
    kinds = {"+": "added", "-": "removed", "@": "faint"}
    lines = [element("span", line, kind=kinds.get(line[:1])) for line in diff[:_MOST_DIFF]]
    return element("pre", joined(lines, Html("\n")), kind="diff")
