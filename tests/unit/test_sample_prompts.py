"""Which prompts are completed, and which tokens end a completion."""

from types import SimpleNamespace
from typing import Any

import pytest
from datasets import Dataset

import tiny
from holdfast.data.prepare import prepare_dataset
from holdfast.samples.greedy import until_stop
from holdfast.samples.prompts import ROWS_PER_PROMPT, choose_prompts, stop_ids, text_of

TOKENIZER = tiny.tokenizer()
PAD, START, END = (TOKENIZER.convert_tokens_to_ids(token) for token in (tiny.PAD, tiny.START, tiny.END))


def pairs(*lengths: int) -> Dataset:
    """Rows of token ids whose prompts have these lengths; prompts of one length are equal."""
    return Dataset.from_list(
        [
            {"prompt_ids": [*range(50, 50 + length)], "chosen_ids": [70 + row, END], "rejected_ids": [90 + row, END]}
            for row, length in enumerate(lengths)
        ]
    )


def chosen(dataset: Any, number: int, **options: Any) -> list[Any]:
    return choose_prompts(
        dataset, number, TOKENIZER, **{"max_length": None, "truncation_mode": "keep_start", "longest": None, **options}
    )


def test_the_first_ones_that_differ() -> None:
    found = chosen(pairs(3, 3, 5, 3, 4, 6), 3)
    assert [(prompt.row, len(prompt.ids)) for prompt in found] == [(0, 3), (2, 5), (4, 4)]
    assert [(prompt.chosen, prompt.rejected) for prompt in found] == [
        (TOKENIZER.decode([70 + row]), TOKENIZER.decode([90 + row])) for row in (0, 2, 4)
    ]
    assert [prompt.row for prompt in chosen(pairs(3, 4), 5)] == [0, 1]


def test_rows_are_counted_as_they_were_loaded() -> None:
    """Row 1 of 4 is left out, since its completions are equal."""
    rows = tiny.preference_rows(4, seed=3)
    rows[1]["rejected"] = rows[1]["chosen"]
    prepared = prepare_dataset(Dataset.from_list(rows), TOKENIZER)
    assert [prompt.row for prompt in chosen(prepared, 3)] == [0, 2, 3]


def test_prompts_are_cut_as_rows_are_and_long_ones_passed_over() -> None:
    assert [prompt.row for prompt in chosen(pairs(3, 9, 4), 3, longest=4)] == [0, 2]
    (whole,) = chosen(pairs(9), 1)
    (start,) = chosen(pairs(9), 1, max_length=6)
    (end,) = chosen(pairs(9), 1, max_length=6, truncation_mode="keep_end")
    assert start.ids == whole.ids[:6]
    assert end.ids == whole.ids[-6:]


def test_so_many_rows_are_looked_at() -> None:
    """A stream of rows with one prompt does not go on for ever."""
    read: list[int] = []

    def endless() -> Any:
        while True:
            read.append(1)
            yield {"prompt_ids": [5], "chosen_ids": [6], "rejected_ids": [7]}

    assert len(chosen(endless(), 2)) == 1
    assert len(read) == 2 * ROWS_PER_PROMPT


@pytest.mark.parametrize(
    ("named", "expected"),
    [(None, {END}), (PAD, {PAD, END}), ([PAD, 7], {PAD, 7, END})],
)
def test_tokens_that_end_a_completion(named: Any, expected: set[int]) -> None:
    config = SimpleNamespace(eos_token_id=named)
    assert stop_ids(pairs(3), TOKENIZER, config) == sorted(expected)


def test_the_end_of_a_turn_ends_a_completion() -> None:
    """The template ends a turn with a token of its own and a line break; the tokenizer's end of sequence is another."""
    tokenizer = tiny.tokenizer()
    tokenizer.eos_token = tiny.PAD
    tokenizer.add_special_tokens({"additional_special_tokens": [tiny.END]})
    prepared = prepare_dataset(Dataset.from_list(tiny.preference_rows(2)), tokenizer)
    assert stop_ids(prepared, tokenizer, SimpleNamespace()) == [PAD, END]
    text = chosen(prepared, 1)[0].text
    assert text.startswith("<|im_start|>user\n")
    assert text.endswith("<|im_end|>\n<|im_start|>assistant\n")


def test_a_completion_is_cut_before_its_end() -> None:
    assert until_stop([5, 6, END, PAD, PAD], [END]) == [5, 6]
    assert until_stop([5, 6], [END]) == [5, 6]
    assert until_stop([END], [END]) == []
    assert text_of([70, END, PAD], TOKENIZER) == TOKENIZER.decode([70])
