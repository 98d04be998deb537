"""One dataset row -> one `Preference`, or a `ValueError` that says which column is wrong, why, and what to do.

Each row is read by itself. A dataset that changes its format halfway is read right or refused; it is never tokenized
as if all rows were like the first. Arrow gives all messages of a column the same keys and fills in None. Such keys are
dropped here, because chat templates ask whether a key exists, or print it (see `holdfast.data.rendering.nulls`).

What is written in another way than it is meant is recognised where it cannot be misread, see `holdfast.data.reading`.

Given up: images, and guessing what a row of mixed text and messages might have meant.
"""

import json
import reprlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

from datasets import Json

from holdfast.data.columns import (
    IMAGE_COLUMNS,
    MASK_COLUMNS,
    REFERENCE_COLUMNS,
    TEMPLATE_KWARGS,
    TEXT_COLUMNS,
    TOKENIZED_COLUMNS,
    TOOLS,
)
from holdfast.data.note import Note
from holdfast.data.reading.empty import note_what_is_empty
from holdfast.data.reading.prompts import (
    Message,
    Side,
    of_one_kind,
    with_prompt,
    without_repeated_messages,
    without_repeated_text,
)
from holdfast.data.reading.roles import KNOWN_ROLES, has_from_and_value, with_known_role
from holdfast.data.reading.rules import NO_RULES, RowRules
from holdfast.data.reading.sentences import SINGLE
from holdfast.data.reading.written import with_messages_read
from holdfast.data.rendering.nulls import message_as_written, tools_as_written, type_of_messages
from holdfast.data.shapes.guess import OLD_NAMES, OTHER_TOKENS, what_is_missing

__all__ = ["Message", "Preference", "check_columns", "is_any_message", "read_preference"]

ASSISTANTS = frozenset({"assistant", "model"})
"""The roles that are the model's. `model` is that of Gemma, whose template takes both."""

ColumnKind = Literal["tokenized", "explicit", "implicit"]

_WRITTEN = Json()
"""The type of what was read from JSON text, to which Arrow has added nothing."""

