"""What of a preference of messages is rendered, and which messages are scored.

A message says by `"train": false` (also `"loss": false` or `"weight": 0`) that it is only seen. These keys are taken
out here, so that no template prints them. A prompt whose last message is the assistant's, followed by an assistant's
message in both completions, is a prefill: both are one message, which the prompt begins and the completion continues.
In conversations without a column `prompt` nothing is joined, since they are written out as they are meant.

Given up: weights between 0 and 1, and the scoring of messages that are not the assistant's.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, final

from holdfast.data.formats import ASSISTANTS, Message, Preference
from holdfast.data.note import Note
from holdfast.data.turns.sentences import ENDS_WITH_OTHER, NOBODY_SPEAKS, NOT_TO_SCORE, PREFILL

SCORING_KEYS = ("train", "loss", "weight")
"""Keys of a message that say whether it is scored."""

_KEYS = frozenset(SCORING_KEYS)
_LONGEST_DETAIL = 60


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Exchange:
    """A preference of messages as it is rendered.

    `preference` has the messages without `SCORING_KEYS`. A `prefill` is the beginning of the first message of both
    completions, and no longer a message of the prompt. `opens_turn` says that the prompt ends with the generation
    prompt. `scored` has the numbers of the messages that are scored, counted from the prompt's first, in the
    conversation with the chosen and in that with the rejected completion; it is None where each completion is one
    assistant's message of which all is scored. `unscored` has the assistant's messages that are left out.
    """

    preference: Preference
    prefill: Message | None = None
    opens_turn: bool = True
    scored: tuple[tuple[int, ...], tuple[int, ...]] | None = None
    unscored: tuple[tuple[int, ...], tuple[int, ...]] = ((), ())
    notes: tuple[Note, ...] = ()

    def conversations(self, preference: Preference) -> list[list[Message]]:
        """The three conversations of `preference`, which has the same messages in the shape that the template needs:
        the prompt, and the prompt with each completion."""
        prompt, chosen, rejected = _messages(preference)
        beginning = [] if self.prefill is None else [_in_shape_of(chosen[0], self.prefill)]
        return [prompt + beginning, prompt + chosen, prompt + rejected]


def exchange_of(preference: Preference, *, assistant_only: bool = True) -> Exchange:
    """What is rendered of a preference of messages. With `assistant_only` False nothing is left out of the scoring.

    Raises `ValueError` for a value of `SCORING_KEYS` that says neither yes nor no, for a message that is left out where
    `assistant_only` is False, and for a prefill that its completion cannot continue.
    """
    prompt, chosen, rejected = _messages(preference)
    is_usual = (
        len(chosen) == len(rejected) == 1
        and chosen[0]["role"] in ASSISTANTS
        and rejected[0]["role"] in ASSISTANTS
        and prompt[-1]["role"] not in ASSISTANTS
        and all(map(_KEYS.isdisjoint, (*prompt, *chosen, *rejected)))
    )
    return Exchange(preference=preference) if is_usual else _unusual(preference, assistant_only=assistant_only)


def _unusual(preference: Preference, *, assistant_only: bool) -> Exchange:
    flags = [[_flag(message) for message in side] for side in _messages(preference)]
    if not assistant_only and any(False in side for side in flags):
        raise ValueError(
            f"a message is left out of the scoring by one of {list(SCORING_KEYS)}, and with assistant_only=False all "
            "messages of a completion are scored. Drop these keys, or set `assistant_only=True`."
        )
    prompt, *completions = ([_without_keys(message) for message in side] for side in _messages(preference))
    begin = [completion[0]["role"] in ASSISTANTS for completion in completions]
    notes = _notes(prompt, completions, flags)
    prefill = None
    if prompt[-1]["role"] in ASSISTANTS and all(begin) and not preference.is_implicit:
        *prompt, prefill = prompt
        completions = [[_joined(prefill, completion[0]), *completion[1:]] for completion in completions]
        notes = (Note(PREFILL, str(prefill.get("content"))[-_LONGEST_DETAIL:]), *notes)
    scored, unscored = [], []
    for side, completion in zip(flags[1:], completions, strict=True):
        speaks = [n for n, message in enumerate(completion) if message["role"] in ASSISTANTS]
        scored.append(tuple(len(prompt) + n for n in speaks if side[n] is not False))
        unscored.append(tuple(len(prompt) + n for n in speaks if side[n] is False))
    is_one_turn = all(len(completion) == 1 for completion in completions) and all(begin) and not any(unscored)
    return Exchange(
        preference=replace(preference, prompt=prompt, chosen=completions[0], rejected=completions[1]),
        prefill=prefill,
        opens_turn=any(begin) and prefill is None,
        scored=None if is_one_turn or not assistant_only else (scored[0], scored[1]),
        unscored=(unscored[0], unscored[1]),
        notes=tuple(note for note in notes if assistant_only or note.kind == PREFILL),
    )


def _messages(preference: Preference) -> tuple[list[Message], list[Message], list[Message]]:
    prompt, chosen, rejected = preference.prompt, preference.chosen, preference.rejected
    assert isinstance(prompt, list)
    assert isinstance(chosen, list)
    assert isinstance(rejected, list)
    return prompt, chosen, rejected


def _notes(
    prompt: Sequence[Message], completions: Sequence[Sequence[Message]], flags: Sequence[Sequence[bool | None]]
) -> tuple[Note, ...]:
    """What is to be said, each kind once."""
    notes: dict[str, Note] = {}
    columns = dict(zip(("prompt", "chosen", "rejected"), (prompt, *completions), strict=True))
    for column, completion in zip(("chosen", "rejected"), completions, strict=True):
        roles = [message["role"] for message in completion]
        kind = NOBODY_SPEAKS if ASSISTANTS.isdisjoint(roles) else ENDS_WITH_OTHER
        if roles[-1] not in ASSISTANTS:
            notes.setdefault(kind, Note(kind, f"{column} has the roles {roles}"))
    for (column, messages), sides in zip(columns.items(), flags, strict=True):
        for message, flag in zip(messages, sides, strict=True):
            if flag and (column == "prompt" or message["role"] not in ASSISTANTS):
                found = f"a message of the role {message['role']!r} in {column}"
                notes.setdefault(NOT_TO_SCORE, Note(NOT_TO_SCORE, found))
    return tuple(notes.values())


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
    beginning, rest = prefill.get("content"), continuation.get("content")
    contradicting = [
        key for key in prefill if key != "content" and key in continuation and prefill[key] != continuation[key]
    ]
    problem = (
        "it calls tools"
        if prefill.get("tool_calls")
        else "it has no content"
        if beginning is None
        else f"both have other values of {contradicting}"
        if contradicting
        else None
    )
    if problem:
        raise ValueError(
            "the prompt ends with an assistant's message and both completions begin with one, which therefore "
            f"continues it; that cannot be, since {problem}. Move that message into `chosen` and `rejected`, or end "
            "the prompt with the message that the assistant answers."
        )
    if rest is None:
        content: Any = beginning
    elif isinstance(beginning, str) and isinstance(rest, str):
        content = beginning + rest
    else:
        content = [*_parts(beginning), *_parts(rest)]
    return {**prefill, **continuation, "content": content}


def _parts(content: Any) -> list[Any]:
    return [{"type": "text", "text": content}] if isinstance(content, str) else list(content)


def _in_shape_of(message: Message, prefill: Message) -> Message:
    """The prefill with its content as text, or as parts, as the message has it that continues it."""
    content = prefill["content"]
    if isinstance(message["content"], str):
        return {**prefill, "content": "".join(part["text"] for part in _parts(content))}
    return {**prefill, "content": _parts(content)}
