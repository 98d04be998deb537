"""The table of chat templates: 12 shapes of real models x the shapes that a row may have; what is scored of each.

`templates/` has the templates, written anew in the manner of those that models come with, and for each what is expected
of it: the prompt and both completions as they are to be, with `⟦` and `⟧` around what is scored.
`unit/test_templates.py` compares token by token. The page docs/templates.md shows the table; as a script, this writes
it anew:

    python tests/template_table.py
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import numpy as np
from transformers import PreTrainedTokenizerFast

import tokenizer_kinds
from holdfast.data.formats import read_preference
from holdfast.data.tokenize import TokenizedPair, tokenize

FOLDER = Path(__file__).parent / "templates"
PAGE = Path(__file__).parent.parent / "docs" / "templates.md"
BEGIN, END = "<!-- table: templates -->", "<!-- /table -->"
DATE = "2026-01-31"
OPEN, CLOSE = "⟦", "⟧"
SIDES = ("chosen", "rejected")

Row = dict[str, Any]


# --- rows -------------------------------------------------------------------------------------------------------------


def message(role: str, content: Any, **others: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **others}


def user(content: Any) -> dict[str, Any]:
    return message("user", content)


def assistant(content: Any, **others: Any) -> dict[str, Any]:
    return message("assistant", content, **others)


def parts(text: str) -> list[dict[str, str]]:
    return [{"type": "text", "text": text}]


TOOL = {
    "type": "function",
    "function": {
        "name": "tide",
        "description": "Height of the tide.",
        "parameters": {"type": "object", "properties": {"day": {"type": "string"}}},
    },
}


def calling(day: str, answer: str) -> list[dict[str, Any]]:
    call = {"id": "call12345", "type": "function", "function": {"name": "tide", "arguments": {"day": day}}}
    return [
        {"role": "assistant", "content": None, "tool_calls": [call]},
        message("tool", "4 metres", tool_call_id="call12345"),
        assistant(answer),
    ]


ASK = [user("Is the tide high?")]
ROWS: dict[str, Row] = {
    "one turn": {"prompt": ASK, "chosen": [assistant("Yes, it is.")], "rejected": [assistant("No.")]},
    "several turns": {
        "prompt": ASK,
        "chosen": [assistant("Yes, it is."), user("And at noon?"), assistant("Then it is low.")],
        "rejected": [assistant("No.")],
    },
    "system": {
        "prompt": [message("system", "Be kind."), *ASK],
        "chosen": [assistant("Yes, it is."), user("And at noon?"), assistant("Then it is low.")],
        "rejected": [assistant("No.")],
    },
    "tools": {
        "prompt": ASK,
        "chosen": calling("Monday", "It is high."),
        "rejected": calling("Friday", "No."),
        "tools": [TOOL],
    },
    "parts": {
        "prompt": [user(parts("Is the tide high?"))],
        "chosen": [assistant(parts("Yes, it is.")), user(parts("And at noon?")), assistant(parts("Then it is low."))],
        "rejected": [assistant(parts("No."))],
    },
    "reasoning": {
        "prompt": ASK,
        "chosen": [
            assistant("Yes, it is.", reasoning_content="I look."),
            user("And at noon?"),
            assistant("Then it is low.", reasoning_content="I wait."),
        ],
        "rejected": [assistant("No.", reasoning_content="I guess.")],
    },
    "reasoning in tags": {
        "prompt": ASK,
        "chosen": [
            assistant("<think>\nI look.\n</think>\n\nYes, it is."),
            user("And at noon?"),
            assistant("<think>\nI wait.\n</think>\n\nThen it is low."),
        ],
        "rejected": [assistant("<think>\nI guess.\n</think>\n\nNo.")],
    },
    "prefill": {
        "prompt": [*ASK, assistant("Well,")],
        "chosen": [assistant(" it is."), user("And at noon?"), assistant("Then it is low.")],
        "rejected": [assistant(" no.")],
    },
    "a turn left out": {
        "prompt": ASK,
        "chosen": [assistant("Yes, it is.", train=False), user("And at noon?"), assistant("Then it is low.")],
        "rejected": [assistant("No.", train=True)],
    },
    "another's message last": {
        "prompt": ASK,
        "chosen": [assistant("Yes, it is."), user("Thanks.")],
        "rejected": [assistant("No.")],
    },
}
"""By name, the shapes that a row may have."""


# --- templates --------------------------------------------------------------------------------------------------------


@final
@dataclass(frozen=True, kw_only=True)
class Template:
    """A chat template: how the page calls it, and the special tokens and the kind of its tokenizer."""

    title: str
    bos: str
    eos: str
    kind: str
    others: tuple[str, ...] = ()
    takes_white_space: bool = False


BAR = "\uff5c"
"""What DeepSeek's special tokens have in the place of `|`."""

