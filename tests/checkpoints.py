"""Checkpoints as earlier versions wrote them, and what may happen to a file of one."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

from holdfast.checkpoint.manifest import read_manifest, to_text

NEW_FIELDS = ("files", "checksum", "optimizer")
"""What manifests of earlier versions lack."""


def manifest_of(checkpoint: Path) -> Path:
    """The manifest's file."""
    return checkpoint / "reference" / "manifest.json"


def make_earlier(checkpoint: Path) -> None:
    """Rewrites the manifest as an earlier version would have written it: without digests."""
    path = manifest_of(checkpoint)
    manifest = json.loads(path.read_text())
    path.write_text(json.dumps({name: value for name, value in manifest.items() if name not in NEW_FIELDS}))


def record_again(checkpoint: Path, **changed: object) -> None:
    """Changes fields of the manifest, with the right checksum."""
    manifest = {name: value for name, value in read_manifest(checkpoint).items() if name != "checksum"}
    manifest_of(checkpoint).write_text(to_text(manifest | changed))


def cut(path: Path) -> None:
    """The second half is gone."""
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path: Path, position: int = -3) -> None:
    """One bit is another."""
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(bytes(content))


def put_folder(path: Path) -> None:
    """A folder is there instead."""
    path.unlink()
    path.mkdir()


def put_fifo(path: Path) -> None:
    """A FIFO is there instead, from which nothing ever comes."""
    path.unlink()
    os.mkfifo(path)


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing": (Path.unlink, "is missing"),
    "cut": (cut, r"has \d+ bytes; \d+ were saved"),
    "empty": (lambda path: path.write_bytes(b""), r"has 0 bytes; \d+ were saved"),
    "flipped": (flip, "has another content than was saved"),
    "a folder": (put_folder, "is a folder"),
    "a FIFO": (put_fifo, "is a FIFO"),
    "unreadable": (lambda path: None, r"cannot be read \(Input/output error\)"),
}
"""What may happen to a file, and what the message says of it; the test makes `unreadable` by itself."""


def copied(checkpoint: Path, folder: Path) -> Path:
    """A copy of a checkpoint, under the same name in `folder`."""
    return Path(shutil.copytree(checkpoint, folder / checkpoint.name))
