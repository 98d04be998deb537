"""Shards: every damage is found, and nothing of a damaged shard is used."""

import logging
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from holdfast.store import shard as shards
from holdfast.store.maintenance import cleanup_steps, stores, verify
from holdfast.store.manifest import MANIFEST, Manifest
from holdfast.store.shard import Shard, shard_paths
from holdfast.store.store import LAST_USED, LogpStore
from stores import KEY, OTHER, damaged, filled, in_shard, same, values


def test_a_shard_that_goes_while_it_is_opened_is_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another process has merged it: its bytes were read, and its arrays cannot be. Any other failure stays one."""
    path = shards.write_shard(
        tmp_path, "key", np.zeros((1, 2), np.int64), np.ones(1, np.int64), np.zeros(1, np.float32)
    )

    def failing(path: Path) -> dict[str, Tensor]:
        raise RuntimeError(f"unable to open file <{path}> in read-only mode")

    monkeypatch.setattr(shards, "load_file", failing)
    with pytest.raises(RuntimeError, match="unable to open"):
        shards.open_shard(path, "key")
    monkeypatch.setattr(shards, "load_file", lambda path: path.unlink() or failing(path))
    with pytest.raises(FileNotFoundError, match="went while it was opened"):
        shards.open_shard(path, "key")


def test_every_flipped_bit_and_every_truncation_is_found_and_nothing_of_it_used(tmp_path, caplog):
    content = values(24, most=4)
    filled(tmp_path / "sound", content, num_per_shard=6)
    draw = random.Random(4)
    names = sorted(path.name for path in (tmp_path / "sound" / KEY.digest()).iterdir() if path.name != LAST_USED)
    assert len(names) == 5
    for trial in range(200):
        root = tmp_path / f"{trial}"
        shutil.copytree(tmp_path / "sound", root)
        path = root / KEY.digest() / names[trial % len(names)]
        held = [] if path.name == MANIFEST else in_shard(path)
        damaged(path, draw)
        assert [damage.path for damage in verify(root)] == [path]
        stores(root)
        cleanup_steps(root)

        caplog.clear()
        opened = LogpStore.open(root, KEY)
        assert [record.levelno for record in caplog.records] == [logging.WARNING]
        assert path.name in caplog.text
        assert sorted(opened.missing(content)) == sorted(held)
        assert same(opened.get(content), {key: value for key, value in content.items() if key not in held})
        assert (root / KEY.digest() / f"{path.name}.corrupt").exists()

        with opened:
            opened.add(content)
        assert same(opened.get(content), content)  # of a shard's name that was damaged as well
        caplog.clear()
        assert same(LogpStore.open(root, KEY).get(content), content)
        assert verify(root) == []
        assert caplog.records == []
        shutil.rmtree(root)


def test_one_warning_for_many_damaged_shards(tmp_path, caplog):
    folder = filled(tmp_path, values(50)).folder
    for path in shard_paths(folder)[:4]:
        path.write_bytes(path.read_bytes()[:-1])
    assert LogpStore.open(tmp_path, KEY).num_completions == 10
    assert len(caplog.records) == 1
    assert "4 damaged file(s)" in caplog.text
    assert "computed again" in caplog.text


def test_a_shard_of_another_store_is_not_used(tmp_path, caplog):
    theirs = filled(tmp_path, values(6), key=OTHER).folder
    ours = filled(tmp_path, values(6, 1)).folder
    path = shard_paths(theirs)[0]
    shutil.copy(path, ours)
    assert [damage.reason for damage in verify(tmp_path)] == [f"it belongs to another store, {OTHER.digest()}"]
    opened = LogpStore.open(tmp_path, KEY)
    assert opened.get(values(6)) == {}
    assert "belongs to another store" in caplog.text
    assert path.exists()


@pytest.mark.parametrize(
    "data",
    [b"", b"\x08\0\0\0\0\0\0\0[1, 2,3]", b"\xff" * 40, shards.save({"content": torch.zeros(2, 2)}, {"holdfast": "{}"})],
)
def test_something_else_under_a_digest_s_name_is_damage(tmp_path, data, caplog):
    folder = filled(tmp_path, values(6)).folder
    path = folder / "wrong"
    path.write_bytes(data)
    path = path.rename(folder / f"{shards.file_digest(path)}.safetensors")
    assert [damage.path for damage in verify(tmp_path)] == [path]
    stores(tmp_path)
    assert LogpStore.open(tmp_path, KEY).num_completions == 6
    assert len(caplog.records) == 1


def test_arrays_that_do_not_fit_are_damage(tmp_path):
    folder = filled(tmp_path, values(6)).folder
    path = shards.write_shard(folder, KEY.digest(), np.zeros((2, 2), np.int64), np.array([3, -1]), np.zeros(2, "f4"))
    assert [(damage.path, damage.reason) for damage in verify(tmp_path)] == [(path, "its arrays do not fit each other")]


def test_a_shard_is_a_record():
    shard = Shard(
        name="x", content=np.zeros((3, 2), np.int64), lengths=np.array([2, 0, 3]), logps=np.zeros(5, "f4"), num_bytes=1
    )
    assert shard.starts().tolist() == [0, 2, 2]
    manifest = Manifest.new(KEY)
    assert Manifest.from_bytes(manifest.to_bytes(), Path("x")) == manifest
