"""Token ids are those of the whole text, cut where the prompt ends; truncation and content ids obey their laws."""

import hashlib
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

import tiny
from holdfast.data.formats import Preference, read_preference
from holdfast.data.tokenize import (
    TokenizedPair,
    check_tokenizer,
    check_truncation,
    check_vocabulary,
    content_id,
    tokenize,
    truncate,
)
from holdfast.data.usability import (
    EMPTY_COMPLETION,
    EQUAL_COMPLETIONS,
    NOTHING_TO_PREDICT,
    PROMPT_FILLS,
    unusable_reason,
)

TOKENIZER = tiny.tokenizer()
IDS = st.lists(st.integers(0, 2**31 - 1), max_size=12)
MODES = st.sampled_from(["keep_start", "keep_end"])


def preference(prompt: object, chosen: object, rejected: object, **others: object) -> Preference:
    return read_preference({"prompt": prompt, "chosen": chosen, "rejected": rejected, **others})


def user(content: str) -> dict[str, str]:
    return {"role": "user", "content": content}


def assistant(content: str) -> dict[str, str]:
    return {"role": "assistant", "content": content}


def texts(pair: TokenizedPair) -> list[str]:
    return [TOKENIZER.decode(ids) for ids in (pair.prompt_ids, pair.chosen_ids, pair.rejected_ids)]


def test_text_gets_the_eos_token_once() -> None:
    pair = tokenize(preference("What is it?", " The sea.", " The bay.<|im_end|>"), TOKENIZER)
    assert texts(pair) == ["What is it?", " The sea.<|im_end|>", " The bay.<|im_end|>"]
    assert pair.chosen_ids.count(TOKENIZER.eos_token_id) == 1
    assert pair.prompt_is_prefix


def test_messages_get_the_chat_template_and_no_eos_of_ours() -> None:
    pair = tokenize(preference([user("What is it?")], [assistant("The sea.")], [assistant("The bay.")]), TOKENIZER)
    assert texts(pair) == [
        "<|im_start|>user\nWhat is it?<|im_end|>\n<|im_start|>assistant\n",
        "The sea.<|im_end|>\n",
        "The bay.<|im_end|>\n",
    ]


def test_tools_and_template_variables_reach_the_template() -> None:
    sides = ([user("Hi")], [assistant("a")], [assistant("b")])
    pair = tokenize(preference(*sides, tools='[{"name": "tides"}]', chat_template_kwargs={"style": "dry"}), TOKENIZER)
    assert texts(pair)[0] == (
        '<|im_start|>system\nTools: [{"name": "tides"}]<|im_end|>\n<|im_start|>system\nStyle: dry<|im_end|>\n'
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )


def test_tokens_that_merge_across_the_boundary_belong_to_the_completions() -> None:
    """ "the " + "water" is tokenized alone as [the][ ], but as [the][ water] in the whole: the space is cut."""
    pair = tokenize(preference("He measured the ", "water.", "smoke."), TOKENIZER)
    assert not pair.prompt_is_prefix
    assert TOKENIZER.decode(pair.cut_ids) == " "
    assert texts(pair) == ["He measured the", " water.<|im_end|>", " smoke.<|im_end|>"]
    assert pair.prompt_ids + pair.chosen_ids == TOKENIZER("He measured the water.<|im_end|>")["input_ids"]


def test_a_template_whose_prompt_is_no_prefix() -> None:
    """The template ends a lone prompt with an empty thought, which the whole conversation does not have."""
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template += "{% if add_generation_prompt %}<think></think>{% endif %}"
    pair = tokenize(preference([user("Hi")], [assistant("a")], [assistant("b")]), tokenizer)
    assert tokenizer.decode(pair.cut_ids) == "<think></think>"
    assert texts(pair)[1:] == ["a<|im_end|>\n", "b<|im_end|>\n"]


def test_the_shorter_common_prefix_counts() -> None:
    """The prompt is a prefix of the chosen text, but merges with the rejected one: both completions begin there."""
    pair = tokenize(preference("He measured the ", "\nwater", "smoke"), TOKENIZER)
    whole = TOKENIZER("He measured the \nwater<|im_end|>")["input_ids"]
    assert pair.prompt_ids + pair.chosen_ids == whole
    assert texts(pair) == ["He measured the", " \nwater<|im_end|>", " smoke<|im_end|>"]


def test_tokenizers_that_cannot_are_refused() -> None:
    bare = tiny.tokenizer(chat_template=False)
    with pytest.raises(
        ValueError, match=r"need a chat template; the tokenizer has none.*Set `tokenizer.chat_template`"
    ):
        tokenize(preference([user("Hi")], [assistant("a")], [assistant("b")]), bare)
    bare.eos_token = None
    with pytest.raises(ValueError, match=r"end with the eos token; the tokenizer has none.*Set `tokenizer.eos_token`"):
        tokenize(preference("a", "b", "c"), bare)
    with pytest.raises(TypeError, match=r"must be a tokenizer; found str.*processor.tokenizer"):
        check_tokenizer("gpt2", is_conversational=False)  # type: ignore[arg-type]