TEMPLATES = {
    "chatml": Template(title="ChatML", bos="<|endoftext|>", eos="<|im_end|>", others=("<|im_start|>",), kind="GPT-2"),
    "llama_3": Template(
        title="Llama 3, with the date",
        bos="<|begin_of_text|>",
        eos="<|eot_id|>",
        others=("<|start_header_id|>", "<|end_header_id|>"),
        kind="Llama 3",
    ),
    "gemma": Template(
        title="Gemma", bos="<bos>", eos="<eos>", others=("<start_of_turn>", "<end_of_turn>"), kind="Metaspace"
    ),
    "mistral": Template(
        title="Mistral",
        bos="<s>",
        eos="</s>",
        others=(
            *("[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]"),
            *("[TOOL_CALLS]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]"),
        ),
        kind="Metaspace",
    ),
    "qwen_3": Template(title="Qwen 3", bos="<|endoftext|>", eos="<|im_end|>", others=("<|im_start|>",), kind="Qwen"),
    "deepseek_r1": Template(
        title="DeepSeek R1",
        bos=f"<{BAR}begin▁of▁sentence{BAR}>",
        eos=f"<{BAR}end▁of▁sentence{BAR}>",
        others=(
            *(f"<{BAR}User{BAR}>", f"<{BAR}Assistant{BAR}>", f"<{BAR}tool▁sep{BAR}>"),
            *(
                f"<{BAR}tool▁{what}▁{end}{BAR}>"
                for what in ("calls", "call", "outputs", "output")
                for end in ("begin", "end")
            ),
        ),
        kind="Qwen",
    ),
    "phi": Template(
        title="Phi",
        bos="<s>",
        eos="<|endoftext|>",
        others=("<|system|>", "<|user|>", "<|assistant|>", "<|end|>"),
        kind="Metaspace",
        takes_white_space=True,
    ),
    "granite": Template(
        title="Granite, with the date",
        bos="<|end_of_text|>",
        eos="<|end_of_text|>",
        others=("<|start_of_role|>", "<|end_of_role|>", "<|tool_call|>"),
        kind="GPT-2",
    ),
    "gpt_oss": Template(
        title="gpt-oss",
        bos="<|startoftext|>",
        eos="<|return|>",
        others=("<|start|>", "<|message|>", "<|channel|>", "<|end|>", "<|call|>"),
        kind="o200k",
    ),
    "command_r": Template(
        title="Command R",
        bos="<BOS_TOKEN>",
        eos="<|END_OF_TURN_TOKEN|>",
        others=(
            *("<|START_OF_TURN_TOKEN|>", "<|SYSTEM_TOKEN|>", "<|USER_TOKEN|>", "<|CHATBOT_TOKEN|>"),
            *("<|START_ACTION|>", "<|END_ACTION|>", "<|START_TOOL_RESULT|>", "<|END_TOOL_RESULT|>"),
        ),
        kind="Qwen",
    ),
    "no_system": Template(title="without a system role", bos="<s>", eos="</s>", kind="Metaspace"),
    "alternating": Template(title="strictly alternating", bos="<s>", eos="</s>", kind="Metaspace"),
}
"""By name, the templates."""


@functools.cache
def tokenizer_of(name: str, *, has_marks: bool = False) -> PreTrainedTokenizerFast:
    """The tokenizer of a template, which may have generation marks."""
    template = TEMPLATES[name]
    return tokenizer_kinds.of_template(
        template.kind,
        (FOLDER / f"{name}{'.marked' if has_marks else ''}.jinja").read_text(encoding="utf-8"),
        template.bos,
        template.eos,
        template.others,
        takes_white_space=template.takes_white_space,
    )


