"""What is said where a template leaves out texts of a row, or prints them in a wrong form."""

from collections.abc import Mapping
from typing import Any

from holdfast.data.rendering.omissions import EARLIER_REASONING, REASONING, SYSTEM, TEXT
from holdfast.data.rendering.tool_text import AS_PYTHON, TOOL, TOOL_CALL, TOOL_DESCRIPTION

LEFT_OUT = {
    SYSTEM: ("system prompts", "Put a system prompt into the first message of the user."),
    TEXT: ("text of messages", "Put such text into a message in which the template prints it, or remove it."),
    REASONING: (
        "reasoning of the last answer",
        "Give reasoning under the key (such as `reasoning_content`) or in the tags that the template prints, or remove "
        "it.",
    ),
    TOOL_CALL: ("tool calls", "Write tool calls into the content, as the model is to write them."),
    TOOL: ("tools", "Describe the tools in a system prompt, or drop the column 'tools'."),
}
"""By kind: what it is called, and what can be done beside taking another template."""

LEFT_OUT_BY_DESIGN = {
    EARLIER_REASONING: "reasoning of answers that are not the last",
    TOOL_DESCRIPTION: "descriptions of tools",
}


def left_out(name: str, found: Mapping[str, Any]) -> str:
    """The message on texts that a template does not print; `found` has an `Occurrence` of each kind."""
    listed = _listed({kind: LEFT_OUT[kind][0] for kind in found}, found)
    remedies = " ".join(LEFT_OUT[kind][1] for kind in found)
    return (
        f"The chat template leaves out what the messages of the {name} dataset hold: {listed}. The model would not see "
        f"it. Take a chat template that prints it (`tokenizer.chat_template`), or change the rows. {remedies}"
    )


def left_out_by_design(name: str, found: Mapping[str, Any]) -> str:
    """The message on texts that many templates leave out at inference as well."""
    listed = _listed({kind: LEFT_OUT_BY_DESIGN[kind] for kind in found}, found)
    return (
        f"The chat template leaves out, as many do: {listed} of the {name} dataset. The model does not see it. Nothing "
        "needs to be done where that is meant."
    )


def as_python(name: str, found: Mapping[str, Any]) -> str:
    """The message on values that a template prints as Python writes them, or as JSON within JSON."""
    at = found[AS_PYTHON]
    return (
        f"The chat template prints values of the {name} dataset as Python writes them, or as JSON within JSON: "
        f"{at.where}, such as {at.detail!r} in {at.row}. No other shape of the messages (contents as text or as parts, "
        "arguments as objects or as JSON text) is printed right. Correct the rows, or take another chat template."
    )


def _listed(names: Mapping[str, str], found: Mapping[str, Any]) -> str:
    return "; ".join(f"{names[kind]} {at.where}, such as {at.detail!r} in {at.row}" for kind, at in found.items())
