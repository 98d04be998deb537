"""What a chat template leaves out of a row is found, counted, said, and refused where it is so in all rows."""

from typing import Any

import pytest
from datasets import Dataset, IterableDataset

import chat_templates
import tiny
from holdfast.data.formats import read_preference
from holdfast.data.notes import Note
from holdfast.data.prepare import prepare_dataset
from holdfast.data.rendering.message_shapes import fitted
from holdfast.data.rendering.omissions import missing_texts
from holdfast.data.rendering.sentences import LEFT_OUT, LEFT_OUT_BY_DESIGN
from holdfast.data.tokenize import renderer, tokenize

TOKENIZER = tiny.tokenizer()


def message(role: str, content: Any, **fields: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **fields}


def call(name: str = "tides", **arguments: Any) -> dict[str, Any]:
    function = {"name": name, "arguments": arguments or {"day": "Monday", "harbours": 2}}
    return {"id": "abcdefghi", "type": "function", "function": function}


def in_parts(text: str) -> list[dict[str, str]]:
    return [{"type": "text", "text": text[:5]}, {"type": "text", "text": text[5:]}]


def with_template(template: str) -> Any:
    TOKENIZER.chat_template = template
    return TOKENIZER


AS_JSON = {**call(), "function": {"name": "tides", "arguments": '{"day": "Monday", "harbours": 2}'}}
TOOL = {
    "type": "function",
    "function": {
        "name": "tides",
        "description": "The tides of a day.",
        "parameters": {
            "type": "object",
            "properties": {
                "day": {"type": "string", "description": "A weekday."},
                "harbours": {"type": "integer", "description": "How many."},
            },
        },
    },
}
BLUE, GREEN = [message("assistant", "It is blue.")], [message("assistant", "It is green.")]


def row(*prompt: dict[str, Any], chosen: Any = BLUE, rejected: Any = GREEN, **others: Any) -> dict[str, Any]:
    return {"prompt": list(prompt), "chosen": chosen, "rejected": rejected, **others}


HI, ASK = message("user", "Hi"), message("user", "Tides on Monday?")


def reasons(thought: str, answer: str) -> list[dict[str, Any]]:
    return [message("assistant", f"<think>\n{thought}\n</think>\n\n{answer}")]


def calls(content: Any, *made: dict[str, Any]) -> dict[str, Any]:
    return row(ASK, chosen=[message("assistant", content, tool_calls=list(made))], tools=[TOOL])


ROWS: dict[str, dict[str, Any]] = {
    "white space": row(message("user", " What colour is it? \n")),
    "system": row(message("system", "Be brief."), HI),
    "turns": row(HI, message("assistant", "Hi there"), message("user", "Hi there, what colour?")),
    "escapes": row(message("user", 'Say "blue"\nor \\n, <b>grün</b> & \'so\'')),
    "parts": row(
        message("system", in_parts("Be brief.")), message("user", in_parts("What colour is it?")),
        chosen=[message("assistant", in_parts("It is blue."))],
    ),
    "reasoning": row(HI, chosen=reasons("Hm, blue", "Blue."), rejected=reasons("Hm, red", "Red.")),
    "earlier reasoning": row(HI, *reasons("First", "Yes?"), message("user", "And")),
    "reasoning field": row(
        HI, chosen=[message("assistant", "Blue.", reasoning_content="Hm, blue")],
        rejected=[message("assistant", "Red.", reasoning_content="Hm, red")],
    ),
    "call and result": row(
        ASK, message("assistant", None, tool_calls=[call()]), message("tool", '{"high": "6:00"}', name="tides"),
        tools=[TOOL],
    ),
    "call as JSON": calls("", AS_JSON),
    "call beside text": calls("I look.", call()),
    "two calls": calls(None, call(), call("winds", hour="noon")),
}  # fmt: skip

KINDS = {*LEFT_OUT, *LEFT_OUT_BY_DESIGN}
NO_TOOLS = {"tool", "tool description", "tool call"}
CALLS = ("call and result", "call as JSON", "call beside text", "two calls")
REASONING_FIELD = {"reasoning field": {"reasoning"}}

