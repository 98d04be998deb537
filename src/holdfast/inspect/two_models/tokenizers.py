"""Which tokenizers and chat templates of two models differ, and what that does to the rows that are compared.

What decides is what becomes of the rows: their token ids by either tokenizer, made as training makes them. Around it
stand the parts that differ, by what they may change: token ids ("counting"), or nothing that training reads
("without effect": the padding side, the padding token, a maximal length that tokenizers only warn about).
"""

import difflib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, final

from transformers import PreTrainedTokenizerBase

from holdfast.inspect.two_models.rows import Completion, Rows

NUM_NAMED = 8
"""So many tokens are named of those that differ."""
_BEFORE, _AFTER = 12, 12

_DECIDING = ("bos_token", "eos_token", "unk_token")
_WITHOUT_EFFECT = ("pad_token", "padding_side", "truncation_side", "model_max_length", "clean_up_tokenization_spaces",
                   "model_input_names", "split_special_tokens")  # fmt: skip
_PARTS = ("normalizer", "pre_tokenizer", "post_processor", "model")
"""Parts of a fast tokenizer that make ids of a text. Its decoder makes texts of ids, which training does not."""


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """A part of a tokenizer that differs, each side as text (None where it has none)."""

    name: str
    model: str | None
    reference: str | None


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Vocabulary:
    """Tokens by text: those that one of the two lacks, and those with other ids, counted, and the first of them."""

    num_model: int
    num_reference: int
    num_only_model: int
    num_only_reference: int
    num_moved: int
    only_model: tuple[str, ...]
    only_reference: tuple[str, ...]
    moved: tuple[tuple[str, int, int], ...]

    @property
    def is_same(self) -> bool:
        """Whether every token has the same id in both."""
        return not (self.num_only_model or self.num_only_reference or self.num_moved)


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class FirstDifference:
    """The first token in which a row differs: the row, its side, the place among the ids (from 0), and the texts of
    the tokens before it, and from it on by either tokenizer."""

    row: int
    side: str
    place: int
    before: str
    model: tuple[str, ...]
    reference: tuple[str, ...]


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Rendering:
    """A row as either tokenizer writes it (prompt and chosen completion), and the unified diff of the two."""

    row: int
    model: str
    reference: str
    diff: tuple[str, ...]


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Tokenizers:
    """Two tokenizers, compared. `counting` and `without_effect` are parts that differ. `template_diff` is the unified
    diff of the chat templates, empty where they are the same. Of `num_rows` rows `num_differing` become other ids or
    other scored tokens; `first` is the first of these, and `rendering` shows it. `refusal` is why the reference's
    tokenizer cannot read the rows; then no ids are compared. `missing` names the model that has no tokenizer."""

    counting: tuple[Part, ...] = ()
    without_effect: tuple[Part, ...] = ()
    vocabulary: Vocabulary | None = None
    template_diff: tuple[str, ...] = ()
    num_rows: int = 0
    num_differing: int = 0
    first: FirstDifference | None = None
    rendering: Rendering | None = None
    refusal: str | None = None
    missing: str | None = None

    @property
    def rows_differ(self) -> bool:
        """Whether some row becomes something else by the reference's tokenizer, or nothing at all."""
        return self.num_differing > 0 or self.refusal is not None

    @property
    def are_same(self) -> bool:
        """Whether nothing was found that may change token ids."""
        return not (self.counting or self.template_diff or self.rows_differ or self.missing)


def compare_tokenizers(
    ours: PreTrainedTokenizerBase, theirs: PreTrainedTokenizerBase, rows: Rows, other: Rows | str
) -> Tokenizers:
    """Two tokenizers and the rows that they make; `other` is the reference's, or why it makes none."""
    counting, without_effect = _parts(ours, theirs)
    found = Tokenizers(
        counting=tuple(counting),
        without_effect=tuple(without_effect),
        vocabulary=_vocabulary(ours.get_vocab(), theirs.get_vocab()),
        template_diff=template_diff(_templates(ours), _templates(theirs)),
        num_rows=len(rows.numbers),
    )
    if isinstance(other, str):
        return replace(found, refusal=other)
    pairs = _pairs(rows, other)
    differing = [(a, b) for a, b in pairs if a is None or b is None or not _are_same(a, b)]
    numbers = {each.row for pair in differing for each in pair if each is not None}
    first = next(((a, b) for a, b in differing if a is not None and b is not None), None)
    return replace(
        found,
        num_differing=len(numbers),
        first=None if first is None else _first(*first, ours, theirs),
        rendering=None if first is None else _rendering(*first, ours, theirs),
    )


