"""One dataset row -> one `Preference`, or a `ValueError` that says which column is wrong, why, and what to do.

Each row is read by itself. A dataset that changes its format halfway is read right or refused; it is never tokenized
as if all rows were like the first. Arrow gives all messages of a column the same keys and fills in None. Such keys are
dropped here, because chat templates ask whether a key exists, or print it (see `holdfast.data.nulls`).

Given up: images, and guessing what a row of mixed text and messages might have meant.
"""

import json
import reprlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from holdfast.data.columns import (
    IMAGE_COLUMNS,
    MASK_COLUMNS,
    REFERENCE_COLUMNS,
    TEMPLATE_KWARGS,
    TEXT_COLUMNS,
    TOKENIZED_COLUMNS,
    TOOLS,
)
from holdfast.data.nulls import message_as_written, tools_as_written, type_of_messages

Message = dict[str, Any]
Side = str | list[Message]

ASSISTANTS = frozenset({"assistant", "model"})
"""The roles that are the model's. `model` is that of Gemma, whose template takes both."""

ColumnKind = Literal["tokenized", "explicit", "implicit"]

RESERVED_TEMPLATE_KWARGS = frozenset(
    {"add_generation_prompt", "continue_final_message", "conversation", "return_dict", "return_tensors", "tokenize"}
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Preference:
    """A prompt with a chosen and a rejected completion: three texts, or three lists of messages, never a mix.

    `tools` and `chat_template_kwargs` go to the chat template; they are None and empty for text. `is_implicit` says
    that the prompt is what both completions began with.
    """

    prompt: Side
    chosen: Side
    rejected: Side
    tools: list[dict[str, Any]] | None
    chat_template_kwargs: dict[str, Any]
    is_implicit: bool = False

    @property
    def is_conversational(self) -> bool:
        return not isinstance(self.prompt, str)


def check_columns(columns: Iterable[str]) -> ColumnKind:
    """Which of the three sets of columns is there: token ids, an explicit prompt, or an implicit prompt.

    Raises `ValueError` for images, for reference log-probs of one side only, for token ids next to only some of the
    other token ids, for masks without token ids, and when none of the sets is complete.
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
        f"both begin with) or {{prompt_ids, chosen_ids, rejected_ids}}; found {sorted(found)}. Rename or add columns, "
        "for example with `dataset.rename_column(...)`."
    )


def read_preference(row: Mapping[str, Any], features: Mapping[str, Any] | None = None) -> Preference:
    """The preference in a row of text or messages. Without a prompt, it is what `chosen` and `rejected` begin with.
    `features` are the types of the dataset's columns; they help to tell what Arrow has added to a row.

    Raises `ValueError` naming the column, what was found in it and what to do; the caller adds the row's number.
    """
    kind = check_columns(row)
    assert kind != "tokenized", "token ids are not read as a preference"
    tools = _read_tools(row.get(TOOLS), None if features is None else features.get(TOOLS))
    sides = {
        column: _read_side(row[column], column, type_of_messages(features, column), tools)
        for column in TEXT_COLUMNS
        if column in row
    }
    if len({isinstance(side, str) for side in sides.values()}) > 1:
        found = {column: "text" if isinstance(side, str) else "messages" for column, side in sides.items()}
        raise ValueError(
            f"the columns {list(sides)} must be all text or all messages; found {found}. Convert them, or, if `chosen` "
            "and `rejected` are whole conversations that contain the prompt, drop the column 'prompt'."
        )
    if kind == "implicit":
        sides = _with_prompt(sides["chosen"], sides["rejected"])
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
        is_implicit=kind == "implicit",
    )


def _with_prompt(chosen: Side, rejected: Side) -> dict[str, Side]:
    """`chosen` and `rejected` split into what they both begin with, and the rest of each."""
    for column, side in (("chosen", chosen), ("rejected", rejected)):
        if not side:
            raise ValueError(
                f"the column {column!r} is empty, but without a column 'prompt' it must begin with the prompt. Drop "
                "the row, or add a column 'prompt'."
            )
    length = _common_prefix_length(chosen, rejected)
    if not isinstance(chosen, str) and length == 0:
        raise ValueError(
            "the columns 'chosen' and 'rejected' hold no prompt: without a column 'prompt', both must be conversations "
            f"that begin with the same messages and end differently; found {_show(chosen[0])} and {_show(rejected[0])} "
            "at their start. Add a column 'prompt', or drop the row."
        )
    return {"prompt": chosen[:length], "chosen": chosen[length:], "rejected": rejected[length:]}


def _common_prefix_length(chosen: Sequence[Any], rejected: Sequence[Any]) -> int:
    """How many characters or messages belong to the prompt: as many as are common, but never the whole of one side.

    In text, a space before the first difference belongs to the completions, since most tokenizers put a space in one
    token with the word after it. When one side is the beginning of the other, its last element stays a completion.
    """
    shorter = min(len(chosen), len(rejected))
    length = next((i for i in range(shorter) if chosen[i] != rejected[i]), None)
    if length is None:
        return shorter - 1
    is_space = length > 0 and chosen[length - 1] == " "
    return length - 1 if is_space else length


def _read_side(value: Any, column: str, feature: Any, tools: list[dict[str, Any]] | None) -> Side:
    if isinstance(value, str):
        _check_characters(value, f"the column {column!r}")
        return value
    if not isinstance(value, list):
        raise ValueError(
            f"the column {column!r} must hold text or a list of messages; found {_show(value)}. Correct the row or "
            "drop it."
        )
    if not value:
        raise ValueError(
            f"the column {column!r} must hold at least one message; found an empty list. Correct the row or drop it."
        )
    read = [_read_message(message, f"message {i} of the column {column!r}") for i, message in enumerate(value)]
    return [message_as_written(message, feature, tools) for message in read]


def _read_message(message: Any, where: str) -> Mapping[str, Any]:
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
