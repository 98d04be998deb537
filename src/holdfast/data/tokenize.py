"""A `Preference` -> token ids, and what follows from token ids alone: truncation and the content id.

The prompt and both full texts are tokenized, with three calls a row; `batch_tokenizer` does the same for many rows
together, and is held to this. Tokens may merge across the boundary, and a
template may render a prompt alone in another way. So the completion begins where the full text leaves the tokenized
prompt, and what is trained on is always the tokenization of the whole text. Given up: tokenizing prompt and completion
apart, which would be faster and wrong.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, TypeVar

import numpy as np
from transformers import PreTrainedTokenizerBase

from holdfast.data.control_text import ControlText
from holdfast.data.dates import template_with_date
from holdfast.data.formats import Message, Preference
from holdfast.data.message_shapes import Render, fitted
from holdfast.data.notes import Note
from holdfast.internals.transformers import apply_template

TruncationMode = Literal["keep_start", "keep_end"]
TRUNCATION_MODES = ("keep_start", "keep_end")


_PLACEHOLDER_TOKENS = ("image_token", "audio_token", "video_token")
_Ids = TypeVar("_Ids", list[int], np.ndarray)


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenizedPair:
    """Token ids of a prompt and its two completions, not truncated.

    `cut_ids` is the end of the tokenized prompt, where a full text has other tokens. It is left out of the prompt. It
    is empty where the tokenized prompt is a prefix of both full texts, as it should be. `as_text` is a special token
    that the row spells out and that was tokenized as text, `as_token` one that was tokenized as this token. A mask has
    a 1 for each completion token that is scored and a 0 for each that is only seen; None where all are scored. `notes`
    are further things to be said of the row.
    """

    prompt_ids: list[int]
    chosen_ids: list[int]
    rejected_ids: list[int]
    cut_ids: list[int]
    as_text: str | None = None
    as_token: str | None = None
    chosen_mask: Sequence[int] | np.ndarray | None = None
    rejected_mask: Sequence[int] | np.ndarray | None = None
    notes: tuple[Note, ...] = ()

    @property
    def prompt_is_prefix(self) -> bool:
        return not self.cut_ids


def tokenize(
    preference: Preference,
    processing_class: PreTrainedTokenizerBase,
    template_date: str | None = None,
    control_text: ControlText | None = None,
) -> TokenizedPair:
    """The token ids of a preference.

    Text completions get the tokenizer's eos token unless they end with it. Messages go through the chat template, which
    ends completions itself and prompts with the generation prompt; where it prints a date, that is `template_date`
    (None is today's). Where the tokenized prompt is not a prefix of both full texts, the completions begin where one of
    them leaves it, and the rest of the prompt is returned as `cut_ids`. Text that spells out a special token is text in
    messages of all roles but the assistant's (see `holdfast.data.control_text`). `control_text` is the finder of such
    texts for the tokenizer; leave it out to have one made.

    Raises `ValueError` when the tokenizer has no eos token or chat template where one is needed (see
    `check_tokenizer`), and when the chat template refuses the messages.
    """
    check_tokenizer(processing_class, is_conversational=preference.is_conversational)
    control_text = control_text or ControlText(processing_class)
    notes: tuple[Note, ...] = ()
    if preference.is_conversational:
        preference, _, notes = fitted(preference, renderer(processing_class, template_date))
    found = control_text.find(preference)
    as_text: list[list[int]] | None = None
    if isinstance(preference.prompt, str):
        ids = [list(processing_class(text)["input_ids"]) for text in texts_with_eos(preference, processing_class)]
    else:
        ids = []
        for number, messages in enumerate(conversations(preference)):
            options = template_options(preference, processing_class, template_date)
            options["add_generation_prompt"] = number == 0
            ids.append(_rendered_ids(messages, processing_class, options))
        if found.by_others is not None:
            as_text = _as_text(preference, processing_class, template_date, control_text, ids)
    prompt_ids, chosen_ids, rejected_ids = as_text or ids
    length = min(_common_prefix_length(prompt_ids, chosen_ids), _common_prefix_length(prompt_ids, rejected_ids))
    return TokenizedPair(
        prompt_ids=prompt_ids[:length],
        chosen_ids=chosen_ids[length:],
        rejected_ids=rejected_ids[length:],
        cut_ids=prompt_ids[length:],
        as_text=found.by_others if as_text else None,
        as_token=found.elsewhere if as_text else found.by_others or found.elsewhere,
        notes=notes,
    )


def texts_with_eos(preference: Preference, processing_class: PreTrainedTokenizerBase) -> list[str]:
    """The three texts of a preference of text: the prompt, and the prompt with each completion, which ends with the
    eos token."""
    prompt, chosen, rejected = preference.prompt, preference.chosen, preference.rejected
    assert isinstance(prompt, str)
    assert isinstance(chosen, str)
    assert isinstance(rejected, str)
    eos_token = str(processing_class.eos_token)
    return [prompt, prompt + _with_eos(chosen, eos_token), prompt + _with_eos(rejected, eos_token)]


def conversations(preference: Preference) -> list[list[Message]]:
    """The three conversations of a preference of messages: the prompt, and the prompt with each completion."""
    prompt, chosen, rejected = preference.prompt, preference.chosen, preference.rejected
    assert isinstance(prompt, list)
    assert isinstance(chosen, list)
    assert isinstance(rejected, list)
    return [prompt, prompt + chosen, prompt + rejected]


def check_tokenizer(processing_class: PreTrainedTokenizerBase, *, is_conversational: bool) -> None:
    """ValueError or TypeError where the tokenizer cannot tokenize such preferences."""
    if not isinstance(processing_class, PreTrainedTokenizerBase):
        raise TypeError(
            f"the processing class must be a tokenizer; found {type(processing_class).__name__}. Pass the tokenizer of "
            "the model (of a processor: `processor.tokenizer`); only text is supported."
        )
    if is_conversational and not processing_class.chat_template:
        raise ValueError(
            "the rows hold messages, which need a chat template; the tokenizer has none. "
            "Set `tokenizer.chat_template`, or take the tokenizer of the "
            "instruction-tuned model, or give `prompt`, `chosen` and `rejected` as text."
        )
    if not is_conversational and processing_class.eos_token is None:
        raise ValueError(
            "the rows hold text, whose completions end with the eos token; the tokenizer has none. "
            "Set `tokenizer.eos_token`."
        )


def check_vocabulary(tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> None:
    """ValueError where the tokenizer has token ids for which the model has no embedding.

    Placeholders for images, audio and video do not count: text-only versions of some models have no rows for them.
    """
    if len(tokenizer) <= vocab_size:
        return
    placeholders = {getattr(tokenizer, name, None) for name in _PLACEHOLDER_TOKENS}
    beyond = {
        token: token_id
        for token, token_id in sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
        if token_id >= vocab_size and token not in placeholders
    }
    if beyond:
        raise ValueError(
            f"the tokenizer has {len(tokenizer)} tokens, but the model has embeddings for {vocab_size}: "
            f"{len(beyond)} token(s) have none, such as {dict(list(beyond.items())[:3])}. Call "
            "`model.resize_token_embeddings(len(tokenizer))`, or use the tokenizer that belongs to the model."
        )


def check_truncation(max_length: int | None, mode: str) -> None:
    """ValueError for an unknown truncation mode, or a length without room for two tokens."""
    if mode not in TRUNCATION_MODES:
        raise ValueError(f"truncation_mode must be one of {TRUNCATION_MODES}; found {mode!r}. Choose one of them.")
    if max_length is not None and max_length < 2:
        raise ValueError(
            f"max_length must leave room for a token and its predecessor, or be None for no truncation; found "
            f"{max_length}. Give at least 2."
        )


def truncate(prompt_ids: _Ids, completion_ids: _Ids, max_length: int | None, mode: TruncationMode) -> tuple[_Ids, _Ids]:
    """Prompt and completion cut to `max_length` tokens together, at their end (`keep_start`) or at their start."""
    excess = 0 if max_length is None else max(0, len(prompt_ids) + len(completion_ids) - max_length)
    if mode == "keep_start":
        from_completion = min(excess, len(completion_ids))
        num_prompt = len(prompt_ids) - (excess - from_completion)
        return prompt_ids[:num_prompt], completion_ids[: len(completion_ids) - from_completion]
    from_prompt = min(excess, len(prompt_ids))
    return prompt_ids[from_prompt:], completion_ids[excess - from_prompt :]


def content_id(
    prompt_ids: Sequence[int] | np.ndarray,
    completion_ids: Sequence[int] | np.ndarray,
    scored: Sequence[int] | np.ndarray | None = None,
) -> tuple[int, int]:
    """The 128-bit content id of a prompt and a completion after truncation, as two signed int64 to fit a tensor.

    BLAKE2b (RFC 7693) over both, each as int64 little-endian with its length in front, so that moving the boundary
    between them changes the id. `scored` marks the completion tokens that count (0 or 1 each); leave it out when all
    count. Layouts (`content_id_of`) end the completion with the last token that counts, and begin it with the first
    one where `scored` has a 0 before that.
    """
    digest = hashlib.blake2b(digest_size=16)
    for ids in (prompt_ids, completion_ids) if scored is None else (prompt_ids, completion_ids, scored):
        digest.update(len(ids).to_bytes(8, "little"))
        digest.update(np.asarray(ids, dtype="<i8").tobytes())
    raw = digest.digest()
    return int.from_bytes(raw[:8], "little", signed=True), int.from_bytes(raw[8:], "little", signed=True)


def template_of(
    processing_class: PreTrainedTokenizerBase, options: Mapping[str, Any], template_date: str | None
) -> str:
    """The chat template for these template options, with the date where it prints one."""
    template = processing_class.get_chat_template(options.get("chat_template"), options.get("tools"))
    return template if template_date is None else template_with_date(template, template_date)


def template_options(
    preference: Preference, processing_class: PreTrainedTokenizerBase, template_date: str | None
) -> dict[str, Any]:
    """The arguments of `apply_chat_template` that a preference has."""
    options: dict[str, Any] = {"tools": preference.tools, **preference.chat_template_kwargs}
    if template_date is not None:
        options["chat_template"] = template_of(processing_class, options, template_date)
    return options


def rendered_text(
    preference: Preference,
    messages: list[Message],
    processing_class: PreTrainedTokenizerBase,
    template_date: str | None,
    *,
    add_generation_prompt: bool,
) -> str:
    """The text that the chat template makes of these messages."""
    options = template_options(preference, processing_class, template_date)
    options["add_generation_prompt"] = add_generation_prompt
    text = apply_template(processing_class, messages, **options, tokenize=False)
    assert isinstance(text, str)
    return text


def renderer(processing_class: PreTrainedTokenizerBase, template_date: str | None) -> Render:
    """What makes the text of a whole conversation with these."""
    return partial(
        rendered_text, processing_class=processing_class, template_date=template_date, add_generation_prompt=False
    )


def _rendered_ids(
    messages: list[Message], processing_class: PreTrainedTokenizerBase, options: Mapping[str, Any]
) -> list[int]:
    try:
        return apply_template(processing_class, messages, **options, tokenize=True)
    except Exception as error:  # whatever the template's own code raises: a name that is missing, a division by zero
        raise ValueError(
            f"the chat template cannot render messages of the roles {[message['role'] for message in messages]}: "
            f"{error}. Correct the row, or use another chat template."
        ) from error


def _as_text(
    preference: Preference,
    processing_class: PreTrainedTokenizerBase,
    template_date: str | None,
    control_text: ControlText,
    ordinary_ids: list[list[int]],
) -> list[list[int]] | None:
    """The ids of the three conversations, in which special tokens that others than the assistant spell out are text.
    None where that is not sure to change nothing else."""
    all_ids = []
    for number, (messages, ids) in enumerate(zip(conversations(preference), ordinary_ids, strict=True)):
        render = partial(
            rendered_text,
            processing_class=processing_class,
            template_date=template_date,
            add_generation_prompt=number == 0,
        )
        render_hidden = partial(render, control_text.hiding_of(preference))
        found = control_text.ids(messages, partial(render, preference), ids, render_hidden)
        if found is None:
            return None
        all_ids.append(found)
    return all_ids


def _with_eos(completion: str, eos_token: str) -> str:
    return completion if completion.endswith(eos_token) else completion + eos_token


def _common_prefix_length(ids: list[int], others: list[int]) -> int:
    for position, (token, other) in enumerate(zip(ids, others, strict=False)):
        if token != other:
            return position
    return min(len(ids), len(others))
