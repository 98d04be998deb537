"""Where the prompt of a row is: in its own column, in front of the completions, or in both.

A prompt without a column is what both completions begin with. One that both repeat is cut off them: for messages a row
says so by itself, since no completion begins with the prompt's own messages; for text the first rows of the dataset say
so (`holdfast.data.reading.rules`). A prompt of another kind than the completions becomes theirs where only one reading
is possible. Given up: prompts that are repeated with changes inside.
"""

import reprlib
from collections.abc import Mapping, Sequence
from typing import Any

from holdfast.data.note import Note
from holdfast.data.reading.sentences import (
    AS_ASSISTANT,
    AS_USER,
    BEGINS_WITH_PROMPT,
    CONVERSATIONS,
    NOT_REPEATED,
    ONE_SIDE_REPEATS,
    REPEATED,
    USER_FIRST,
)

Message = dict[str, Any]
Side = str | list[Message]

ENOUGH_TEXT = 16
"""Characters of prompts that completions repeat by no coincidence."""

_BEFORE_THE_USER = ("system", "developer")


def of_one_kind(sides: Mapping[str, Side], notes: list[Note]) -> dict[str, Side]:
    """The sides as all text or all messages. A text prompt of whole conversations is left out, since they hold it.
    Raises `ValueError` where they are of two kinds that cannot be brought together."""
    kinds = {column: "text" if isinstance(side, str) else "messages" for column, side in sides.items()}
    if len(set(kinds.values())) < 2:
        return dict(sides)
    prompt, chosen, rejected = sides.get("prompt"), sides["chosen"], sides["rejected"]
    if isinstance(prompt, str) and isinstance(chosen, list) and isinstance(rejected, list):
        if chosen[0]["role"] == rejected[0]["role"] == "assistant":
            notes.append(Note(AS_USER, reprlib.repr(prompt)))
            return {**sides, "prompt": [{"role": "user", "content": prompt}]}
        if _first_speaker(chosen) == _first_speaker(rejected) == "user" and _holds(chosen, rejected, prompt):
            notes.append(Note(CONVERSATIONS, reprlib.repr(prompt)))
            return {"chosen": chosen, "rejected": rejected}
    are_texts = isinstance(chosen, str) and isinstance(rejected, str)
    if isinstance(prompt, list) and are_texts and prompt[-1]["role"] != "assistant":
        notes.append(Note(AS_ASSISTANT, reprlib.repr(chosen)))
        return {
            "prompt": prompt,
            "chosen": [{"role": "assistant", "content": chosen}],
            "rejected": [{"role": "assistant", "content": rejected}],
        }
    raise ValueError(
        f"the columns {list(sides)} must be all text or all messages; found {kinds}. Convert them, or, if `chosen` "
        "and `rejected` are whole conversations that contain the prompt, drop the column 'prompt'."
    )


def with_prompt(chosen: Side, rejected: Side) -> dict[str, Side]:
    """`chosen` and `rejected` split into what they both begin with, and the rest of each. Raises `ValueError` where one
    is empty, and where messages have nothing in common."""
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


def repeated_text(prompt: str, chosen: str, rejected: str) -> int | None:
    """The number of characters of the prompt with which both completions begin; None where they do not. White space
    around the prompt may differ from theirs, as long as both have the same."""
    if not prompt or prompt.isspace():
        return None
    if chosen.startswith(prompt) and rejected.startswith(prompt):
        return len(prompt)
    inner = prompt.strip()
    start = len(chosen) - len(chosen.lstrip())
    length = start + len(inner)
    is_repeated = chosen.startswith(inner, start) and rejected.startswith(chosen[:length])
    return length if is_repeated else None


