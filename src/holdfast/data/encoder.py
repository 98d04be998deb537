"""Texts -> token ids, many at a time, and each part of them once.

A tokenizer of the `tokenizers` library reads a text in parts that do not see each other: it takes out the special
tokens, and cuts what is between them into words. So a text may be cut at these places beforehand, and a part that was
encoded before is looked up: a prompt is encoded once and not with each completion, a common word once and for all.
Where a tokenizer may cut is read from its own description (what stands in `tokenizer.json`):

- Before a special token, if the token takes no white space with it, no other added token can run across the cut, and
  all steps of the tokenizer are known ones, which look at nothing but their part and at whether it begins the text.
- Also before a space that follows a character other than white space, if the words are found by one of
  `_WORD_PATTERNS`, none of which matches such a character together with a space after it, and the normalizer is none
  or NFC.
- Else nowhere: the tokenizer is called with all texts at once.

A text's beginning is never cut off, since some tokenizers put a space there; every other part begins with its special
token or its space. Ids are bytes here (int32), which join and compare much faster than lists.

Given up: tokenizers with parts in Python, and those that draw at random (BPE dropout); they are called.
"""

import json
import re
from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from operator import itemgetter
from typing import Any, final

import numpy as np
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from holdfast.internals.transformers import backend_of

NUM_ID_BYTES = 4
"""Bytes of a token id, an int32."""

Step = Mapping[str, Any]
Tokens = tuple[int, int]
"""The first and the last of some tokens."""

_MOST_WORDS = 100_000
"""So many words are remembered at most, then they are learned anew: some 15 MB."""
_MOST_OFFSETS = 10_000
_LONGEST_WORD = 40
"""Longer words, such as whole lines of a script without spaces, are not remembered."""

# Before each space that follows a character which is no white space: `(?<=\S)(?= )`, but faster.
_WORDS = re.compile(r"\s*\S+(?:[^\S ]\s*\S+)*(?:[^\S ]\s*\Z)?|\s+")

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_CL100K_HEAD = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_CL100K_TAIL = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_O200K_WORDS = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"
)
_O200K_TAIL = r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_WORD_PATTERNS = frozenset(
    {
        _GPT2,
        *(_CL100K_HEAD + numbers + _CL100K_TAIL for numbers in (r"\p{N}", r"\p{N}+", r"\p{N}{1,3}")),
        *(_O200K_WORDS + numbers + _O200K_TAIL for numbers in (r"\p{N}", r"\p{N}{1,3}")),
    }
)
"""Patterns of which no alternative matches a character that is no white space and a space after it."""

_KNOWN_MODELS = frozenset({"BPE", "Unigram", "WordLevel", "WordPiece"})
_KNOWN_NORMALIZERS = frozenset({
    "BertNormalizer", "ByteLevel", "Lowercase", "NFC", "NFD", "NFKC", "NFKD", "Nmt", "Precompiled", "Prepend",
    "Replace", "Sequence", "Strip", "StripAccents",
})  # fmt: skip
_KNOWN_PRE_TOKENIZERS = frozenset({
    "BertPreTokenizer", "ByteLevel", "CharDelimiterSplit", "Digits", "Metaspace", "Punctuation", "Sequence", "Split",
    "UnicodeScripts", "Whitespace", "WhitespaceSplit",
})  # fmt: skip
"""What looks at nothing but the part that it is given, and, in `Metaspace`, at whether this is the text's beginning."""


