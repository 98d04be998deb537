"""Kinds of notes on who speaks in a row and where its texts end, and the sentences that are said of them."""

from collections.abc import Mapping
from typing import Any

PREFILL = "prefill"
ENDS_WITH_OTHER = "a completion ends with another's message"
NOBODY_SPEAKS = "a completion without an assistant's message"
NOT_TO_SCORE = "a message to score that is not scored"
NO_END = "a completion without an end"
ENDED_PROMPT = "a prompt that ends with the eos token"

_SENTENCES = {
    PREFILL: (
        "A prompt of the {name} dataset ends with an assistant's message and both completions begin with one, {where}, "
        "such as ...{detail!r} in {row}. They are taken as one message, which the prompt begins and the completion "
        "continues, without a space between them; only the completion's part is scored. If these are two messages, "
        "give whole conversations in `chosen` and `rejected`, without a column `prompt`."
    ),
    ENDS_WITH_OTHER: (
        "A completion of the {name} dataset ends with a message that is not the assistant's, {where}: in {row}, "
        "{detail}. What comes after the assistant's last message is not scored, and changes nothing. Drop these "
        "messages, or give the answers to them."
    ),
    NOBODY_SPEAKS: (
        "A completion of the {name} dataset has no message of the assistant, {where}: in {row}, {detail}. Nothing in "
        "it is scored, so such rows are left out. Give the role `assistant` to what the model is to say, or set "
        "`assistant_only=False` to score all messages of the completions."
    ),
    NOT_TO_SCORE: (
        "A message of the {name} dataset says that it is scored, {where}: in {row}, {detail}. Only the assistant's "
        "messages in `chosen` and `rejected` are. Drop `train`, `loss` and `weight` there, or set "
        "`assistant_only=False` to score all messages of the completions."
    ),
    NO_END: (
        "The chat template ends a completion of the {name} dataset without the eos token or another special token, "
        "{where}: {row} ends with {detail!r}. The model does not learn from it where to stop. Use a chat template that "
        "ends what the assistant says with such a token, or add the one that it writes with "
        '`tokenizer.add_special_tokens({{"additional_special_tokens": [...]}})`.'
    ),
    ENDED_PROMPT: (
        "A prompt of the {name} dataset ends with the eos token, {where}, such as ...{detail!r} in {row}. It stays, "
        "and the completion follows it. Where it is not meant, take it off: the completions get their own."
    ),
}

KINDS = tuple(_SENTENCES)
"""All of these kinds; each is said by itself."""


def sentence(kind: str, name: str, found: Mapping[str, Any]) -> str:
    """What is said of the rows of the dataset `name` that have notes of this kind; `found` is as in
    `holdfast.data.notes.Topic`."""
    where, detail, row = found[kind]
    return _SENTENCES[kind].format(name=name, where=where, detail=detail, row=row)
