"""Messages reach each template in the shape that it needs; the renderings are written by hand."""

from typing import Any

import pytest

import chat_templates
import tiny
from holdfast.data.batch_tokenizer import BatchTokenizer, EncodedPair
from holdfast.data.formats import read_preference
from holdfast.data.rendering.message_shapes import fitted
from holdfast.data.tokenize import renderer, tokenize

TOKENIZER = tiny.tokenizer()


def message(role: str, content: Any, **fields: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **fields}


def parts(*texts: str) -> list[dict[str, str]]:
    return [{"type": "text", "text": text} for text in texts]


def calling(arguments: Any, content: Any = None) -> dict[str, Any]:
    function = {"name": "tides", "arguments": arguments}
    return message("assistant", content, tool_calls=[{"type": "function", "function": function}])


def rendered(template: str, *messages: dict[str, Any]) -> str:
    """What the template makes of a prompt and a chosen completion, the last of these messages."""
    *prompt, chosen = messages
    TOKENIZER.chat_template = template
    preference = read_preference({"prompt": prompt, "chosen": [chosen], "rejected": [message("assistant", "No.")]})
    found = fitted(preference, renderer(TOKENIZER, None))
    assert found.texts is not None
    assert not found.notes
    return found.texts[0]


S, U, A = message("system", "Be."), message("user", "Hi you"), message("assistant", "Yes.")
S2, U2, A2 = (message(m["role"], parts(m["content"][:2], m["content"][2:])) for m in (S, U, A))
USER, MODEL = message("user", "Ask"), "[assistant] "

CONTENT: dict[str, tuple[str, tuple[dict[str, Any], ...], str]] = {
    "parts for strings": (
        chat_templates.CHATML,
        (S2, U2, A2),
        "<|im_start|>system\nBe.<|im_end|>\n<|im_start|>user\nHi you<|im_end|>\n"
        "<|im_start|>assistant\nYes.<|im_end|>\n",
    ),
    "parts for a template that adds texts": (
        "{% for m in messages %}{{ '[' + m.role + '] ' + m.content + '\n' }}{% endfor %}",
        (S2, U, A2),
        "[system] Be.\n[user] Hi you\n[assistant] Yes.\n",
    ),
    "parts for a template that prints strings alone": (
        "{% for m in messages %}[{{ m.role }}] {% if m.content is string %}{{ m.content }}{% endif %}{{ '\n' }}"
        "{% endfor %}",
        (U2, A),
        "[user] Hi you\n[assistant] Yes.\n",
    ),
    "parts as JSON": (
        "{% for m in messages %}[{{ m.role }}] {{ m.content | tojson }}{{ '\n' }}{% endfor %}",
        (U2, A),
        '[user] "Hi you"\n[assistant] "Yes."\n',
    ),
    "parts for parts": (
        chat_templates.PARTS,
        (S2, U2, A2),
        "<|im_start|>system: Be.<|im_end|>\n<|im_start|>user: Hi you<|im_end|>\n"
        "<|im_start|>assistant: Yes.<|im_end|>\n",
    ),
    "strings for parts": (
        chat_templates.PARTS,
        (S, U, A),
        "<|im_start|>system: Be.<|im_end|>\n<|im_start|>user: Hi you<|im_end|>\n"
        "<|im_start|>assistant: Yes.<|im_end|>\n",
    ),
    "a part by its number": (
        "{% for m in messages %}[{{ m.role }}] {{ m.content[0].text }}{{ '\n' }}{% endfor %}",
        (U, A),
        "[user] Hi you\n[assistant] Yes.\n",
    ),
    "the first part alone": (
        "{% for m in messages %}[{{ m.role }}] {{ (m.content | selectattr('type', 'equalto', 'text') | list)[0].text }}"
        "{{ '\n' }}{% endfor %}",
        (U2, A),
        "[user] Hi you\n[assistant] Yes.\n",
    ),
    "a system of strings beside parts": (
        chat_templates.LLAMA_VISION,
        (S2, U2, A),
        "Be.<|eot|><|start|>user\n\nHi you<|eot|><|start|>assistant\n\nYes.<|eot|>",
    ),
    "a system of strings before parts alone": (
        "{{ messages[0].content | trim }}\n{% for m in messages[1:] %}[{{ m.role }}] {% for part in m.content %}"
        "{{ part.text }}{% endfor %}{{ '\n' }}{% endfor %}",
        (S, U, A),
        "Be.\n[user] Hi you\n[assistant] Yes.\n",
    ),
    "parts that differ in each line keep their kind": (
        "{% for m in messages %}[{{ m.role }}] {% if m.content is string %}{{ m.content }}{% else %}"
        "{% for part in m.content %}({{ part.text }}){% endfor %}{% endif %}{{ '\n' }}{% endfor %}",
        (U2, A),
        "[user] (Hi)( you)\n[assistant] Yes.\n",
    ),
}


@pytest.mark.parametrize(("template", "messages", "expected"), CONTENT.values(), ids=CONTENT)
def test_contents(template: str, messages: tuple[dict[str, Any], ...], expected: str) -> None:
    assert rendered(template, *messages) == expected


