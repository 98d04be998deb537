"""Preferences of plain text: the beginning-of-sequence and the end-of-sequence token, each once.

Tokenizers differ in what they add to a text: a bos token before it, an eos token after it, both, or nothing. Here the
text is encoded without, and what the tokenizer adds in front comes in front unless the text itself begins with it. A
completion ends with one eos token. A prompt does not get one, since the completion follows it.

White space after an eos token at a completion's end is dropped, as nothing is generated after it. Given up: a prompt
whose own text ends with the eos token. It stays so, and is counted.
"""

from collections.abc import Sequence
from typing import Any, TypeVar, final

from transformers import PreTrainedTokenizerBase

from holdfast.data.formats import Preference
from holdfast.data.note import Note
from holdfast.data.turns.sentences import ENDED_PROMPT

_Ids = TypeVar("_Ids", list[int], bytes)
_PROBE = "a"


@final
class TextPairs:
    """The texts of preferences for one tokenizer, and the tokens around their ids."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._eos = str(tokenizer.eos_token)
        before, after = _added(tokenizer)
        self.before: list[int] = before
        self.after: list[int] = [token for token in after if token != tokenizer.eos_token_id]

    def texts(self, preference: Preference) -> list[str]:
        """The prompt, and the prompt with each completion, which ends with the eos token."""
        prompt, chosen, rejected = preference.prompt, preference.chosen, preference.rejected
        assert isinstance(prompt, str)
        assert isinstance(chosen, str)
        assert isinstance(rejected, str)
        return [prompt, prompt + with_eos(chosen, self._eos), prompt + with_eos(rejected, self._eos)]

    def notes(self, preference: Preference) -> tuple[Note, ...]:
        """What is to be said of a preference of text."""
        prompt: Any = preference.prompt
        stripped = prompt.rstrip()
        return (Note(ENDED_PROMPT, stripped[-60:]),) if stripped.endswith(self._eos) else ()

    def surrounded(self, ids: Sequence[_Ids], before: _Ids, after: _Ids) -> list[_Ids]:
        """The ids of the three texts with those that the tokenizer adds. `before` and `after` are those of this
        object, as `ids` has them."""
        prompt, chosen, rejected = (each if each[: len(before)] == before else before + each for each in ids)
        return [prompt, chosen + after, rejected + after]


def with_eos(completion: str, eos_token: str) -> str:
    """The completion with one eos token at its end."""
    rest = completion.rstrip()
    if not rest.endswith(eos_token):
        return completion + eos_token
    while rest.endswith(eos_token):
        completion = rest.removesuffix(eos_token)
        rest = completion.rstrip()
    return completion + eos_token


def _added(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """The tokens that the tokenizer adds before and after a text."""
    whole: Any = tokenizer(_PROBE)["input_ids"]
    bare: Any = tokenizer(_PROBE, add_special_tokens=False)["input_ids"]
    for start in range(len(whole) - len(bare) + 1):
        if whole[start : start + len(bare)] == bare:
            return list(whole[:start]), list(whole[start + len(bare) :])
    raise ValueError(
        f"the tokenizer was asked what it adds before and after a text; it makes {whole} of {_PROBE!r}, and {bare} of "
        "the same text without special tokens, which is no part of that. Use a tokenizer that adds tokens only around "
        "a text."
    )