EXPECTED: dict[str, dict[str, set[str]]] = {
    "ChatML": {**dict.fromkeys(CALLS, NO_TOOLS), **REASONING_FIELD},
    "Qwen 2": REASONING_FIELD,
    "Qwen 3": {"earlier reasoning": {"earlier reasoning"}},
    "DeepSeek R1": {
        "reasoning": {"reasoning"},
        "earlier reasoning": {"earlier reasoning"},
        **dict.fromkeys(CALLS, NO_TOOLS - {"tool call"}),
        "call beside text": NO_TOOLS,
        **REASONING_FIELD,
    },
    "Llama 3": {"call beside text": {"text"}, "two calls": {"tool call"}, **REASONING_FIELD},
    "Llama 3 vision": {**dict.fromkeys(CALLS, NO_TOOLS), **REASONING_FIELD},
    "parts": {**dict.fromkeys(CALLS, NO_TOOLS), **REASONING_FIELD},
    "Mistral": {"call beside text": {"text"}, **REASONING_FIELD},
    "Gemma": {**dict.fromkeys(CALLS, NO_TOOLS), **REASONING_FIELD},
    "Phi 3": {
        "system": {"system prompt"},
        "parts": {"system prompt"},
        **dict.fromkeys(CALLS, NO_TOOLS),
        "call and result": {*NO_TOOLS, "text"},
        **REASONING_FIELD,
    },
    "Granite": REASONING_FIELD,
    "gpt-oss": {"call beside text": {"text"}, "two calls": {"tool call"}},
    "Command R": {"call beside text": {"text"}, **REASONING_FIELD},
}
"""By template and row, what is left out, as it is read in the templates; nothing of the rows that are not named."""


@pytest.mark.parametrize("template", chat_templates.ALL)
def test_what_is_left_out(template: str) -> None:
    rows = {name: each for name, each in ROWS.items() if (template, name) != ("gpt-oss", "reasoning field")}
    tokenizer = with_template(chat_templates.ALL[template])
    found = {
        name: KINDS & {note.kind for note in tokenize(read_preference(each), tokenizer).notes}
        for name, each in rows.items()
    }
    assert found == {name: EXPECTED[template].get(name, set()) for name in rows}


def test_the_reasoning_that_gpt_oss_reads() -> None:
    thinks = row(HI, message("assistant", "Yes?", thinking="First"), HI)
    thinks["chosen"] = [message("assistant", "Blue.", thinking="Hm, blue")]
    notes = tokenize(read_preference(thinks), with_template(chat_templates.GPT_OSS)).notes
    assert {note for note in notes if note.kind in KINDS} == {Note("earlier reasoning", "First")}


ONE_TURN = "{% for m in messages %}[{{ m.role }}] BODY\n{% endfor %}"
PRINTED = {
    "stripped": "{{ m.content | trim }}",
    "as JSON": "{{ m.content | tojson }}",
    "as JSON in ASCII": "{{ m.content | tojson(ensure_ascii=True) }}",
    "as HTML": "{{ m.content | e }}",
    "in capitals": "{{ m.content | upper }}",
    "in small letters": "{{ m.content | lower }}",
    "indented": "{{ m.content | indent(8) }}",
    "lines quoted": "> {{ m.content | replace('\n', '\n> ') }}",
    "on one line": "{{ m.content.split() | join(' ') }}",
}
CUT = {
    "its beginning": "{{ m.content[:8] }}",
    "its end": "{{ m.content[8:] }}",
    "one line": "{{ m.content.split('\n')[0] }}",
    "nothing": "",
    "no letter": "{{ m.content | length }}",
}


@pytest.mark.parametrize(
    ("body", "is_whole"), [*((b, True) for b in PRINTED.values()), *((b, False) for b in CUT.values())]
)
def test_forms_of_a_text(body: str, is_whole: bool) -> None:
    text = 'A first line of "text" & <b>ümläut</b>\n   the second, it\'s longer\n\nthe end'
    each = row(message("user", text), chosen=[message("assistant", "x")], rejected=[message("assistant", "y")])
    found = fitted(read_preference(each), renderer(with_template(ONE_TURN.replace("BODY", body)), None))
    assert ("text" not in {note.kind for note in found.notes}) is is_whole


