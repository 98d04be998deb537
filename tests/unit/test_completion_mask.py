"""Which completion tokens are scored: masks against loops over single tokens, and what each way of saying it gives."""

import itertools
import re
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from datasets import Dataset, Features, List, Value
from hypothesis import given
from hypothesis import strategies as st

import tiny
from holdfast.batch import PairBatch
from holdfast.checkpoint.provenance import dataset_digest
from holdfast.data.columns import MASK_COLUMNS, TOKENIZED_COLUMNS, columns_of_pairs
from holdfast.data.layouts.choose import LAYOUTS
from holdfast.data.layouts.completion_rows import row_per_completion
from holdfast.data.layouts.padded import PaddedLayout
from holdfast.data.layouts.preference_collator import DataCollatorForPreference, with_positions
from holdfast.data.layouts.sequences import content_id_of, truncated_sequences
from holdfast.data.loader.fillers import StreamWithFillers
from holdfast.data.loader.order import order_by_length
from holdfast.data.prepare import prepare_dataset
from holdfast.data.usability import UNUSABLE_REASONS
from holdfast.data.verdicts import USABLE, Judge
from holdfast.metrics import _token_count
from holdfast.policy.rotations import longest_pair
from masked_rows import masked_data, masked_rows
from policies import config

Row = dict[str, Any]
SIDES = (("chosen_ids", "chosen_mask"), ("rejected_ids", "rejected_mask"))


@st.composite
def drawn_rows(draw: Any, max_size: int = 4, min_tokens: int = 0, most_id: int = 4) -> list[Row]:
    """Rows of few ids, so that completions are often alike. A mask may be missing, empty, of ones or of zeros."""

    def side() -> tuple[list[int], list[int] | None]:
        ids = draw(st.lists(st.integers(1, most_id), min_size=min_tokens, max_size=6))
        mask = st.lists(st.sampled_from([0, 1, 1]), min_size=len(ids), max_size=len(ids))
        return ids, draw(st.one_of(st.none(), st.just([]), mask, mask))

    rows = []
    for _ in range(draw(st.integers(1, max_size))):
        prompt = draw(st.lists(st.integers(1, most_id), max_size=4))
        (chosen, chosen_mask), (rejected, rejected_mask) = side(), side()
        ids = {"prompt_ids": prompt, "chosen_ids": chosen, "rejected_ids": rejected}
        rows.append(ids | {"chosen_mask": chosen_mask, "rejected_mask": rejected_mask})
    return rows


def naive_cut(row: Row, side: int, max_length: int | None, mode: str) -> tuple[list[int], list[tuple[int, int]]]:
    """The prompt that is left, and (id, whether it is scored) of each completion token that is left, token by token."""
    ids_column, mask_column = SIDES[side]
    prompt = list(row["prompt_ids"])
    completion = list(zip(row[ids_column], row[mask_column] or [1] * len(row[ids_column]), strict=True))

    def without_tail() -> None:
        while completion and not completion[-1][1]:
            completion.pop()

    without_tail()
    while max_length is not None and len(prompt) + len(completion) > max_length:
        if mode == "keep_start":
            (completion or prompt).pop()
        else:
            (prompt or completion).pop(0)
    without_tail()
    return prompt, completion


def naive_reason(row: Row, max_length: int | None, mode: str) -> str | None:
    """Why a row cannot be used, from the rule as the documentation says it."""
    if not row["chosen_ids"] or not row["rejected_ids"]:
        return "empty completion"
    cut = [naive_cut(row, side, max_length, mode) for side in (0, 1)]
    if any(not completion and len(prompt) == max_length for prompt, completion in cut):
        return "prompt fills max_length"
    if any(not completion for _, completion in cut):
        return "no scored token"
    if cut[0][1] == cut[1][1]:
        return "chosen equals rejected"
    for prompt, completion in cut:
        if sum(scored for place, (_, scored) in enumerate(completion) if place + len(prompt) > 0) == 0:
            return "no token to predict"
    return None


LENGTHS = st.sampled_from([None, 2, 3, 4, 6])
MODES = st.sampled_from(["keep_start", "keep_end"])


