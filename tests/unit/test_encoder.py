"""Texts that are encoded in parts have the ids that the tokenizer gives to the whole."""

import functools
import re
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

import tiny
import tokenizer_kinds
from holdfast.data import encoder
from holdfast.data.encoder import Encoder, from_bytes

PIECES = [
    *(tiny.PAD, tiny.START, tiny.END, "<|im_", "end|>", "user", "assistant", "system"),
    *(" ", "  ", "\n", "\r\n", "\t", "\x1c", "\x85", "\xa0", "\u3000", "\u2028", "\u200b"),
    *("the", "water", "side", "Don", "'t", "'LL", "it's", "naïve", "e\u0301", "\u0301", "漢字", "שלום", "🙂"),
    *("1", "234", "5678", "!", "...", "/", "_", "▁", "A", "b", "#\n", "The keeper kept two books."),
]
TEXTS = st.lists(st.lists(st.sampled_from(PIECES), max_size=14).map("".join), max_size=4)


@functools.cache
def made(kind: str) -> tuple[PreTrainedTokenizerFast, Encoder]:
    tokenizer = tokenizer_kinds.KINDS[kind][0]()
    return tokenizer, Encoder(tokenizer)


@pytest.mark.parametrize("kind", tokenizer_kinds.KINDS)
def test_into_what_texts_are_cut(kind: str) -> None:
    assert made(kind)[1].granularity == tokenizer_kinds.KINDS[kind][1]


@pytest.mark.parametrize("kind", tokenizer_kinds.KINDS)
@given(TEXTS)
@settings(max_examples=60)
def test_the_ids_are_those_of_the_tokenizer(kind: str, texts: list[str]) -> None:
    tokenizer, fast = made(kind)
    found = [from_bytes(ids).tolist() for ids in fast.encode(texts)]
    assert found == [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]


@pytest.mark.parametrize("kind", tokenizer_kinds.KINDS)
@given(TEXTS.map("".join), st.data())
@settings(max_examples=25, deadline=None)
def test_tokens_at_a_place_are_those_of_the_offsets(kind: str, text: str, data: st.DataObject) -> None:
    """As `char_to_token` of the whole text's encoding has them; once with what an encoding before has left."""
    tokenizer, fast = made(kind)
    places = sorted(data.draw(st.sets(st.integers(-1, len(text) + 1), max_size=4)))
    encoding = tokenizer(text, add_special_tokens=False)
    for _ in range(2):
        found = fast.tokens_at(text, places)
        expected = [encoding.char_to_token(place) if 0 <= place < len(text) else None for place in places]
        assert [tokens and tokens[0] for tokens in found] == expected
        backwards = [
            max((n for n in range(len(encoding.input_ids)) if _covers(encoding, n, place)), default=None)
            for place in places
        ]
        assert [tokens and tokens[1] for tokens in found] == backwards
        fast.encode([text, "the water"])


def _covers(encoding: Any, token: int, place: int) -> bool:
    start, end = encoding.encodings[0].offsets[token]
    return start <= place < end


@given(st.one_of(TEXTS.map("".join), st.text()))
def test_words_begin_at_a_space_after_no_white_space(text: str) -> None:
    """The plain way to say it, and nothing is lost."""
    words = encoder._WORDS.findall(text)
    assert words == (re.split(r"(?<=\S)(?= )", text) if text else [])


def test_what_a_caller_left_set_does_not_matter() -> None:
    tokenizer = tiny.tokenizer()
    expected = tokenizer("a long text <|im_end|>", add_special_tokens=False)["input_ids"]
    fast = Encoder(tokenizer)
    tokenizer(["a", "b c"], padding=True, truncation=True, max_length=3, split_special_tokens=True)
    assert [from_bytes(ids).tolist() for ids in fast.encode(["a long text <|im_end|>"] * 2)] == [expected] * 2


def test_words_are_forgotten_before_they_fill_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoder, "_MOST_WORDS", 5)
    tokenizer = tiny.tokenizer()
    fast = Encoder(tokenizer)
    for text in (tiny.PROSE, "x" * 400, tiny.PROSE):
        assert from_bytes(fast.encode([text])[0]).tolist() == tokenizer(text, add_special_tokens=False)["input_ids"]
        assert len(fast._known) <= 5
    fast.encode(["short " + "long" * 20])
    assert set(fast._known) == {"short"}


def test_tokenizers_with_a_call_of_their_own_are_called() -> None:
    class Shouting(PreTrainedTokenizerFast):
        def _encode_plus(self, text, *args, **kwargs):  # type: ignore[override]
            shouted = text.upper() if isinstance(text, str) else [each.upper() for each in text]
            return super()._encode_plus(shouted, *args, **kwargs)

    tokenizer = Shouting(tokenizer_object=tiny.tokenizer().backend_tokenizer)
    fast = Encoder(tokenizer)
    assert fast.granularity == "nothing"
    assert from_bytes(fast.encode(["abc"])[0]).tolist() == tokenizer("ABC", add_special_tokens=False)["input_ids"]
    splitting = tiny.tokenizer()
    splitting.split_special_tokens = True
    fast = Encoder(splitting)
    assert fast.granularity == "nothing"
    assert from_bytes(fast.encode(["a<|im_end|>"])[0]).tolist() == splitting("a<|im_end|>")["input_ids"]
