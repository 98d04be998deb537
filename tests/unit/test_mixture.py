"""Mixtures: what a weight means, which rows are taken, and that each row stays what it is."""

import json
import math
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset, DatasetDict, Features, IterableDataset, Json, List, Value
from hypothesis import given
from hypothesis import strategies as st

import tiny
from holdfast.checkpoint.provenance import dataset_digest
from holdfast.data.dates import date_of_run
from holdfast.data.files.places import places_of
from holdfast.data.load import load_preferences
from holdfast.data.mixing.common_features import common_feature
from holdfast.data.mixing.mixture import first_rows, mix, mixture_of
from holdfast.data.mixing.shares import STOPPINGS, WeightError, rows_of_sources
from holdfast.data.prepare import prepare_dataset

NAMES = ("a", "b", "c")


def text(n: int, word: str = "text") -> Dataset:
    return Dataset.from_list([{"prompt": f"{word} {i}?", "chosen": f"yes {i}", "rejected": "no"} for i in range(n)])


def of(mixture: Any) -> Counter[str]:
    """How many rows of each source there are."""
    return Counter(row["source"] for row in mixture)


# What a weight means ------------------------------------------------------------------------------------------------

SHARES: list[tuple[dict[str, int], dict[str, float] | None, str, dict[str, int]]] = [
    ({"a": 10, "b": 4}, None, "first_exhausted", {"a": 10, "b": 4}),
    ({"a": 10, "b": 10}, {"a": 3, "b": 1}, "first_exhausted", {"a": 10, "b": 3}),
    ({"a": 10, "b": 10}, {"a": 0.75, "b": 0.25}, "first_exhausted", {"a": 10, "b": 3}),
    ({"a": 10, "b": 10}, {"a": 3, "b": 1}, "all_exhausted", {"a": 30, "b": 10}),
    ({"a": 400, "b": 100}, {"a": 3, "b": 1}, "first_exhausted", {"a": 300, "b": 100}),
    ({"a": 400, "b": 100}, {"a": 3, "b": 1}, "all_exhausted", {"a": 400, "b": 133}),
    ({"a": 400, "b": 100}, {"a": 1, "b": 1}, "first_exhausted", {"a": 100, "b": 100}),
    ({"a": 400, "b": 100}, {"a": 1, "b": 1}, "all_exhausted", {"a": 400, "b": 400}),
    ({"a": 5, "b": 1000}, {"a": 0.01, "b": 0.99}, "first_exhausted", {"a": 5, "b": 495}),
    ({"a": 7}, {"a": 0.3}, "all_exhausted", {"a": 7}),
]


@pytest.mark.parametrize(("lengths", "weights", "stopping", "expected"), SHARES)
def test_shares_by_hand(lengths: Any, weights: Any, stopping: Any, expected: Any) -> None:
    assert rows_of_sources(lengths, weights, stopping) == expected
    mixture = mix(
        {name: text(length) for name, length in lengths.items()}, weights=weights, stopping=weights and stopping
    )
    assert of(mixture) == expected


@given(
    st.dictionaries(st.sampled_from(NAMES), st.integers(1, 300), min_size=1),
    st.lists(st.floats(0.05, 20), min_size=3, max_size=3),
    st.sampled_from(STOPPINGS),
)
def test_shares_follow_the_weights(lengths: dict[str, int], drawn: list[float], stopping: Any) -> None:
    """To the nearest row; none twice, or each at least once; and not one row more could be taken, or less."""
    weights = dict(zip(NAMES, drawn, strict=True))
    try:
        counts = rows_of_sources(lengths, weights, stopping)
    except WeightError as error:
        assert error.source in lengths  # noqa: PT017
        return
    scale = (min if stopping == "first_exhausted" else max)(lengths[name] / weights[name] for name in lengths)
    for name, length in lengths.items():
        assert abs(counts[name] - weights[name] * scale) <= 0.5 + 1e-6
        assert counts[name] <= length if stopping == "first_exhausted" else counts[name] >= length
    assert any(counts[name] == length for name, length in lengths.items())