@given(drawn_rows(max_size=8, most_id=2), LENGTHS, MODES, st.integers(0, 2), st.sampled_from(["int64", "bool_"]))
def test_verdicts(rows: list[Row], max_length: int | None, mode: Any, start: int, kind: str) -> None:
    """Of many rows together and of each by itself, against the rule in words."""
    judge = Judge(max_length=max_length, truncation_mode=mode, vocab_size=9, name="train")
    flags = pa.list_(getattr(pa, kind)())
    types = dict.fromkeys(TOKENIZED_COLUMNS, pa.list_(pa.int32())) | dict.fromkeys(MASK_COLUMNS, flags)
    if kind == "bool_":
        rows = [row | {name: row[name] and [*map(bool, row[name])] for name in MASK_COLUMNS} for row in rows]
    table = pa.table({name: pa.array([row[name] for row in rows], of) for name, of in types.items()}).slice(start)
    expected = [naive_reason(row, max_length, mode) for row in rows[start:]]
    assert [judge.reason(row, 0) for row in rows[start:]] == expected
    found = judge.verdicts(table, start)
    assert [None if code == USABLE else UNUSABLE_REASONS[code] for code in found] == expected


@given(drawn_rows(), LENGTHS, MODES)
def test_a_sequence_is_cut_with_its_mask(rows: list[Row], max_length: int | None, mode: Any) -> None:
    cut = [naive_cut(row, side, max_length, mode) for side in (0, 1) for row in rows]
    for (prompt, completion), found in zip(cut, truncated_sequences(rows, max_length, mode), strict=True):
        assert found.ids.tolist() == prompt + [token for token, _ in completion]
        assert found.num_prompt == len(prompt)
        scored = [bool(flag) for _, flag in completion]
        assert (found.scored is None) == all(scored)
        assert found.scored is None or found.scored.tolist() == scored
        assert found.num_targets == sum(scored[not prompt :])


def usable(rows: list[Row], max_length: int | None, mode: str) -> list[Row]:
    return [row for row in rows if naive_reason(row, max_length, mode) is None]


@given(drawn_rows(min_tokens=1, most_id=9), LENGTHS, MODES)
def test_every_layout_scores_the_same_tokens(rows: list[Row], max_length: int | None, mode: Any) -> None:
    """Each target by its sequence, and the token that predicts it; content ids are those of the padded layout, also of
    the rows that `DataCollatorForPreference` makes, and `row_per_completion` gives whole rows again."""
    if not (rows := usable(rows, max_length, mode)):
        return
    cut = [naive_cut(row, side, max_length, mode) for side in (0, 1) for row in rows]
    expected = []
    for prompt, completion in cut:
        ids = prompt + [token for token, _ in completion]
        flags = [0] * len(prompt) + [scored for _, scored in completion]
        expected.append([(ids[place - 1], ids[place]) for place in range(1, len(ids)) if flags[place]])
    padded = PaddedLayout(0, max_length, mode)(rows)
    all_tensors = {name: layout(0, max_length, mode)(rows) for name, layout in LAYOUTS.items()}
    all_tensors["collator"] = with_positions(DataCollatorForPreference(0, max_length, mode)(rows))
    for name, tensors in all_tensors.items():
        batch = PairBatch.from_tensors(tensors)
        ids = batch.inputs["input_ids"].flatten()
        pairs = list(zip(ids[batch.source].tolist(), batch.target.tolist(), strict=True))
        ends = [0, *itertools.accumulate(batch.lengths())]
        of_each = [pairs[start:end] for start, end in itertools.pairwise(ends)]
        order = torch.cat([batch.chosen, batch.rejected]).tolist()
        assert [of_each[sequence] for sequence in order] == expected, name
        assert [batch.content_ids()[sequence] for sequence in order] == [*map(tuple, padded["content"].tolist())], name
        num_tokens = sum(len(prompt) + len(completion) for prompt, completion in cut)
        assert _token_count(batch)["num_tokens"][0] == num_tokens, name
        again = row_per_completion(tensors, 0)
        for key in ("input_ids", "attention_mask", "source", "target", "sequence"):
            assert torch.equal(again[key], padded[key]), (name, key)


