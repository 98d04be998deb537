"""What of a preference of messages is rendered, and which messages are scored.

A message says by `"train": false` (also `"loss": false` or `"weight": 0`) that it is only seen. These keys are taken
out here, so that no template prints them. A prompt whose last message is the assistant's, followed by an assistant's
message in both completions, is a prefill: both are one message, which the prompt begins and the completion continues.
In conversations without a column `prompt` nothing is joined, since they are written out as they are meant.

Given up: weights between 0 and 1, and the scoring of messages that are not the assistant's.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, final

from holdfast.data.formats import Message, Preference
from holdfast.data.notes import Note

ASSISTANTS = frozenset({"assistant", "model"})
"""The roles that are the model's. `model` is that of Gemma, whose template takes both."""

SCORING_KEYS = ("train", "loss", "weight")
"""Keys of a message that say whether it is scored."""

ENDS_WITH_OTHER, NOBODY_SPEAKS, PREFILL, NOT_TO_SCORE = (
    "a completion ends with another's message",
    "a completion without an assistant's message",
    "prefill",
    "a message to score that is not scored",
)
"""Kinds of notes."""

_KEYS = frozenset(SCORING_KEYS)


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Exchange:
    """A preference of messages as it is rendered.

    `prompt` and the two `wholes` are the conversations. `is_continued` says that the prompt's last message is left
    open, `opens_turn` that the prompt ends with the generation prompt. `scored` has the numbers of the messages that
    are scored in each whole, and is None where each completion is one assistant's message of which all is scored.
    `unscored` has the assistant's messages that are left out.
    """

    preference: Preference
    prompt: list[Message]
    wholes: tuple[list[Message], list[Message]]
    is_continued: bool = False
    opens_turn: bool = True
    scored: tuple[tuple[int, ...], tuple[int, ...]] | None = None
    unscored: tuple[tuple[int, ...], tuple[int, ...]] = ((), ())
    notes: tuple[Note, ...] = ()


def exchange_of(preference: Preference, *, assistant_only: bool = True) -> Exchange:
    """What is rendered of a preference of messages. With `assistant_only` False nothing is left out of the scoring.

    Raises `ValueError` for a value of `SCORING_KEYS` that says neither yes nor no, for a message that is left out where
    `assistant_only` is False, and for a prefill that its completion cannot continue.
    """
    prompt, chosen, rejected = preference.prompt, preference.chosen, preference.rejected
    assert isinstance(prompt, list)
    assert isinstance(chosen, list)
    assert isinstance(rejected, list)
    is_usual = (
        len(chosen) == len(rejected) == 1
        and chosen[0]["role"] in ASSISTANTS
        and rejected[0]["role"] in ASSISTANTS
        and prompt[-1]["role"] not in ASSISTANTS
        and all(map(_KEYS.isdisjoint, (*prompt, *chosen, *rejected)))
    )
    if is_usual:
        return Exchange(preference=preference, prompt=prompt, wholes=(prompt + chosen, prompt + rejected))
    flags = {name: [_flag(message) for message in side] for name, side in _sides(prompt, chosen, rejected)}
    preference = replace(
        preference,
        prompt=[*map(_without_keys, prompt)],
        chosen=[*map(_without_keys, chosen)],
        rejected=[*map(_without_keys, rejected)],
    )
    return _unusual(preference, flags, assistant_only=assistant_only)


def _unusual(preference: Preference, flags: Mapping[str, list[bool | None]], *, assistant_only: bool) -> Exchange:
    prompt: Any = preference.prompt
    completions: tuple[Any, Any] = (preference.chosen, preference.rejected)
    if not assistant_only and any(False in side for side in flags.values()):
        raise ValueError(
            f"a message is left out of the scoring by one of {list(SCORING_KEYS)}, and with assistant_only=False all "
            "messages of a completion are scored. Drop these keys, or set `assistant_only=True`."
        )
    begin = [completion[0]["role"] in ASSISTANTS for completion in completions]
    is_continued = prompt[-1]["role"] in ASSISTANTS and all(begin) and not preference.is_implicit
    wholes = tuple(
        [*prompt[:-1], _joined(prompt[-1], completion[0]), *completion[1:]] if is_continued else prompt + completion
        for completion in completions
    )
    first = len(prompt) - is_continued
    scored, unscored = [], []
    for side, whole in zip(("chosen", "rejected"), wholes, strict=True):
        speaks = [number for number in range(first, len(whole)) if whole[number]["role"] in ASSISTANTS]
        left_out = {first + n for n, flag in enumerate(flags[side]) if flag is False}
        scored.append(tuple(number for number in speaks if number not in left_out))
        unscored.append(tuple(number for number in speaks if number in left_out))
    is_whole = all(len(completion) == 1 for completion in completions) and all(begin) and not any(unscored)
    return Exchange(
        preference=preference,
        prompt=prompt,
        wholes=(wholes[0], wholes[1]),
        is_continued=is_continued,
        opens_turn=any(begin) and not is_continued,
        scored=None if is_whole or not assistant_only else (scored[0], scored[1]),
        unscored=(unscored[0], unscored[1]),
        notes=_notes(prompt, completions, flags, is_continued=is_continued, assistant_only=assistant_only),
    )


