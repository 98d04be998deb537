"""The commands `holdfast store list | verify | gc | export | import`, over the stores of reference log-probs.

Only `import --run` needs a model. `gc` says what it would remove, and removes nothing without `--yes`. Descriptions and
names in a folder of stores may be anybody's, so all is printed by way of `cli.text`. Given up: a clean-up by one short
command.
"""

import math
import re
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from holdfast.cli.errors import messages
from holdfast.cli.options import Debug
from holdfast.cli.paths import path_option
from holdfast.cli.text import printable
from holdfast.cli.yaml_document import RunFileError

if TYPE_CHECKING:
    from holdfast.store.maintenance import CleanupStep, StoreFacts
    from holdfast.store.parquet import TransferReport

app = typer.Typer(
    name="store",
    help="The store of reference log-probs: what it holds, whether it is sound, making room, moving it.",
    no_args_is_help=True,
)

_Root = Annotated[
    Path | None,
    typer.Option(
        "--root", parser=path_option, metavar="FOLDER", help="The folder of the stores. [default: $HOLDFAST_HOME/store]"
    ),
]
_MOST_DAYS, _MOST_BYTES = 100_000, 1 << 62
_UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12}
_UNITS |= {"kib": 1 << 10, "mib": 1 << 20, "gib": 1 << 30, "tib": 1 << 40}


def _days(value: float | None) -> float | None:
    """The value of --older-than, checked."""
    if value is not None and not 0 <= value <= _MOST_DAYS:  # so is NaN
        raise typer.BadParameter(f"a number of days from 0 to {_MOST_DAYS:,} is needed; found {value}.")
    return value


def _digits(value: str) -> str:
    """The value of --key, checked."""
    if re.fullmatch("[0-9a-f]{0,32}", value) is None:
        raise typer.BadParameter(
            f"the first digits of a store's key are needed, of 0-9 and a-f and at most 32; found {printable(value)!r}. "
            "`holdfast store list` shows those of the stores here."
        )
    return value


@app.command("list")
def list_stores(root: _Root = None, debug: Debug = False) -> None:
    """List the stores: what they were computed with, how much they hold, when they were last used."""
    with messages(debug, of_libraries=True):
        from holdfast.store.maintenance import stores

        folder = _folder(root)
        found = stores(folder)
        table = Table("key", "description", "completions", "tokens", "size", "last used")
        for facts in found:
            table.add_row(
                facts.name[:12],
                escape(printable(_description(facts))),
                f"{facts.num_completions:,}",
                f"{facts.num_tokens:,}",
                human_bytes(facts.num_bytes),
                _ago(time.time() - facts.last_used),
            )
        if found:
            _output().print(table)
        total = human_bytes(sum(facts.num_bytes for facts in found))
        _print(f"{len(found)} store(s) in {folder}, {total}")


@app.command()
def verify(
    key: Annotated[str, typer.Argument(metavar="[KEY]", help="The first digits of a store's key; default: all.")] = "",
    root: _Root = None,
    debug: Debug = False,
) -> None:
    """Read every byte and name what is damaged; the exit code is 1 if anything is. Nothing is changed."""
    with messages(debug, of_libraries=True):
        from holdfast.store import maintenance as upkeep

        folder = _folder(root)
        if key:
            upkeep.find_store(folder, key)
        damaged = upkeep.verify(folder, key)
        for damage in damaged:
            _print(f"damaged: {damage.path}: {damage.reason}")
        num_stores = sum(facts.name.startswith(key) for facts in upkeep.stores(folder))
        _print(f"{num_stores} store(s) in {folder} verified, {len(damaged) or 'no'} file(s) damaged")
    raise typer.Exit(1 if damaged else 0)


