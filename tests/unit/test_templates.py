"""What is scored under the templates of real models: as it is written down, and as their generation marks say it."""

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import template_table as table
from holdfast.data.batch_tokenizer import BatchTokenizer, EncodedPair
from holdfast.data.formats import read_preference
from holdfast.data.rendering.template import template_of
from holdfast.data.tokenize import TokenizedPair, tokenize

CELLS = [(name, shape) for name in table.TEMPLATES for shape in table.ROWS]
REFUSED = {
    ("alternating", "tools"),
    ("gemma", "tools"),
    ("no_system", "system"),
    ("no_system", "tools"),
}
ENDED_TWICE = "phi"
"""Its template writes a second end token after the last message, which its marks leave out."""

PIECES = [
    *("The", " sea", "  ", "\n", "\n\n", "é", "🙂", "漢字", "'", "1", "."),
    *("<think>", "</think>", "<tool_call>", "[INST]", "ASSISTANT:", "<|im_end|>", "</s>", "user", "{% x %}"),
]
TEXTS = st.lists(st.sampled_from(PIECES), min_size=1, max_size=6).map("".join).filter(str.strip)


@pytest.mark.parametrize(("name", "shape"), CELLS)
def test_what_comes_of_a_row_is_what_is_written_down(name: str, shape: str) -> None:
    found = table.shown(name, shape)
    assert found == table.expected(name)[shape]
    assert found[0].startswith("error: ") == ((name, shape) in REFUSED)


def whole_masks(name: str, shape: str) -> list[tuple[list[int], list[int]]]:
    """Ids and mask of both conversations, as transformers has them for the template with marks."""
    row = table.ROWS[shape]
    tokenizer = table.tokenizer_of(name, has_marks=True)
    found = []
    for side in table.SIDES:
        messages = [
            # newer versions of transformers do this, for gpt-oss
            {**message, "thinking": message["reasoning_content"]} if "reasoning_content" in message else message
            for message in row["prompt"] + row[side]
        ]
        rendered: Any = tokenizer.apply_chat_template(
            messages,
            tools=row.get("tools"),
            chat_template=template_of(tokenizer, {"tools": row.get("tools")}, table.DATE),
            return_assistant_tokens_mask=True,
            return_dict=True,
        )
        found.append((rendered["input_ids"], rendered["assistant_masks"]))
    return found


AS_THEY_ARE = (
    "one turn",
    "several turns",
    "system",
    "tools",
    "reasoning",
    "reasoning in tags",
    "another's message last",
)
"""Shapes whose messages stay as they are."""
RESHAPED = {("chatml", "tools"), ("deepseek_r1", "tools"), ("phi", "tools"), ("command_r", "tools")}
"""Under these templates a call's message is given another shape, since they fail on it as it is."""


@pytest.mark.parametrize(
    ("name", "shape"), [cell for cell in CELLS if cell[1] in AS_THEY_ARE and cell not in REFUSED | RESHAPED]
)
def test_masks_are_those_of_the_marks(name: str, shape: str) -> None:
    """`return_assistant_tokens_mask=True` of transformers, restricted to the completions; one turn included."""
    pair = table.pair_of(name, shape, has_marks=True)
    for side, (ids, mask) in zip(table.SIDES, whole_masks(name, shape), strict=True):
        own_ids, own_mask = getattr(pair, f"{side}_ids"), getattr(pair, f"{side}_mask")
        assert pair.prompt_ids + own_ids == ids
        expected = mask[len(pair.prompt_ids) :]
        assert (own_mask or [1] * len(own_ids)) == expected
        assert 1 in expected


def masks(pair: TokenizedPair) -> list[list[int]]:
    return [
        list(mask) if mask is not None else [1] * len(ids)
        for ids, mask in ((pair.chosen_ids, pair.chosen_mask), (pair.rejected_ids, pair.rejected_mask))
    ]


@pytest.mark.parametrize(
    ("name", "shape"),
    [cell for cell in CELLS if cell[1] != "one turn" and cell[0] != ENDED_TWICE and cell not in REFUSED],
)
def test_turns_are_found_where_marks_would_be(name: str, shape: str) -> None:
    without, marked = table.pair_of(name, shape), table.pair_of(name, shape, has_marks=True)
    assert (without.prompt_ids, without.chosen_ids) == (marked.prompt_ids, marked.chosen_ids)
    assert masks(without) == masks(marked)


@pytest.mark.parametrize("name", table.TEMPLATES)
def test_rows_together_are_as_one_by_one(name: str) -> None:
    rows = [row for shape, row in table.ROWS.items() if (name, shape) not in REFUSED]
    preferences = [read_preference(row) for row in rows]
    for has_marks in (False, True):
        tokenizer = table.tokenizer_of(name, has_marks=has_marks)
        together = BatchTokenizer(tokenizer, table.DATE)._together(preferences)
        assert together == [EncodedPair.of(tokenize(each, tokenizer, table.DATE)) for each in preferences]


@pytest.mark.parametrize("name", [name for name in table.TEMPLATES if name != ENDED_TWICE])
@given(st.data())
@settings(max_examples=3, deadline=None)
def test_whatever_is_said(name: str, data: st.DataObject) -> None:
    """Turns are found where marks would be, row by row and together, for texts of all sorts.

    DeepSeek's generation prompt ends with `<think>`. A text that begins so begins within it, and marks do not say so.
    """
    row = {
        "prompt": [table.user(data.draw(TEXTS))],
        "chosen": [
            table.message("user" if turn % 2 else "assistant", data.draw(TEXTS))
            for turn in range(data.draw(st.integers(2, 5)))
        ],
        "rejected": [table.assistant(data.draw(TEXTS))],
    }
    if name == "deepseek_r1":
        row = json.loads(json.dumps(row).replace("<think>", "<b>"))
    preference = read_preference(row)
    tokenizers = [table.tokenizer_of(name, has_marks=has_marks) for has_marks in (False, True)]
    pairs = [tokenize(preference, tokenizer, table.DATE) for tokenizer in tokenizers]
    assert pairs[0].chosen_ids == pairs[1].chosen_ids
    assert masks(pairs[0]) == masks(pairs[1])
    for tokenizer, pair in zip(tokenizers, pairs, strict=True):
        assert BatchTokenizer(tokenizer, table.DATE)._together([preference]) == [EncodedPair.of(pair)]


def test_the_page_is_what_the_table_says() -> None:
    page = table.PAGE.read_text(encoding="utf-8")
    assert page == table.written(page), "run `python tests/template_table.py`"
