"""`holdfast inspect MODEL --reference REF --data DATA`: is this the reference you think it is?

`compare` is what the command `inspect` calls where a reference is named. Its exit codes are those of `diff`, for
scripts: 0 where both are the same, 1 where they differ, 2 where they could not be compared, whatever the reason.
"""

import json
import math
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, final

import typer

from holdfast.cli.errors import RANK, messages
from holdfast.cli.output_files import check_files
from holdfast.cli.paths import expanded

if TYPE_CHECKING:
    from holdfast.inspect.two_models.compare import Comparison

IS_SAME, DIFFERS, NOT_COMPARED = 0, 1, 2
"""The exit codes."""

_STYLES = {
    "heading": "bold", "warning": "bold yellow", "faint": "dim", "good": "bold green", "bad": "bold yellow",
    "added": "green", "removed": "red", "token": "bold magenta",
}  # fmt: skip


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Comparing:
    """What the command was asked: the model, the reference and the data as they were written, and how to compare."""

    model: str
    reference: str
    data: str | None = None
    revision: str | None = None
    reference_revision: str | None = None
    split: str | None = None
    columns: str | None = None
    dtype: str = "float32"
    limit: int = 64
    seed: int = 0
    max_length: int = 1024
    beta: float = 0.1
    tolerance: float | None = None
    weights_only: bool = False
    ignore_tokenizer: bool = False
    trust_remote_code: bool = False
    html: Path | None = None
    json: Path | None = None


def compare(asked: Comparing, *, debug: bool) -> None:
    """Compares two models, prints and writes what was found, and ends the command with its exit code."""
    with _exit_codes(), messages(debug, of_libraries=True):
        _check(asked)
        comparison = _compared(asked)
        _write(comparison, asked)
        _print(comparison)
    raise typer.Exit(IS_SAME if comparison.verdict.outcome == "same" else DIFFERS)


@contextmanager
def _exit_codes() -> Iterator[None]:
    """A context in which whatever fails ends the command with `NOT_COMPARED`: no script may take it for a difference.
    The codes of signals stay."""
    try:
        yield
    except typer.Exit as ended:
        raise typer.Exit(NOT_COMPARED if ended.exit_code in (1, 2) else ended.exit_code) from None
    except Exception:
        traceback.print_exc()
        raise typer.Exit(NOT_COMPARED) from None


def _check(asked: Comparing) -> None:
    """ValueError for what cannot be, before anything is loaded."""
    check_files({"html": asked.html, "json": asked.json})
    if asked.data is None and not asked.weights_only:
        raise ValueError(
            "two models were to be compared, and --data is missing: the pairs on which they are run. Name a file, a "
            "folder or a hub id, or add --weights-only, which runs no model."
        )
    of_data = {"data": asked.data, "split": asked.split, "columns": asked.columns, "tolerance": asked.tolerance}
    if asked.weights_only and (found := [f"--{name}" for name, value in of_data.items() if value is not None]):
        raise ValueError(f"--weights-only runs no model, so {', '.join(found)} would be ignored. Drop one of them.")
    if asked.dtype not in _DTYPES:
        raise ValueError(f"--dtype is {', '.join(_DTYPES)}; found {asked.dtype!r}.")
    for name, value in (("beta", asked.beta), ("tolerance", asked.tolerance)):
        if value is not None and not (value >= 0 and math.isfinite(value)):
            raise ValueError(f"--{name} is a number from 0 on; found {value}. Write another one.")


_DTYPES = ("float32", "bfloat16", "float16", "auto")


def _compared(asked: Comparing) -> "Comparison":
    from holdfast.inspect.two_models.compare import Request, compare_models
    from holdfast.inspect.two_models.sides import Loading, Place

    is_shown = sys.stderr.isatty()
    loading = Loading(dtype=asked.dtype, trust_remote_code=asked.trust_remote_code, disable_tqdm=not is_shown)
    request = Request(
        model=Place(path=_expanded("MODEL", asked.model), revision=asked.revision),
        reference=Place(path=_expanded("--reference", asked.reference), revision=asked.reference_revision),
        loading=loading,
        limit=asked.limit,
        seed=asked.seed,
        max_length=asked.max_length,
        beta=asked.beta,
        tolerance=asked.tolerance,
        weights_only=asked.weights_only,
        with_tokenizers=not asked.ignore_tokenizer,
    )
    from holdfast.data.progress import bars

    with bars(are_shown=is_shown):
        return compare_models(request, None if asked.data is None else _dataset(asked, asked.data))


def _expanded(name: str, text: str) -> str:
    try:
        return expanded(text)
    except ValueError as error:
        raise ValueError(f"{name} is {text!r}: {error}.") from error


def _dataset(asked: Comparing, data: str) -> Any:
    """The pairs to compare on. ValueError where they cannot be read, or have several splits."""
    from holdfast.data.load import load_preferences

    columns: Any = asked.columns
    if columns is not None and columns.lstrip().startswith("{"):
        try:
            columns = json.loads(columns)
        except ValueError as error:
            raise ValueError(
                f"--columns is {columns!r}, which is no JSON: {error}. Name a format, or a mapping."
            ) from error
    dataset = load_preferences(_expanded("--data", data), split=asked.split, columns=columns)
    if isinstance(dataset, dict):
        raise ValueError(
            f"--data must be one dataset; found the splits {', '.join(map(str, dataset))} in {data!r}. Choose "
            f"one of them, as in --split {next(iter(dataset))}."
        )
    return dataset


def _write(comparison: "Comparison", asked: Comparing) -> None:
    if RANK != 0:
        return
    if asked.html is not None:
        from holdfast.inspect.two_models.page import write_page

        write_page(comparison, asked.html)
    if asked.json is not None:
        from holdfast.inspect.two_models.numbers_file import write_json

        write_json(comparison, asked.json)


def _print(comparison: "Comparison") -> None:
    from holdfast.cli.printed_lines import console_of_reports, print_lines, width_of
    from holdfast.inspect.two_models.lines import comparison_lines

    console = console_of_reports()
    print_lines(console, comparison_lines(comparison, width_of(console)), _STYLES)
