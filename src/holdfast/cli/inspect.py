"""The command `holdfast inspect`: what a reference makes of a run's pairs, or whether it is the reference you think.

With a run file it scores the pairs of the run through the store, as `holdfast precompute` would, and shows how the
reference ranks them; with `--run OUT` also what training did to them. With `--reference` it compares two models
(`cli.compare`). Options of the one are refused beside the other.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from holdfast.cli import inspect_options as option
from holdfast.cli.compare import Comparing, compare
from holdfast.cli.data import check_name
from holdfast.cli.errors import RANK, messages
from holdfast.cli.options import Debug
from holdfast.cli.output_files import check_files
from holdfast.cli.paths import path_option
from holdfast.cli.runfile import RunFile, read_run_file

if TYPE_CHECKING:
    from holdfast.inspect.ranking.inspection import RankingInspection

_STYLES = {"heading": "bold", "warning": "bold yellow", "faint": "dim"}
_NUM_PAIRS = 5


def inspect(
    target: option.Target,
    out: option.Out = None,
    overrides: option.Overrides = None,
    dataset: option.Dataset = None,
    num_pairs: option.NumPairs = None,
    csv: option.Csv = None,
    reference: option.Reference = None,
    data: option.Data = None,
    revision: option.Revision = None,
    reference_revision: option.ReferenceRevision = None,
    split: option.Split = None,
    columns: option.Columns = None,
    dtype: option.Dtype = None,
    limit: option.Limit = None,
    seed: option.Seed = None,
    max_length: option.MaxLength = None,
    beta: option.Beta = None,
    tolerance: option.Tolerance = None,
    weights_only: option.WeightsOnly = False,
    ignore_tokenizer: option.IgnoreTokenizer = False,
    trust_remote_code: option.TrustRemoteCode = False,
    html: option.Html = None,
    json: option.Json = None,
    debug: Debug = False,
) -> None:
    """Show how the reference ranks a run's pairs, and what training did to them; or compare two models.

    With RUN.YAML: the pairs of the run under its reference, and with --run under the trained policy too.

    With MODEL, --reference and --data: whether both are the same. The exit code is 0 where they are, 1 where they
    differ, and 2 where they cannot be compared.
    """
    of_models = _given(
        data=data, revision=revision, reference_revision=reference_revision, split=split, columns=columns, dtype=dtype,
        limit=limit, seed=seed, max_length=max_length, beta=beta, tolerance=tolerance,
        weights_only=weights_only or None, ignore_tokenizer=ignore_tokenizer or None,
        trust_remote_code=trust_remote_code or None,
    )  # fmt: skip
    of_run = _given(run=out, set=overrides or None, dataset=dataset, pairs=num_pairs, csv=csv)
    if reference is not None:
        _refuse(of_run, "shows a run's pairs, and --reference compares two models; leave one of them out")
        compare(Comparing(model=target, reference=reference, html=html, json=json, **of_models), debug=debug)
        return
    _refuse(of_models, "compares two models: name the other one with --reference, or leave it out to inspect a run")
    path = _run_file(target)
    with messages(debug):
        files = {"html": html, "json": json, "csv": csv}
        check_files(files)
        run = read_run_file(path, overrides or [])
        check_name(run, dataset)
        inspection = _inspected(run, out, dataset, _NUM_PAIRS if num_pairs is None else num_pairs)
        if RANK == 0:
            _write(inspection, files)
        _print(inspection)


def _given(**options: Any) -> dict[str, Any]:
    """The options that have a value."""
    return {name: value for name, value in options.items() if value is not None}


def _refuse(options: dict[str, Any], reason: str) -> None:
    """A usage error where there is one of these options."""
    for name in options:
        raise typer.BadParameter(f"{reason}.", param_hint=f"--{name.replace('_', '-')}")


def _run_file(target: str) -> Path:
    path = path_option(target)
    if path.is_dir():
        raise typer.BadParameter(
            f"{target!r} is a folder. Name a run file to inspect its pairs, or compare this model with --reference REF "
            "--data DATA.",
            param_hint="RUN.YAML|MODEL",
        )
    return path


def _inspected(run: RunFile, out: Path | None, only: str | None, num_pairs: int) -> "RankingInspection":
    """The inspection of a run's pairs. ValueError, TypeError or OSError where they cannot be scored."""
    from holdfast.cli.run_numbers import run_numbers
    from holdfast.cli.trained_by import other_values
    from holdfast.inspect.ranking.of_run import inspect_run

    arguments = run.training_arguments()  # as they are, before any is changed to ask the reference
    others = () if out is None else other_values(run, out)
    return inspect_run(run_numbers(run, out), arguments, only=only, num_shown=num_pairs, notes=others)


def _write(inspection: "RankingInspection", files: dict[str, Path | None]) -> None:
    if (path := files["html"]) is not None:
        from holdfast.inspect.ranking.page import write_page

        write_page(inspection, path)
    if (path := files["json"]) is not None:
        from holdfast.inspect.ranking.numbers_file import write_json

        write_json(inspection, path)
    if (path := files["csv"]) is not None:
        from holdfast.inspect.ranking.numbers_file import write_csv

        write_csv(inspection, path)


def _print(inspection: "RankingInspection") -> None:
    from holdfast.cli.printed_lines import console_of_reports, print_lines, width_of
    from holdfast.inspect.ranking.lines import report_lines

    console = console_of_reports()
    print_lines(console, report_lines(inspection, width_of(console)), _STYLES)
