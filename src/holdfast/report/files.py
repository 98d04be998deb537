"""The files of a report, written whole or not at all."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import final

from holdfast.report.numbers_file import report_json
from holdfast.report.page import report_page
from holdfast.report.run import Run, read_run
from holdfast.store.files import write_durably

NAME = "report"


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Files:
    """Where the parts of a report go; None for a part that is not written."""

    html: Path | None = None
    png: Path | None = None
    json: Path | None = None

    @classmethod
    def all_in(cls, folder: Path) -> "Files":
        """`report.html`, `report.png` and `report.json` in a folder."""
        return cls(html=folder / f"{NAME}.html", png=folder / f"{NAME}.png", json=folder / f"{NAME}.json")

    def paths(self) -> list[Path]:
        """The files that are written."""
        return [path for path in (self.html, self.png, self.json) if path is not None]


def write_report(runs: Sequence[Run], files: Files) -> None:
    """Writes the report of these runs. OSError where a file cannot be written."""
    if files.html is not None:
        write_page(runs, files.html)
    if files.json is not None:
        write_durably(files.json, report_json(runs).encode())
    if files.png is not None:
        from holdfast.report.picture import report_png

        write_durably(files.png, report_png(runs))


def write_page(runs: Sequence[Run], path: Path, refresh_seconds: int | None = None) -> None:
    """Writes the page alone; with `refresh_seconds`, one that a browser loads again so often."""
    write_durably(path, report_page(runs, refresh_seconds).encode())


def write_own_report(folder: Path) -> Files:
    """Writes the report of the run in `folder` into that folder. ValueError where there is none."""
    files = Files.all_in(folder)
    write_report((read_run(folder),), files)
    return files
