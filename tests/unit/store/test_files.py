"""Files that cannot be written: a read-only store, a full disk, a missing permission."""

import errno
import os
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import holdfast
from holdfast.store.key import StoreKey
from holdfast.store.maintenance import verify
from holdfast.store.manifest import MANIFEST
from holdfast.store.shard import shard_paths
from holdfast.store.store import LogpStore
from stores import KEY, failing, filled, in_shard, read_only, same, tree, values


def test_a_read_only_store_is_read(tmp_path, caplog):
    content, more = values(20), values(5, 1)
    filled(tmp_path, content)
    before = tree(tmp_path)
    with read_only():
        opened = LogpStore.open(tmp_path, KEY)
        assert same(opened.get(content), content)
        with opened:
            opened.add(content)
        with pytest.raises(
            ValueError,
            match=r"were to be written to the log-prob store .*cannot be written to \(Read-only file system\); it can "
            r"be read, and holds 20 completions\. Change the folder's permissions, or choose another",
        ):
            opened.add(more)
        with pytest.raises(ValueError, match="cannot be written to"):
            opened.check_writable()
        assert opened.num_completions == 20
    assert tree(tmp_path) == before
    assert caplog.records == []
    opened.add(more)  # mounted otherwise in the meantime
    opened.flush()
    assert same(LogpStore.open(tmp_path, KEY).get([*content, *more]), content | more)


def test_damage_in_a_read_only_store_is_skipped(tmp_path, caplog):
    content = values(20)
    folder = filled(tmp_path, content).folder
    path = shard_paths(folder)[0]
    held = in_shard(path)
    for file in (path, folder / MANIFEST):
        file.write_bytes(file.read_bytes()[:-3])
    with read_only():
        opened = LogpStore.open(tmp_path, KEY)
        assert sorted(opened.missing(content)) == sorted(held)
        opened.refresh()
    assert [record.getMessage().count("left in place") for record in caplog.records] == [1, 1]  # manifest, shard
    assert path.exists()


def test_a_file_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    """Else a power cut could leave a name without its bytes."""
    opened = filled(tmp_path, values(5))
    opened.add(values(5, 1))
    calls: list[str] = []

    def noted(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def called(*arguments: Any, **options: Any) -> Any:
            calls.append(f"{name} {Path(arguments[0]).suffix or 'folder'}" if name == "open" else name)
            return original(*arguments, **options)

        return called

    for name in ("open", "write", "fsync", "replace"):
        monkeypatch.setattr(os, name, noted(name, getattr(os, name)))
    opened.flush()
    assert calls[:6] == ["open .partial", "write", "fsync", "replace", "open folder", "fsync"]


def test_a_folder_without_permission_is_read(tmp_path):
    content = values(20)
    folder = filled(tmp_path, content).folder
    folder.chmod(0o500)
    if os.access(folder, os.W_OK):
        pytest.skip("permissions do not hold for this user")
    try:
        opened = LogpStore.open(tmp_path, KEY)
        assert same(opened.get(content), content)
        with pytest.raises(ValueError, match=r"cannot be written to \(Permission denied\)"):
            opened.add(values(1, 1))
    finally:
        folder.chmod(0o700)


def test_a_root_that_is_a_file(tmp_path):
    (tmp_path / "file").touch()
    opened = LogpStore.open(tmp_path / "file", KEY)
    assert opened.missing([(0, 0)]) == [(0, 0)]
    with pytest.raises(ValueError, match="cannot be written to"):
        opened.add({(0, 0): torch.zeros(1)})


@pytest.mark.parametrize("call", ["write", "fsync", "replace"])
def test_a_full_disk_keeps_what_is_written_and_what_is_not(tmp_path, monkeypatch, call):
    first, second = values(20, 1), values(5, 2)
    opened = filled(tmp_path, first)
    before = tree(tmp_path)
    opened.add(second)
    with monkeypatch.context() as context:
        context.setattr(os, call, failing(errno.ENOSPC))
        with pytest.raises(
            ValueError,
            match=r"5 completions \([\d,]+ bytes\) were to be written to the log-prob store .*no room for them: No "
            r"space left on device, [\d,]+ bytes are free\. The 20 completions in finished shards are kept "
            r"\([\d,]+ bytes\)\. Free some space",
        ):
            opened.flush()
    assert tree(tmp_path) == before
    opened.flush()
    assert same(LogpStore.open(tmp_path, KEY).get([*first, *second]), first | second)


FULL = """
import resource, signal, sys, torch
from holdfast.store.key import StoreKey
from holdfast.store.store import LogpStore
resource.setrlimit(resource.RLIMIT_FSIZE, (4000, 4000))
store = LogpStore.open(sys.argv[1], StoreKey(weights_digest="w", config_digest="c", numerics={}))
store.add({(0, number): torch.zeros(10) for number in range(20)})
store.flush()
store.add({(1, number): torch.zeros(10) for number in range(200)})
try:
    store.flush()
except ValueError as error:
    print(error)
"""


@pytest.mark.skipif(not hasattr(resource, "RLIMIT_FSIZE"), reason="no such limit here")
def test_a_file_that_grows_too_large_is_not_left_behind(tmp_path):
    """A shard of 200 completions is larger than the 4,000 bytes that the operating system allows, one of 20 is not."""
    environment = os.environ | {"PYTHONPATH": str(Path(holdfast.__file__).parent.parent)}
    done = subprocess.run(
        [sys.executable, "-c", FULL, str(tmp_path)], capture_output=True, text=True, check=True, env=environment
    )
    assert "200 completions (11,200 bytes) were to be written" in done.stdout
    assert "no room for them: File too large" in done.stdout
    assert "The 20 completions in finished shards are kept" in done.stdout
    (folder,) = tmp_path.iterdir()
    assert sorted(path.suffix for path in folder.iterdir()) == ["", ".json", ".safetensors"]
    opened = LogpStore.open(tmp_path, StoreKey(weights_digest="w", config_digest="c", numerics={}))
    assert opened.num_completions == 20
    assert verify(tmp_path) == []


def test_a_shard_that_is_read_back_otherwise_is_an_error(tmp_path, monkeypatch):
    def written(descriptor: int, data: memoryview) -> int:
        return original(descriptor, bytes(len(data)))

    opened, original = filled(tmp_path, values(5)), os.write
    opened.add(values(5, 1))
    monkeypatch.setattr(os, "write", written)
    with pytest.raises(ValueError, match=r"cannot be written to \(read back, its bytes have the digest"):
        opened.flush()
    monkeypatch.undo()
    opened.flush()
    assert same(LogpStore.open(tmp_path, KEY).get(values(5, 1)), values(5, 1))