@app.command()
def gc(
    older_than: Annotated[
        float | None, typer.Option(metavar="DAYS", callback=_days, help="Remove stores not used for so many days.")
    ] = None,
    max_size: Annotated[
        str | None, typer.Option(metavar="SIZE", help="Remove those not used for longest beyond this size: 20GB.")
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", help="Do it; otherwise only say what would be done.")] = False,
    root: _Root = None,
    debug: Debug = False,
) -> None:
    """Remove old stores and what kills left behind, and merge small shards."""
    with messages(debug, of_libraries=True):
        from holdfast.store import maintenance as upkeep

        max_bytes = None if max_size is None else parsed_bytes(max_size)
        steps = upkeep.cleanup_steps(_folder(root), older_than=older_than, max_bytes=max_bytes)
        undone: list[CleanupStep] = []
        for step in steps:
            size = f" ({human_bytes(step.num_bytes)})" if step.num_bytes else ""
            _print(f"{step.action}: {step.path}{size}: {step.reason}")
            if yes and not _is_done(step):
                undone.append(step)
        freed = human_bytes(sum(step.num_bytes for step in steps if step not in undone))
        if not steps:
            _print("nothing to do")
        elif yes:
            _print(f"{freed} freed" + (f"; {len(undone)} step(s) not done" if undone else ""))
        else:
            _print(f"{freed} would be freed; nothing was changed. Add --yes to do it.")
    raise typer.Exit(1 if undone else 0)


@app.command("export")
def export_one(
    key: Annotated[str, typer.Argument(metavar="KEY", help="The first digits of the store's key.")],
    file: Annotated[Path, typer.Argument(parser=path_option, metavar="FILE.PARQUET", help="Where to write it.")],
    root: _Root = None,
    debug: Debug = False,
) -> None:
    """Write a store into one Parquet file."""
    with messages(debug, of_libraries=True):
        from holdfast.store.maintenance import find_store
        from holdfast.store.parquet import export_store

        report = export_store(find_store(_folder(root), key).folder, file)
        _print(f"{_summary(report)} exported to {file} ({human_bytes(file.stat().st_size)})")


@app.command("import")
def import_one(
    file: Annotated[
        Path,
        typer.Argument(parser=path_option, metavar="FILE.PARQUET", help="A file that `holdfast store export` wrote."),
    ],
    key: Annotated[
        str,
        typer.Option(
            metavar="KEY", callback=_digits, help="Refuse a file whose store's key does not begin with these digits."
        ),
    ] = "",
    run_file: Annotated[
        Path | None,
        typer.Option(
            "--run",
            parser=path_option,
            metavar="RUN.YAML",
            help="Refuse what this run would not use, and say what it covers.",
        ),
    ] = None,
    root: _Root = None,
    debug: Debug = False,
) -> None:
    """Add an exported store to those here, once all of it is checked."""
    with messages(debug, of_libraries=True):
        from holdfast.store.exported import read_exported
        from holdfast.store.parquet import coverage, import_store

        if key:
            exported = read_exported(file).key
            if not exported.digest().startswith(key):
                raise ValueError(
                    f"the store {key} was to be imported; {file} holds {exported.digest()} "
                    f"({printable(exported.description) or 'without a description'}). Give its key, or another file."
                )
        if run_file is None:
            report = import_store(_folder(root), file)
            _print(f"{_summary(report)} imported, {report.num_new:,} of them new here")
            return
        read_exported(file)  # a damaged file is refused before the model is loaded
        from holdfast.cli.assembly import store_needs
        from holdfast.cli.runfile import read_run_file

        needs = store_needs(read_run_file(run_file, []))
        report = import_store(needs.store.folder.parent if root is None else _folder(root), file, needs.store.key)
        _print(f"{_summary(report)} imported, {report.num_new:,} of them new here")
        num_found, num_asked = coverage(file, needs.ids)
        _print(f"{num_found:,} of the {num_asked:,} completions of {run_file} are in it")


def human_bytes(num_bytes: int) -> str:
    """A size in decimal units: 999 B, 1.0 kB, 12.3 MB."""
    size = float(num_bytes)
    for unit in ("B", "kB", "MB", "GB"):
        if round(size, 1) < 1000:
            return f"{num_bytes} B" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"


def parsed_bytes(text: str) -> int:
    """The number of bytes in a size such as `500MB`, `1.5 GiB` or `1000`. RunFileError where it is none."""
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)\s*([a-zA-Z]*)", text.strip())
    num_bytes = math.nan if match is None else float(match[1]) * _UNITS.get(match[2].lower(), math.nan)
    if not num_bytes <= _MOST_BYTES:  # so is NaN
        raise RunFileError(
            f"--max-size is a size such as 500MB, 20GB or 1.5GiB; found {text!r}. Give a number and one of the units "
            "B, kB, MB, GB, TB, KiB, MiB, GiB, TiB."
        )
    return int(num_bytes)


def _description(facts: "StoreFacts") -> str:
    damage = f"{facts.num_damaged} file(s) damaged: see `holdfast store verify`" if facts.num_damaged else ""
    return "; ".join(filter(None, (facts.description, damage)))


def _is_done(step: "CleanupStep") -> bool:
    """Does a step of a clean-up and says what stays, or why it is not done. The other steps do not depend on it."""
    from holdfast.store.maintenance import carry_out

    try:
        for path in carry_out(step):
            _print(f"stays, since it is not the store's: {path}")
    except (OSError, ValueError) as error:
        reason = (isinstance(error, OSError) and error.strerror) or error
        typer.echo(printable(f"error: {step.action}: {step.path}: not done: {reason}"), err=True)
        return False
    return True


def _summary(report: "TransferReport") -> str:
    name = f"{report.key.digest()[:12]} ({report.key.description or 'without a description'})"
    return f"{name}: {report.num_completions:,} completions, {report.num_tokens:,} tokens"


def _ago(seconds: float) -> str:
    for size, unit in ((86_400, "day"), (3_600, "hour"), (60, "minute")):
        if seconds >= size:
            count = int(seconds // size)
            return f"{count} {unit}{'s' if count > 1 else ''} ago"
    return "now"


def _folder(root: Path | None) -> Path:
    from holdfast.store.store import default_root

    folder = default_root() if root is None else root.expanduser()
    if folder.exists() and not folder.is_dir():
        raise RunFileError(f"the stores were to be in {str(folder)!r}, which is no folder. Give their folder (--root).")
    return folder


def _print(text: str) -> None:
    typer.echo(printable(text))


def _output() -> Console:
    return Console()
