"""An inspection as one HTML file, which loads nothing: no scripts, no fonts, no pictures from elsewhere.

The skeleton, the tables and the escapes are those of `holdfast.pages`. Every token is a `span` whose title, shown
under the pointer, says its ids and what becomes of it.
"""

import base64
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

from holdfast.inspect.data import DataInspection, DatasetInspection
from holdfast.inspect.lengths import QUANTILES, Lengths
from holdfast.inspect.lines import MEANINGS, percent
from holdfast.inspect.numbers import NEARLY_EQUAL, Found, Numbers
from holdfast.inspect.page_style import CSS
from holdfast.inspect.plots import length_figure, png
from holdfast.inspect.rows import Piece, RowView, SideView, Use
from holdfast.pages.markup import Html, html
from holdfast.pages.page import page as whole_page
from holdfast.pages.tables import facts, table
from holdfast.store.files import write_durably

_SPACES = {" ": '<i class="s"> </i>', "\t": '<i class="t">\t</i>', "\n": '<i class="n">\n</i>'}


def write_page(inspection: DataInspection, path: Path, most_tokens: int | None = None) -> None:
    """Writes the page. Of a part of a row, at most so many tokens are shown; None shows all."""
    write_durably(path, page(inspection, most_tokens).encode())


def page(inspection: DataInspection, most_tokens: int | None = None) -> str:
    """The page's HTML."""
    of_model = {
        "model (not loaded)": inspection.model,
        "embeddings": f"{inspection.num_embeddings:,}",
        "tokenizer": inspection.tokenizer,
        "max_length": str(inspection.max_length),
        "truncation_mode": inspection.truncation_mode,
        "date in the chat template": inspection.template_date or "none",
    }
    datasets = "".join(_dataset(each, inspection, most_tokens) for each in inspection.datasets)
    key = " ".join(f'<span class="{use}">{escape(meaning)}</span>' for use, meaning in MEANINGS.items())
    body = (
        f"<h1>What will be trained</h1>{facts(of_model)}"
        '<input type="checkbox" id="spaces"><label for="spaces">white space</label> '
        '<input type="checkbox" id="boundaries"><label for="boundaries">token boundaries</label>'
        f'<div class="controls">{key} <span class="special">special token</span></div>'
        f"<main>{datasets}</main>"
    )
    return whole_page(f"Data of {inspection.model}", Html(body), style=CSS)


def _dataset(dataset: DatasetInspection, inspection: DataInspection, most_tokens: int | None) -> str:
    picture = base64.b64encode(png(length_figure((dataset,), inspection.max_length))).decode("ascii")
    messages = "".join(f'<p class="warn">{html(message)}</p>' for message in dataset.said)
    if dataset.refusal is not None:
        messages += f'<p class="warn"><strong>Training would end here:</strong> {html(dataset.refusal)}</p>'
    part = ", the first ones only" if dataset.is_part else ""
    sources = "".join(
        f"<h3>Source {html(name)}: {numbers.num_rows:,} rows</h3>{_numbers(numbers, dataset, inspection.max_length)}"
        for name, numbers in dataset.by_source.items()
    )
    rows = "".join(_row(row, most_tokens) for row in dataset.shown)
    return (
        f"<h2>{html(dataset.name)}: {dataset.numbers.num_rows:,} rows{part}</h2>{messages}"
        f"{_numbers(dataset.numbers, dataset, inspection.max_length)}"
        f'<img class="plot" alt="Histograms of lengths" src="data:image/png;base64,{picture}">'
        f"{sources}<h3>Rows</h3>{rows}"
    )


# Numbers -------------------------------------------------------------------------------------------------------------


def _numbers(numbers: Numbers, dataset: DatasetInspection, max_length: int | None) -> str:
    tokens, bias, repeats = numbers.tokens, numbers.length_bias, numbers.repeats
    counts = [
        ["pairs used", f"{numbers.num_used:,} of {numbers.num_rows:,}"],
        ["tokens of an epoch, seen", f"{tokens.seen:,}"],
        ["of these scored", f"{tokens.scored:,}"],
        ["of completions not scored", f"{tokens.unscored:,}"],
        ["different prompts", f"{repeats.num_prompts:,}"],
        ["prompts of several pairs", f"{repeats.shared_prompts:,} (at most {repeats.most_pairs:,} pairs)"],
    ]
    if bias is not None:
        counts += [
            ["scored tokens, chosen and rejected", f"{bias.mean_chosen:,.1f} and {bias.mean_rejected:,.1f}"],
            ["chosen is longer / equal / shorter", " / ".join(map(percent, (bias.longer, bias.equal, bias.shorter)))],
            ['a rule "longer is better" is right in', percent(bias.rule_accuracy)],
        ]
    return f"{table([], counts)}{_found(numbers, dataset, max_length)}{_lengths(numbers.lengths)}"


