"""A path or hub name in a run file, and what is loaded from it: a tokenizer, a dataset, a mixture of datasets.

The libraries that load are imported on the first load, since reading a run file must stay fast.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from holdfast.cli.yaml_document import Document
from holdfast.data.mixing.shares import WeightError, check_weights

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset
    from transformers import PreTrainedTokenizerBase


DATASET: dict[str, Any] = {
    "path": str,
    "split": str | None,
    "name": str | None,
    "streaming": bool,
    "columns": str | dict | None,
}
"""What a dataset may be loaded with, beside its path."""

WITH_WEIGHT: dict[str, Any] = {**DATASET, "weight": float}
"""One of several training sets."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """Something to load: a local path or a hub name, and the options to load it with."""

    path: str
    options: dict[str, Any]

    @property
    def is_stream(self) -> bool:
        """Whether a dataset is read as it is trained on."""
        return bool(self.options.get("streaming"))


@dataclass(frozen=True, slots=True, kw_only=True)
class MixtureOfSources:
    """Several datasets that are trained on together. `weights` are their shares; None for every row once."""

    sources: dict[str, Source]
    weights: dict[str, float] | None

    @property
    def is_stream(self) -> bool:
        """Whether one of them is a stream, and so the mixture is."""
        return any(source.is_stream for source in self.sources.values())


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
    if options.get("columns") is not None:
        read_columns(document, f"{name}.columns", options["columns"])
    return Source(path=options.pop("path"), options=options)


def read_columns(document: Document, name: str, value: Any) -> Any:
    """Which columns of a dataset are what, as it was written. RunFileError for what cannot be."""
    from holdfast.data.shapes.mapping import check_mapping

    try:
        check_mapping(value)
    except ValueError as error:
        raise document.error(name, f"`{name}`: {error}") from error
    return value


def read_mixture(document: Document, name: str, value: Mapping[str, Any], hints: Mapping[str, Any]) -> MixtureOfSources:
    """The mixture written as a mapping of names to sources, each a path or a mapping of `hints` and `weight`.
    RunFileError for weights that cannot be."""
    if not value:
        raise document.error(name, f"`{name}` is a mapping without datasets. Name one.")
    sources = {part: read_source(document, f"{name}.{part}", source, hints) for part, source in value.items()}
    weights = {part: source.options.pop("weight") for part, source in sources.items() if "weight" in source.options}
    try:
        check_weights(sources, weights or None)
    except WeightError as error:
        written = f"{name}.{error.source}" if error.source is not None else name
        key = f"{written}.weight" if error.source in weights else written
        raise document.error(key, f"`{key}`: {error}") from error
    return MixtureOfSources(sources=sources, weights=weights or None)


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
    """The dataset at `source`, which the key `name` of the run file names, with the columns of `data.columns` where the
    source has none. RunFileError where it has several splits."""
    from holdfast.data.load import load_preferences

    of_all: Any = document.values.get("data")
    columns = of_all.get("columns") if isinstance(of_all, dict) else None
    dataset = load_preferences(source.path, **{"columns": columns, **source.options})
    if isinstance(dataset, dict):
        raise document.error(
            name,
            f"`{name}` must be one dataset; found the splits {', '.join(map(str, dataset))} in {source.path!r}. "
            f"Choose one of them: {{path: {source.path}, split: {next(iter(dataset))}}}.",
        )
    return dataset


def load_mixture(
    document: Document, name: str, mixture: MixtureOfSources, *, seed: int, stopping: Any
) -> "Dataset | IterableDataset":
    """The mixture that the key `name` of the run file describes. RunFileError where its datasets cannot be mixed."""
    from holdfast.data.mixing.mixture import mix

    loaded = {
        part: load_dataset(document, f"{name}.{part}", source)
        for part, source in mixture.sources.items()
        if mixture.weights is None or mixture.weights[part]
    }
    weights = None if mixture.weights is None else {part: mixture.weights[part] for part in loaded}
    try:
        return mix(loaded, weights=weights, seed=seed, stopping=stopping)
    except ValueError as error:
        source = getattr(error, "source", None)
        raise document.error(f"{name}.{source}" if source in loaded else name, f"`{name}`: {error}") from error
