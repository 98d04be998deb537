"""Stores for tests: keys, random log-probs, stores filled with them, damage done to their files, and how often a
reference is asked."""

import contextlib
import errno
import os
import random
import shutil
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from holdfast.batch import ContentId
from holdfast.reference import base
from holdfast.reference.scorers import model
from holdfast.store.key import StoreKey
from holdfast.store.parquet import export_store
from holdfast.store.store import LogpStore

KEY = StoreKey(
    weights_digest="5a" * 16,
    config_digest="c0" * 16,
    numerics={"dtype": "torch.bfloat16", "autocast": None, "attention": "sdpa", "is_tf32": False},
    description="tiny policy, bf16",
)


OTHER = StoreKey(weights_digest="5b" * 16, config_digest="c0" * 16, numerics=KEY.numerics, description="another policy")


Values = dict[ContentId, Tensor]


def values(num: int, seed: int = 0, *, most: int = 9) -> Values:
    """Random log-probs of so many completions."""
    draw = random.Random(seed)
    generator = torch.Generator().manual_seed(seed)
    ids = [(draw.randrange(-(2**63), 2**63), draw.randrange(-(2**63), 2**63)) for _ in range(num)]
    return {key: -torch.rand(draw.randint(1, most), generator=generator) for key in ids}


def same(found: Mapping[ContentId, Tensor], expected: Mapping[ContentId, Tensor]) -> bool:
    """Whether both hold the same completions, bit for bit."""
    return found.keys() == expected.keys() and all(
        found[key].dtype == torch.float32
        and found[key].numpy().tobytes() == expected[key].numpy().astype(np.float32).tobytes()
        for key in expected
    )


def filled(root: Path, content: Values, *, num_per_shard: int = 10, key: StoreKey = KEY) -> LogpStore:
    """A store with that content, in shards of so many completions."""
    with LogpStore.open(root, key) as opened:
        items = list(content.items())
        for begin in range(0, len(items), num_per_shard):
            opened.add(dict(items[begin : begin + num_per_shard]))
            opened.flush()
    return opened


def tree(folder: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def in_shard(path: Path) -> list[ContentId]:
    """The content ids in a shard, by another reader."""
    return [(high, low) for high, low in load_file(path)["content"].tolist()]


def damaged(path: Path, draw: random.Random) -> None:
    """Flips a bit of a file, or cuts it off."""
    data = bytearray(path.read_bytes())
    place = draw.randrange(len(data))
    if draw.random() < 0.5:
        data[place] ^= 1 << draw.randrange(8)
    else:
        del data[place:]
    path.write_bytes(data)


def newer(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Writes shards or manifests as a newer version of the package would."""
    monkeypatch.setattr(f"holdfast.store.{name}.FORMAT", 2)


def failing(number: int):
    """A function of the operating system that fails."""

    def fail(*arguments: Any, **options: Any) -> Any:
        raise OSError(number, os.strerror(number))

    return fail


@contextlib.contextmanager
def read_only() -> Iterator[None]:
    """All calls that change a file system fail as on one that is mounted read-only, which holds for every user."""
    original = os.open

    def opened(path: Any, flags: int, *arguments: Any, **options: Any) -> int:
        if flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            failing(errno.EROFS)()
        return original(path, flags, *arguments, **options)

    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(os, "open", opened)
        for name in ("mkdir", "replace", "rename", "unlink", "rmdir", "utime"):
            monkeypatch.setattr(os, name, failing(errno.EROFS))
        yield


def used(root: Path, key: StoreKey, days_ago: float) -> None:
    """Marks a store as last used so long ago."""
    moment = time.time() - days_ago * 86_400
    for path in (root / key.digest()).iterdir():
        os.utime(path, (moment, moment))


def exported(folder: Path, content: Values, **options: Any) -> Path:
    """An exported store with that content."""
    export_store(filled(folder / "store", content, **options).folder, folder / "out.parquet")
    return folder / "out.parquet"


# --- what may be under a file's name ----------------------------------------------------------------------------------


def _gone(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink(missing_ok=True)


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _flipped(path: Path) -> None:
    data = bytearray(path.read_bytes() or b"0")
    data[len(data) // 2] ^= 4
    path.write_bytes(data)


def _folder(path: Path) -> None:
    _gone(path)
    path.mkdir()
    (path / "thesis.tex").write_text("of somebody")


def _pipe(path: Path) -> None:
    _gone(path)
    os.mkfifo(path)


def _socket(path: Path) -> None:
    _gone(path)
    where = os.getcwd()
    os.chdir(path.parent)  # the path of a socket is short
    try:
        with socket.socket(socket.AF_UNIX) as made:
            made.bind(path.name)
    finally:
        os.chdir(where)


def _link(path: Path, target: Path | str) -> None:
    _gone(path)
    path.symlink_to(target)


ODD: dict[str, Callable[[Path], object]] = {
    "missing": _gone,
    "empty": lambda path: path.write_bytes(b""),
    "cut": _cut,
    "flipped": _flipped,
    "longer": lambda path: path.write_bytes(path.read_bytes() + b"!"),
    "folder": _folder,
    "pipe": _pipe,
    "socket": _socket,
    "device": lambda path: _link(path, "/dev/zero"),
    "link to nothing": lambda path: _link(path, "nowhere"),
    "link to itself": lambda path: _link(path, path.name),
    "unreadable": lambda path: None,
}
"""Ways in which a file is not what it should be. `odd` makes it so."""


@contextlib.contextmanager
def odd(path: Path, kind: str) -> Iterator[None]:
    """Inside, the file at `path` is of this kind of `ODD`. A file that cannot be read is so for every user; another in
    its place can be."""
    ODD[kind](path)
    original, forbidden = os.open, path.stat().st_ino if kind == "unreadable" else None

    def opened(name: Any, flags: int, *arguments: Any, **options: Any) -> int:
        is_same = Path(name) == path and path.exists() and path.stat().st_ino == forbidden
        if is_same and not flags & os.O_WRONLY:
            failing(errno.EACCES)()
        return original(name, flags, *arguments, **options)

    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(os, "open", opened)
        yield


class Counting:
    """Counts the sequences that references are asked about, by the way of `frozen_logps`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.scored = 0
        for module in (base, model):
            plain = module.frozen_logps

            def counted(policy: Any, batch: Any, autocast: Any, plain: Any = plain) -> Any:
                self.scored += batch.num_sequences
                return plain(policy, batch, autocast)

            monkeypatch.setattr(module, "frozen_logps", counted)

    def during(self, make: Any) -> int:
        before = self.scored
        make()
        return self.scored - before
