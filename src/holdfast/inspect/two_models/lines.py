"""A comparison as lines of text: the verdict first, then what it rests on.

A line is made of spans with a style (see `inspect.lines`). All text of models and data is made visible here.
"""

import textwrap
from collections.abc import Iterable, Iterator, Sequence

from rich.cells import cell_len

from holdfast.inspect.lines import FAINT, HEADING, WARNING, Line, Span
from holdfast.inspect.two_models.compare import Comparison
from holdfast.inspect.two_models.gaps import Gaps, LargeGap
from holdfast.inspect.two_models.parting import Parting
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
from holdfast.inspect.two_models.weights import Weights
from holdfast.visible import visible

GOOD, BAD = "good", "bad"
ADDED, REMOVED, TOKEN = "added", "removed", "token"
_MOST_GROUPS, _MOST_SETTINGS, _MOST_DIFF, _MOST_LAYERS = 12, 10, 40, 40
_BAR = 24


def comparison_lines(comparison: Comparison, width: int | None = None) -> Iterator[Line]:
    """The lines of the whole report. Sentences are wrapped to `width` columns; None leaves them whole."""
    verdict = comparison.verdict
    style = GOOD if verdict.outcome == SAME else BAD
    yield from _wrapped(verdict.sentence, width, style=style)
    if comparison.recorded is not None:
        yield from _wrapped(recorded_sentence(comparison.recorded), width)
    for remark in verdict.remarks:
        yield from _wrapped(f"- {remark}", width, indent="  ")
    yield from _both_models(comparison)
    if comparison.gaps is not None:
        yield from _gaps(comparison.gaps, width)
    yield ()
    yield from _parting(comparison, width)
    yield from _weights(comparison.weights)
    yield from _settings(comparison)
    if comparison.tokenizers is not None:
        yield from _tokenizers(comparison.tokenizers, width)
    for message in comparison.said:
        yield ()
        yield from _wrapped(f"said: {message}", width, style=WARNING, hanging=6)


def _both_models(comparison: Comparison) -> Iterator[Line]:
    for label, facts in (("MODEL", comparison.model), ("REF", comparison.reference)):
        yield ()
        yield _heading(label)
        for name, value in facts_of(facts).items():
            yield (Span(f"  {name:<20}", FAINT), Span(visible(value)))


def _gaps(gaps: Gaps, width: int | None) -> Iterator[Line]:
    yield ()
    yield _heading(
        f"log-probs of {gaps.num_tokens:,} tokens in {gaps.num_completions:,} completions of {gaps.num_pairs:,} pairs"
    )
    names = ["mean", *gaps.quantiles, "largest"]
    values = [gaps.mean, *gaps.quantiles.values(), gaps.largest]
    yield (Span("  gap in nats" + "".join(f"{name:>11}" for name in names), FAINT),)
    yield _line("  per token  " + "".join(f"{value:>11.3g}" for value in values))
    above = f"{100 * gaps.share_above:.1f} % of tokens are further apart than {gaps.tolerance:g} nats"
    mean = f"MODEL - REF is {gaps.signed_mean:+.3g} per token on average"
    yield from _wrapped(f"{above}; {mean}", width, indent="  ")
    yield (Span(f"  {'':<11}{'MODEL, a token':>16}{'REF, a token':>16}{'log ratio, a completion':>26}", FAINT),)
    for side, nats in gaps.nats_per_token.items():
        values = f"{nats['model']:>16.4f}{nats['reference']:>16.4f}{gaps.log_ratio[side]:>+26.3g}"
        yield _line(f"  {side:<11}{values}")
    yield from _wrapped(start_sentence(gaps), width, indent="  ")
    if gaps.examples:
        yield ()
        yield _heading("largest gaps, one of a completion")
    for example in gaps.examples:
        yield from _example(example, width)


