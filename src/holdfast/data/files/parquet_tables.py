"""A Parquet file -> its tables, batch by batch. Its faults are named with the file, and with the row where known."""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Features
from datasets.table import table_cast

from holdfast.data.files.faults import no_rows, seeming_kind, show, words_of

BATCH_ROWS = 1000


def parquet_features(path: Path) -> tuple[Features, int]:
    """The types of the columns, and the number of rows. Raises `ValueError` for what cannot be read, or has no rows."""
    try:
        with pq.ParquetFile(path) as file:
            schema, num_rows = file.schema_arrow, file.metadata.num_rows
        if not schema.names:
            raise ValueError("it has no columns")
        if twice := [name for name, count in Counter(schema.names).items() if count > 1]:
            raise ValueError(f"each column must have a name of its own; found {twice[0]!r} twice")
        features = Features.from_arrow_schema(schema)
    except Exception as error:  # damaged bytes raise many kinds, of pyarrow and of Python
        raise _unreadable(path, error) from error
    if num_rows == 0:
        raise no_rows(path, "none")
    return features, num_rows


def parquet_tables(path: Path, features: Features) -> Iterator[pa.Table]:
    """The rows as tables with columns of these types. Raises `ValueError` with the file, and the row where it stops."""
    row = 0
    try:
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=BATCH_ROWS):
                table = table_cast(pa.Table.from_batches([batch]), features.arrow_schema)
                table.validate(full=True)
                yield table
                row += len(table)
    except GeneratorExit:
        raise
    except Exception as error:
        raise _unreadable(path, error, f" from row {row} on") from error


def _unreadable(path: Path, error: Exception, where: str = "") -> ValueError:
    seems = seeming_kind(path)
    seems = "" if seems in (None, "a Parquet file") else f" (by its first bytes it is {seems})"
    return ValueError(f"{show(path)} could not be read{where}: {words_of(error)}{seems}. Check the file.")