# --- what comes of them -----------------------------------------------------------------------------------------------


def pair_of(name: str, shape: str, *, has_marks: bool = False) -> TokenizedPair:
    """The row of this shape under a template. `ValueError` where it is refused."""
    return tokenize(read_preference(ROWS[shape]), tokenizer_of(name, has_marks=has_marks), DATE)


def shown(name: str, shape: str) -> list[str]:
    """What comes of a row: the prompt and both completions as text, with brackets around what is scored, the end of a
    prompt that is cut, and the notes; or the error."""
    try:
        pair = pair_of(name, shape)
    except ValueError as error:
        return [f"error: {error}"]
    lines = [f"prompt: {_text(name, pair.prompt_ids)}"]
    lines += [
        f"{side}: {bracketed(name, getattr(pair, f'{side}_ids'), getattr(pair, f'{side}_mask'))}" for side in SIDES
    ]
    if pair.cut_ids:
        lines.append(f"cut: {_text(name, pair.cut_ids)}")
    return [*lines, *sorted(f"note: {note.kind}: {note.detail}" for note in pair.notes)]


def bracketed(name: str, ids: Sequence[int], mask: Sequence[int] | np.ndarray | None) -> str:
    """The text of a completion with brackets around what is scored."""
    flags = [1] * len(ids) if mask is None else mask
    tokens = [_text(name, [token]) for token in ids]
    shown = (f"{OPEN}{token}{CLOSE}" if flag else token for token, flag in zip(tokens, flags, strict=True))
    return "".join(shown).replace(CLOSE + OPEN, "")


def _text(name: str, ids: Sequence[int]) -> str:
    tokens: Any = tokenizer_of(name).convert_ids_to_tokens(list(ids))
    return "".join(tokens).replace("\n", "\\n").replace("Ċ", "\\n").replace("Ġ", " ").replace("▁", " ")


def expected(name: str) -> dict[str, list[str]]:
    """What is to come of the rows under a template, by shape, as it is written down in `tests/templates`."""
    found: dict[str, list[str]] = {}
    for line in (FOLDER / f"{name}.txt").read_text(encoding="utf-8").splitlines():
        if line.startswith("# "):
            found[line.removeprefix("# ")] = []
        elif line:
            list(found.values())[-1].append(line)
    return found


# --- the page ---------------------------------------------------------------------------------------------------------

SAID = {
    "tool": "tools",
    "tool call": "call",
    "text": "text",
    "reasoning": "reasoning",
    "earlier reasoning": "earlier reasoning",
    "tool description": "description of the tool",
    "system prompt": "system prompt",
}
"""By kind of note: what a template leaves out."""


def cell(lines: Sequence[str]) -> str:
    """What the page says of a row."""
    if lines[0].startswith("error: "):
        return "refused"
    notes = [line.removeprefix("note: ").split(":")[0] for line in lines if line.startswith("note: ")]
    left_out = [SAID[kind] for kind in notes if kind in SAID]
    said = ["prompt is cut"] * any(line.startswith("cut: ") for line in lines)
    return "; ".join([*said, *(f"no {what}" for what in left_out)]) or "whole"


def page() -> str:
    """The part of the page that is written by this module."""
    names = list(TEMPLATES)
    lines = [f"| template | {' | '.join(ROWS)} |", f"|{'---|' * (len(ROWS) + 1)}"]
    for name in names:
        rows = expected(name)
        lines.append(f"| {TEMPLATES[name].title} | {' | '.join(cell(rows[shape]) for shape in ROWS)} |")
    for name in names:
        lines += ["", f"### {TEMPLATES[name].title}", "", "```text"]
        for shape, found in expected(name).items():
            lines += [f"# {shape}", *found, ""]
        lines[-1] = "```"
    return "\n".join(lines)


def written(text: str) -> str:
    """The text of the page with the table in its place."""
    head, rest = text.split(BEGIN)
    return f"{head}{BEGIN}\n\n{page()}\n\n{END}{rest.split(END)[1]}"


if __name__ == "__main__":
    PAGE.write_text(written(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
