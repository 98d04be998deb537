"""The options of how a run's datasets are read, tokenized and cut."""

from dataclasses import dataclass, field
from typing import Any


def _option(help: str, **kwargs: Any) -> Any:
    return field(metadata={"help": help}, **kwargs)


@dataclass(kw_only=True)
class DataOptions:
    """Options about data. `DPOConfig` inherits them, and checks them with the others."""

    columns: dict[str, Any] | str | None = _option("Which columns are what: a format or a mapping.", default=None)
    dataset_num_proc: int | None = _option("Processes that tokenize the dataset.", default=None)
    template_date: str | None = _option(
        "Date (YYYY-MM-DD) that chat templates print which print one. Default: the day on which the run began, on a "
        "resume too.",
        default=None,
    )
    assistant_only: bool = _option(
        "Score only what the assistant says in completions of several messages. Off: all their tokens.", default=True
    )
    max_length: int | None = _option("Longest prompt + completion in tokens; None does not truncate.", default=1024)
    truncation_mode: str = _option("Longer sequences: `keep_start` or `keep_end`.", default="keep_start")
    special_tokens_in_text: str = _option(
        "What special tokens become that others than the assistant spell out: `text` or `token`.", default="text"
    )
