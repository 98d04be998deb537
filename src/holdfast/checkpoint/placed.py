"""Files that are written elsewhere first and get their place in a folder only when all of them are whole.

The final model, the logged numbers, the card and the run file are written into a folder of random name in
`<folder>/_saving`, flushed to the disk and moved. So a full disk or a kill leaves no file that is half written, and
what was there before stays as it was until the new files are complete. The next run removes what a killed one left
there. The cost is room on the disk for both. Files are moved one by one, what makes a model loadable last.
"""

import contextlib
import errno
import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePath

from holdfast.checkpoint.disk_error import writing
from holdfast.checkpoint.files import flush
from holdfast.reference.run_folder import RunFolder, remove_left_over

SAVING = "_saving"
"""The folder, inside the one that is written to, in which files are until they are complete."""

_WEIGHTS = re.compile(r"model(?:-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?")


@contextmanager
def placed(folder: Path, content: str, way_on: Callable[[], str]) -> Iterator[Path]:
    """A temporary folder in `folder`. When the context ends without an error, its files are moved into `folder`.

    ValueError where the disk is full or cannot be written to: see `disk_error.writing`, which takes `content` and
    `way_on`. Whatever the error, nothing is moved and the temporary folder is removed.
    """
    staged = RunFolder(folder / SAVING)
    try:
        with writing(content, folder, way_on):
            yield staged.path()
            move_into(staged.path(), folder)
    finally:
        staged.remove()


def write_text(path: Path, text: str, way_on: Callable[[], str]) -> None:
    """Writes a file that is whole or not there; ValueError where it cannot be written."""
    with placed(path.parent, path.name, way_on) as staged:
        (staged / path.name).write_text(text, encoding="utf-8")


def remove_what_a_kill_left(folder: Path) -> None:
    """Removes what killed runs were about to move into `folder`."""
    remove_left_over(folder / SAVING)


def keep_copy(file: Path, staged: Path) -> None:
    """Copies a file that is there already into the temporary folder, for what changes it instead of writing it anew."""
    if file.is_file():
        shutil.copyfile(file, staged / file.name)


def is_json_mapping(file: Path) -> bool:
    """Whether the file is there and holds a JSON object."""
    try:
        return isinstance(json.loads(file.read_bytes()), dict)
    except (OSError, ValueError, RecursionError):
        return False


def move_into(staged: Path, folder: Path) -> None:
    """Moves all files of `staged` to the same places in `folder`.

    In each folder the weights come after the other files, and the index of sharded weights comes last. Weights that
    are no part of the new ones are deleted: an older index before the new shards are moved, others once the new ones
    are complete. So whenever the move ends, no mixture of two models is taken for one.
    """
    names = sorted((path.relative_to(staged) for path in staged.rglob("*") if path.is_file()), key=_turn)
    for name in names:
        if (folder / name).is_dir():
            raise IsADirectoryError(errno.EISDIR, f"{name} is a folder there")
        flush(staged / name)
    indices = {name for name in names if name.suffix == ".json" and _WEIGHTS.fullmatch(name.name)}
    for name in indices:
        (folder / name).unlink(missing_ok=True)
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        os.replace(staged / name, folder / name)
    for parent in {name.parent for name in names}:
        _remove_older_weights(folder / parent, {name.name for name in names if name.parent == parent})
        flush(folder / parent)


def remove_cut_copies(of: Path, folder: Path) -> None:
    """Removes from `folder` the weights that are shorter than the files of the same name in `of`."""
    for path in of.iterdir():
        copy = folder / path.name
        is_weights = _WEIGHTS.fullmatch(path.name.removeprefix("adapter_"))
        if is_weights and copy.is_file() and copy.stat().st_size < path.stat().st_size:
            with contextlib.suppress(OSError):
                copy.unlink()


def _turn(name: PurePath) -> tuple[int, str]:
    """When a file is moved: weights after all others, an index last."""
    match = _WEIGHTS.fullmatch(name.name)
    return (0 if match is None else 2 if match[1] else 1), str(name)


def _remove_older_weights(folder: Path, new: Iterable[str]) -> None:
    """Removes the weights in `folder` beside the `new` ones, an index before its shards."""
    names = set(new)
    if not any(_WEIGHTS.fullmatch(name) for name in names):
        return
    older = [path.name for path in folder.iterdir() if _WEIGHTS.fullmatch(path.name) and path.name not in names]
    for name in sorted(older, key=lambda name: _turn(PurePath(name)), reverse=True):
        (folder / name).unlink(missing_ok=True)