@given(drawn_rows(min_tokens=1, most_id=9))
def test_what_is_read_of_the_last_layer_has_all_that_is_scored(rows: list[Row]) -> None:
    """`Segments.unread_and_read` counts whole completions as read: more than the scored tokens need, never less."""
    if not (rows := usable(rows, None, "keep_start")):
        return
    for name in ("packed", "prefix_shared"):
        tensors = LAYOUTS[name](0)(rows)
        runs = tensors["row_segments"].unread_and_read()
        is_read = np.repeat(np.arange(len(runs)) % 2 == 1, runs)
        assert is_read[tensors["source"].numpy()].all()


SAME: dict[str, Row] = {
    "no columns": {},
    "None": {"chosen_mask": None},
    "an empty list": {"chosen_mask": []},
    "ones": {"chosen_mask": [1, 1, 1, 1]},
    "booleans": {"chosen_mask": [True] * 4},
    "an array": {"chosen_mask": np.ones(4, dtype=np.int8)},
}
OTHER: dict[str, Row] = {
    **{f"mask {mask}": {"chosen_mask": mask} for mask in ([0, 1, 1, 1], [1, 0, 1, 1], [1, 1, 0, 1], [1, 1, 1, 0])},
    **{f"id {n}": {"chosen_ids": [9 if n == place else 4 + place for place in range(4)]} for n in range(4)},
    "a seen id": {"chosen_ids": [4, 9, 6, 7], "chosen_mask": [1, 0, 1, 1]},
    "the prompt": {"prompt_ids": [1, 3]},
    "both masks": {"chosen_mask": [0, 1, 0, 1]},
}
PLAIN = {"prompt_ids": [1, 2], "chosen_ids": [4, 5, 6, 7], "rejected_ids": [8]}


def identity(change: Row) -> tuple[int, int]:
    return content_id_of(truncated_sequences([PLAIN | change], None, "keep_start")[0])


def test_a_mask_is_part_of_the_identity_and_one_of_ones_is_none() -> None:
    assert {identity(change) for change in SAME.values()} == {identity({})}
    assert len({identity(change) for change in OTHER.values()} | {identity({})}) == len(OTHER) + 1


def test_what_cannot_change_a_number_is_no_part_of_the_identity() -> None:
    """Tokens after the last scored one; and where the prompt ends, before the first scored one."""
    tail = {"chosen_ids": [4, 5, 6, 7, 70, 71], "chosen_mask": [1, 1, 1, 1, 0, 0]}
    assert identity(tail) == identity({})
    first = {"prompt_ids": [1], "chosen_ids": [2, 4, 5, 6, 7], "chosen_mask": [0, 1, 1, 1, 1]}
    assert identity(first) == identity({})


def data_with(masks: list[list[int] | None] | None) -> Dataset:
    rows = [{"prompt_ids": [1, n], "chosen_ids": [4, 5, 6], "rejected_ids": [7, 8]} for n in range(3)]
    data = Dataset.from_list(rows)
    return data if masks is None else data.add_column("chosen_mask", masks)


def test_the_digest_of_a_dataset() -> None:
    ones: list[Any] = [[1, 1, 1], None, []]
    assert dataset_digest(data_with(ones)) == dataset_digest(data_with(None))
    masks = [[[1, 0, 1], None, None], [None, [1, 0, 1], None], [[0, 1, 1], None, None], [[1, 0, 1], [1, 1, 1], []]]
    digests = [dataset_digest(data_with(mask)) for mask in masks]
    assert digests[0] == digests[3] != digests[1]
    assert len({*digests, dataset_digest(data_with(None))}) == 4


WRONG: dict[str, tuple[Any, str]] = {
    "too short": ([1, 0], "found 2 values"),
    "too long": ([1, 0, 1, 1], "found 4 values"),
    "another value": ([1, 2, 0], "found list [1, 2, 0]"),
    "negative": ([1, -1, 0], "found list [1, -1, 0]"),
    "None in it": ([1, None, 0], "found list [1, None, 0]"),
    "floats": ([1.0, 0.0, 1.0], "found list [1.0, 0.0, 1.0]"),
    "text": (["1", "0", "1"], "found list ['1', '0', '1']"),
    "lists": ([[1], [0], [1]], "found list [[1], [0], [1]]"),
}