LIST = "{% for m in messages %}[{{ m.role }}] BODY{{ '\n' }}{% endfor %}"
CALLS = "{% for c in m.tool_calls or [] %}<{{ c.function.name }} {{ c.function.arguments | tojson }}>{% endfor %}"
EMPTY = {
    "is none": "{% if m.content is none %}" + CALLS + "{% else %}{{ '' + m.content }}{% endif %}",
    "is not none": "{% if m.content is not none %}{{ m.content + '' }}{% endif %}" + CALLS,
    "printed": "{{ m.content }}" + CALLS,
    "added": "{{ '' + m.content }}" + CALLS,
    "trimmed": "{{ m.content | trim }}" + CALLS,
    "split": "{{ m.content.split('|')[0] }}" + CALLS,
    "is string": "{% if m.content is string %}{{ m.content }}{% endif %}" + CALLS,
    "is defined": "{% if m.content is defined and m.content is not none %}{{ m.content + '' }}{% endif %}" + CALLS,
    "is not defined": "{% if m.content is not defined %}" + CALLS + "{% else %}{{ m.content }}{% endif %}",
    "asked for": "{% if 'content' not in m %}{{ raise_exception('no content') }}{% endif %}{{ m.content or '' }}"
    + CALLS,
    "if content": "{% if m.content %}{{ m.content }}{% endif %}" + CALLS,
    "a part": "{{ m.content[0].type and m.content[0].text }}" + CALLS,
    "either": "{% if not m.content %}" + CALLS + "{% else %}{{ m.content }}{% endif %}",
}


@pytest.mark.parametrize("content", [None, ""])
@pytest.mark.parametrize("body", EMPTY.values(), ids=EMPTY)
def test_calls_without_content(body: str, content: str | None) -> None:
    """The call is printed, and neither None nor an error is."""
    text = rendered(LIST.replace("BODY", body), USER, calling({"day": "Monday"}, content))
    assert text == '[user] Ask\n[assistant] <tides {"day": "Monday"}>\n'


OBJECT, TEXT = {"day": "Montag, ü", "hours": [1, 2]}, '{"day": "Montag, ü", "hours": [1, 2]}'
ARGUMENTS = {
    "as JSON": ("{{ c.function.arguments | tojson }}", TEXT),
    "as they are": ("{{ c.function.arguments }}", TEXT),
    "added": ("{{ '' + c.function.arguments }}", TEXT),
    "both": (
        "{% if c.function.arguments is string %}{{ c.function.arguments }}{% else %}{{ c.function.arguments | tojson }}"
        "{% endif %}",
        TEXT,
    ),
    "one by one": (
        "{% for key, value in c.function.arguments.items() %}{{ key }}={{ value }};{% endfor %}",
        "day=Montag, ü;hours=[1, 2];",
    ),
    "the filter": ("{% for key, value in c.function.arguments | items %}{{ key }}={{ value }};{% endfor %}",
                   "day=Montag, ü;hours=[1, 2];"),
    "the whole call": ("{{ c.function | tojson }}", '{"name": "tides", "arguments": ' + TEXT + "}"),
}  # fmt: skip


@pytest.mark.parametrize("given", [OBJECT, TEXT], ids=["object", "text"])
@pytest.mark.parametrize(("body", "expected"), ARGUMENTS.values(), ids=ARGUMENTS)
def test_arguments(body: str, expected: str, given: Any) -> None:
    template = "{% for m in messages %}[{{ m.role }}] {{ m.content or '' }}{% for c in m.tool_calls or [] %}"
    template += "{{ c.function.name }} " * ("c.function |" not in body) + body + "{% endfor %}{{ '\n' }}{% endfor %}"
    name = "tides " if "c.function |" not in body else ""
    assert rendered(template, USER, calling(given)) == f"[user] Ask\n[assistant] {name}{expected}\n"


def test_what_no_shape_mends_is_said() -> None:
    template = (
        "{% for m in messages %}{{ m.content or '' }}{% for c in m.tool_calls or [] %}{{ c.function.name }}"
        "{% if c.function.arguments is string %}{{ c.function.arguments | tojson }}{% else %}{{ c.function.arguments }}"
        "{% endif %}"
        "{% endfor %}{% endfor %}"
    )
    TOKENIZER.chat_template = template
    row = {"prompt": [USER], "chosen": [calling(OBJECT)], "rejected": [message("assistant", "No.")]}
    notes = fitted(read_preference(row), renderer(TOKENIZER, None)).notes
    assert [note.kind for note in notes] == ["as Python writes it"]


SHAPED = [
    {"prompt": [U2], "chosen": [A2], "rejected": [A]},
    {"prompt": [U], "chosen": [calling(OBJECT)], "rejected": [calling(TEXT)]},
    {"prompt": [U], "chosen": [A], "rejected": [message("assistant", "No.")]},
]


@pytest.mark.parametrize("template", chat_templates.ALL)
def test_rows_together_are_as_rows_alone(template: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ids and notes, where none are compared on the way."""
    monkeypatch.setattr("holdfast.data.batch_tokenizer.NUM_COMPARED", 0)
    TOKENIZER.chat_template = chat_templates.ALL[template]
    preferences = [read_preference(row) for row in SHAPED]
    alone = [EncodedPair.of(tokenize(preference, TOKENIZER)) for preference in preferences]
    assert BatchTokenizer(TOKENIZER, None)(preferences) == alone


@pytest.mark.parametrize("asked", ["reasoning_content", "thinking", "reasoning"])
@pytest.mark.parametrize("given", ["reasoning_content", "thinking", "reasoning"])
def test_reasoning_is_found_under_the_key_that_the_template_reads(given: str, asked: str) -> None:
    template = (
        "{% for message in messages %}{{ message.role }}:{% if message." + asked + " %}({{ message." + asked + " }})"
        "{% endif %}{{ message.content }};{% endfor %}"
    )
    found = rendered(template, message("user", "High?"), message("assistant", "Yes.", **{given: "I look."}))
    assert found == "user:High?;assistant:(I look.)Yes.;"