def test_which_rows_are_taken() -> None:
    """A row comes once before any comes twice. What is taken of a source depends on the seed, and on no other source,
    nor on the order in which they are named."""
    sources = {"a": text(20, "a"), "b": text(9, "b")}
    mixture = mix(sources, weights={"a": 1, "b": 1}, seed=1)
    prompts = Counter(row["prompt"] for row in mixture)
    assert max(prompts.values()) == 1
    twice = Counter(mix(sources, weights={"a": 1, "b": 1}, seed=1, stopping="all_exhausted")["prompt"])
    assert {twice[f"b {i}?"] for i in range(9)} == {2, 3}
    assert {twice[f"a {i}?"] for i in range(20)} == {1}

    def of_a(**options: Any) -> set[str]:
        return {row["prompt"] for row in mix(**options) if row["source"] == "a"}

    taken = of_a(sources=sources, weights={"a": 1, "b": 1}, seed=1)
    assert taken == of_a(sources={"c": text(9), "a": sources["a"]}, weights={"c": 2, "a": 2}, seed=1)
    assert taken != of_a(sources=sources, weights={"a": 1, "b": 1}, seed=2)
    assert mix(dict(reversed(sources.items())), weights={"b": 1, "a": 1}, seed=1)[:] == mixture[:]
    assert mixture["prompt"] != sorted(mixture["prompt"])


def test_a_source_of_weight_0_is_left_out() -> None:
    mixture = mix({"a": text(4), "b": text(4)}, weights={"a": 2, "b": 0})
    assert of(mixture) == {"a": 4}
    assert of(mix({"a": text(4), "b": text(4).to_iterable_dataset()}, weights={"a": 2, "b": 0})) == {"a": 4}


def test_what_is_taken_is_said(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    sources = {"a": text(8), "b": text(2)}
    mix(sources, weights={"a": 1, "b": 1})
    mix(sources, weights={"a": 1, "b": 1}, stopping="all_exhausted")
    mix({name: part.to_iterable_dataset() for name, part in sources.items()}, weights={"a": 3, "b": 1})
    said = [record.message for record in caplog.records]
    assert said == [
        "the mixture has 4 rows: 'a' 2 of 8 rows (50 %, weight 1), 'b' all 2 rows (50 %, weight 1)",
        "the mixture has 16 rows: 'a' all 8 rows (50 %, weight 1), 'b' 8 from 2 rows (50 %, weight 1, each 4 times on "
        "average)",
        "the mixture is a stream, of whose rows on average come from 'a' 75 %, 'b' 25 %",
    ]
    monkeypatch.setenv("RANK", "1")
    mix(sources)
    assert len(caplog.records) == 3


NOT_MIXED: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"weights": {"a": -1, "b": 1}}, ValueError, r"weight of the source 'a' must be a number of at least 0; found -1"),
    ({"weights": {"a": math.nan, "b": 1}}, ValueError, r"source 'a' must be a number of at least 0; found nan"),
    ({"weights": {"a": math.inf, "b": 1}}, ValueError, r"found inf"),
    ({"weights": {"a": True, "b": 1}}, ValueError, r"found True"),
    ({"weights": {"a": "0.5", "b": 1}}, ValueError, r"found '0.5'"),
    ({"weights": {"a": None, "b": 1}}, ValueError, r"found None"),
    ({"weights": {"a": 0, "b": 0.0}}, ValueError, r"all weights are 0"),
    ({"weights": {"a": 1}}, ValueError, r"the source 'b' has no weight, and others have"),
    ({"weights": {}}, ValueError, r"the source 'a' has no weight"),
    ({"weights": {"a": 1, "b": 1, "bb": 1}}, ValueError, r"for 'bb', and there is no such source. Did you mean 'b'"),
    ({"weights": {"a": 1e-9, "b": 1}}, ValueError, r"weight 1e-09 the source 'a' gives .* of a row, so none"),
    ({"weights": {"a": 1e5, "b": 1}, "stopping": "all_exhausted"}, ValueError, r"each come .* times; 1000 is the most"),
    ({"weights": {"a": 1, "b": 1}, "stopping": "longest"}, ValueError, r"stopping='longest' was asked for; it is"),
    ({"stopping": "all_exhausted"}, ValueError, r"without weights; then every row of every source is there once"),
    ({"seed": -1}, ValueError, r"seed=-1 was asked for"),
    ({"sources": {}}, TypeError, r"a mixture is made of a dict of datasets by name"),
    ({"sources": [text(1)]}, TypeError, r"a dict of datasets by name; found list"),
    ({"sources": {"": text(1)}}, ValueError, r"needs a name, which is text; found ''"),
    ({"sources": {1: text(1)}}, ValueError, r"needs a name, which is text; found 1"),
    ({"sources": {"a": DatasetDict({"train": text(1)})}}, TypeError, r"the source 'a' must be a .* found DatasetDict"),
    ({"sources": {"a": text(3).select([])}}, ValueError, r"the source 'a' has no rows"),
    ({"sources": {"a": text(3), "b": Dataset.from_dict({"question": ["x"]})}}, ValueError, r"source 'b': .*needs the"),
    ({"sources": {"a": text(1), "b": Dataset.from_list([{"prompt_ids": [1], "chosen_ids": [2], "rejected_ids": [3]}])}},
     ValueError, r"source 'b' is tokenized .*, and the source 'a' does not, so they cannot be mixed"),
    ({"sources": {"a": text(1).add_column("ref_chosen_logps", [1.0]).add_column("ref_rejected_logps", [1.0]),
                  "b": text(1)}}, ValueError, r"'a' brings reference log-probs along"),
    ({"sources": {"a": text(1).with_transform(lambda rows: rows)}}, ValueError, r"'a' are made by a transform"),
    ({"sources": {"a": text(1).add_column("source", ["x"]).add_column("original_source", ["y"])}}, ValueError,
     r"'a' has the columns 'source' and 'original_source'"),
]  # fmt: skip


