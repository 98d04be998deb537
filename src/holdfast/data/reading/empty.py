"""What is empty in a row that is used all the same: its prompt, or a completion. And what is a dialogue in one text."""

import reprlib
from collections.abc import Mapping

from holdfast.data.note import Note
from holdfast.data.reading.prompts import Message, Side
from holdfast.data.reading.sentences import BLANK, DIALOGUE, EMPTY_PROMPT, NO_COMMON_BEGINNING
from holdfast.data.shapes.dialogues import is_dialogue


def note_what_is_empty(sides: Mapping[str, Side], notes: list[Note], *, is_implicit: bool) -> None:
    """Adds notes on an empty prompt, on completions of white space, and on an implicit prompt (what both completions
    began with) that is the beginning of a dialogue."""
    prompt = sides["prompt"]
    if isinstance(prompt, str):
        if not prompt or prompt.isspace():
            kind = NO_COMMON_BEGINNING if is_implicit else EMPTY_PROMPT
            notes.append(Note(kind, f"'chosen' is {reprlib.repr(sides['chosen'])}"))
        elif is_implicit and is_dialogue(prompt):
            notes.append(Note(DIALOGUE, reprlib.repr(prompt)))
    elif all(map(_is_blank, prompt)):
        notes.append(Note(EMPTY_PROMPT, reprlib.repr(prompt)))
    for column in ("chosen", "rejected"):
        side = sides[column]
        if (not side or side.isspace()) if isinstance(side, str) else all(map(_is_blank, side)):
            notes.append(Note(BLANK, f"{column!r} is {reprlib.repr(side)}"))


def _is_blank(message: Message) -> bool:
    """Whether a message says nothing: no text but white space, and no other field."""
    content = message.get("content")
    return isinstance(content, str) and (not content or content.isspace()) and len(message) == 2
