"""Datasets that people reported elsewhere because a run failed on them, or trained on something else without a word.

Each is read right, with the token ids of the same rows converted by hand, or refused by one message before the first
step; and each is met as a dataset, as a stream, and through a run file. What is read as something else than it is at
first sight is said. `REPORTS` name where such data were met.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset, IterableDataset

import tiny
from holdfast.cli.runfile import read_run_file
from holdfast.cli.sources import load_dataset
from holdfast.data.columns import TOKENIZED_COLUMNS
from holdfast.data.prepare import prepare_dataset

TOKENIZER = tiny.tokenizer()

Row = dict[str, Any]


def user(text: str) -> Row:
    return {"role": "user", "content": text}


def answer(text: str) -> Row:
    return {"role": "assistant", "content": text}


def system(text: str) -> Row:
    return {"role": "system", "content": text}


QUESTIONS = (
    "Who wrote the first book about the tides?",
    "What should I pack for a walk?",
    "How do I make tea for six?",
)
GOOD = ("I am not sure.", "Good shoes and a coat.", "Boil the water and warm the pot.")
BAD = ("Somebody.", "Nothing at all.", "No idea.")
TURNS = list(zip(QUESTIONS, GOOD, BAD, strict=True))
BY_HAND = [{"prompt": [user(q)], "chosen": [answer(g)], "rejected": [answer(b)]} for q, g, b in TURNS]
TEXT_BY_HAND = [{"prompt": q, "chosen": g, "rejected": b} for q, g, b in TURNS]


@dataclass(frozen=True, kw_only=True)
class Case:
    """A dataset, with what `columns` is where it is asked for, and what becomes of it: `by_hand` are the same rows in
    holdfast's own shape, `said` is in what is logged, `refused` in the error. `from_csv`: files are CSV."""

    rows: list[Row]
    columns: Any = None
    by_hand: list[Row] | None = None
    said: tuple[str, ...] = ()
    refused: str | None = None
    more: dict[str, Any] = field(default_factory=dict)


def sharegpt(text: str, speaker: str = "human") -> Row:
    return {"from": speaker, "value": text}


