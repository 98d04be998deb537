"""Characters that are scored -> a 1 or a 0 for each token.

A token that stands across the first character of a turn belongs to the turn, as `char_to_token` of transformers has it
for the marks of a template. So does one that stands across the last.
"""

from collections.abc import Callable, Sequence

import numpy as np

from holdfast.data.encoder import Tokens
from holdfast.data.turns.spans import Span

TokensAt = Callable[[str, Sequence[int]], list[Tokens | None]]
"""The first and the last token that contain each of some characters of a text, ascending."""


def mask_of_turns(text: str, spans: Sequence[Span], num_tokens: int, tokens_at: TokensAt) -> np.ndarray:
    """An int8 for each token of `text`: 1 where it has a character of these spans, which are turns."""
    mask = np.zeros(num_tokens, dtype=np.int8)
    inner = [span for start, end in spans if (span := _without_white_space(text, start, end))[0] < span[1]]
    edges = sorted({place for start, end in [*spans, *inner] if start < end for place in (start, end - 1)})
    tokens = dict(zip(edges, tokens_at(text, edges), strict=True))
    for start, end in spans:
        if start == end:
            continue
        stripped = _without_white_space(text, start, end)
        if stripped[0] >= stripped[1]:
            stripped = start, end
        first = tokens[start] or tokens[stripped[0]]  # some tokenizers have no token for white space
        last = tokens[end - 1] or tokens[stripped[1] - 1]
        if first is not None and last is not None:
            mask[first[0] : last[1] + 1] = 1
    return mask


def mask_of_marks(text: str, spans: Sequence[Span], num_tokens: int, tokens_at: TokensAt) -> np.ndarray:
    """The same for the spans of `{% generation %}`, with the very tokens that `apply_chat_template` gives for them with
    `return_assistant_tokens_mask=True`."""
    mask = np.zeros(num_tokens, dtype=np.int8)
    edges = sorted({place for start, end in spans for place in (start, end - 1)})
    tokens = dict(zip(edges, tokens_at(text, edges), strict=True))
    for start, end in spans:
        first, last = tokens[start], tokens[end - 1]
        if first is None:
            break
        mask[first[0] : last[0] + 1 if last is not None and last[0] > 0 else num_tokens] = 1
    return mask


def completion_mask(mask: np.ndarray | None, num_prompt_tokens: int) -> np.ndarray | None:
    """The mask of a completion from that of its whole text. None where all of its tokens are scored."""
    if mask is None:
        return None
    mask = mask[num_prompt_tokens:]
    return None if mask.all() else mask


def _without_white_space(text: str, start: int, end: int) -> Span:
    inner = text[start:end]
    return start + len(inner) - len(inner.lstrip()), end - len(inner) + len(inner.rstrip())
