"""The columns of a dataset of preferences, each named once.

A pair is `TOKENIZED_COLUMNS` once it is tokenized: the prompt and its two completions as token ids, before truncation.
It is read from the `TEXT_COLUMNS`. `MASK_COLUMNS` say which tokens of the completions are scored. `REFERENCE_COLUMNS`
hold log-probs that a user may have computed beforehand.
"""

from collections.abc import Container

PROMPT_IDS, CHOSEN_IDS, REJECTED_IDS = "prompt_ids", "chosen_ids", "rejected_ids"

TOKENIZED_COLUMNS = (PROMPT_IDS, CHOSEN_IDS, REJECTED_IDS)
"""A tokenized pair. With `MASK_COLUMNS`, it is all that training reads of a row, unless a user's own collator reads
more."""

CHOSEN_MASK, REJECTED_MASK = "chosen_mask", "rejected_mask"

MASK_COLUMNS = (CHOSEN_MASK, REJECTED_MASK)
"""For each token of a completion, whether it is scored (1) or only seen (0). Without a column all tokens are scored.
They are, too, in a row that has None or an empty list there."""

TEXT_COLUMNS = ("prompt", "chosen", "rejected")
"""A pair as text or messages. `prompt` may be missing: it is then what `chosen` and `rejected` both begin with."""

TOOLS, TEMPLATE_KWARGS = "tools", "chat_template_kwargs"
"""Arguments of the chat template, which a row of messages may have."""

REFERENCE_COLUMNS = ("ref_chosen_logps", "ref_rejected_logps")
"""The reference's log-probs of both completions, sums in nats, where the user's dataset has them."""

IMAGE_COLUMNS = ("image", "images")
"""Columns of pictures, which are refused."""


def columns_of_pairs(names: Container[str]) -> list[str]:
    """The columns among `names` that make a tokenized pair: its token ids, and its masks where there are any."""
    return [*TOKENIZED_COLUMNS, *(name for name in MASK_COLUMNS if name in names)]