# Parts ---------------------------------------------------------------------------------------------------------------


def _parts(ours: Any, theirs: Any) -> tuple[list[Part], list[Part]]:
    counting = [Part(name=name, model=_text(ours, name), reference=_text(theirs, name)) for name in _DECIDING]
    mine, others = _backend(ours), _backend(theirs)
    for name in _PARTS:
        counting.append(Part(name=name, model=_short(mine.get(name)), reference=_short(others.get(name))))
        if mine.get(name) != others.get(name) and counting[-1].model == counting[-1].reference:
            counting[-1] = _described(name, mine.get(name), others.get(name))
    for name, (a, b) in _of_added(ours, theirs).items():
        counting.append(Part(name=f"added token {name!r}", model=a, reference=b))
    without = [Part(name=name, model=_text(ours, name), reference=_text(theirs, name)) for name in _WITHOUT_EFFECT]
    without.append(Part(name="class", model=type(ours).__name__, reference=type(theirs).__name__))
    without.append(Part(name="decoder", model=_short(mine.get("decoder")), reference=_short(others.get("decoder"))))
    return [each for each in counting if each.model != each.reference], [e for e in without if e.model != e.reference]


def _text(tokenizer: Any, name: str) -> str | None:
    value = getattr(tokenizer, name, None)
    return None if value is None else str(value)