@pytest.mark.parametrize("form", ["dataset", "stream"])
@pytest.mark.parametrize("case", WRONG)
def test_a_mask_that_is_none_names_its_row(case: str, form: str) -> None:
    value, found = WRONG[case]
    rows = [PLAIN | {"chosen_ids": [4, 5, 6], "chosen_mask": value if n == 2 else None} for n in range(4)]
    data: Any = Dataset.from_list(rows)
    data = data.to_iterable_dataset() if form == "stream" else data
    where = r"^train dataset, row 2: the column 'chosen_mask' must hold a list .* 3 token ids in 'chosen_ids'; "
    pattern = where + re.escape(found)
    with pytest.raises(ValueError, match=pattern):
        list(prepare_dataset(data, tiny.tokenizer()))


def test_a_mask_that_fits_no_ids_is_refused_by_a_layout() -> None:
    with pytest.raises(ValueError, match=r"each of the 1 token ids in 'rejected_ids'; found 2 values"):
        PaddedLayout(0)([PLAIN | {"rejected_mask": [1, 0]}])


def test_masks_need_token_ids() -> None:
    data = Dataset.from_list([{"prompt": "a", "chosen": " b", "rejected": " c", "chosen_mask": [1]}])
    with pytest.raises(ValueError, match=r"\['chosen_mask'\] say which token ids .* need the columns \['prompt_ids'"):
        prepare_dataset(data, tiny.tokenizer())


def test_lists_of_one_length_are_masks_too() -> None:
    ids = dict.fromkeys(TOKENIZED_COLUMNS, List(Value("int32")))
    features = Features({**ids, "chosen_mask": List(Value("int8"), length=4)})
    data = Dataset.from_list([PLAIN | {"chosen_mask": [1, 0, 1, 0]}] * 3, features=features)
    prepared = prepare_dataset(data, tiny.tokenizer())
    assert (len(prepared), longest_pair(prepared)) == (3, 5)


@pytest.mark.parametrize("form", ["dataset", "stream", "transform"])
def test_masks_stay_in_a_prepared_dataset(form: str, caplog: pytest.LogCaptureFixture) -> None:
    """And rows of which nothing is scored are left out, with that reason."""
    rows = masked_rows()
    bad = rows[0] | {"rejected_mask": [0, 0, 0]}
    data: Any = Dataset.from_list([*rows[:4], bad, *rows[4:]])
    if form == "transform":
        data = data.with_transform(lambda batch: batch)
    prepared = prepare_dataset(data.to_iterable_dataset() if form == "stream" else data, tiny.tokenizer())
    assert [{name: row[name] for name in columns_of_pairs(row)} for row in prepared] == rows
    assert "no scored token" in caplog.text


def test_a_column_of_nothing_is_no_column() -> None:
    features = Features({**dict.fromkeys(TOKENIZED_COLUMNS, List(Value("int32"))), "chosen_mask": Value("null")})
    data = Dataset.from_list([PLAIN | {"chosen_mask": None}] * 2, features=features)
    prepared = prepare_dataset(data, tiny.tokenizer())
    assert longest_pair(prepared) == 6
    assert dataset_digest(prepared) == dataset_digest(data.remove_columns("chosen_mask"))


def test_lengths_are_those_that_are_computed(tmp_path: Any) -> None:
    """Of the longest row, and in the order by length."""
    cut = [[sum(map(len, naive_cut(row, side, None, "keep_start"))) for side in (0, 1)] for row in masked_rows()]
    assert longest_pair(masked_data()) == max(map(max, cut))
    order = order_by_length(masked_data(), config(tmp_path))
    assert order is not None
    own = [a + b - len(row["prompt_ids"]) for (a, b), row in zip(cut, masked_rows(), strict=True)]
    assert order._lengths.tolist() == own


@pytest.mark.parametrize("multiple", [2, 4])
def test_a_filler_has_one_mask_for_both(multiple: int) -> None:
    """So its two completions are equal, and it counts for nothing."""
    table = masked_rows()
    table.append(table[0] | {"rejected_mask": [1, 0, 1]})
    if len(table) % multiple == 0:
        table = table[:-1]
    found = list(StreamWithFillers(Dataset.from_list(table).to_iterable_dataset(), multiple))
    assert len(found) % multiple == 0
    for row in found[len(table) :]:
        batch = PaddedLayout(0)([row])
        assert torch.equal(*batch["content"])
