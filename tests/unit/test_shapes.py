"""`columns`: what can be asked for, which columns and answers it finds, and what is guessed where nothing was asked."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from datasets.fingerprint import Hasher
from transformers import HfArgumentParser

import tiny
from holdfast.cli.runfile import read_run_file
from holdfast.cli.yaml_document import RunFileError
from holdfast.config import DPOConfig
from holdfast.data.add_ids import AddIds
from holdfast.data.columns import TOKENIZED_COLUMNS
from holdfast.data.dates import date_of_run
from holdfast.data.load import load_preferences
from holdfast.data.prepare import Preparation, prepare_dataset
from holdfast.data.reading.roles import with_known_role
from holdfast.data.reading.rules import RowRules
from holdfast.data.shapes.answers import NoPairError, by_best, by_preference, by_scores
from holdfast.data.shapes.convert import with_columns
from holdfast.data.shapes.dialogues import messages_of
from holdfast.data.shapes.guess import guess
from holdfast.data.shapes.mapping import check_mapping, plan
from holdfast.data.shapes.named import NAMED_FORMATS

TOKENIZER = tiny.tokenizer()
USER = {"role": "user", "content": "Q"}
GOOD, BAD = {"role": "assistant", "content": "a"}, {"role": "assistant", "content": "b"}
AS_MESSAGES = {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]}
AS_TEXT = {"prompt": "Q", "chosen": "a", "rejected": "b"}
HUMAN = {"from": "human", "value": "Q"}
SAID_GOOD, SAID_BAD = {"from": "gpt", "value": "a"}, {"from": "gpt", "value": "b"}

ROWS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "sharegpt": (
        {"conversations": [HUMAN], "chosen": SAID_GOOD, "rejected": SAID_BAD},
        {"prompt": [HUMAN], "chosen": [SAID_GOOD], "rejected": [SAID_BAD]},
    ),
    "messages": ({"messages": [USER], "chosen": GOOD, "rejected": BAD}, AS_MESSAGES),
    "swift": ({"messages": [USER, GOOD], "rejected_response": [BAD]}, AS_MESSAGES),
    "swift-query": (
        {"query": "Q", "response": "a", "rejected_response": "b", "history": [["u", "v"]], "system": ""},
        AS_MESSAGES | {"prompt": [{"role": "user", "content": "u"}, {"role": "assistant", "content": "v"}, USER]},
    ),
    "openai": (
        {"input": {"messages": [USER], "tools": []}, "preferred_output": [GOOD], "non_preferred_output": [BAD]},
        AS_MESSAGES,
    ),
    "orca": ({"system": None, "question": "Q", "chosen": "a", "rejected": "b"}, AS_MESSAGES),
    "alpaca": ({"instruction": "Q", "input": "", "chosen": "a", "rejected": "b"}, AS_MESSAGES),
    "argilla": (
        {"system": "S", "instruction": "Q", "chosen_response": "a", "rejected_response": "b"},
        AS_MESSAGES | {"prompt": [{"role": "system", "content": "S"}, USER]},
    ),
    "distilabel": ({"input": "Q", "chosen": "a", "rejected": "b"}, AS_MESSAGES),
    "prompt-pairs": ({"prompt": "Q", "chosen": "a", "rejected": "b"}, AS_MESSAGES),
    "ultrafeedback": (
        {"instruction": "Q", "completions": [{"response": r, "overall_score": s} for r, s in (("b", 1), ("a", 2))]},
        AS_MESSAGES,
    ),
    "nectar": (
        {
            "prompt": "\n\nHuman: Q\n\nAssistant: ",
            "answers": [{"answer": "a", "rank": 1.0}, {"answer": "b", "rank": 7.0}],
        },
        AS_MESSAGES,
    ),
    "nemo": (
        {"context": [USER], "completions": [{"rank": 1, "completion": [BAD]}, {"rank": 0, "completion": [GOOD]}]},
        AS_MESSAGES,
    ),
    "helpsteer": ({"prompt": "Q", "response_1": "b", "response_2": "a", "preference_strength": 2}, AS_MESSAGES),
    "helpsteer3": ({"context": [USER], "response1": "a", "response2": "b", "overall_preference": -1}, AS_MESSAGES),
    "arena": (
        {"conversation_a": [USER, BAD], "conversation_b": [USER, GOOD], "winner": "model_b"},
        {"chosen": [USER, GOOD], "rejected": [USER, BAD]},
    ),
    "hh": (
        {"chosen": "\n\nHuman: Q\n\nAssistant: a", "rejected": "\n\nHuman: Q\n\nAssistant: b"},
        {"chosen": [USER, GOOD], "rejected": [USER, BAD]},
    ),
    "pku-saferlhf": ({"prompt": "Q", "response_0": "a", "response_1": "b", "better_response_id": 0}, AS_TEXT),
    "shp": ({"history": "Q", "human_ref_A": "a", "human_ref_B": "b", "labels": 1}, AS_TEXT),
    "stack-exchange": ({"question": "Q", "response_j": "a", "response_k": "b"}, AS_TEXT),
    "webgpt": (
        {"question": {"full_text": "Q"}, "answer_0": "b", "answer_1": "a", "score_0": -1.0, "score_1": 1.0},
        AS_TEXT,
    ),
    "summarize": ({"info": {"post": "Q"}, "summaries": [{"text": "b"}, {"text": "a"}], "choice": 1}, AS_TEXT),
}


@pytest.mark.parametrize("make", [Dataset.from_list, lambda rows: Dataset.from_list(rows).to_iterable_dataset()])
@pytest.mark.parametrize("name", NAMED_FORMATS)
def test_a_named_format_is_read(name: str, make: Any) -> None:
    row, expected = ROWS[name]
    converted = list(with_columns(make([row, row]), name))
    assert [{key: found[key] for key in expected} for found in converted] == [expected] * 2
    if name != "prompt-pairs":  # whose columns have holdfast's names
        assert {"prompt", "chosen", "rejected"} & set(converted[0]) == set(expected)


def test_the_docs_have_every_format() -> None:
    docs = (Path(__file__).parents[2] / "docs" / "data.md").read_text(encoding="utf-8")
    assert [name for name, shape in NAMED_FORMATS.items() if f"| `{name}` | {shape.of} |" not in docs] == []


@pytest.mark.parametrize("name", [name for name in NAMED_FORMATS if name not in ("hh", "prompt-pairs")])
def test_a_named_format_is_guessed_by_its_columns(name: str) -> None:
    assert f"write `columns: {name}`" in str(guess([*ROWS[name][0], *NAMED_FORMATS[name].guessed_with]))


@pytest.mark.parametrize(
    ("columns", "advice"),
    [
        (["Prompt", "Chosen", "Rejected"], "`columns: {prompt: Prompt, chosen: Chosen, rejected: Rejected}`"),
        (["query", "good", "bad"], "`columns: {prompt: query, chosen: good, rejected: bad}`"),
        (["winner", "loser"], "`columns: {chosen: winner, rejected: loser}`"),
        (["question", "chosen", "rejected"], "`columns: {prompt: question}`"),
        (["text", "label"], None),
        (["chosen"], None),
        (["id", "chosen", "rejected"], None),
    ],
)
def test_columns_are_guessed_by_their_names(columns: list[str], advice: str | None) -> None:
    assert advice in str(guess(columns)) if advice else guess(columns) is None


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ("sharegtp", r"names the format 'sharegtp', which there is not. Did you mean 'sharegpt'\?"),
        ({"format": 3}, r"names the format 3, which there is not. Choose among sharegpt"),
        (3, r"must be the name of a format or a mapping.*found 3. The formats are sharegpt"),
        ({}, r"must be the name of a format or a mapping.*found \{\}"),
        ({"promt": "x"}, r"has the key 'promt'.*Did you mean 'prompt'\?"),
        ({"prompt": 3}, r"must name a column for 'prompt'; found 3"),
        ({"prompt": " "}, r"must name a column for 'prompt'; found ' '"),
        ({"chosen": ["a", "b"]}, r"must name one column for 'chosen'; found \['a', 'b'\]"),
        ({"as_messages": "yes"}, r"has 'as_messages' with 'yes'; it must be true or false"),
        ({"responses": ["a", "b"]}, r"'responses', which needs exactly one of best, scores, ranks, preference"),
        ({"responses": ["a", "b"], "best": "c", "ranks": "d"}, r"needs exactly one of .*found \['responses', 'best'"),
        ({"responses": ["a", "b"], "best": "c", "chosen": "d"}, r"and neither 'chosen' nor 'rejected'"),
        ({"best": "c"}, r"has 'best', which judges 'responses'; found \['best'\]. Add it"),
        ({"prompt_and_chosen": "messages"}, r"needs 'rejected', and neither 'prompt' nor 'chosen'"),
    ],
)
def test_mappings_that_are_refused(columns: Any, message: str, tmp_path: Path) -> None:
    """By name and value alone, before anything is loaded: in a config, in a call, and in a run file with its line."""
    with pytest.raises(ValueError, match=message):
        check_mapping(columns)
    with pytest.raises(ValueError, match=message):
        load_preferences(tmp_path / "not-there.jsonl", columns=columns)
    if isinstance(columns, str | dict):
        with pytest.raises(ValueError, match=message):
            DPOConfig(output_dir=str(tmp_path), columns=columns, use_cpu=True)
        for where in ("columns", "train.columns"):
            run = tmp_path / "run.yaml"
            data = (
                {"train": {"path": "p"}, "columns": columns}
                if where == "columns"
                else {"train": {"path": "p", "columns": columns}}
            )
            run.write_text(json.dumps({"model": "m", "data": data}), encoding="utf-8")
            with pytest.raises(RunFileError, match=rf"run.yaml, line 1: `data.{where}`: .*{message}"):
                read_run_file(run)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (
            {"prompt": "qustion"},
            r"take 'prompt' from 'qustion'.*\['answers', 'meta', 'question'\]. Did you mean 'question'",
        ),
        ({"prompt": "zzz"}, r"take 'prompt' from 'zzz'.*Name one of these"),
        (
            {"chosen": "answers.7"},
            r"row 0: `columns` names 'answers.7'; found \['a', 'b'\] at 'answers', which has no 7",
        ),
        ({"chosen": "meta.worse"}, r"row 0: `columns` names 'meta.worse'; found .* at 'meta', which has no 'worse'"),
        ({"responses": "question", "scores": "meta"}, r"row 0: 'question' must hold a list; found 'Q'"),
        ({"responses": "answers", "best": "question"}, r"'best' must be the number of an answer .*found 'Q'"),
        ({"prompt": ["question", "meta"]}, r"'question' and the columns after it must hold text"),
    ],
)
def test_what_a_dataset_does_not_have(columns: Any, message: str) -> None:
    rows = [{"question": "Q", "answers": ["a", "b"], "meta": {"better": 0}}]
    with pytest.raises(ValueError, match=f"train dataset.*{message}"):
        list(with_columns(Dataset.from_list(rows), columns))


def test_only_names_are_changed_where_that_is_enough() -> None:
    """Nothing is written then, and other columns stay. A column that is replaced is gone, and names may be swapped."""
    rows = [{"question": "Q", "chosen": "a", "rejected": "b", "prompt": "old", "id": 7}]
    columns = {"prompt": "question", "chosen": "rejected", "rejected": "chosen"}
    assert plan(columns, list(rows[0])).renames == {"question": "prompt", "rejected": "chosen", "chosen": "rejected"}
    converted = with_columns(Dataset.from_list(rows), columns)
    assert converted.cache_files == []
    assert list(converted) == [{"prompt": "Q", "chosen": "b", "rejected": "a", "id": 7}]
    stream = with_columns(Dataset.from_list(rows).to_iterable_dataset(), columns)
    assert list(stream) == [{"prompt": "Q", "chosen": "b", "rejected": "a", "id": 7}]


def test_a_format_may_be_changed_in_part() -> None:
    row = {"dialogue": "Q", "chosen": "a", "rejected": "b", "system": "S", "tools": "[]"}
    columns = {"format": "orca", "prompt": "dialogue", "system": None, "as_messages": False}
    assert list(with_columns(Dataset.from_list([row]), columns)) == [{**AS_TEXT, "system": "S", "tools": "[]"}]
    implicit = {"chosen": [USER, GOOD], "rejected": [USER, BAD], "prompt": "what is it?"}
    assert list(with_columns(Dataset.from_list([implicit]), {"format": "hh", "prompt": None})) == [
        {"chosen": [USER, GOOD], "rejected": [USER, BAD]}
    ]


@pytest.mark.parametrize(
    ("pair", "expected"),
    [
        (lambda: by_scores("abc", [1, 3, 2]), ("b", "a")),
        (lambda: by_scores("abcd", [3, 1, 3, 1]), ("a", "b")),  # the first of those with the same score
        (lambda: by_scores("abc", [1, 3, 2], less_is_better=True), ("a", "b")),
        (lambda: by_scores("abc", [None, "4.5", "N/A"]), "fewer than two answers are judged"),
        (lambda: by_scores("ab", [2, 2.0]), "no answer is preferred"),
        (lambda: by_scores("", []), "fewer than two"),
        (lambda: by_scores("ab", [1]), "found 2 answers and 1 scores"),
        (lambda: by_scores("ab", [1, "good"]), "must be a number; found 'good'"),
        (lambda: by_best("ab", ["x_0", "x_1"], 1), ("b", "a")),
        (lambda: by_best("ab", ["x_0", "x_1"], "x_1"), ("b", "a")),
        (lambda: by_best("ab", ["conversation_a", "conversation_b"], "model_a"), ("a", "b")),
        (lambda: by_best("ab", ["response_a", "response_b"], "B"), ("b", "a")),
        (lambda: by_best("ab", ["x_0", "x_1"], True), ("b", "a")),
        (lambda: by_best("ab", ["x_0", "x_1"], "tie (bothbad)"), "no answer is preferred"),
        (lambda: by_best("ab", ["x_0", "x_1"], None), "no answer is preferred"),
        (lambda: by_best("ab", ["x_0", "x_1"], 2), "found 2. Correct the row"),
        (lambda: by_best("ab", ["x_0", "x_1"], -1), "found -1. Correct the row"),
        (lambda: by_best("abc", ["x_0", "x_1", "x_2"], 1), "which of two answers is preferred; found 3"),
        (lambda: by_preference("ab", -3), ("a", "b")),
        (lambda: by_preference("ab", 0.5), ("b", "a")),
        (lambda: by_preference("ab", 0), "no answer is preferred"),
        (lambda: by_preference("ab", "left"), "must be a number; found 'left'"),
    ],
)
def test_the_pair_among_answers(pair: Any, expected: Any) -> None:
    if isinstance(expected, tuple):
        assert pair() == expected
    else:
        with pytest.raises((ValueError, NoPairError), match=expected):
            pair()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("\n\nHuman: a\n\nAssistant: b", [("user", "a"), ("assistant", "b")]),
        ("Human: a\n\nAssistant:", [("user", "a")]),
        (
            "\n\nHuman: a\nb\n\nc\n\nAssistant: d\n\nHuman: e\n\nAssistant: ",
            [("user", "a\nb\n\nc"), ("assistant", "d"), ("user", "e")],
        ),
        ("\n\nHuman: Assistant: is a word\n\nAssistant: b", [("user", "Assistant: is a word"), ("assistant", "b")]),
        ("Hello", r"must begin with .*found 'Hello'"),
        ("Hello\n\nHuman: a", r"must begin with"),
    ],
)
def test_dialogues_in_one_text(text: str, expected: Any) -> None:
    if isinstance(expected, list):
        assert messages_of(text) == [{"role": role, "content": content} for role, content in expected]
    else:
        with pytest.raises(ValueError, match=expected):
            messages_of(text)


CALL = {"name": "tides", "arguments": {"day": "Monday"}}


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ({"from": "human", "value": "x", "weight": 0}, {"role": "user", "content": "x", "weight": 0}),
        ({"from": "observation", "value": "{}"}, {"role": "tool", "content": "{}"}),
        ({"role": "Assistant ", "content": "x"}, {"role": "assistant", "content": "x"}),
        (
            {"from": "function_call", "value": json.dumps(CALL)},
            {"role": "assistant", "tool_calls": [{"type": "function", "function": CALL}]},
        ),
        ({"role": "observation", "content": "x"}, {"role": "observation", "content": "x"}),  # the template names it
        ({"from": "function_call", "value": "call me"}, r"is a function call, which must be JSON .*found 'call me'"),
        ({"role": "narrator", "content": "x"}, r"has the role 'narrator', which is none of assistant.*does not name"),
    ],
)
def test_roles_with_other_names(message: dict, expected: Any) -> None:
    words = ("observation",) if message.get("role") == "observation" else ()
    if isinstance(expected, dict):
        assert with_known_role(message, "message 0", words)[0] == expected
    else:
        with pytest.raises(ValueError, match=expected):
            with_known_role(message, "message 0", words)


def test_columns_of_a_config_are_those_of_all_datasets(tmp_path: Path) -> None:
    """From Python and as JSON on a command line, for the training data and each evaluation set; rows with token ids
    stay as they are."""
    columns = {"prompt": "question", "chosen": "good", "rejected": "bad"}
    (args,) = HfArgumentParser(DPOConfig).parse_args_into_dataclasses(
        ["--output_dir", str(tmp_path), "--use_cpu", "True", "--columns", json.dumps(columns)]
    )
    assert args.columns == columns == DPOConfig(output_dir=str(tmp_path), use_cpu=True, columns=columns).columns
    preparation = Preparation.of_options(args, TOKENIZER, vocab_size=512, template_date=None)
    rows = [{"question": f"{n}? ", "good": "yes", "bad": "no"} for n in range(3)]
    by_hand = [{"prompt": row["question"], "chosen": "yes", "rejected": "no"} for row in rows]
    expected = [
        {name: row[name] for name in TOKENIZED_COLUMNS}
        for row in prepare_dataset(Dataset.from_list(by_hand), TOKENIZER)
    ]
    prepared = preparation.of_eval({"a": Dataset.from_list(rows), "b": Dataset.from_list(rows)})
    for dataset in (
        preparation.of(Dataset.from_list(rows), "train"),
        prepared["a"],
        preparation.of(prepared["b"], "x"),
    ):
        assert [{name: row[name] for name in TOKENIZED_COLUMNS} for row in dataset] == expected


def test_columns_in_a_run_file(tmp_path: Path) -> None:
    """`data.columns` is for each dataset that has no columns of its own, and `training.columns` is refused."""
    from holdfast.cli.sources import load_dataset

    for name in ("question", "query"):
        (tmp_path / f"{name}.jsonl").write_text(
            json.dumps({name: "Q", "chosen": "a", "rejected": "b"}), encoding="utf-8"
        )
    (tmp_path / "own.jsonl").write_text(json.dumps(AS_TEXT), encoding="utf-8")
    data = {
        "train": {"path": str(tmp_path / "question.jsonl"), "streaming": True},
        "eval": {
            "a": {"path": str(tmp_path / "query.jsonl"), "columns": {"prompt": "query"}},
            "b": {"path": str(tmp_path / "own.jsonl"), "columns": None},
        },
        "columns": {"prompt": "question"},
    }
    path = tmp_path / "run.yaml"
    path.write_text(json.dumps({"model": "m", "data": data}), encoding="utf-8")
    run = read_run_file(path)
    sources = {
        "data.train": run["data.train"],
        **{f"data.eval.{name}": each for name, each in run["data.eval"].items()},
    }
    for name, source in sources.items():
        assert list(load_dataset(run.document, name, source)) == [AS_TEXT]
    with pytest.raises(RunFileError, match=r"`training.columns` was set. Write it as `data.columns`"):
        read_run_file(path, ["training.columns={prompt: x}"]).training_arguments()


def test_an_error_names_the_line_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    rows = [
        ROWS["ultrafeedback"][0],
        {"instruction": "Q", "completions": [{"response": "a", "overall_score": "high"}] * 2},
    ]
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    with pytest.raises(ValueError, match=r"train dataset, row 1 \(.*pairs.jsonl, line 2\): .*must be a number"):
        load_preferences(path, columns="ultrafeedback")
    path.write_text(
        "\n".join(map(json.dumps, [*rows[:1], {"instruction": "Q", "completions": None}])), encoding="utf-8"
    )
    loaded = load_preferences(path, columns="ultrafeedback", streaming=True)
    with pytest.raises(ValueError, match=r"row 1.*: `columns` names 'completions.\*.response'; found None"):
        list(loaded)


def test_what_the_first_rows_decide_is_in_the_cache_key(tmp_path: Path) -> None:
    """The same rows are tokenized anew where they are decided to be read in another way."""
    keys = [
        Hasher.hash(AddIds(processing_class=TOKENIZER, name="x", template_date=None, row_rules=rules))
        for rules in (RowRules(), RowRules(repeats_prompt=True), RowRules(written=("prompt",)), RowRules())
    ]
    assert len(set(keys)) == 3
    assert keys[0] == keys[3]


def test_scores_that_say_the_opposite_are_said(caplog: pytest.LogCaptureFixture) -> None:
    rows = [{**AS_TEXT, "prompt": f"{n} ", "score_chosen": float(n), "score_rejected": 2.5} for n in range(4)]
    with caplog.at_level(logging.WARNING):
        prepare_dataset(Dataset.from_list(rows), TOKENIZER)
    assert "The scores in 'score_chosen' are below those in 'score_rejected' in 3 of the first 4 rows" in caplog.text
    assert "`columns: {chosen: rejected, rejected: chosen}`" in caplog.text


@pytest.mark.parametrize(
    ("row", "columns"),
    [
        (AS_MESSAGES, None),
        ({column: json.dumps(messages) for column, messages in AS_MESSAGES.items()}, None),
        ({"prompt": "Q", "chosen": GOOD, "rejected": BAD}, None),
        ({"system": "S", "question": "Q", "chosen": "a", "rejected": "b"}, "orca"),
    ],
)
def test_rows_that_become_messages_have_a_date(row: dict, columns: Any) -> None:
    """The date that their template prints is the run's, whatever shape they come in."""
    dated = tiny.tokenizer()
    dated.chat_template = "{{ strftime_now('%Y-%m-%d') }}" + tiny.CHAT_TEMPLATE
    dataset = Dataset.from_list([row])
    assert date_of_run(dated, "2024-02-29", None, [dataset], columns) == "2024-02-29"
    prepared = prepare_dataset(dataset, dated, columns=columns, template_date="2024-02-29")
    assert dated.decode(prepared[0]["prompt_ids"]).startswith("2024-02-29")


@pytest.mark.parametrize("columns", ["messages", {"prompt": "messages"}])
def test_keys_that_arrow_added_are_not_written_into_the_new_columns(columns: Any) -> None:
    """The objects of a column have the keys of each other, as None. They are none of the row's, before or after."""
    call = {"type": "function", "function": {"name": "tides", "arguments": {"day": "Monday"}}}
    turns = [USER, {"role": "assistant", "content": "", "tool_calls": [call]}, {"role": "tool", "content": "high"}]
    rows = [
        {"messages": turns, "chosen": [GOOD], "rejected": [BAD]},
        {"messages": [USER], "chosen": [GOOD], "rejected": [BAD]},
    ]
    by_hand = [{**row, "prompt": row["messages"]} for row in rows]
    found, expected = (
        [{name: row[name] for name in TOKENIZED_COLUMNS} for row in prepare_dataset(dataset, TOKENIZER, columns=given)]
        for dataset, given in ((Dataset.from_list(rows), columns), (Dataset.from_list(by_hand), None))
    )
    assert found == expected
    converted = with_columns(Dataset.from_list(rows), columns)
    if columns == "messages":
        assert converted[0]["prompt"] == turns