def _notes(
    prompt: Sequence[Message],
    completions: Sequence[Sequence[Message]],
    flags: Mapping[str, list[bool | None]],
    *,
    is_continued: bool,
    assistant_only: bool,
) -> tuple[Note, ...]:
    notes = []
    if is_continued:
        notes.append(Note(PREFILL, str(prompt[-1].get("content"))[-60:]))
    for column, completion in zip(("chosen", "rejected"), completions, strict=True):
        roles = [message["role"] for message in completion]
        if ASSISTANTS.isdisjoint(roles):
            notes.append(Note(NOBODY_SPEAKS, f"{column} has the roles {roles}"))
        elif roles[-1] not in ASSISTANTS:
            notes.append(Note(ENDS_WITH_OTHER, f"{column} has the roles {roles}"))
    for column, messages in _sides(prompt, *completions):
        for message, flag in zip(messages, flags[column], strict=True):
            if flag and (column == "prompt" or message["role"] not in ASSISTANTS):
                notes.append(Note(NOT_TO_SCORE, f"a message of the role {message['role']!r} in {column}"))
    kinds = {note.kind: note for note in reversed(notes)}
    return tuple(kinds.values()) if assistant_only else tuple(note for note in notes if note.kind == PREFILL)


def _sides(prompt: Any, chosen: Any, rejected: Any) -> tuple[tuple[str, Any], ...]:
    return (("prompt", prompt), ("chosen", chosen), ("rejected", rejected))


def _flag(message: Message) -> bool | None:
    """Whether a message says that it is scored; None where it says nothing."""
    found: dict[str, bool] = {}
    for key in SCORING_KEYS:
        value = message.get(key)
        if value is None:
            continue
        if not isinstance(value, bool | int | float) or value not in (0, 1):
            raise ValueError(
                f"the key {key!r} of a message says whether it is scored, with true (or 1) and false (or 0); found "
                f"{value!r} in a message of the role {message['role']!r}. Write one of these, or drop the key."
            )
        found[key] = bool(value)
    if len(set(found.values())) > 1:
        raise ValueError(
            f"the keys {list(found)} of a message say whether it is scored, and contradict each other: {found}. Keep "
            "one of them."
        )
    return next(iter(found.values()), None)


def _without_keys(message: Message) -> Message:
    if _KEYS.isdisjoint(message):
        return message
    return {key: value for key, value in message.items() if key not in _KEYS}


def _joined(prefill: Message, continuation: Message) -> Message:
    """The message that the prompt begins and a completion continues."""
    contents = prefill.get("content"), continuation.get("content")
    other = sorted(key for key in prefill if key != "content" and key in continuation and prefill[key] != continuation[key])
    if prefill.get("tool_calls") or contents[0] is None or other:
        found = "it calls tools" if prefill.get("tool_calls") else f"both have other values of {other}" if other else (
            "it has no content"
        )
        raise ValueError(
            "the prompt ends with an assistant's message and both completions begin with one, so they are to continue "
            f"it; but {found}. Move that message into `chosen` and `rejected`, or end the prompt with the message that "
            "the assistant answers."
        )
    if contents[1] is None:
        content: Any = contents[0]
    elif isinstance(contents[0], str) and isinstance(contents[1], str):
        content = contents[0] + contents[1]
    else:
        parts = [[{"type": "text", "text": each}] if isinstance(each, str) else list(each) for each in contents]
        content = parts[0] + parts[1]
    return {**prefill, **continuation, "content": content}
