"""Other names of roles, and messages of `from` and `value`: the message with the role that chat templates know.

A name that the chat template itself spells out is left alone. A role that nobody knows is refused, since most templates
would print it. Given up: roles that are names of people, unless the template spells them out.
"""

import json
import re
import reprlib
from collections.abc import Collection, Mapping
from typing import Any

from transformers import PreTrainedTokenizerBase

from holdfast.data.reading.sentences import FROM_AND_VALUE, OTHER_ROLES

KNOWN_ROLES = frozenset(
    {
        "system", "developer", "user", "assistant", "tool", "function", "ipython", "environment", "context", "document",
        "documents", "available_tools", "tool_response", "tool_call", "tool_calls",
    }
)  # fmt: skip
"""Roles that are passed on as they are, since some chat template knows them."""

ALIASES = {
    "human": "user", "prompter": "user", "customer": "user",
    "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant", "chatbot": "assistant", "ai": "assistant",
    "model": "assistant", "bard": "assistant", "bing": "assistant",
    "observation": "tool", "function_response": "tool", "tool_result": "tool",
    "function_call": "assistant",
}  # fmt: skip
"""Names that other programs have for a role."""

_QUOTED = re.compile(r"""['"](\w[\w -]*)['"]""")


def words_of(tokenizer: PreTrainedTokenizerBase) -> frozenset[str]:
    """The words that the chat template spells out in quotes, roles among them."""
    return frozenset(_QUOTED.findall(str(tokenizer.chat_template or "")))


def has_from_and_value(message: Mapping[str, Any]) -> bool:
    """Whether a message is written with `from` and `value` in place of `role` and `content`."""
    is_other = isinstance(message.get("from"), str) and "value" in message
    return is_other and message.get("role") is None and message.get("content") is None


def with_known_role(
    message: Mapping[str, Any], where: str, words: Collection[str]
) -> tuple[Mapping[str, Any], tuple[str, str] | None]:
    """The message with a known role, and what was done to it, as kind and detail of a note. `words` are those that the
    template spells out. Raises `ValueError` for a role that is not known."""
    kind = None
    if has_from_and_value(message):
        kind = FROM_AND_VALUE
        rest = {key: value for key, value in message.items() if key not in ("from", "value", "role", "content")}
        message = {"role": message["from"], "content": message["value"], **rest}
    role = message.get("role")
    if not isinstance(role, str) or role in KNOWN_ROLES or role in words:
        return message, None if kind is None else (kind, f"{role!r}")
    plain = role.strip().lower()
    known = plain if plain in KNOWN_ROLES else ALIASES.get(plain)
    if known is None:
        raise ValueError(
            f"{where} has the role {reprlib.repr(role)}, which is none of {', '.join(sorted(KNOWN_ROLES))}, and which "
            "the chat template does not name. Correct the row, or name the role in the chat template."
        )
    message = {**message, "role": known}
    if plain == "function_call":
        message = _with_tool_calls(message, where)
    return message, (kind or OTHER_ROLES, f"{role!r} as {known!r}")


def _with_tool_calls(message: Mapping[str, Any], where: str) -> Mapping[str, Any]:
    """A message whose content is a call, or a list of calls, as JSON: with `tool_calls` in its place."""
    content = message.get("content")
    try:
        written: Any = json.loads(content) if isinstance(content, str) else content
        calls = written if isinstance(written, list) else [written]
        functions = [{"name": call["name"], "arguments": call.get("arguments", {})} for call in calls]
    except (ValueError, RecursionError, LookupError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{where} is a function call, which must be JSON with a 'name' and 'arguments'; found "
            f"{reprlib.repr(content)}. Correct the row."
        ) from error
    rest = {key: value for key, value in message.items() if key != "content"}
    return {**rest, "tool_calls": [{"type": "function", "function": function} for function in functions]}