def without_repeated_text(
    prompt: str, chosen: str, rejected: str, notes: list[Note], *, repeats: bool
) -> dict[str, Side]:
    """The three texts, with completions that begin after the prompt where those of the dataset repeat it."""
    length = repeated_text(prompt, chosen, rejected)
    if length is not None and repeats:
        notes.append(Note(REPEATED, reprlib.repr(prompt)))
        return {"prompt": chosen[:length], "chosen": chosen[length:], "rejected": rejected[length:]}
    if length is not None:
        notes.append(Note(BEGINS_WITH_PROMPT, reprlib.repr(prompt)))
    elif len(prompt) >= ENOUGH_TEXT and chosen.startswith(prompt) != rejected.startswith(prompt):
        notes.append(Note(ONE_SIDE_REPEATS, reprlib.repr(prompt)))
    elif repeats and prompt.strip():
        notes.append(Note(NOT_REPEATED, reprlib.repr(chosen)))
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def without_repeated_messages(
    prompt: list[Message], chosen: list[Message], rejected: list[Message], notes: list[Note]
) -> dict[str, Side]:
    """The sides, with completions that begin after the prompt where both repeat it. System messages in front of it may
    stand in the prompt, in the completions or in both. Raises `ValueError` where only one of them repeats it."""
    sides: dict[str, Side] = {"prompt": prompt, "chosen": chosen, "rejected": rejected}
    if chosen[0]["role"] == rejected[0]["role"] == "assistant" and prompt[0]["role"] != "assistant":
        return sides
    system, turns = _apart(prompt)
    parts = [_apart(side) for side in (chosen, rejected)]
    repeats = [bool(turns) and len(side) > len(turns) and all(map(_same, turns, side)) for _, side in parts]
    (chosen_system, chosen_turns), (rejected_system, rejected_turns) = parts
    if (
        all(repeats)
        and chosen_system == rejected_system
        and (not system or not chosen_system or system == chosen_system)
    ):
        notes.append(Note(REPEATED, reprlib.repr(turns[0].get("content"))))
        length = len(turns)
        return {
            "prompt": (system or chosen_system) + turns,
            "chosen": chosen_turns[length:],
            "rejected": rejected_turns[length:],
        }
    if any(repeats):
        column, other = ("chosen", "rejected") if repeats[0] else ("rejected", "chosen")
        problem = f"{other!r} does not" if not all(repeats) else "they have other system messages"
        raise ValueError(
            f"the column {column!r} begins with the messages of the prompt, and {problem}; found {_show(chosen[0])} "
            f"and {_show(rejected[0])} at their start. Correct the row or drop it."
        )
    first = next((side[0] for side in (chosen, rejected) if side[0]["role"] in ("user", *_BEFORE_THE_USER)), None)
    if first is not None:
        notes.append(Note(USER_FIRST, f"{first['role']}: {reprlib.repr(first.get('content'))}"))
    return sides


def columns_of(row: Mapping[str, Any], prompt: Side) -> dict[str, Any]:
    """The values of the columns of a row whose prompt was implicit, which callbacks that generate look for: the prompt,
    and what comes after it. Columns that hold messages in another way stay as they are, without a prompt."""
    kind = str if isinstance(prompt, str) else list
    if not all(isinstance(row[side], kind) for side in ("chosen", "rejected")):
        return {"prompt": None, "chosen": row["chosen"], "rejected": row["rejected"]}
    length = len(prompt)
    return {"prompt": row["chosen"][:length], **{side: row[side][length:] for side in ("chosen", "rejected")}}


def _apart(messages: list[Message]) -> tuple[list[Message], list[Message]]:
    """The system messages in front, and the others."""
    number = next((n for n, message in enumerate(messages) if message["role"] not in _BEFORE_THE_USER), len(messages))
    return messages[:number], messages[number:]


def _same(message: Message, other: Message) -> bool:
    """Whether two messages are the same but for white space around their text, which may be in parts."""
    if message == other:
        return True
    is_text = len(message) == len(other) == 2 and message["role"] == other["role"]
    return is_text and _text(message.get("content")) == _text(other.get("content"))


def _first_speaker(messages: list[Message]) -> str | None:
    _, turns = _apart(messages)
    return turns[0]["role"] if turns else None


def _holds(chosen: list[Message], rejected: list[Message], prompt: str) -> bool:
    """Whether a message of the user with which both conversations begin is the prompt, or the prompt is empty."""
    common = chosen[: _common_prefix_length(chosen, rejected)]
    contents = [message.get("content") for message in common if message["role"] == "user"]
    return bool(common) and (not prompt.strip() or prompt.strip() in [_text(content) for content in contents])


def _text(content: Any) -> str:
    parts = content if isinstance(content, list) else [{"text": content}]
    return "".join(str(part.get("text")) for part in parts).strip()


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


def _show(value: Any) -> str:
    return f"{type(value).__name__} {reprlib.repr(value)}"
