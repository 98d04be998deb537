"""The options of how a run's datasets are read, tokenized and cut."""

from dataclasses import dataclass
from typing import Any

from holdfast.losses.options import option


@dataclass(kw_only=True)
class DataOptions:
    """Options about data. `DPOConfig` inherits them, and checks them with the others."""

    columns: dict[str, Any] | str | None = option(
        None, "Which columns of the datasets are what: the name of a public format, or a mapping."
    )
    dataset_num_proc: int | None = option(None, "Processes that tokenize the dataset.")
    template_date: str | None = option(
        None,
        "Date (YYYY-MM-DD) that chat templates print which print one. Default: the day on which the run began, on a "
        "resume too.",
    )
    assistant_only: bool = option(
        True,
        "Score only what the assistant says in completions of several messages; what others say is seen. Off: score "
        "all tokens of the completions.",
    )
    weight_column: str | None = option(
        None, "Column of the datasets that says how much each pair counts in the loss: a number of at least 0."
    )
    margin_column: str | None = option(
        None, "Column of the datasets that says which margin each pair is to reach: a number, in units of beta * nats."
    )
    max_length: int | None = option(1024, "Longest prompt + completion in tokens; None does not truncate.")
    truncation_mode: str = option("keep_start", "Which end of a longer sequence is kept: `keep_start` or `keep_end`.")
    special_tokens_in_text: str = option(
        "text",
        "What a special token becomes that a message of others than the assistant spells out: `text`, or this `token`.",
    )
