"""What is said of rows that are read as something else than they are at first sight, or that may not be meant.

A kind of note is a line in one of the two tables. The sentence is filled with where, the first row and what was found.
"""

from collections.abc import Callable, Mapping
from typing import Any

REPEATED, CONVERSATIONS, AS_USER, AS_ASSISTANT = "prompt repeated", "whole conversations", "as user", "as assistant"
SINGLE, WRITTEN, FROM_AND_VALUE, OTHER_ROLES = "single message", "written", "from and value", "other roles"

READ_AS: Mapping[str, str] = {
    REPEATED: "`chosen` and `rejected` repeat the prompt, which is read once",
    CONVERSATIONS: "the prompt is a text, and `chosen` and `rejected` are whole conversations that hold it; the prompt "
    "is what these begin with",
    AS_USER: "the prompt is a text, and `chosen` and `rejected` are messages of the assistant; the prompt is read as a "
    "message of the user",
    AS_ASSISTANT: "the prompt is messages, and `chosen` and `rejected` are texts; they are read as messages of the "
    "assistant",
    SINGLE: "a message stands where a list of messages is meant; it is read as a list of one",
    WRITTEN: "messages are written as text; they are read as messages",
    FROM_AND_VALUE: "messages have `from` and `value` in place of `role` and `content`, and are read as such",
    OTHER_ROLES: "roles have other names, and are read as those that chat templates know",
}
"""Kinds of rows that are read as what they are meant to be, which is said."""

NOT_REPEATED, BEGINS_WITH_PROMPT, LOOKS_WRITTEN = "not repeated", "begins with prompt", "looks written"
ONE_SIDE_REPEATS = "one side repeats"
EMPTY_PROMPT, NO_COMMON_BEGINNING, BLANK = "empty prompt", "no common beginning", "blank completion"
DIALOGUE, USER_FIRST = "dialogue in text", "completion begins with the user"

MAY_NOT_BE_MEANT: Mapping[str, tuple[str, str]] = {
    NOT_REPEATED: (
        "`chosen` and `rejected` do not repeat the prompt, as those of the first rows do; they are read as they are",
        "Correct these rows where they are meant to be like the others.",
    ),
    BEGINS_WITH_PROMPT: (
        "`chosen` and `rejected` begin with the prompt's text, which they do not in all of the first rows; they are "
        "read as they are, so that the prompt comes twice",
        "Drop the column `prompt` if all rows are like this.",
    ),
    ONE_SIDE_REPEATS: (
        "only one of `chosen` and `rejected` begins with the prompt's text; they are read as they are",
        "Correct these rows: the prompt comes twice there, on one side only.",
    ),
    LOOKS_WRITTEN: (
        "a text looks like messages that are written as JSON, as not all of the first rows do; it is read as text",
        "Convert such rows if messages are meant.",
    ),
    EMPTY_PROMPT: ("the prompt is empty", "Correct these rows, or drop them, if a prompt is meant to be there."),
    NO_COMMON_BEGINNING: (
        "there is no prompt: no column has it, and `chosen` and `rejected` begin with nothing in common",
        "Name the prompt's column with `columns: {prompt: ...}` if there is one.",
    ),
    BLANK: ("a completion holds nothing but white space", "Correct these rows or drop them."),
    DIALOGUE: (
        "`chosen` and `rejected` are dialogues in one text; they are read as text, in which the prompt ends where the "
        "two first differ",
        "Write `columns: hh` to read them as messages, for the chat template.",
    ),
    USER_FIRST: (
        "`chosen` or `rejected` begins with a message of the user or the system, after a prompt that it does not "
        "repeat",
        "Correct these rows, or drop the column `prompt` if these are whole conversations.",
    ),
}
"""Kinds of rows that are used as they are: what they are, and what to do about it."""


def read_as(kind: str) -> Callable[[str, Mapping[str, Any]], str]:
    """The message about rows of a kind in `READ_AS`, from the dataset's name and the notes' occurrences."""

    def message(name: str, found: Mapping[str, Any]) -> str:
        where, detail, row = found[kind]
        return f"{where[:1].upper()}{where[1:]} of the {name} dataset, {READ_AS[kind]} ({row}: {detail})."

    return message


def may_not_be_meant(kind: str) -> Callable[[str, Mapping[str, Any]], str]:
    """The message about rows of a kind in `MAY_NOT_BE_MEANT`."""
    what, remedy = MAY_NOT_BE_MEANT[kind]

    def message(name: str, found: Mapping[str, Any]) -> str:
        where, detail, row = found[kind]
        return f"{where[:1].upper()}{where[1:]} of the {name} dataset, {what} ({row}: {detail}). {remedy}"

    return message