@pytest.mark.parametrize(("options", "error", "message"), NOT_MIXED)
def test_what_cannot_be_mixed(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        mix(**{"sources": {"a": text(3), "b": text(3)}} | options)


# Rows of unlike columns ---------------------------------------------------------------------------------------------


def message(role: str, content: Any, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


CALL = {"type": "function", "function": {"name": "look", "arguments": {"where": "up", "far": True}}}
OTHER_CALL = {"type": "function", "function": {"name": "look", "arguments": {"where": None, "when": [1, None]}}}
TOOL = {"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {}}}}
OTHER_TOOL = {"type": "function", "function": {"name": "add", "description": "sum", "parameters": {"a": [1, 2.5]}}}
ASK, YES, NO = message("user", "Is it?"), message("assistant", "Yes."), message("assistant", "No.")

UNLIKE: dict[str, list[dict[str, Any]]] = {
    "text": [{"prompt": "42", "chosen": "7", "rejected": "null"}, {"prompt": "{}", "chosen": "true", "rejected": "x"}],
    "implicit text": [{"chosen": "So it is. 1", "rejected": "So it is. 2", "score": 1}],
    "messages": [{"prompt": [ASK], "chosen": [YES], "rejected": [NO]}],
    "implicit messages": [{"chosen": [ASK, YES], "rejected": [ASK, NO], "score": 0.5, "when": "now"}],
    "names": [{"prompt": [message("user", "Who?", name="Ada")], "chosen": [YES], "rejected": [NO]}],
    "gaps": [{"prompt": [message("user", "Who?", name="Ada")], "chosen": [YES], "rejected": [NO]},
             {"prompt": [message("user", "Who?"), YES, message("user", "No?")], "chosen": [YES], "rejected": [NO]}],
    "gaps in tools": [{"prompt": [ASK], "chosen": [YES], "rejected": [NO], "tools": [tool]}
                      for tool in (TOOL, OTHER_TOOL)],
    "gaps in arguments": [{"prompt": [ASK], "chosen": [message("assistant", "", tool_calls=[call])], "rejected": [NO]}
                          for call in (CALL, OTHER_CALL)],
    "no content": [{"prompt": [ASK], "chosen": [message("assistant", None, tool_calls=[CALL])], "rejected": [NO]},
                   {"prompt": [ASK], "chosen": [message("assistant", None, tool_calls=[OTHER_CALL])],
                    "rejected": [YES]}],
    "tools": [{"prompt": [ASK], "chosen": [message("assistant", "", tool_calls=[CALL])], "rejected": [NO],
               "tools": [TOOL], "chat_template_kwargs": {"style": "terse"}}],
    "other tools": [{"prompt": [ASK], "chosen": [YES], "rejected": [NO], "tools": [OTHER_TOOL], "score": "high"}],
    "tools as text": [{"prompt": [ASK], "chosen": [YES], "rejected": [NO], "tools": json.dumps([TOOL])}],
    "in JSON": [{"prompt": json.dumps([ASK]), "chosen": json.dumps([YES]), "rejected": json.dumps([NO])}],
    "repeats": [{"prompt": "How so is it then, tell me?", "chosen": "How so is it then, tell me? Yes",
                 "rejected": "How so is it then, tell me? No"}] * 3,
    "a source": [{"prompt": "Where from?", "chosen": "a", "rejected": "b", "source": "the web"}],
}  # fmt: skip


def ids(rows: Any) -> list[tuple[tuple[int, ...], ...]]:
    return [tuple(tuple(row[name]) for name in ("prompt_ids", "chosen_ids", "rejected_ids")) for row in rows]


@pytest.mark.parametrize("is_stream", [False, True])
@pytest.mark.parametrize("names", [[*UNLIKE], *([name, other] for name in ("text", "tools") for other in UNLIKE)])
def test_each_row_stays_what_it_is(names: list[str], is_stream: bool) -> None:
    """It has the token ids that it has in its source alone, also where Arrow has added keys to a message or a tool."""
    tokenizer = tiny.tokenizer()
    parts = {name: Dataset.from_list(UNLIKE[name]) for name in dict.fromkeys(names)}
    alone = {name: sorted(ids(prepare_dataset(part, tokenizer))) for name, part in parts.items()}
    given = {name: part.to_iterable_dataset() if is_stream else part for name, part in parts.items()}
    mixture = [*prepare_dataset(mix(given), tokenizer)]
    for name in parts:
        assert sorted(ids(row for row in mixture if row["source"] == name)) == alone[name], name
    of_their_own = {row["source"]: row.get("original_source") for row in mixture}
    assert of_their_own == {name: "the web" if name == "a source" else None for name in parts}


@pytest.mark.parametrize(
    ("one", "other", "expected"),
    [
        (Value("string"), Value("string"), Value("string")),
        (Value("null"), List(Value("int64")), List(Value("int64"))),
        (Value("large_string"), Value("string"), Value("string")),
        (Value("int8"), Value("int64"), Value("int64")),
        (Value("int64"), Value("float32"), Value("float64")),
        (Value("int64"), Value("string"), Json()),
        (Value("bool"), Value("int64"), Json()),
        (Value("string"), List(Value("string")), Json()),
        (List(Value("null")), List(Value("string")), List(Value("string"))),
        ({"a": Value("int64")}, {"a": Value("float64")}, {"a": Value("float64")}),
        ({"a": Value("null")}, {"a": Value("int64")}, Json()),
        ({"a": Value("int64")}, {"a": Value("int64"), "b": Value("int64")}, Json()),
        (List({"a": Value("string")}), List({"b": Value("string")}), List(Json())),
        (Json(), Value("string"), Json()),
    ],
)  # fmt: skip
def test_what_holds_both(one: Any, other: Any, expected: Any) -> None:
    assert common_feature(one, other) == common_feature(other, one) == expected


@pytest.mark.parametrize("is_stream", [False, True])
def test_a_date_is_that_of_the_run_whichever_row_comes_first(is_stream: bool) -> None:
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = "{{ strftime_now('%Y') }} " + tokenizer.chat_template
    parts = {"a": text(1), "b": Dataset.from_list(UNLIKE["messages"])}
    alone = ids(prepare_dataset(parts["b"], tokenizer, template_date="2001-02-03"))
    given = {name: part.to_iterable_dataset() if is_stream else part for name, part in parts.items()}
    mixtures = [mix(given, seed=seed) for seed in range(4)]
    assert {next(iter(mixture))["source"] for mixture in mixtures} >= {"a"}
    for mixture in mixtures:
        prepared = prepare_dataset(mixture, tokenizer, template_date="2001-02-03")
        assert ids(row for row in prepared if row["source"] == "b") == alone
        assert date_of_run(tokenizer, "2001-02-03", None, [mixture]) == "2001-02-03"


def test_masks_of_some_sources_only() -> None:
    """A row without a mask is scored whole."""
    pairs = {"prompt_ids": [1, 2], "chosen_ids": [3, 4], "rejected_ids": [5]}
    parts = {"plain": Dataset.from_list([pairs]), "masked": Dataset.from_list([pairs | {"chosen_mask": [0, 1]}])}
    prepared = prepare_dataset(mix(parts), tiny.tokenizer())
    assert {row["source"]: row["chosen_mask"] for row in prepared} == {"plain": None, "masked": [0, 1]}


def test_columns_of_like_sources_keep_their_types() -> None:
    mixture = mix({"a": Dataset.from_list(tiny.preference_rows(3)), "b": Dataset.from_list(tiny.preference_rows(4, 1))})
    assert mixture.features == Features(
        {**Dataset.from_list(tiny.preference_rows(1)).features, "source": Value("string")}
    )


# Where a row comes from ---------------------------------------------------------------------------------------------

GOOD, BAD = {"prompt": "What?", "chosen": "a", "rejected": "b"}, {"prompt": "What?", "chosen": None, "rejected": "b"}


def files(folder: Path, **rows: list[dict[str, Any]]) -> dict[str, Any]:
    """A file for each of the sources, with an empty line after each row."""
    for name, of_source in rows.items():
        (folder / f"{name}.jsonl").write_text("\n\n".join(map(json.dumps, of_source)))
    return {name: folder / f"{name}.jsonl" for name in rows}


@pytest.mark.parametrize("is_stream", [False, True])
def test_a_row_is_named_by_source_file_and_line(tmp_path: Path, is_stream: bool) -> None:
    paths = files(tmp_path, fine=[GOOD] * 5, broken=[GOOD, GOOD, BAD])
    mixture = mix({name: load_preferences(path, streaming=is_stream) for name, path in paths.items()})
    message = (
        r"train dataset, row \d+ \(source 'broken', .*broken.jsonl, line 5\): .*must hold text or a list of messages"
    )
    with pytest.raises(ValueError, match=message):
        list(prepare_dataset(mixture, tiny.tokenizer()))


def test_a_row_of_no_file_is_named_by_its_number_in_the_source() -> None:
    parts = {"a": text(3), "b": Dataset.from_list([GOOD, BAD])}
    for sources in (parts, {name: part.to_iterable_dataset() for name, part in parts.items()}):
        with pytest.raises(ValueError, match=r"row \d+ \(source 'b', row 1\): "):
            list(prepare_dataset(mix(sources), tiny.tokenizer()))


def test_every_row_has_its_place(tmp_path: Path) -> None:
    paths = files(
        tmp_path, a=[GOOD | {"prompt": f"a {i}"} for i in range(4)], b=[GOOD | {"prompt": f"b {i}"} for i in range(3)]
    )
    inner = mix({name: load_preferences(path) for name, path in paths.items()})
    outer = mix({"both": inner, "more": text(3, "more")}, weights={"both": 1, "more": 1}, stopping="all_exhausted")
    for mixture in (inner, outer):
        places = places_of(mixture)
        assert places.of(len(mixture)) is None
        for row, values in enumerate(mixture):
            name, number = values["prompt"].rstrip("?").split()
            file = f", {paths[name]}, line {2 * int(number) + 1}" if name in paths else f", row {number}"
            assert places.of(row).endswith(file)
            assert places.of(row).startswith(f"source {values['source']!r}, ")
    assert {row["original_source"] for row in outer} == {"a", "b", None}


def test_a_prompt_that_is_not_there_is_named(tmp_path: Path) -> None:
    paths = files(tmp_path, chat=[{"chosen": [ASK, YES], "rejected": [ASK, NO]}, {"chosen": [YES], "rejected": [NO]}])
    with pytest.raises(ValueError, match=r"'chat' dataset, row 1 \(.*chat.jsonl, line 3\): .*hold no prompt"):
        mix({"chat": load_preferences(paths["chat"]), "text": text(2)})


def test_a_value_that_a_stream_cannot_carry() -> None:
    def rows() -> Iterator[dict[str, Any]]:
        yield GOOD | {"seen": b"bytes"}

    streams = {"a": IterableDataset.from_generator(rows), "b": text(2)}
    with pytest.raises(ValueError, match=r"'a' dataset, row 0: the column 'seen' holds bytes that is neither text"):
        list(mix(streams))


def test_rows_that_are_left_out_are_counted_by_source(caplog: pytest.LogCaptureFixture) -> None:
    same = Dataset.from_list([GOOD | {"chosen": "b"}] * 2)
    prepared = prepare_dataset(mix({"a": text(3), "empty": same}), tiny.tokenizer())
    assert of(prepared) == {"a": 3}
    assert any("By source: all 2 of 'empty'." in record.message for record in caplog.records)


# The same everywhere ------------------------------------------------------------------------------------------------


def test_the_digest_of_the_data_is_that_of_the_mixture() -> None:
    tokenizer = tiny.tokenizer()
    sources = {"a": text(6, "a"), "b": text(6, "b")}
    streams = {name: part.to_iterable_dataset() for name, part in sources.items()}
    unlike: list[dict[str, Any]] = [
        {}, {"weights": {"a": 2, "b": 1}}, {"weights": {"a": 1, "b": 2}}, {"weights": {"a": 2, "b": 1}, "seed": 1},
        {"weights": {"a": 2, "b": 1}, "stopping": "all_exhausted"},
    ]  # fmt: skip
    for parts in (sources, streams):
        digests = [dataset_digest(prepare_dataset(mix(parts, **options), tokenizer)) for options in unlike]
        assert len({*digests}) == len(unlike)
        assert None not in digests
        assert digests == [dataset_digest(prepare_dataset(mix(parts, **options), tokenizer)) for options in unlike]
    assert dataset_digest(streams["a"]) is None
    assert mixture_of(sources["a"]) is None


def test_streams_give_every_row_in_turns_or_by_their_shares() -> None:
    streams = {"a": text(3, "a").to_iterable_dataset(), "b": text(5, "b")}
    rows = [*mix(streams)]
    assert [row["source"] for row in rows] == ["a", "b", "a", "b", "a", "b", "b", "b"]
    assert [row["source_row"] for row in rows] == [0, 0, 1, 1, 2, 2, 3, 4]
    many = {"a": text(900).to_iterable_dataset(), "b": text(900).to_iterable_dataset()}
    weighted = mix(many, weights={"a": 9, "b": 1}, seed=4)
    counts = of(weighted)
    assert counts["a"] == 900
    assert 70 <= counts["b"] <= 130
    assert [*weighted] == [*mix(many, weights={"a": 0.9, "b": 0.1}, seed=4)]


def test_the_first_rows_are_those_of_all_sources() -> None:
    chat = Dataset.from_list(UNLIKE["messages"])
    assert [row["chosen"] for row in first_rows(mix({"a": text(2), "b": chat}))] == ["yes 0", [YES]]
    assert len([*first_rows(text(3))]) == 1
