"""A `Preference` -> token ids, and what follows from token ids alone: truncation and the content id.

The prompt and both full texts are tokenized, with three calls a row; `batch_tokenizer` does the same for many rows
together, and is held to this. Tokens may merge across the boundary, and a
template may render a prompt alone in another way. So the completion begins where the full text leaves the tokenized
prompt, and what is trained on is always the tokenization of the whole text. Given up: tokenizing prompt and completion
apart, which would be faster and wrong.
"""

import hashlib
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, TypeVar

import numpy as np
from transformers import PreTrainedTokenizerBase

from holdfast.data.control_text import ControlText, Encoded
from holdfast.data.encoder import Tokens, containing, offsets_of
from holdfast.data.formats import Preference
from holdfast.data.note import Note
from holdfast.data.rendering.message_shapes import fitted
from holdfast.data.rendering.template import rendered_ids, rendered_prompt, rendered_text, renderer, template_options
from holdfast.data.text_pair import TextPairs
from holdfast.data.turns.exchange import Exchange, exchange_of
from holdfast.data.turns.masks_of_turns import TurnMasks
from holdfast.data.turns.token_masks import TokensAt, completion_mask

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
    turn_masks: TurnMasks | None = None,
) -> TokenizedPair:
    """The token ids of a preference, and which of them are scored.

    Text completions end with one eos token (see `holdfast.data.text_pair`). Messages go through the chat template,
    which ends completions itself and prompts with the generation prompt; where it prints a date, that is
    `template_date` (None is today's). Where the tokenized prompt is not a prefix of both full texts, the completions
    begin where one of them leaves it, and the rest of the prompt is returned as `cut_ids`. Text that spells out a
    special token is text in messages of all roles but the assistant's (see `holdfast.data.control_text`). Only what
    the assistant says is scored (see `holdfast.data.turns`). `control_text` and `turn_masks` are the finders of
    both for the tokenizer; leave them out to have them made.

    Raises `ValueError` when the tokenizer has no eos token or chat template where one is needed (see
    `check_tokenizer`), when the chat template refuses the messages, and when the assistant's turns cannot be told.
    """
    check_tokenizer(processing_class, is_conversational=preference.is_conversational)
    control_text = control_text or ControlText(processing_class)
    if not preference.is_conversational:
        return _text_pair(preference, processing_class, control_text)
    turn_masks = turn_masks or TurnMasks(processing_class, template_date, assistant_only=True)
    exchange = exchange_of(preference, assistant_only=turn_masks.assistant_only)
    preference, full_texts, notes = fitted(exchange.preference, renderer(processing_class, template_date))
    conversations = exchange.conversations(preference)
    ids: list[list[int]] = []
    for number, messages in enumerate(conversations):
        options = template_options(preference, processing_class, template_date)
        options["add_generation_prompt"] = number == 0 and exchange.opens_turn
        if number == 0 and exchange.prefill is not None:
            options["continue_final_message"] = True
        ids.append(rendered_ids(messages, processing_class, options))
    assert full_texts is not None, "the template has rendered both"
    prompt_text = rendered_prompt(exchange, preference, processing_class, template_date)
    texts = [prompt_text, *full_texts]
    scored = turn_masks.scored(exchange, preference, texts)
    found = control_text.find(preference)
    offsets: list[Any] = [None] * len(ids)
    is_text = False
    if found.by_others is not None:
        as_text = _as_text(exchange, preference, processing_class, template_date, control_text, ids)
        if as_text is not None:
            is_text = True
            ids, offsets = [each.ids for each in as_text], [each.offsets for each in as_text]
    masks = [None, None]
    if scored is not None:
        masks = [
            scored[n].mask(texts[n + 1], len(ids[n + 1]), _tokens_at(processing_class, offsets[n + 1])) for n in (0, 1)
        ]
    return _pair(
        ids,
        masks,
        as_text=found.by_others if is_text else None,
        as_token=found.elsewhere if is_text else found.by_others or found.elsewhere,
        notes=(*notes, *exchange.notes, *turn_masks.notes(conversations, texts)),
    )


def _text_pair(
    preference: Preference, processing_class: PreTrainedTokenizerBase, control_text: ControlText
) -> TokenizedPair:
    pairs = TextPairs(processing_class)
    ids: list[Any] = [processing_class(text, add_special_tokens=False)["input_ids"] for text in pairs.texts(preference)]
    found = control_text.find(preference)
    return _pair(
        pairs.surrounded(ids, pairs.before, pairs.after),
        (None, None),
        as_text=None,
        as_token=found.by_others or found.elsewhere,
        notes=pairs.notes(preference),
    )


def _pair(
    ids: Sequence[list[int]],
    masks: Sequence[np.ndarray | None],
    *,
    as_text: str | None,
    as_token: str | None,
    notes: tuple[Note, ...],
) -> TokenizedPair:
    """The pair of the ids of the three texts, of which the masks are those of the two full ones."""
    prompt_ids, chosen_ids, rejected_ids = ids
    length = min(_common_prefix_length(prompt_ids, chosen_ids), _common_prefix_length(prompt_ids, rejected_ids))
    chosen_mask, rejected_mask = (completion_mask(mask, length) for mask in masks)
    return TokenizedPair(
        prompt_ids=prompt_ids[:length],
        chosen_ids=chosen_ids[length:],
        rejected_ids=rejected_ids[length:],
        cut_ids=prompt_ids[length:],
        as_text=as_text,
        as_token=as_token,
        chosen_mask=None if chosen_mask is None else chosen_mask.tolist(),
        rejected_mask=None if rejected_mask is None else rejected_mask.tolist(),
        notes=notes,
    )


def _tokens_at(tokenizer: PreTrainedTokenizerBase, offsets: Sequence[tuple[int, int]] | None) -> TokensAt:
    def tokens_at(text: str, characters: Sequence[int]) -> list[Tokens | None]:
        known = offsets_of(tokenizer, text) if offsets is None else offsets
        return [containing(known, character) for character in characters]

    return tokens_at


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
    content = b"".join(
        part
        for ids in ((prompt_ids, completion_ids) if scored is None else (prompt_ids, completion_ids, scored))
        for part in (len(ids).to_bytes(8, "little"), np.asarray(ids, dtype="<i8").tobytes())
    )
    high, low = struct.unpack("<qq", hashlib.blake2b(content, digest_size=16).digest())
    return high, low


def _as_text(
    exchange: Exchange,
    preference: Preference,
    processing_class: PreTrainedTokenizerBase,
    template_date: str | None,
    control_text: ControlText,
    ordinary_ids: list[list[int]],
) -> list[Encoded] | None:
    """The three conversations encoded so that special tokens that others than the assistant spell out are text. None
    where that is not sure to change nothing else."""
    found: list[Encoded] = []
    for number, (messages, ids) in enumerate(zip(exchange.conversations(preference), ordinary_ids, strict=True)):
        render = partial(
            rendered_text,
            processing_class=processing_class,
            template_date=template_date,
            add_generation_prompt=number == 0 and exchange.opens_turn,
            continue_final_message=number == 0 and exchange.prefill is not None,
        )
        render_hidden = partial(render, control_text.hiding_of(preference))
        encoded = control_text.encoded(messages, partial(render, preference), ids, render_hidden)
        if encoded is None:
            return None
        found.append(encoded)
    return found


def _common_prefix_length(ids: list[int], others: list[int]) -> int:
    for position, (token, other) in enumerate(zip(ids, others, strict=False)):
        if token != other:
            return position
    return min(len(ids), len(others))
