"""Files whose contents are known -> a dataset in the cache of `datasets`, or a stream.

The builder is what `datasets` calls a reader of files. Its cache is kept by path, time and size of each file, by the
options of reading, and by `RULES`.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, final

import datasets
import pyarrow as pa
from datasets import Dataset, DatasetDict, Features, IterableDataset, IterableDatasetDict, SplitGenerator
from datasets.builder import Key
from datasets.data_files import DataFilesDict, DataFilesList
from datasets.exceptions import DatasetGenerationError

from holdfast.data.files.contents import Contents, Reading
from holdfast.data.files.faults import words_of

RULES = "holdfast-2"
"""Part of the cache's key: raise it when the same file gives other rows."""


@dataclass
class _Config(datasets.BuilderConfig):
    """What the cache of a dataset depends on, beside the rules."""

    features: Features = field(default_factory=Features)
    reading: Reading = field(default_factory=lambda: Reading(kind="json"))


@final
class _FilesBuilder(datasets.ArrowBasedBuilder):
    """Reads the files of a dataset, in which nothing is downloaded or unpacked.

    For streams, `datasets` replaces `open` and `Path` in this module by its own, which take "::" in a path for an
    archive. So files are opened in other modules.
    """

    BUILDER_CONFIG_CLASS = _Config
    config: _Config

    def _info(self) -> datasets.DatasetInfo:
        return datasets.DatasetInfo(features=self.config.features)

    def _split_generators(self, dl_manager: Any) -> list[SplitGenerator]:
        files = (self.config.data_files or {}).items()
        return [SplitGenerator(name=split, gen_kwargs={"files": list(of_split)}) for split, of_split in files]

    def _generate_shards(self, files: Sequence[str]) -> Iterator[str]:
        yield from files

    def _generate_tables(self, files: Sequence[str]) -> Iterator[tuple[Key, pa.Table]]:
        for number, file in enumerate(files):
            for batch, table in enumerate(self.config.reading.tables(file, self.config.features)):
                yield Key(number, batch), table


def load_contents(
    contents: Contents,
    split: str | None,
    *,
    streaming: bool = False,
    cache_dir: str | None = None,
    num_proc: int | None = None,
    keep_in_memory: bool | None = None,
    download_mode: Any = None,
) -> Dataset | DatasetDict | IterableDataset | IterableDatasetDict:
    """The dataset of that split (or of all splits) of the files; the options are those of `datasets.load_dataset`.

    Raises `ValueError` with file and line where a file has changed since it was examined, or is damaged further on.
    """
    builder = _FilesBuilder(
        cache_dir=cache_dir,
        dataset_name="holdfast",
        hash=RULES,
        data_files=DataFilesDict({split: _stamped(files) for split, files in contents.files.items()}),
        features=contents.features,
        reading=contents.reading,
    )
    if streaming:
        return builder.as_streaming_dataset(split=split)  # type: ignore[return-value]
    try:
        builder.download_and_prepare(download_mode=download_mode, num_proc=num_proc)
    except DatasetGenerationError as error:
        cause = error.__cause__
        if isinstance(cause, ValueError):
            raise cause from error
        cause = cause if isinstance(cause, Exception) else error
        raise ValueError(
            f"the rows could not be written to the cache in {builder.cache_dir}: {words_of(cause)}. Check its disk, or "
            "give another one as `cache_dir` or in the environment variable HF_DATASETS_CACHE."
        ) from error
    return builder.as_dataset(split=split, in_memory=bool(keep_in_memory))  # type: ignore[return-value]


def _stamped(files: Sequence[Path]) -> DataFilesList:
    stamps: list[Any] = [(str(file.stat().st_mtime_ns), str(file.stat().st_size)) for file in files]
    return DataFilesList([str(file.absolute()) for file in files], stamps)
