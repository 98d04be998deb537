"""A path or hub name in a run file, and what is loaded from it: a tokenizer or a dataset.

The libraries that load are imported on the first load, since reading a run file must stay fast.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from holdfast.cli.yaml_document import Document

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """Something to load: a local path or a hub name, and the options to load it with."""

    path: str
    options: dict[str, Any]


def read_source(document: Document, name: str, value: Any, hints: Mapping[str, Any]) -> Source:
    """The source written as a path, or as a mapping with `path` and the options of `hints`. RunFileError."""
    if isinstance(value, str):
        return Source(path=value, options={})
    options = document.check(name, value, hints)
    if "path" not in options:
        raise document.error(
            name, f"`{name}` needs `path`; found {', '.join(options) or 'nothing'}. Write `path: ...`."
        )
    for option, text in options.items():
        if isinstance(text, str) and not text.strip():
            raise document.error(f"{name}.{option}", f"`{name}.{option}` is empty. Write what it is, or leave it out.")
    return Source(path=options.pop("path"), options=options)


def load_tokenizer(source: Source, *, trust_remote_code: bool) -> "PreTrainedTokenizerBase":
    """The tokenizer at `source`. ValueError where it cannot be loaded."""
    from holdfast.policy.tokenizer import read_tokenizer

    return read_tokenizer(
        source.path,
        trust_remote_code=trust_remote_code,
        advice="Give the folder or hub name that has it as `tokenizer:` (default: the model's).",
        **source.options,
    )


def load_dataset(document: Document, name: str, source: Source) -> "Dataset | IterableDataset":
    """The dataset at `source`, which the key `name` of the run file names. RunFileError where it has several splits."""
    from holdfast.data.load import load_preferences

    dataset = load_preferences(source.path, **source.options)
    if isinstance(dataset, dict):
        raise document.error(
            name,
            f"`{name}` must be one dataset; found the splits {', '.join(map(str, dataset))} in {source.path!r}. "
            f"Choose one of them: {{path: {source.path}, split: {next(iter(dataset))}}}.",
        )
    return dataset