RESERVED_TEMPLATE_KWARGS = frozenset(
    {"add_generation_prompt", "continue_final_message", "conversation", "return_dict", "return_tensors", "tokenize"}
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Preference:
    """A prompt with a chosen and a rejected completion: three texts, or three lists of messages, never a mix.

    `tools` and `chat_template_kwargs` go to the chat template; they are None and empty for text. `is_implicit` says
    that the prompt is what both completions began with. `notes` say what was read as something else than it is at first
    sight, and what may not be meant.
    """

    prompt: Side
    chosen: Side
    rejected: Side
    tools: list[dict[str, Any]] | None
    chat_template_kwargs: dict[str, Any]
    is_implicit: bool = False
    notes: tuple[Note, ...] = ()

    @property
    def is_conversational(self) -> bool:
        return not isinstance(self.prompt, str)


def check_columns(columns: Iterable[str]) -> ColumnKind:
    """Which of the three sets of columns is there: token ids, an explicit prompt, or an implicit prompt.

    Raises `ValueError` for images, for reference log-probs of one side only or under an old name, for token ids next to
    only some of the other token ids or under names of other programs, for masks without token ids, and when none of the
    sets is complete.
    """
    if not isinstance(columns, Iterable) or isinstance(columns, str):
        raise ValueError(
            f"a row must be a dict with the columns as keys; found {_show(columns)}. Check what makes the rows."
        )
    found = set(columns)
    if images := sorted(found & set(IMAGE_COLUMNS)):
        raise ValueError(
            f"the dataset has the column(s) {images}, but only text is supported. Drop them (and the rows that cannot "
            "be answered without them)."
        )
    if old := sorted(found & OLD_NAMES.keys()):
        raise ValueError(
            f"the dataset has reference log-probs in {old}, names that are not read. Rename them: "
            f"{', '.join(f'{name!r} to {OLD_NAMES[name]!r}' for name in old)}; or drop them."
        )
    if len(logps := sorted(found & set(REFERENCE_COLUMNS))) == 1:
        raise ValueError(
            f"reference log-probs come in the two columns {list(REFERENCE_COLUMNS)}; the dataset has only {logps}. Add "
            "the other, or drop it: reference log-probs are computed and kept by holdfast."
        )
    token_ids = found & set(TOKENIZED_COLUMNS)
    if len(token_ids) == len(TOKENIZED_COLUMNS):
        return "tokenized"
    if token_ids:
        raise ValueError(
            f"a tokenized dataset needs the columns {list(TOKENIZED_COLUMNS)}; found only {sorted(token_ids)}. Add the "
            "others, or rename these if they are something else."
        )
    if other := sorted(found & OTHER_TOKENS.keys()):
        raise ValueError(
            f"the dataset has token ids of another program, in the columns {other}, which are not read. Rename them "
            f"({', '.join(f'{name!r} to {OTHER_TOKENS[name]!r}' for name in other)}), where {list(TOKENIZED_COLUMNS)} "
            "hold the prompt alone and each completion without the prompt; or drop them."
        )
    if masks := sorted(found & set(MASK_COLUMNS)):
        raise ValueError(
            f"the column(s) {masks} say which token ids of a completion are scored, and need the columns "
            f"{list(TOKENIZED_COLUMNS)}; found {sorted(found)}. Add these, or rename the masks if they are something "
            "else."
        )
    if {"chosen", "rejected"} <= found:
        return "explicit" if "prompt" in found else "implicit"
    raise ValueError(
        "a preference dataset needs the columns {prompt, chosen, rejected}, {chosen, rejected} (the prompt is what "
        f"both begin with) or {{prompt_ids, chosen_ids, rejected_ids}}; found {sorted(found)}. {what_is_missing(found)}"
    )


def read_preference(
    row: Mapping[str, Any], features: Mapping[str, Any] | None = None, rules: RowRules = NO_RULES
) -> Preference:
    """The preference in a row of text or messages. Without a prompt, it is what `chosen` and `rejected` begin with.
    `features` are the types of the dataset's columns; they help to tell what Arrow has added to a row. `rules` say how
    text is read in the dataset that the row is of.

    Raises `ValueError` naming the column, what was found in it and what to do; the caller adds the row's number.
    """
    kind = _kind_of_columns(tuple(row)) if isinstance(row, dict) else check_columns(row)
    assert kind != "tokenized", "token ids are not read as a preference"
    notes: list[Note] = []
    tools = _read_tools(row.get(TOOLS), None if features is None else features.get(TOOLS))
    values, written = with_messages_read(row, rules.written, notes)
    read = {
        column: _read_side(
            value, column, _WRITTEN if column in written else type_of_messages(features, column), tools, rules, notes
        )
        for column, value in values.items()
    }
    sides = of_one_kind(read, notes)
    prompt, chosen, rejected = sides.get("prompt"), sides["chosen"], sides["rejected"]
    if prompt is None:
        sides = with_prompt(chosen, rejected)
    elif isinstance(prompt, str) and isinstance(chosen, str) and isinstance(rejected, str):
        sides = without_repeated_text(prompt, chosen, rejected, notes, repeats=rules.repeats_prompt)
    elif isinstance(prompt, list) and isinstance(chosen, list) and isinstance(rejected, list):
        sides = without_repeated_messages(prompt, chosen, rejected, notes)
    note_what_is_empty(sides, notes, is_implicit=prompt is None)
    template_kwargs = _read_template_kwargs(row.get(TEMPLATE_KWARGS))
    if isinstance(sides["chosen"], str) and (tools or template_kwargs):
        column = TOOLS if tools else TEMPLATE_KWARGS
        raise ValueError(
            f"the column {column!r} is for a chat template, which needs messages; found text. Drop the column, or "
            "give `prompt`, `chosen` and `rejected` as lists of messages."
        )
    return Preference(
        prompt=sides["prompt"],
        chosen=sides["chosen"],
        rejected=sides["rejected"],
        tools=tools,
        chat_template_kwargs=template_kwargs,
        is_implicit=prompt is None,
        notes=tuple(dict.fromkeys(notes)),
    )


_kind_of_columns = lru_cache(maxsize=64)(check_columns)
"""The same for rows, of which most have the columns of the one before."""


def is_any_message(row: Mapping[str, Any], rules: RowRules) -> bool:
    """Whether a row is of messages: one of its columns holds some, or text in which they are written."""
    return bool(rules.written) or any(isinstance(row.get(column), list | Mapping) for column in TEXT_COLUMNS)


def _read_side(
    value: Any, column: str, feature: Any, tools: list[dict[str, Any]] | None, rules: RowRules, notes: list[Note]
) -> Side:
    if isinstance(value, str):
        _check_characters(value, f"the column {column!r}")
        return value
    if isinstance(value, Mapping) and ("content" in value or has_from_and_value(value)):
        notes.append(Note(SINGLE, f"{column!r} is {reprlib.repr(dict(value))}"))
        value = [value]
    if not isinstance(value, list):
        raise ValueError(
            f"the column {column!r} must hold text or a list of messages; found {_show(value)}. Correct the row or "
            f"drop it{_path_inside(column, value)}."
        )
    if not value:
        raise ValueError(
            f"the column {column!r} must hold at least one message; found an empty list. Correct the row or drop it."
        )
    messages = []
    for number, message in enumerate(value):
        if _is_plain(message):
            messages.append(dict(message))
            continue
        read = _read_message(message, f"message {number} of the column {column!r}", rules, notes)
        is_written = "tool_calls" in read and "tool_calls" not in message  # they were JSON text
        messages.append(message_as_written(read, _WRITTEN if is_written else feature, tools))
    return messages


def _is_plain(message: Any) -> bool:
    """Whether a message has nothing but a known role and a text of ASCII, in which nothing can be wrong: most have."""
    if type(message) is not dict or len(message) != 2 or message.get("role") not in KNOWN_ROLES:
        return False
    content = message.get("content")
    return type(content) is str and content.isascii()


def _read_message(message: Any, where: str, rules: RowRules, notes: list[Note]) -> Mapping[str, Any]:
    if isinstance(message, Mapping) and message.get("role") not in KNOWN_ROLES:
        message, found = with_known_role(message, where, rules.words)
        if found is not None:
            notes.append(Note(*found))
    if isinstance(message, str):
        raise ValueError(
            f"{where} must be a dict with a 'role' and a 'content'; found {_show(message)}. Correct the row, or name "
            "the one text that is meant in a list of texts, such as `columns: {chosen: answers.0}`."
        )
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str) or not message["role"]:
        raise ValueError(
            f"{where} must be a dict with a 'role' and a 'content'; found {_show(message)}. Correct the row or drop "
            'it; a message looks like {"role": "user", "content": "Hello"}.'
        )
    content = message.get("content")
    is_tool_call = content is None and bool(message.get("tool_calls"))
    if not is_tool_call and not isinstance(content, str) and not _is_text_parts(content):
        raise ValueError(
            f"{where} must have text, or a list of parts of type 'text', as its 'content'; found {_show(content)}. "
            "Correct the row or drop it; only text is supported."
        )
    for text in [content] if isinstance(content, str) else [part["text"] for part in content or []]:
        _check_characters(text, where)
    return message