def test_a_template_that_refuses_the_messages_names_their_roles() -> None:
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(
        ValueError, match=r"cannot render messages of the roles \['user'\]: roles must alternate.*Corre"
    ):
        tokenize(preference([user("Hi")], [assistant("a")], [assistant("b")]), tokenizer)


def test_vocabulary() -> None:
    tokenizer = tiny.tokenizer(vocab_size=300)
    check_vocabulary(tokenizer, 300)
    tokenizer.add_tokens(["<new>"])
    message = (
        r"301 tokens, but the model has embeddings for 300: 1 token\(s\) have none, such as \{'<new>': 300\}.*resize"
    )
    with pytest.raises(ValueError, match=message):
        check_vocabulary(tokenizer, 300)
    check_vocabulary(tokenizer, 301)


def test_placeholders_for_other_modalities_need_no_embedding() -> None:
    backend = tiny.tokenizer(vocab_size=300).backend_tokenizer
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, extra_special_tokens={"image_token": "<image>"})
    assert tokenizer.convert_tokens_to_ids("<image>") == 300
    check_vocabulary(tokenizer, 300)


@given(IDS, IDS, st.integers(2, 30), MODES)
def test_truncation_is_a_slice_of_the_whole(prompt: list[int], completion: list[int], length: int, mode: str) -> None:
    kept, rest = truncate(prompt, completion, length, mode)
    whole = prompt + completion
    assert kept + rest == (whole[:length] if mode == "keep_start" else whole[-length:])
    # The boundary stays where it was: what is left of the prompt is prompt.
    assert len(rest) == (
        max(0, min(len(whole), length) - len(prompt)) if mode == "keep_start" else min(len(completion), length)
    )


@given(IDS, IDS, MODES)
def test_no_truncation_without_a_limit_or_need(prompt: list[int], completion: list[int], mode: str) -> None:
    assert truncate(prompt, completion, None, mode) == (prompt, completion)
    assert truncate(prompt, completion, len(prompt) + len(completion), mode) == (prompt, completion)


def test_truncation_options_are_checked() -> None:
    with pytest.raises(ValueError, match=r"truncation_mode must be one of .*found 'middle'. Choose"):
        check_truncation(8, "middle")
    with pytest.raises(ValueError, match=r"max_length must leave room.*found 1. Give at least 2"):
        check_truncation(1, "keep_end")


@pytest.mark.parametrize(
    ("prompt", "chosen", "rejected", "max_length", "mode", "reason"),
    [
        ([1, 2], [3], [4], None, "keep_start", None),
        ([1, 2], [3], [4], 3, "keep_start", None),
        ([1, 2], [3], [4], 2, "keep_start", PROMPT_FILLS),
        ([1, 2], [3], [4], 2, "keep_end", None),
        ([1, 2], [], [4], None, "keep_start", EMPTY_COMPLETION),
        ([1, 2], [3], [], 2, "keep_start", EMPTY_COMPLETION),
        ([1, 2], [3, 4], [3, 4], None, "keep_start", EQUAL_COMPLETIONS),
        ([1, 2], [3, 4], [3, 5], 3, "keep_start", EQUAL_COMPLETIONS),  # they differ only in what is cut
        ([1, 2], [3, 4], [5, 4], 3, "keep_end", None),  # 2 3 4 | 2 5 4
        ([1, 2], [3, 4, 6], [5, 4, 6], 2, "keep_end", EQUAL_COMPLETIONS),  # 4 6 | 4 6
        ([], [3], [4], None, "keep_start", NOTHING_TO_PREDICT),
        ([], [3, 4], [5], None, "keep_start", NOTHING_TO_PREDICT),
        ([], [3, 4], [5, 4], None, "keep_start", None),
    ],
)
def test_unusable_reasons(
    prompt: list[int], chosen: list[int], rejected: list[int], max_length: int | None, mode: str, reason: str | None
) -> None:
    pair = TokenizedPair(prompt_ids=prompt, chosen_ids=chosen, rejected_ids=rejected, cut_ids=[])
    assert unusable_reason(pair, max_length, mode) == reason


@given(IDS, IDS)
def test_content_id_is_blake2b_of_both_parts_with_their_lengths(prompt: list[int], completion: list[int]) -> None:
    """Compared with `struct`, which is another way to write the same bytes."""
    packed = b"".join(struct.pack(f"<q{len(part)}q", len(part), *part) for part in (prompt, completion))
    first, second = content_id(prompt, completion)
    assert struct.pack("<qq", first, second) == hashlib.blake2b(packed, digest_size=16).digest()
    assert all(-(2**63) <= half < 2**63 for half in (first, second))


@given(st.tuples(IDS, IDS), st.tuples(IDS, IDS))
def test_content_ids_are_equal_only_for_equal_content(one: tuple, other: tuple) -> None:
    assert (content_id(*one) == content_id(*other)) == (one == other)


@given(IDS.filter(len), IDS)
def test_moving_the_boundary_changes_the_content_id(prompt: list[int], completion: list[int]) -> None:
    assert content_id(prompt, completion) != content_id(prompt[:-1], prompt[-1:] + completion)


def test_what_is_scored_is_part_of_the_content() -> None:
    ids = {content_id([1], [2, 3], scored) for scored in (None, [1, 0], [0, 1])}
    assert len(ids) == 3
