"""Rows of every accepted kind are read as they are meant; every other row is refused with its column and what to do."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from holdfast.data.formats import Preference, check_columns, read_preference

USER = {"role": "user", "content": "Who wrote it?"}
OTHER = {"role": "user", "content": "When?"}
GOOD = {"role": "assistant", "content": "I am not sure."}
BAD = {"role": "assistant", "content": "Somebody."}
CALL = {"type": "function", "function": {"name": "tides", "arguments": {"day": "Monday"}}}


def test_an_explicit_prompt_is_taken_as_it_is() -> None:
    text = read_preference({"prompt": "a ", "chosen": "b", "rejected": "c"})
    assert text == Preference(prompt="a ", chosen="b", rejected="c", tools=None, chat_template_kwargs={})
    assert not text.is_conversational
    messages = read_preference({"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]})
    assert (messages.prompt, messages.chosen, messages.rejected) == ([USER], [GOOD], [BAD])
    assert messages.is_conversational


@pytest.mark.parametrize(
    ("chosen", "rejected", "expected"),
    [
        ("The sky is blue.", "The sky is green.", ("The sky is", " blue.", " green.")),  # the space goes with the word
        ("I like bread", "I like brie", ("I like br", "ead", "ie")),
        ("The sky", "The sky is", ("The sk", "y", "y is")),  # neither side is ever empty
        ("blue", "green", ("", "blue", "green")),
        ("blue ", "green ", ("", "blue ", "green ")),  # a space at the *end* is not before the first difference
        (" blue", " green", ("", " blue", " green")),
    ],
)
def test_an_implicit_prompt_of_text(chosen: str, rejected: str, expected: tuple[str, str, str]) -> None:
    read = read_preference({"chosen": chosen, "rejected": rejected})
    assert (read.prompt, read.chosen, read.rejected) == expected


@pytest.mark.parametrize(
    ("chosen", "rejected", "num_prompt"),
    [
        ([USER, GOOD], [USER, BAD], 1),
        ([USER, GOOD, OTHER, GOOD], [USER, GOOD, OTHER, BAD], 3),
        ([USER, GOOD], [USER, GOOD, OTHER, BAD], 1),  # one conversation is the beginning of the other
    ],
)
def test_an_implicit_prompt_of_messages(chosen: list[dict], rejected: list[dict], num_prompt: int) -> None:
    read = read_preference({"chosen": chosen, "rejected": rejected})
    assert read.prompt == chosen[:num_prompt]
    assert (read.chosen, read.rejected) == (chosen[num_prompt:], rejected[num_prompt:])


@given(st.text(min_size=1), st.text(min_size=1))
def test_an_implicit_prompt_loses_nothing(chosen: str, rejected: str) -> None:
    read = read_preference({"chosen": chosen, "rejected": rejected})
    assert read.prompt + read.chosen == chosen
    assert read.prompt + read.rejected == rejected
    assert read.chosen
    assert read.rejected


def test_none_keys_that_arrow_adds_are_dropped_at_every_depth() -> None:
    padded = {**USER, "tool_calls": None, "name": None}
    call = {"function": {**CALL["function"], "arguments": {"day": "Monday", "hour": None}}, "type": "function"}
    read = read_preference(
        {
            "prompt": [padded, {"role": "assistant", "content": None, "tool_calls": [call]}],
            "chosen": [{"role": "assistant", "content": [{"type": "text", "text": "x", "image": None}]}],
            "rejected": [BAD],
            "tools": [{"function": {"name": "tides", "parameters": {"day": {"type": "string"}, "hour": None}}}],
            "chat_template_kwargs": {"enable_thinking": False, "style": None},
        }
    )
    assert read.prompt == [USER, {"role": "assistant", "tool_calls": [CALL]}]
    assert read.chosen == [{"role": "assistant", "content": [{"type": "text", "text": "x"}]}]
    assert read.tools == [{"function": {"name": "tides", "parameters": {"day": {"type": "string"}}}}]
    assert read.chat_template_kwargs == {"enable_thinking": False}


def test_tools_may_be_json_and_then_keep_their_nulls() -> None:
    row = {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]}
    tools = [{"name": "tides", "parameters": {"day": {"default": None}}}]
    assert read_preference({**row, "tools": json.dumps(tools)}).tools == tools
    for none in (None, "", "[]", [], "null"):
        assert read_preference({**row, "tools": none}).tools is None


@pytest.mark.parametrize(
    ("columns", "kind"),
    [
        (["prompt", "chosen", "rejected", "score"], "explicit"),
        (["chosen", "rejected"], "implicit"),
        (["prompt_ids", "chosen_ids", "rejected_ids", "prompt", "chosen"], "tokenized"),
    ],
)
def test_columns(columns: list[str], kind: str) -> None:
    assert check_columns(columns) == kind


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (["prompt", "chosen"], r"needs the columns \{prompt, chosen, rejected\}, .* found \['chosen', 'prompt'\]"),
        (3, r"a row must be a dict with the columns as keys; found int 3. Check what makes the rows"),
        ("prompt", r"a row must be a dict with the columns as keys; found str 'prompt'"),
        (["question", "answer"], r"found \['answer', 'question'\].*rename_column"),
        (["prompt", "chosen", "rejected", "images"], r"column\(s\) \['images'\], but only text.*Drop them"),
        (
            ["prompt", "chosen", "rejected", "ref_chosen_logps"],
            r"two columns .*has only \['ref_chosen_logps'\]. Add the other, or drop it: reference log-probs are comp",
        ),
        (["prompt", "chosen", "rejected", "prompt_ids"], r"found only \['prompt_ids'\].*Add the others"),
    ],
)
def test_columns_that_are_refused(columns: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_columns(columns)


MESSAGES = {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]}
TEXTS = {"prompt": "a", "chosen": "b", "rejected": "c"}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({**TEXTS, "chosen": None}, r"'chosen' must hold text or a list of messages; found None.*Correct the row"),
        ({**TEXTS, "rejected": 3}, r"'rejected' must hold text.*found int 3"),
        ({**TEXTS, "prompt": {"role": "user"}}, r"'prompt' must hold text.*found dict"),
        ({**MESSAGES, "chosen": []}, r"'chosen' must hold at least one message; found an empty list"),
        ({**MESSAGES, "chosen": ["hello"]}, r"message 0 of the column 'chosen' must be a dict.*found str 'hello'"),
        ({**MESSAGES, "chosen": [GOOD, {"content": "x"}]}, r"message 1 of the column 'chosen'.*'role' and a 'content'"),
        ({**MESSAGES, "prompt": [{"role": "user"}]}, r"message 0 of the column 'prompt' must have text.*found None"),
        ({**MESSAGES, "prompt": [{"role": "user", "content": 7}]}, r"must have text.*found int 7"),
        (
            {**MESSAGES, "prompt": [{"role": "user", "content": [{"type": "image", "text": "x"}]}]},
            r"parts of type 'text'.*found list.*only text is supported",
        ),
        (
            {"prompt": "a", "chosen": [USER, GOOD], "rejected": [USER, BAD]},
            r"all text or all messages; found \{'prompt': 'text'.*drop the column 'prompt'",
        ),
        ({**MESSAGES, "chosen": "a"}, r"all text or all messages; found .*'chosen': 'text', 'rejected': 'messages'"),
        ({"chosen": "", "rejected": "b"}, r"'chosen' is empty, but without a column 'prompt'"),
        ({"chosen": [GOOD], "rejected": [BAD]}, r"hold no prompt.*found dict .*Add a column 'prompt'"),
        ({**MESSAGES, "tools": "{oops"}, r"'tools' must hold a list of tools.*not JSON"),
        ({**MESSAGES, "tools": '{"name": "tides"}'}, r"'tools' must hold a list of tools \(dicts\).*found str"),
        ({**MESSAGES, "tools": ["tides"]}, r"'tools' must hold a list of tools \(dicts\).*found list"),
        ({**TEXTS, "tools": [CALL]}, r"'tools' is for a chat template, which needs messages; found text. Drop"),
        ({**TEXTS, "chat_template_kwargs": {"a": 1}}, r"'chat_template_kwargs' is for a chat template"),
        ({**MESSAGES, "chat_template_kwargs": "x"}, r"'chat_template_kwargs' must hold a dict or None; found str"),
        ({**MESSAGES, "chat_template_kwargs": {"tokenize": False}}, r"holds \['tokenize'\], which are set by"),
        ({"prompt": "a", "chosen": "b"}, r"needs the columns"),
        ({**TEXTS, "chosen": b"b"}, r"'chosen' must hold text or a list of messages; found bytes b'b'"),
        ({**TEXTS, "chosen": True}, r"'chosen' must hold text or a list of messages; found bool True"),
        ({**TEXTS, "prompt": float("nan")}, r"'prompt' must hold text or a list of messages; found float nan"),
        ({**TEXTS, "chosen": "b\ud800"}, r"'chosen' must not hold half of a surrogate pair.*found \.\.\.'b\\ud800'"),
        (
            {**MESSAGES, "chosen": [GOOD, {"role": "assistant", "content": "\udc00"}]},
            r"message 1 of the column 'chosen' must not hold half of a surrogate pair",
        ),
        (
            {**MESSAGES, "prompt": [{"role": "user", "content": [{"type": "text", "text": "\ud83d"}]}]},
            r"message 0 of the column 'prompt' must not hold half of a surrogate pair",
        ),
        (
            {**MESSAGES, "prompt": [{"from": "narrator", "value": "x"}]},
            r"prompt' has the role 'narrator', which is none",
        ),
        ({**MESSAGES, "prompt": [{"from": "human", "text": "x"}]}, r"must be a dict with a 'role'.*found dict"),
        ({**MESSAGES, "prompt": [{"role": None, "content": "x"}]}, r"must be a dict with a 'role'"),
        ({**MESSAGES, "prompt": [{"role": "user", "content": {"text": "x"}}]}, r"must have text.*found dict"),
        ({**MESSAGES, "prompt": [{"role": "user", "content": []}]}, r"must have text.*found list \[\]"),
        ({**MESSAGES, "prompt": [[USER]]}, r"message 0 of the column 'prompt' must be a dict.*found list"),
        ({**MESSAGES, "prompt": [None]}, r"message 0 of the column 'prompt' must be a dict.*found None"),
        ({**MESSAGES, "tools": "[" * 100_000}, r"'tools' must hold a list of tools .*not JSON"),
        ({**MESSAGES, "tools": "[" + "1" * 5000 + "]"}, r"'tools' must hold a list of tools .*not JSON"),
        ({**MESSAGES, "tools": r'[{"name": "\ud800"}]'}, r"'tools' must hold a list of tools .*surrogates not allowed"),
    ],
)
def test_rows_that_are_refused(row: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_preference(row)