CASES: dict[str, Case] = {
    # hiyouga/LlamaFactory issues 3774 and 5911, huggingface/trl issue 2083
    "ShareGPT, asked for": Case(
        rows=[
            {"conversations": [sharegpt(q)], "chosen": sharegpt(g, "gpt"), "rejected": sharegpt(b, "gpt")}
            for q, g, b in TURNS
        ],
        columns="sharegpt",
        by_hand=BY_HAND,
        said=("`from` and `value`",),
    ),
    "ShareGPT, not asked for": Case(
        rows=[
            {"conversations": [sharegpt(q)], "chosen": sharegpt(g, "gpt"), "rejected": sharegpt(b, "gpt")}
            for q, g, b in TURNS
        ],
        refused=r"'conversations' seems to hold the prompt. This looks like LLaMA-Factory.*`columns: sharegpt`",
    ),
    # huggingface/trl issue 2083: the messages alone
    "from and value in holdfast's columns": Case(
        rows=[
            {"prompt": [sharegpt(q)], "chosen": [sharegpt(g, "gpt")], "rejected": [sharegpt(b, "gpt")]}
            for q, g, b in TURNS
        ],
        by_hand=BY_HAND,
        said=("In 3 of 3 rows (100.0 %) of the train dataset, messages have `from` and `value`", "row 0: 'human' as"),
    ),
    # shibing624/MedicalGPT issue 358
    "question and response_chosen": Case(
        rows=[{"question": q, "response_chosen": g, "response_rejected": b} for q, g, b in TURNS],
        refused=r"write `columns: \{prompt: question, chosen: response_chosen, rejected: response_rejected\}`",
    ),
    "question and response_chosen, mapped": Case(
        rows=[{"question": q, "response_chosen": g, "response_rejected": b} for q, g, b in TURNS],
        columns={"prompt": "question", "chosen": "response_chosen", "rejected": "response_rejected"},
        by_hand=TEXT_BY_HAND,
    ),
    # a prompt that is called `question` beside `chosen` and `rejected`: trained on empty prompts
    "question beside chosen and rejected": Case(
        rows=[{"question": q, "chosen": g, "rejected": b} for q, g, b in TURNS],
        refused=r"nothing or next to it.*the column 'question' holds text: 'Who wrote.*`columns: \{prompt: question\}`",
    ),
    "question with system, beside chosen and rejected": Case(
        rows=[{"system": "Be brief.", "question": q, "chosen": g, "rejected": b} for q, g, b in TURNS],
        refused=r"the column 'question' holds text: 'Who wrote.*`columns: orca`",
    ),
    "Orca pairs": Case(
        rows=[{"system": "Be brief.", "question": q, "chosen": g, "rejected": b} for q, g, b in TURNS],
        columns="orca",
        by_hand=[{**row, "prompt": [system("Be brief."), *row["prompt"]]} for row in BY_HAND],
    ),
    # modelscope/ms-swift issue 6830, hiyouga/LlamaFactory issue 5455
    "instruction and input": Case(
        rows=[
            {"system": "Be brief.", "instruction": "Answer:", "input": q, "chosen": g, "rejected": b}
            for q, g, b in TURNS
        ],
        columns="alpaca",
        by_hand=[
            {"prompt": [system("Be brief."), user(f"Answer:\n{q}")], "chosen": [answer(g)], "rejected": [answer(b)]}
            for q, g, b in TURNS
        ],
    ),
    "instruction and input, not asked for": Case(
        rows=[{"instruction": "Answer:", "input": q, "chosen": g, "rejected": b} for q, g, b in TURNS],
        refused=r"the column 'instruction' holds text: 'Answer:'.*LLaMA-Factory.*`columns: alpaca`",
    ),
    # argilla-io/distilabel issue 343, hiyouga/LlamaFactory pull request 3066: UltraFeedback binarized
    "text prompt, whole conversations": Case(
        rows=[
            {"prompt": q, "chosen": [user(q), answer(g)], "rejected": [user(q), answer(b)], "score_chosen": 8.0}
            for q, g, b in TURNS
        ],
        by_hand=BY_HAND,
        said=("whole conversations that hold it",),
    ),
    "text prompt, messages of the assistant": Case(
        rows=[{"prompt": q, "chosen": [answer(g)], "rejected": [answer(b)]} for q, g, b in TURNS],
        by_hand=BY_HAND,
        said=("read as a message of the user",),
    ),
    # OpenRLHF/OpenRLHF issue 909
    "messages that repeat the prompt": Case(
        rows=[
            {"prompt": [user(q)], "chosen": [user(q), answer(g)], "rejected": [user(q), answer(b)]} for q, g, b in TURNS
        ],
        by_hand=BY_HAND,
        said=("In 3 of 3 rows (100.0 %) of the train dataset, `chosen` and `rejected` repeat the prompt",),
    ),
    "text that repeats the prompt": Case(
        rows=[{"prompt": q, "chosen": f"{q} {g}", "rejected": f"{q} {b}"} for q, g, b in TURNS]
        + [{"prompt": "Why?", "chosen": "Because.", "rejected": "No."}] * 2,
        by_hand=[{"prompt": q, "chosen": f" {g}", "rejected": f" {b}"} for q, g, b in TURNS]
        + [{"prompt": "Why?", "chosen": "Because.", "rejected": "No."}] * 2,
        said=("repeat the prompt", "In 2 of 5 rows", "do not repeat the prompt, as those of the first rows"),
        more={"head": 3},
    ),
    "text that repeats the prompt on one side": Case(
        rows=[*TEXT_BY_HAND, {"prompt": QUESTIONS[0], "chosen": f"{QUESTIONS[0]} Me.", "rejected": "You."}],
        by_hand=[*TEXT_BY_HAND, {"prompt": QUESTIONS[0], "chosen": f"{QUESTIONS[0]} Me.", "rejected": "You."}],
        said=("only one of `chosen` and `rejected` begins with the prompt's text; they are read as they are (row 3",),
    ),
    "one text that begins with its prompt by chance": Case(
        rows=[*TEXT_BY_HAND, {"prompt": "Sing to me", "chosen": "Sing to me, muse", "rejected": "Sing to me no more"}],
        by_hand=[
            *TEXT_BY_HAND,
            {"prompt": "Sing to me", "chosen": "Sing to me, muse", "rejected": "Sing to me no more"},
        ],
        said=("begin with the prompt's text, which they do not in all of the first rows",),
    ),
    # kakao/diatool-dpo issue 2, and lists that a CSV file holds
    "messages in JSON": Case(
        rows=[{column: json.dumps(messages) for column, messages in row.items()} for row in BY_HAND],
        by_hand=BY_HAND,
        said=("messages are written as text",),
    ),
    "messages as Python prints them": Case(
        rows=[{column: str(messages) for column, messages in row.items()} for row in BY_HAND],
        by_hand=BY_HAND,
        said=("messages are written as text",),
    ),
    "messages as numpy prints them": Case(
        rows=[
            {"chosen": "[{'role': 'user', 'content': 'a'}\n {'role': 'assistant'}]", "rejected": "[{'role': 'user'}]"}
        ],
        refused=r"row 0.*'chosen' must hold messages, which are written as JSON text.*no list of messages in JSON",
    ),
    "one answer about JSON": Case(
        rows=[*TEXT_BY_HAND, {"prompt": "Show a message.", "chosen": json.dumps([user("Hi")]), "rejected": "No."}],
        by_hand=[*TEXT_BY_HAND, {"prompt": "Show a message.", "chosen": json.dumps([user("Hi")]), "rejected": "No."}],
        said=("looks like messages that are written as JSON",),
    ),
    # modelscope/ms-swift issues 1922 and 7314
    "query and rejected_response": Case(
        rows=[{"query": q, "response": g, "rejected_response": b} for q, g, b in TURNS],
        columns="swift-query",
        by_hand=BY_HAND,
    ),
    "messages and rejected_response": Case(
        rows=[{"messages": [user(q), answer(g)], "rejected_response": b} for q, g, b in TURNS],
        columns="swift",
        by_hand=BY_HAND,
    ),
    # hiyouga/LlamaFactory issue 3354, axolotl-ai-cloud/axolotl issues 1400 and 2647: whole conversations
    "whole conversations of several turns": Case(
        rows=[
            {
                "chosen": [system("Be brief."), user("Hello"), answer("Hi"), user(q), answer(g)],
                "rejected": [system("Be brief."), user("Hello"), answer("Hi"), user(q), answer(b)],
            }
            for q, g, b in TURNS
        ],
        by_hand=[
            {
                "prompt": [system("Be brief."), user("Hello"), answer("Hi"), user(q)],
                "chosen": [answer(g)],
                "rejected": [answer(b)],
            }
            for q, g, b in TURNS
        ],
    ),
    # axolotl-ai-cloud/axolotl issue 1708: one message each
    "messages, with one chosen message": Case(
        rows=[{"messages": [user(q)], "chosen": answer(g), "rejected": answer(b)} for q, g, b in TURNS],
        columns="messages",
        by_hand=BY_HAND,
    ),
    # OpenRLHF/OpenRLHF issue 308, huggingface/trl issue 1858
    "dialogues in one text": Case(
        rows=[
            {"chosen": f"\n\nHuman: {q}\n\nAssistant: {g}", "rejected": f"\n\nHuman: {q}\n\nAssistant: {b}"}
            for q, g, b in TURNS
        ],
        columns="hh",
        by_hand=BY_HAND,
    ),
    "dialogues in one text, not asked for": Case(
        rows=[
            {"chosen": f"\n\nHuman: {q}\n\nAssistant: {g}", "rejected": f"\n\nHuman: {q}\n\nAssistant: {b}"}
            for q, g, b in TURNS
        ],
        by_hand=[
            {"prompt": f"\n\nHuman: {q}\n\nAssistant:", "chosen": f" {g}", "rejected": f" {b}"} for q, g, b in TURNS
        ],
        said=("`columns: hh`",),
    ),
    # Linear95/APO issue 3, OpenBMB/UltraFeedback issue 8: the best and the worst score
    "completions with scores": Case(
        rows=[
            {
                "instruction": q,
                "completions": [
                    {"response": "Perhaps.", "overall_score": 4.0},
                    {"response": b, "overall_score": 2.0},
                    {"response": g, "overall_score": 8.5},
                ],
            }
            for q, g, b in TURNS
        ]
        + [{"instruction": "Why?", "completions": [{"response": t, "overall_score": 5.0} for t in ("Yes.", "No.")]}],
        columns="ultrafeedback",
        by_hand=BY_HAND,
        said=("no answer is preferred in row 3", "chosen equals rejected"),
    ),
    "better_response_id": Case(
        rows=[
            {"prompt": q, "response_0": b, "response_1": g, "better_response_id": 1, "safer_response_id": 0}
            for q, g, b in TURNS
        ],
        columns="pku-saferlhf",
        by_hand=TEXT_BY_HAND,
    ),
    "labels of two references": Case(
        rows=[
            {"history": q, "human_ref_A": g if n else b, "human_ref_B": b if n else g, "labels": 1 if n else 0}
            for n, (q, g, b) in enumerate(TURNS)
        ],
        columns="shp",
        by_hand=TEXT_BY_HAND,
    ),
    # huggingface/trl issues 1116 and 2385, modelscope/ms-swift issue 4535
    "unpaired": Case(
        rows=[{"prompt": q, "completion": g, "label": True} for q, g, b in TURNS],
        refused=r"This is unpaired: each row has one completion and a label",
    ),
    "a system message in its own column": Case(
        rows=[{"system": [user("Be brief.")], **row} for row in BY_HAND],
        by_hand=BY_HAND,
        said=(r"has the column(s) ['system'], which are not read",),
    ),
    "the same, mapped": Case(
        rows=[{"system": [user("Be brief.")], **row} for row in BY_HAND],
        columns={"system": "system"},
        by_hand=[{**row, "prompt": [system("Be brief."), *row["prompt"]]} for row in BY_HAND],
    ),
    # modelscope/ms-swift issue 1702, huggingface/trl pull request 5856, facebookresearch/fairseq2 pull request 958
    "token ids under other names": Case(
        rows=[{"prompt_input_ids": [1, 2], "chosen_input_ids": [3, 4], "rejected_input_ids": [5, 6]}],
        refused=r"'prompt_input_ids' to 'prompt_ids', 'rejected_input_ids' to 'rejected_ids'",
    ),
    "reference log-probs under their old names": Case(
        rows=[{**row, "reference_chosen_logps": -3.0, "reference_rejected_logps": -4.0} for row in TEXT_BY_HAND],
        refused=r"'reference_chosen_logps' to 'ref_chosen_logps'",
    ),
    # huggingface/trl issue 2385, unslothai/unsloth issue 994
    "roles of another program": Case(
        rows=[
            {
                "prompt": [{"role": "Human", "content": q}],
                "chosen": [{"role": "bot", "content": g}],
                "rejected": [{"role": "gpt", "content": b}],
            }
            for q, g, b in TURNS
        ],
        by_hand=BY_HAND,
        said=("roles have other names", "'Human' as 'user'"),
    ),
    "a role that nobody knows": Case(
        rows=[*BY_HAND, {**BY_HAND[0], "prompt": [{"role": "asisstant", "content": "x"}]}],
        refused=r"row 3.*message 0 of the column 'prompt' has the role 'asisstant', which is none of",
    ),
    # shibing624/MedicalGPT issue 382
    "a completion that is None": Case(
        rows=[*TEXT_BY_HAND, {"prompt": "Why?", "chosen": None, "rejected": "No."}],
        refused=r"row 3.*'chosen' must hold text or a list of messages; found None",
    ),
    "completions of white space, and prompts of nothing": Case(
        rows=[*TEXT_BY_HAND, {"prompt": "Why?", "chosen": "\n ", "rejected": "No."}, {**TEXT_BY_HAND[0], "prompt": ""}],
        by_hand=[
            *TEXT_BY_HAND,
            {"prompt": "Why?", "chosen": "\n ", "rejected": "No."},
            {**TEXT_BY_HAND[0], "prompt": ""},
        ],
        said=("the prompt is empty (row 4", "nothing but white space (row 3"),
    ),
    "empty prompts beside a column that holds them": Case(
        rows=[{"prompt": "", "chosen": g, "rejected": b, "question": q} for q, g, b in TURNS],
        refused=r"prompts of the train dataset are empty \(column 'prompt', the first 3 row\(s\)\).*'question'.*"
        r"`columns: \{prompt: question\}`",
    ),
    # hiyouga/LlamaFactory issue 6509
    "a list of texts": Case(
        rows=[{"instruction": q, "output": [g, b]} for q, g, b in TURNS],
        columns={"prompt": "instruction", "chosen": "output.0", "rejected": "output.1", "as_messages": True},
        by_hand=BY_HAND,
    ),
    "only one of the completions repeats the prompt": Case(
        rows=[*BY_HAND, {"prompt": [user("a")], "chosen": [user("a"), answer("b")], "rejected": [answer("c")]}],
        refused=r"row 3.*'chosen' begins with the messages of the prompt, and 'rejected' does not",
    ),
    "a column that there is not": Case(
        rows=[{"questions": q, "chosen": g, "rejected": b} for q, g, b in TURNS],
        columns={"prompt": "question"},
        refused=r"take 'prompt' from 'question'; the dataset has no such column, but .*Did you mean 'questions'\?",
    ),
}


