"""For all tests of the store: no wait for the disk, and a folder with three stores."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from holdfast.store.key import StoreKey
from stores import filled, tree, used, values


@pytest.fixture(autouse=True, scope="module")
def _quick() -> Iterator[None]:
    """Nothing here outlives the machine, so nothing waits for the disk."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(os, "fsync", lambda descriptor: None)
        yield


@pytest.fixture
def three(tmp_path) -> tuple[Path, list[StoreKey], list[int]]:
    """Three stores of one shard each, last used 1, 10 and 100 days ago, and the sizes of their folders."""
    keys = [
        StoreKey(weights_digest=name, config_digest="c", numerics={}, description=f"policy {name}") for name in "abc"
    ]
    for key, num, days in zip(keys, (3, 30, 300), (1, 10, 100), strict=True):
        filled(tmp_path, values(num), key=key, num_per_shard=1_000)
        used(tmp_path, key, days)
    return tmp_path, keys, [sum(map(len, tree(tmp_path / key.digest()).values())) for key in keys]