def _example(example: LargeGap, width: int | None) -> Iterator[Line]:
    where = f"row {example.row}, {example.side}, scored token {example.place} (id {example.token})"
    values = f"MODEL {example.model:.3f}, REF {example.reference:.3f}"
    yield from _wrapped(f"{abs(example.gap):.3g} nats: {where}: {values}", width, indent="  ", hanging=2)
    before, text, after = (visible(each, shows_spaces=False) for each in (example.before, example.text, example.after))
    if width is not None:
        room = max(16, width - cell_len(text) - 8)
        before, after = before[-(2 * room // 3) :], after[: room // 3]
    yield (Span("    ", FAINT), Span(before, FAINT), Span(f"\u27e6{text}\u27e7", TOKEN), Span(after, FAINT))


def _parting(comparison: Comparison, width: int | None) -> Iterator[Line]:
    yield _heading("hidden states")
    yield from _wrapped(parting_sentence(comparison), width, indent="  ")
    parting = comparison.parting
    if parting is None or parting.first is None:
        return
    yield from _wrapped(f"relative distance after each layer, {where_of(parting)}:", width, indent="  ")
    yield from _layers(parting)


def _layers(parting: Parting) -> Iterator[Line]:
    known = [each.relative for each in parting.layers if each.relative is not None]
    most = max([*known, 1e-30])
    shown = list(parting.layers)
    if len(shown) > _MOST_LAYERS:
        step = -(-len(shown) // _MOST_LAYERS)
        shown = [each for number, each in enumerate(shown) if number % step == 0 or number == len(shown) - 1]
    longest = max((len(each.name) for each in shown), default=0)
    for each in shown:
        if each.relative is None:
            yield _line(f"    {each.name:<{longest}}  of another shape")
        else:
            bar = "#" * round(_BAR * min(each.relative, most) / most)
            yield _line(f"    {each.name:<{longest}}  {each.relative:>8.2g}  {bar}")


def _weights(weights: Weights) -> Iterator[Line]:
    yield ()
    yield _heading("tensors")
    yield _line(f"  {num_equal(weights)}")
    if weights.groups:
        yield (Span(f"  {'differ':>12}{'|a-b|/|a|':>11}{'most |a-b|':>12}  name", FAINT),)
    for group in weights.groups[:_MOST_GROUPS]:
        relative = "shape" if group.relative is None else f"{group.relative:.2g}"
        largest = "" if group.largest is None else f"{group.largest:.2g}"
        counts = f"{group.count:,} of {group.num_tensors:,}"
        yield _line(f"  {counts:>12}{relative:>11}{largest:>12}  {group.pattern}")
    yield from _more(len(weights.groups) - _MOST_GROUPS)
    for each in [d for d in weights.differing if d.shapes[0] != d.shapes[1]][:_MOST_GROUPS]:
        rows = (
            f"; the {min(each.shapes[0][0], each.shapes[1][0]):,} rows of both are equal"
            if each.is_of_rows_only
            else ""
        )
        yield _line(f"    {each.name}: {list(each.shapes[0])} and {list(each.shapes[1])}{rows}")
    for label, names in (("MODEL", weights.only_model), ("REF", weights.only_reference)):
        for name in names[:_MOST_GROUPS]:
            yield _line(f"    only in {label}: {name}")
        yield from _more(len(names) - _MOST_GROUPS)


def _settings(comparison: Comparison) -> Iterator[Line]:
    settings = comparison.settings
    titles = {
        "settings that change log-probs": settings.counting,
        "computed otherwise here": settings.numerics,
        "entries of the configs that change no log-prob": settings.without_effect,
    }
    for title, found in titles.items():
        if found:
            yield ()
            yield _heading(title)
            yield from _two_columns([(_counted(each), each.model, each.reference) for each in found[:_MOST_SETTINGS]])
            yield from _more(len(found) - _MOST_SETTINGS)


def _counted(setting: Setting) -> str:
    return setting.name + (f" ({setting.count} times)" if setting.count > 1 else "")


def _two_columns(rows: Iterable[tuple[str, str | None, str | None]]) -> Iterator[Line]:
    for name, model, reference in rows:
        yield _line(f"  {name}: MODEL {_value(model)}, REF {_value(reference)}")


def _value(value: str | None, most: int = 200) -> str:
    if value is None:
        return "(none)"
    return value if len(value) <= most else f"{value[:most]}..."


def _tokenizers(tokenizers: Tokenizers, width: int | None) -> Iterator[Line]:
    yield ()
    yield _heading("tokenizer and chat template")
    if tokenizers.missing is not None:
        yield _line(f"  {tokenizers.missing} has none; nothing to compare")
        return
    if tokenizers.refusal is not None:
        yield from _wrapped(f"REF's cannot read these rows: {tokenizers.refusal}", width, indent="  ")
    else:
        yield _line(f"  {tokenizers.num_differing:,} of {tokenizers.num_rows:,} rows become other tokens by REF's")
    yield from _vocabulary(tokenizers)
    yield from _two_columns(_parts(tokenizers.counting))
    if tokenizers.without_effect:
        yield (Span("  without effect on training:", FAINT),)
        yield from _two_columns(_parts(tokenizers.without_effect))
    if (first := tokenizers.first) is not None:
        where = f"row {first.row}, {first.side}, token {first.place}, after {first.before!r}"
        yield from _wrapped(f"first difference: {where}", width, indent="  ", hanging=2)
        for label, tokens in (("MODEL", first.model), ("REF", first.reference)):
            yield from _wrapped(f"{label:<5} {' '.join(tokens)}", width, indent="    ", hanging=6)
    if tokenizers.template_diff:
        yield _line("  chat template:")
        yield from _diff(tokenizers.template_diff)
    if tokenizers.rendering is not None and tokenizers.rendering.diff:
        yield _line(f"  row {tokenizers.rendering.row} as either writes it:")
        yield from _diff(tokenizers.rendering.diff)


def _parts(parts: Sequence[Part]) -> list[tuple[str, str | None, str | None]]:
    return [(each.name, each.model, each.reference) for each in parts[:_MOST_SETTINGS]]


def _vocabulary(tokenizers: Tokenizers) -> Iterator[Line]:
    found = tokenizers.vocabulary
    if found is None or found.is_same:
        return
    yield _line(f"  vocabulary: MODEL {found.num_model:,} tokens, REF {found.num_reference:,}")
    for label, count, names in (
        ("MODEL", found.num_only_model, found.only_model), ("REF", found.num_only_reference, found.only_reference)
    ):  # fmt: skip
        if count:
            yield _line(f"    {count:,} only in {label}: {', '.join(map(repr, names))}")
    if found.num_moved:
        moved = ", ".join(f"{token!r} {ours} and {theirs}" for token, ours, theirs in found.moved)
        yield _line(f"    {found.num_moved:,} have other ids: {moved}")


def _diff(diff: Sequence[str]) -> Iterator[Line]:
    styles = {"+": ADDED, "-": REMOVED, "@": FAINT}
    for line in diff[:_MOST_DIFF]:
        yield (Span("    "), Span(visible(line), styles.get(line[:1], "")))
    yield from _more(len(diff) - _MOST_DIFF, noun="lines")


def _more(count: int, noun: str = "more") -> Iterator[Line]:
    if count > 0:
        yield (Span(f"    ... and {count:,} {noun}{' more' if noun != 'more' else ''}; --json has all", FAINT),)


def _heading(text: str) -> Line:
    return (Span(visible(text), HEADING),)


def _line(text: str) -> Line:
    return (Span(visible(text)),)


def _wrapped(
    text: str, width: int | None, *, indent: str = "", style: str = "", hanging: int | None = None
) -> Iterator[Line]:
    text = visible(text)
    after = indent + " " * (2 if text.startswith("- ") else 0 if hanging is None else hanging)
    if width is None:
        yield (Span(f"{indent}{text}", style),)
        return
    for line in textwrap.wrap(text, max(20, width - 1), initial_indent=indent, subsequent_indent=after):
        yield (Span(line, style),)
