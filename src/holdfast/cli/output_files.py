"""Files that an option names to be written: refused before anything is loaded where they could not be."""

import os
from collections.abc import Mapping
from pathlib import Path


def check_files(files: Mapping[str, Path | None]) -> None:
    """ValueError where a file could not be written, before anything is loaded."""
    for name, path in files.items():
        if path is None:
            continue
        folder = path.parent
        if path.is_dir() or not folder.is_dir() or not os.access(folder, os.W_OK):
            found = (
                "which is a folder" if path.is_dir()
                else f"and there is no folder {str(folder)!r}" if not folder.is_dir()
                else "whose folder cannot be written to"
            )  # fmt: skip
            raise ValueError(
                f"--{name} is to be {str(path)!r}, {found}. Name a file in a folder that you can write to."
            )