def ids(rows: Any) -> list[Row]:
    return [{column: row[column] for column in TOKENIZED_COLUMNS} for row in rows]


def as_dataset(case: Case, folder: Path) -> Dataset | IterableDataset:
    return prepare_dataset(Dataset.from_list(case.rows), TOKENIZER, columns=case.columns)


def as_stream(case: Case, folder: Path) -> Dataset | IterableDataset:
    stream = IterableDataset.from_generator(lambda rows: iter(rows), gen_kwargs={"rows": case.rows})
    return prepare_dataset(stream, TOKENIZER, columns=case.columns)


def by_run_file(case: Case, folder: Path) -> Dataset | IterableDataset:
    data = folder / "pairs.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in case.rows), encoding="utf-8")
    run = folder / "run.yaml"
    run.write_text(json.dumps({"model": "m", "data": {"train": str(data), "columns": case.columns}}), encoding="utf-8")
    document = read_run_file(run)
    loaded = load_dataset(document.document, "data.train", document["data.train"])
    return prepare_dataset(loaded, TOKENIZER)


@pytest.fixture(autouse=True)
def head(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """How many rows decide for all, where a case has fewer than there would be."""
    case = CASES[request.node.callspec.params["name"]]
    if "head" in case.more:
        monkeypatch.setattr("holdfast.data.reading.rules.NUM_ROWS", case.more["head"])


@pytest.mark.parametrize("way", [as_dataset, as_stream, by_run_file])
@pytest.mark.parametrize("name", CASES)
def test_surprising_data(name: str, way: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    case = CASES[name]
    if case.refused is not None:
        with pytest.raises(ValueError, match=f"(?s){case.refused}"):
            list(way(case, tmp_path))
        return
    assert case.by_hand is not None
    found = ids(way(case, tmp_path))
    said = caplog.text
    caplog.clear()
    expected = ids(prepare_dataset(Dataset.from_list(case.by_hand), TOKENIZER))
    assert found == expected
    for words in case.said:
        is_count = words.startswith("In ") and way is as_stream  # whose rows are not counted
        assert words in said or is_count
    if not case.said:
        assert said == ""