def _found(numbers: Numbers, dataset: DatasetInspection, max_length: int | None) -> str:
    found: dict[str, Found] = {f"left out: {reason}": each for reason, each in numbers.left_out.items()}
    cut = f"cut by max_length {max_length} ({numbers.tokens.beyond:,} tokens)" if max_length else "cut (no max_length)"
    found |= {
        cut: numbers.truncated,
        "identical to an earlier pair": numbers.repeats.identical,
        "nearly identical to an earlier pair (an estimate)": numbers.repeats.nearly_identical,
        "contradicted by a pair with sides swapped": numbers.repeats.contradictions,
        f"chosen and rejected nearly the same ({NEARLY_EQUAL:.0%} of tokens common)": numbers.nearly_equal,
    }
    if numbers is dataset.numbers:
        found |= {} if dataset.leak is None else {"prompt is in the training data too": dataset.leak}
        found |= {f"note: {note.kind}: {note.detail}": note.found for note in dataset.notes}
    rows = [
        [what, f"{each.count:,}", percent(each.share), _examples(each, dataset.excerpts)]
        for what, each in found.items()
    ]
    return table(["found", "rows", "share", "examples"], rows, kind="found")


def _examples(found: Found, excerpts: Mapping[int, str]) -> Html:
    if not found.examples:
        return Html("")
    lines = "<br>".join(f"row {row}: {html(excerpts.get(row, ''))}" for row in found.examples)
    return Html(f"<details><summary>rows {', '.join(map(str, found.examples))}</summary>{lines}</details>")


def _lengths(lengths: Mapping[str, Lengths]) -> str:
    head = ["tokens, all rows, before truncation", "mean", "least", *(f"{share:.0%}" for share in QUANTILES), "most"]
    rows = [
        [name, f"{each.mean:,.1f}", *(f"{value:,}" for value in (each.least, *each.quantiles.values(), each.most))]
        for name, each in lengths.items()
    ]
    return table(head, rows)


# Rows ----------------------------------------------------------------------------------------------------------------


def _row(row: RowView, most_tokens: int | None) -> str:
    words = [f"row {row.index}", *([row.place] if row.place else [])]
    words += [] if row.source is None else [f"source {row.source}"]
    words += [] if row.reason is None else [f"left out: {row.reason}"]
    is_same = row.chosen.prompt == row.rejected.prompt
    prompt = _part("prompt", row.chosen.prompt, most_tokens) if is_same else ""
    sides = "".join(
        f"<div>{'' if is_same else _part(f'prompt of {name}', side.prompt, most_tokens)}"
        f"{_part(_title(name, side), side.completion, most_tokens)}</div>"
        for name, side in (("chosen", row.chosen), ("rejected", row.rejected))
    )
    return (
        f'<details class="row"{"" if row.reason else " open"}><summary>{html(", ".join(words))}</summary>{prompt}'
        f'<div class="sides">{sides}</div></details>'
    )


def _title(name: str, side: SideView) -> str:
    beyond = f"; {side.num_beyond:,} beyond max_length" if side.num_beyond else ""
    return f"{name}: {side.num_scored:,} tokens scored, {side.num_seen:,} seen with the prompt{beyond}"


def _part(title: str, pieces: Sequence[Piece], most_tokens: int | None) -> str:
    shown = pieces if most_tokens is None else pieces[:most_tokens]
    missing = len(pieces) - len(shown)
    rest = f'<div class="faint">{missing:,} more tokens are not shown</div>' if missing else ""
    return f'<div class="part">{html(title)}</div><div class="tokens">{"".join(map(_token, shown))}</div>{rest}'


def _token(piece: Piece) -> str:
    ids = ", ".join(map(str, piece.ids))
    kinds = f"{piece.use} special" if piece.is_special else str(piece.use)
    meaning = f"{MEANINGS[Use(piece.use)]}{', special token' if piece.is_special else ''}"
    text = "".join(_SPACES.get(each) or html(each) for each in piece.text)
    return f'<span class="{kinds}" title="id {ids}: {escape(meaning)}">{text}</span>'