@final
class Encoder:
    """Encodes texts with a tokenizer, without the special tokens that it would add around them."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._backend = backend_of(tokenizer)
        self._special_tokens = None if self._backend is None else _cuts_at_special_tokens(self._backend)
        self._cuts_words = self._special_tokens is not None and _may_cut_words(self._backend)
        self._known: dict[str, bytes] = {}
        self._encoded: dict[str, bytes] = {}
        self._offsets_of: dict[str, list[tuple[int, int]]] = {}

    @property
    def granularity(self) -> str:
        """Into what texts are cut: `words`, `special tokens` or `nothing`."""
        if self._special_tokens is None:
            return "nothing"
        return "words" if self._cuts_words else "special tokens"

    def encode(self, texts: Sequence[str]) -> list[bytes]:
        """The ids of each text, as `tokenizer(text, add_special_tokens=False)` has them."""
        if not texts:
            return []
        if self._special_tokens is None:
            return [as_bytes(ids) for ids in self._tokenizer(list(texts), add_special_tokens=False)["input_ids"]]
        parts_of = [_before_each(self._special_tokens, text) for text in texts]
        self._encoded = encoded = self._parts(dict.fromkeys(part for parts in parts_of for part in parts))
        return [b"".join(map(encoded.__getitem__, parts)) for parts in parts_of]

    def tokens_at(self, text: str, characters: Sequence[int]) -> list[Tokens | None]:
        """The first and the last token that contain each of these characters of a text, ascending, as the offsets of
        `tokenizer(text, add_special_tokens=False)` have it; None where no token does."""
        if self._special_tokens is None:
            offsets = offsets_of(self._tokenizer, text)
            return [containing(offsets, character) for character in characters]
        found: list[Tokens | None] = []
        wanted = list(reversed(characters))
        start = num_tokens = 0
        for part in _before_each(self._special_tokens, text):
            if not wanted:
                break
            end, at, before = start + len(part), start, num_tokens
            for word in self._words(part) if wanted[-1] < end else ():
                while wanted and wanted[-1] < at + len(word):
                    tokens = containing(self._offsets(word), wanted.pop() - at)
                    found.append(tokens and (tokens[0] + before, tokens[1] + before))
                if not wanted or wanted[-1] >= end:
                    break
                at, before = at + len(word), before + self._num_tokens(word)
            start, num_tokens = end, num_tokens + self._num_tokens(part)
        return found + [None] * len(wanted)

    def _words(self, part: str) -> Iterable[str]:
        return (match[0] for match in _WORDS.finditer(part)) if self._cuts_words else [part]

    def _num_tokens(self, part: str) -> int:
        """The number of tokens of a part, or of a word."""
        ids = self._encoded.get(part) or self._known.get(part)
        if ids is None:
            ids = self._parts([part])[part]
        return len(ids) // NUM_ID_BYTES

    def _offsets(self, part: str) -> list[tuple[int, int]]:
        offsets = self._offsets_of.get(part)
        if offsets is None:
            assert self._backend is not None
            self._backend.no_truncation()
            self._backend.no_padding()
            self._backend.encode_special_tokens = False
            offsets = self._backend.encode(part, add_special_tokens=False).offsets
            if len(self._offsets_of) >= _MOST_OFFSETS:
                self._offsets_of.clear()
            if len(part) <= _LONGEST_WORD:
                self._offsets_of[part] = offsets
        return offsets

    def _parts(self, parts: Iterable[str]) -> dict[str, bytes]:
        if not self._cuts_words:
            return self._whole(list(parts))
        words_of = {part: _WORDS.findall(part) for part in parts}
        known = self._known
        new = self._whole(list({word for words in words_of.values() for word in words if word not in known}))
        known.update(new)
        found = {part: b"".join(map(known.__getitem__, words)) for part, words in words_of.items()}
        for word in new:
            if len(word) > _LONGEST_WORD:
                del known[word]
        if len(known) > _MOST_WORDS:
            known.clear()
        return found

    def _whole(self, texts: list[str]) -> dict[str, bytes]:
        assert self._backend is not None
        self._backend.no_truncation()  # a caller of the tokenizer may have left them on
        self._backend.no_padding()
        self._backend.encode_special_tokens = False
        encodings = self._backend.encode_batch_fast(texts, add_special_tokens=False)
        return {text: as_bytes(encoding.ids) for text, encoding in zip(texts, encodings, strict=True)}


def as_bytes(ids: Sequence[int]) -> bytes:
    """Token ids as `Encoder.encode` returns them."""
    return np.asarray(ids, dtype=np.int32).tobytes()


def from_bytes(ids: bytes) -> np.ndarray:
    """The array of token ids that these bytes are."""
    return np.frombuffer(ids, dtype=np.int32)


def offsets_of(tokenizer: PreTrainedTokenizerBase, text: str) -> list[tuple[int, int]]:
    """The characters of each token of a text. `ValueError` for a tokenizer that does not tell them."""
    if not tokenizer.is_fast:
        raise ValueError(
            "only a part of a completion is scored, which takes a tokenizer that tells the characters of its tokens; "
            f"{type(tokenizer).__name__} is written in Python and does not. Load the fast tokenizer of the model, or "
            "set `assistant_only=False`."
        )
    encoded: Any = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    return encoded["offset_mapping"]


def containing(offsets: Sequence[tuple[int, int]], character: int) -> Tokens | None:
    """The first and the last token that contain a character; None where no token does."""
    at = bisect_right(offsets, character, key=itemgetter(1))  # the first that ends after it
    first = last = None
    for token in range(at, len(offsets)):
        start, end = offsets[token]
        if start > character:
            break
        if character < end:
            first, last = token if first is None else first, token
    return None if first is None or last is None else (first, last)


def _before_each(pattern: re.Pattern[str], text: str) -> list[str]:
    """The text cut before each match."""
    starts = [match.start() for match in pattern.finditer(text)]
    if not starts:
        return [text]
    parts = [text[start:end] for start, end in zip(starts, [*starts[1:], len(text)], strict=True)]
    return parts if starts[0] == 0 else [text[: starts[0]], *parts]


def _description(component: Any) -> Step:
    """A normalizer or pre-tokenizer as it stands in `tokenizer.json`; of the type `none` where there is none, and
    `unknown` where it is written in Python."""
    if component is None:
        return {"type": "none"}
    try:
        return json.loads(component.__getstate__())
    except Exception:  # the library raises a bare Exception for those
        return {"type": "unknown"}


def _steps(step: Step, inner: str) -> list[Step]:
    """A normalizer or pre-tokenizer as the list of its steps."""
    if step["type"] == "none":
        return []
    if step["type"] != "Sequence":
        return [step]
    return [each for part in step[inner] for each in _steps(part, inner)]


def _normalizers(backend: Tokenizer) -> list[Step]:
    return _steps(_description(backend.normalizer), "normalizers")


def _pre_tokenizers(backend: Tokenizer) -> list[Step]:
    return _steps(_description(backend.pre_tokenizer), "pretokenizers")


def _cuts_at_special_tokens(backend: Tokenizer) -> re.Pattern[str] | None:
    """Matches the special tokens before which a text may be cut; None where the tokenizer is none of the known."""
    model = backend.model
    if type(model).__name__ not in _KNOWN_MODELS or getattr(model, "dropout", None):
        return None
    if not {step["type"] for step in _normalizers(backend)} <= _KNOWN_NORMALIZERS:
        return None
    if not {step["type"] for step in _pre_tokenizers(backend)} <= _KNOWN_PRE_TOKENIZERS:
        return None
    added = backend.get_added_tokens_decoder().values()
    usable = [
        token.content
        for token in added
        if token.special
        and not (token.lstrip or token.rstrip or token.single_word or token.normalized)
        and not (token.content[0].isalnum() or token.content[0].isspace() or token.content[0] == "_")
        and not any(_runs_across_the_start(other.content, token.content) for other in added)
    ]
    longest_first = sorted(usable, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) or "(?!)")


def _runs_across_the_start(other: str, token: str) -> bool:
    """Whether `other` may begin before `token` begins in a text, and end after that."""
    ends = (other[start:] for start in range(1, len(other)))
    return any(token.startswith(end) or end.startswith(token) for end in ends)


def _may_cut_words(backend: Tokenizer | None) -> bool:
    """Whether a text may be cut before each space that follows a character which is no white space."""
    if backend is None or any(step["type"] != "NFC" for step in _normalizers(backend)):
        return False
    if any(
        token.lstrip or token.rstrip or token.single_word or re.search(r"\S ", token.content)
        for token in backend.get_added_tokens_decoder().values()
    ):
        return False
    *before, last = _pre_tokenizers(backend) or [{"type": "none"}]
    if last["type"] != "ByteLevel" or last["add_prefix_space"]:
        return False
    splits = [step for step in before if step["type"] == "Split"]
    if len(splits) + sum(step["type"] == "Digits" for step in before) < len(before):
        return False
    if any(split["invert"] or split["behavior"] != "Isolated" for split in splits):
        return False
    patterns = [split["pattern"].get("Regex") for split in splits] + [_GPT2] * bool(last.get("use_regex", True))
    return len(patterns) == 1 and patterns[0] in _WORD_PATTERNS