def _path_inside(column: str, value: Any) -> str:
    """What to write where the messages stand inside of a value."""
    inside = next((key for key in ("messages", "conversations") if isinstance(value, Mapping) and key in value), None)
    return f", or write `columns: {{{column}: {column}.{inside}}}`" if inside else ""


def _check_characters(text: str, where: str) -> None:
    """ValueError for half of a surrogate pair, which is no character and which no tokenizer takes."""
    if text.isascii():
        return
    try:
        text.encode()
    except UnicodeEncodeError as error:
        start = max(0, error.start - 10)
        raise ValueError(
            f"{where} must not hold half of a surrogate pair, which is no character; found "
            f"...{text[start : error.end + 10]!a}. Correct the row or drop it."
        ) from error


def _is_text_parts(content: Any) -> bool:
    return (
        isinstance(content, list)
        and len(content) > 0
        and all(isinstance(part, Mapping) and isinstance(part.get("text"), str) for part in content)
        and all(part.get("type") == "text" for part in content)
    )


def _read_tools(value: Any, feature: Any) -> list[dict[str, Any]] | None:
    """The tools of a row; None for an empty list, for which some templates announce tools."""
    tools = value
    if isinstance(value, str):
        try:
            tools = json.loads(value) if value.strip() else None
            json.dumps(tools, ensure_ascii=False).encode()  # not so for half of a surrogate pair
        except (ValueError, RecursionError) as error:
            raise ValueError(
                f"the column 'tools' must hold a list of tools or that list as JSON; found {_show(value)}, which is "
                f"not JSON ({error}). Correct the row."
            ) from error
    if tools is None or tools == []:
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, Mapping) for tool in tools):
        raise ValueError(
            f"the column 'tools' must hold a list of tools (dicts) or that list as JSON; found {_show(value)}. "
            "Correct the row."
        )
    return tools if isinstance(value, str) else tools_as_written(tools, feature)


def _read_template_kwargs(value: Any) -> dict[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise ValueError(
            f"the column 'chat_template_kwargs' must hold a dict or None; found {_show(value)}. Correct the row."
        )
    if reserved := sorted(RESERVED_TEMPLATE_KWARGS & value.keys()):
        raise ValueError(
            f"the column 'chat_template_kwargs' holds {reserved}, which are set by the tokenization itself. Keep only "
            "variables of the chat template, such as `enable_thinking`."
        )
    return {key: item for key, item in value.items() if item is not None}


def _show(value: Any) -> str:
    return "None" if value is None else f"{type(value).__name__} {reprlib.repr(value)}"
