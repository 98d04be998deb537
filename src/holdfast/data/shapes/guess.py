"""Which shape a dataset seems to have that has not holdfast's columns, and the line that would read it: `guess`.

A format is guessed where all of its columns are there, the one with most columns first. Else the columns are guessed by
names that people give to a prompt, the better answer and the worse one.
"""

from collections.abc import Collection, Sequence

from holdfast.data.shapes.named import NAMED_FORMATS, NamedFormat

PROMPT_NAMES = (
    "question", "instruction", "query", "input", "prompts", "prompt_text", "user", "user_prompt", "user_input",
    "conversations", "conversation", "messages", "context", "history", "dialogue", "problem", "post", "source_text",
)  # fmt: skip
"""Names that people give to a prompt, the likeliest first."""

_CHOSEN_NAMES = (
    "response_chosen", "chosen_response", "chosen_answer", "answer_chosen", "chosen_text", "chosen_completion",
    "preferred", "preferred_output", "preferred_response", "preferred_answer", "preferred_completion", "accepted",
    "accepted_response", "response_j", "better", "better_response", "good", "good_response", "win",
    "winner", "positive", "pos", "best", "best_response", "output_chosen", "chosen_output", "correct", "y_w",
    "response_w",
)  # fmt: skip
_REJECTED_NAMES = (
    "response_rejected", "rejected_response", "rejected_answer", "answer_rejected", "rejected_text",
    "rejected_completion", "dispreferred", "non_preferred_output", "dispreferred_output", "dispreferred_response",
    "non_preferred", "rejected_output", "output_rejected", "reject", "rejects", "response_k", "worse", "worse_response",
    "bad", "bad_response", "lose", "loser", "negative", "neg", "worst", "worst_response", "incorrect", "wrong", "y_l",
    "response_l",
)  # fmt: skip

OLD_NAMES = {
    "reference_chosen_logps": "ref_chosen_logps",
    "reference_rejected_logps": "ref_rejected_logps",
    "chosen_ref_logps": "ref_chosen_logps",
    "rejected_ref_logps": "ref_rejected_logps",
    "ref_logps_chosen": "ref_chosen_logps",
    "ref_logps_rejected": "ref_rejected_logps",
    "reference_score_chosen": "ref_chosen_logps",
    "reference_score_rejected": "ref_rejected_logps",
}
"""Names that reference log-probs had, or have elsewhere."""

OTHER_TOKENS = {
    "prompt_input_ids": "prompt_ids",
    "input_ids_prompt": "prompt_ids",
    "chosen_input_ids": "chosen_ids",
    "input_ids_chosen": "chosen_ids",
    "rejected_input_ids": "rejected_ids",
    "input_ids_rejected": "rejected_ids",
    "chosen_labels": "chosen_ids",
    "rejected_labels": "rejected_ids",
}
"""Columns of token ids of other programs, and the nearest of holdfast's."""


def guess(columns: Collection[str]) -> str | None:
    """The sentence that says which shape these columns seem to be, and what to write; None where nothing is near."""
    found = set(columns)
    formats = [name for name, shape in NAMED_FORMATS.items() if name != "hh" and _required(shape) <= found]
    if formats:
        name = max(formats, key=lambda name: (len(_all(NAMED_FORMATS[name]) & found), -formats.index(name)))
        return f"This looks like {NAMED_FORMATS[name].of}: write `columns: {name}`."
    sides = {
        "prompt": _first(("prompt", *PROMPT_NAMES), columns),
        "chosen": _first(("chosen", *_CHOSEN_NAMES), columns),
        "rejected": _first(("rejected", *_REJECTED_NAMES), columns),
    }
    if sides["chosen"] is None or sides["rejected"] is None:
        return None
    mapping = ", ".join(f"{side}: {column}" for side, column in sides.items() if column not in (None, side))
    if not mapping:
        return None
    return f"Its columns seem to be these: write `columns: {{{mapping}}}`."


def what_is_missing(columns: Collection[str]) -> str:
    """What to do about a dataset that has no pair by holdfast's names."""
    found = set(columns)
    if guessed := guess(found):
        return guessed
    if found & {"label", "is_good", "desirable"} and found & {"completion", "response", "messages", "output", "answer"}:
        return (
            "This is unpaired: each row has one completion and a label that says whether it is good. A pair needs a "
            "chosen and a rejected completion for one prompt; put two rows of a prompt together."
        )
    if found & {"response", "completion", "output", "answer"} and found & {"score", "helpfulness", "rating", "reward"}:
        return (
            "Each row has one completion and its score. A pair needs two for one prompt; put the best and the worst "
            "row of a prompt together."
        )
    if not found & {"chosen", "rejected"} and found & {"messages", "conversations", "text", "completion", "output"}:
        return "Each row seems to have one completion only, as for supervised fine-tuning; a pair needs two."
    return (
        "Rename or add columns, for example with `dataset.rename_column(...)`, or say which are which: "
        "`columns: {prompt: ..., chosen: ..., rejected: ...}`."
    )


def _required(shape: NamedFormat) -> set[str]:
    return set(shape.guessed_with) | {
        name.split(".")[0]
        for key, value in shape.columns.items()
        if key not in shape.optional and not isinstance(value, bool)
        for name in _names(value)[: 1 if key == "prompt" else None]
    }


def _all(shape: NamedFormat) -> set[str]:
    values = [value for value in shape.columns.values() if not isinstance(value, bool)]
    return {name.split(".")[0] for value in values for name in _names(value)}


def _names(value: str | Sequence[str]) -> list[str]:
    return [value] if isinstance(value, str) else list(value)


def _first(names: Sequence[str], columns: Collection[str]) -> str | None:
    """The column with the first of these names that there is, in whatever case it is written."""
    by_name = {str(column).lower(): str(column) for column in columns}
    return next((by_name[name] for name in names if name in by_name), None)