def _backend(tokenizer: Any) -> dict[str, Any]:
    """The parts of a fast tokenizer; empty for a slow one."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    return json.loads(backend.to_str()) if backend is not None else {}


_SHORT = 160


def _short(part: Any) -> str | None:
    """A part of a fast tokenizer as text, without its vocabulary, which is compared by itself."""
    if part is None:
        return None
    if isinstance(part, Mapping):
        part = {name: value for name, value in part.items() if name not in ("vocab", "merges")}
    text = json.dumps(part, ensure_ascii=False)
    return text if len(text) <= _SHORT else f"{text[:_SHORT]}..."


def _described(name: str, ours: Any, theirs: Any) -> Part:
    """A part whose short texts are the same: what of it differs, counted."""
    if isinstance(ours, Mapping) and isinstance(theirs, Mapping):
        for inner, noun in (("merges", "merges"), ("vocab", "tokens")):
            a, b = (each.get(inner) or [] for each in (ours, theirs))
            if a != b:
                place = next((n for n, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
                return Part(
                    name=f"{name}.{inner}",
                    model=f"{len(a):,} {noun}, {_item(a, place)}",
                    reference=f"{len(b):,} {noun}, {_item(b, place)}",
                )
    return Part(name=name, model=f"{len(json.dumps(ours)):,} characters", reference="others of the same beginning")


def _item(items: Any, place: int) -> str:
    each = list(items)[place] if place < len(items) else "none"
    return f"number {place} is {' '.join(each) if isinstance(each, list) else each!r}"


def _of_added(ours: Any, theirs: Any) -> dict[str, tuple[str | None, str | None]]:
    """Added tokens with other properties, by text."""
    mine, others = ({str(t): _flags(n, t) for n, t in e.added_tokens_decoder.items()} for e in (ours, theirs))
    return {
        name: (mine.get(name), others.get(name))
        for name in sorted(mine.keys() | others.keys())
        if mine.get(name) != others.get(name)
    }


def _flags(number: int, token: Any) -> str:
    names = ("special", "normalized", "lstrip", "rstrip", "single_word")
    return " ".join([f"id {number}", *(name for name in names if getattr(token, name, False))])


def _vocabulary(ours: Mapping[str, int], theirs: Mapping[str, int]) -> Vocabulary:
    by_id = sorted(ours, key=lambda token: ours[token])
    only_model = [token for token in by_id if token not in theirs]
    only_reference = [token for token in sorted(theirs, key=lambda token: theirs[token]) if token not in ours]
    moved = [(token, ours[token], theirs[token]) for token in by_id if token in theirs and ours[token] != theirs[token]]
    return Vocabulary(
        num_model=len(ours),
        num_reference=len(theirs),
        num_only_model=len(only_model),
        num_only_reference=len(only_reference),
        num_moved=len(moved),
        only_model=tuple(only_model[:NUM_NAMED]),
        only_reference=tuple(only_reference[:NUM_NAMED]),
        moved=tuple(moved[:NUM_NAMED]),
    )


# Templates -----------------------------------------------------------------------------------------------------------


def _templates(tokenizer: Any) -> dict[str, str]:
    """The chat templates by name; a single one is "default"."""
    template = getattr(tokenizer, "chat_template", None)
    if template is None:
        return {}
    return dict(template) if isinstance(template, Mapping) else {"default": str(template)}


def template_diff(ours: Mapping[str, str], theirs: Mapping[str, str]) -> tuple[str, ...]:
    """The unified diff of chat templates. A line that holds several tags is broken before each of them, in both."""
    lines: list[str] = []
    for name in dict.fromkeys((*ours, *theirs)):
        titles = (f"MODEL {name}", f"REF {name}")
        lines += _unified(_tags(ours.get(name, "")), _tags(theirs.get(name, "")), titles)
    return tuple(lines)


def _tags(template: str) -> list[str]:
    broken: list[str] = []
    for line in template.splitlines():
        broken += [part for part in re.split(r"(?=\{%|\{\{)", line) if part] or [""]
    return broken


def _unified(ours: Sequence[str], theirs: Sequence[str], titles: tuple[str, str]) -> list[str]:
    return list(difflib.unified_diff(ours, theirs, titles[0], titles[1], lineterm="", n=2))


# Rows ----------------------------------------------------------------------------------------------------------------


def _pairs(rows: Rows, other: Rows) -> list[tuple[Completion | None, Completion | None]]:
    """The completions of both, by row and side; None where one has left the row out."""
    theirs = {(each.row, each.side): each for each in other.completions}
    ours = {(each.row, each.side): each for each in rows.completions}
    return [(ours.get(key), theirs.get(key)) for key in sorted(ours.keys() | theirs.keys())]


def _are_same(ours: Completion, theirs: Completion) -> bool:
    same_ids = ours.sequence.ids.tolist() == theirs.sequence.ids.tolist()
    return same_ids and ours.scored_positions().tolist() == theirs.scored_positions().tolist()


def _first(ours: Completion, theirs: Completion, mine: Any, others: Any) -> FirstDifference:
    a, b = ours.sequence.ids.tolist(), theirs.sequence.ids.tolist()
    place = next((n for n, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    return FirstDifference(
        row=ours.row,
        side=ours.side,
        place=place,
        before=_decoded(mine, a[max(0, place - _BEFORE) : place]),
        model=tuple(_token(mine, each) for each in a[place : place + _AFTER]),
        reference=tuple(_token(others, each) for each in b[place : place + _AFTER]),
    )


def _rendering(ours: Completion, theirs: Completion, mine: Any, others: Any) -> Rendering:
    texts = _decoded(mine, ours.sequence.ids.tolist()), _decoded(others, theirs.sequence.ids.tolist())
    diff = _unified(texts[0].splitlines(), texts[1].splitlines(), ("MODEL", "REF"))
    return Rendering(row=ours.row, model=texts[0], reference=texts[1], diff=tuple(diff))


def _decoded(tokenizer: Any, ids: Sequence[int]) -> str:
    text: Any = tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return str(text)


def _token(tokenizer: Any, number: int) -> str:
    """A token's text with its id."""
    return f"{_decoded(tokenizer, [number])!r} {number}"