@pytest.mark.parametrize(
    ("texts", "rendering", "missing"),
    [
        (["Hi", "Hi there", "Hi"], "Hi|Hi there|Hi", []),
        (["Hi", "Hi there", "Hi"], "Hi there|Hi", ["Hi"]),
        (["Hi", "Hi there"], "Hi there", ["Hi"]),
        (["a b", "c"], "c|a b", []),
        (["Be kind.", "Be kind. Please."], "Be kind. Please.", ["Be kind."]),
        (["", "  \n"], "", []),
        (["12", "2"], "12", ["2"]),
    ],
)
def test_a_short_text_is_not_found_within_another(texts: list[str], rendering: str, missing: list[str]) -> None:
    found = missing_texts([message("user", text) for text in texts], rendering)
    assert [omission.text for omission in found] == missing


def said(caplog: pytest.LogCaptureFixture) -> list[str]:
    """The messages on what is left out."""
    return [text for text in caplog.messages if text.startswith("The chat template leaves out")]


def test_what_is_left_of_an_answer_is_not_found_in_another() -> None:
    first, second = (message("assistant", f"<think>\n{thought}\n</think>\n\nBlue.") for thought in ("hm", "hm2"))
    found = missing_texts([HI, first, HI, second], "Hi|Blue.|Hi|" + second["content"])
    assert [tuple(omission) for omission in found] == [("earlier reasoning", "hm")]


def prepared(rows: list[dict[str, Any]], template: str, *, as_stream: bool = False) -> list[Any]:
    tokenizer = with_template(template)
    data: Any = IterableDataset.from_generator(lambda: iter(rows)) if as_stream else Dataset.from_list(rows)
    return list(prepare_dataset(data, tokenizer))


SYSTEM, PLAIN = ROWS["system"], row(HI)


def test_it_is_counted_and_said_once(caplog: pytest.LogCaptureFixture) -> None:
    second = row(message("system", "Be kind."), HI)
    assert len(prepared([PLAIN, SYSTEM, second, PLAIN], chat_templates.PHI_3)) == 4
    assert len(said(caplog)) == 1
    assert said(caplog)[0].startswith(
        "The chat template leaves out what the messages of the train dataset hold: system prompts in 2 of 4 rows "
        "(50.0 %), such as 'Be brief.' in row 1. The model would not see it. Take a chat template that prints it"
    )


REFUSED = {
    "an ignored system role": ("system", "Phi 3", r"system prompts in 3 of 3 rows \(100.0 %\), such as 'Be brief.'"),
    "stripped reasoning": ("reasoning", "DeepSeek R1", "reasoning of the last answer in 3 of 3 rows"),
    "tools": ("call and result", "DeepSeek R1", "tools in 3 of 3 rows"),
    "calls": ("call as JSON", "ChatML", "tool calls in 3 of 3 rows"),
    "text beside calls": ("call beside text", "Llama 3", "text of messages in 3 of 3 rows .*'I look.' in row 0"),
}


@pytest.mark.parametrize(("name", "template", "match"), REFUSED.values(), ids=REFUSED)
def test_it_is_refused_in_all_rows(name: str, template: str, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        prepared([ROWS[name]] * 3, chat_templates.ALL[template])


def test_the_reasoning_of_earlier_answers_is_said_alone(caplog: pytest.LogCaptureFixture) -> None:
    assert len(prepared([ROWS["earlier reasoning"]] * 3, chat_templates.QWEN_3)) == 3
    assert len(said(caplog)) == 1
    assert said(caplog)[0].startswith(
        "The chat template leaves out, as many do: reasoning of answers that are not the last in 3 of 3 rows "
        "(100.0 %), such as 'First' in row 0 of the train dataset."
    )


@pytest.mark.parametrize("num_before", [0, 3])
def test_a_stream_is_refused_by_its_first_rows(num_before: int) -> None:
    with pytest.raises(ValueError, match="system prompts in each row that was read before training"):
        prepared([SYSTEM] * (num_before + 1), chat_templates.PHI_3, as_stream=True)


def test_a_stream_is_not_refused_where_a_row_is_printed_whole(caplog: pytest.LogCaptureFixture) -> None:
    assert len(prepared([*[SYSTEM] * 7, PLAIN], chat_templates.PHI_3, as_stream=True)) == 8
    assert [text.split(", such")[0].split(": ")[1] for text in said(caplog)] == ["system prompts in at least one row"]


def test_the_usual_rows_are_not_reported(caplog: pytest.LogCaptureFixture) -> None:
    for template in (chat_templates.CHATML, chat_templates.LLAMA_3, chat_templates.QWEN_3, chat_templates.GEMMA):
        assert len(prepared(tiny.preference_rows(12), template)) == 12
    assert not said(caplog)
