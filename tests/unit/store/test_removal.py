"""What a clean-up removes: folders that are proved to be stores, and in them the store's own files alone."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from holdfast.store.files import DROPPED
from holdfast.store.key import StoreKey
from holdfast.store.maintenance import carry_out, cleanup_steps, stores
from holdfast.store.manifest import MANIFEST
from holdfast.store.removal import is_store, remove_store
from holdfast.store.shard import shard_paths
from holdfast.store.store import LAST_USED, LogpStore
from stores import KEY, OTHER, failing, filled, newer, same, tree, values

CONTENT = values(6)
DIGITS = "0123456789abcdef0123456789abcdef"


def store(root: Path, key: StoreKey = KEY) -> Path:
    return filled(root, CONTENT, key=key).folder


def clean_up(root: Path) -> list[Path]:
    """Removes all that a clean-up may remove, and returns what it says stays."""
    steps = cleanup_steps(root, older_than=0, max_bytes=0)
    return [path for step in steps for path in carry_out(step)]


def _of_others(folder: Path, *names: str) -> None:
    folder.mkdir(parents=True)
    for name in names or ("thesis.tex",):
        (folder / name).write_text("of somebody")


def _without(root: Path, name: str) -> Path:
    (folder := store(root)).joinpath(name).unlink()
    return folder


NO_STORES: dict[str, Callable[[Path], object]] = {
    "32 digits": lambda root: _of_others(root / DIGITS),
    "32 digits, empty": lambda root: (root / DIGITS).mkdir(),
    "32 digits with a manifest of others": lambda root: _of_others(root / DIGITS, "manifest.json"),
    "32 digits with safetensors of others": lambda root: _of_others(root / DIGITS, "model.safetensors"),
    "32 digits with what is called like a shard": lambda root: _of_others(root / DIGITS, f"{DIGITS}.safetensors"),
    "32 digits with what a store has beside shards": lambda root: _of_others(
        root / DIGITS, LAST_USED, f"{DIGITS}.claim"
    ),
    "a file of 32 digits": lambda root: _of_others(root / "x") or (root / DIGITS).write_text("of somebody"),
    "a store under another name": lambda root: store(root).rename(root / "backup"),
    "a store under another store's name": lambda root: store(root).rename(root / DIGITS),
    "shards beside which there is more": lambda root: (_without(root, MANIFEST) / "thesis.tex").write_text("mine"),
    "shards beside which there is a folder": lambda root: (_without(root, MANIFEST) / f"{DIGITS}.claim").mkdir(),
    "shards of another store": lambda root: _without(root, MANIFEST).rename(root / DIGITS),
    "dropped": lambda root: _of_others(root / "holiday.dropped", "photo.jpg"),
    "dropped, empty": lambda root: (root / "holiday.dropped").mkdir(),
    "dropped, with 32 digits": lambda root: _of_others(root / f"{DIGITS}.dropped"),
    "dropped, with 64 digits": lambda root: _of_others(root / f"{DIGITS}.{DIGITS}.dropped"),
    "dropped, a store of another key": lambda root: store(root).rename(root / f"{DIGITS}.{DIGITS}.dropped"),
    "dropped, a file": lambda root: (root / f"{DIGITS}.dropped").write_text("of somebody"),
}
"""What is no store, or not known to be one."""


@pytest.mark.parametrize("kind", NO_STORES)
def test_what_is_no_store_is_not_touched(tmp_path: Path, kind: str) -> None:
    NO_STORES[kind](tmp_path)
    store(tmp_path, OTHER)
    for path in tmp_path.rglob("*"):
        os.utime(path, (0, 0))
    before = {name: data for name, data in tree(tmp_path).items() if OTHER.digest() not in name}
    folders = sorted(path for path in tmp_path.rglob("*") if path.is_dir() and path.name != OTHER.digest())
    assert clean_up(tmp_path) == []
    assert tree(tmp_path) == before
    assert sorted(path for path in tmp_path.rglob("*") if path.is_dir()) == folders
    for path in [*folders, tmp_path / DIGITS, tmp_path]:
        if path.exists():
            with pytest.raises(ValueError, match=r"was to be removed; the folder has no manifest.*Nothing was removed"):
                remove_store(path)
    assert tree(tmp_path) == before


def _dropped(root: Path, name: str = f"{KEY.digest()}.{DIGITS}{DROPPED}") -> Path:
    return store(root).rename(root / name)


STORES: dict[str, Callable[[Path], object]] = {
    "whole": store,
    "without a manifest": lambda root: _without(root, MANIFEST),
    "with a damaged manifest": lambda root: (store(root) / MANIFEST).write_text("{"),
    "without shards": lambda root: [path.unlink() for path in shard_paths(store(root))],
    "with what kills leave behind": lambda root: (store(root) / f"{DIGITS}.partial").write_text(""),
    "with damage set aside": lambda root: (store(root) / f"{DIGITS}.safetensors.corrupt").write_text(""),
    "dropped": _dropped,
    "dropped by an earlier version": lambda root: _dropped(root, f"{DIGITS}{DROPPED}"),
    "dropped, the manifest gone": lambda root: (_dropped(root) / MANIFEST).unlink(),
    "dropped, all gone": lambda root: (root / f"{KEY.digest()}.{DIGITS}{DROPPED}").mkdir(),
}


@pytest.mark.parametrize("kind", STORES)
def test_what_is_a_store_goes(tmp_path: Path, kind: str) -> None:
    STORES[kind](tmp_path)
    assert clean_up(tmp_path) == []
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("by", ["gc", "drop"])
def test_files_of_others_stay_and_so_does_their_folder(
    tmp_path: Path, by: str, caplog: pytest.LogCaptureFixture
) -> None:
    folder = store(tmp_path)
    (folder / "thesis.tex").write_text("mine")
    (folder / "notes").mkdir()
    if by == "gc":
        (step,) = cleanup_steps(tmp_path, older_than=0)
        assert step.reason == "not used for 0 days; what is not the store's stays (2)"
        assert carry_out(step) == [folder / "notes", folder / "thesis.tex"]
    else:
        LogpStore.open(tmp_path, KEY).drop()
        assert f"{folder} stays, with what is not the store's: {folder / 'notes'}, {folder}" in caplog.text
    assert tree(tmp_path) == {f"{folder.name}/thesis.tex": b"mine"}
    assert (folder / "notes").is_dir()
    assert clean_up(tmp_path) == []
    assert tree(tmp_path) == {f"{folder.name}/thesis.tex": b"mine"}
    filled(tmp_path, CONTENT)
    assert same(LogpStore.open(tmp_path, KEY).get(CONTENT), CONTENT)


def test_dropping_leaves_what_is_no_store(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    opened = LogpStore(tmp_path, KEY)
    _of_others(opened.folder)
    opened.drop()
    assert "was to be removed; the folder has no manifest" in caplog.text
    assert tree(tmp_path) == {f"{KEY.digest()}/thesis.tex": b"of somebody"}


def test_no_link_is_followed(tmp_path: Path) -> None:
    """Neither one under a store's name, nor one in a store."""
    elsewhere, root = tmp_path / "elsewhere", tmp_path / "root"
    outside = store(elsewhere)
    before = tree(elsewhere)
    root.mkdir()
    (root / KEY.digest()).symlink_to(outside)
    (root / f"{KEY.digest()}.{DIGITS}{DROPPED}").symlink_to(outside)
    assert [facts.name for facts in stores(root)] == [KEY.digest()]  # it can be read
    assert cleanup_steps(root, older_than=0, max_bytes=0) == []
    with pytest.raises(ValueError, match="was to be removed"):
        remove_store(root / KEY.digest())
    inside = store(root, OTHER)
    (inside / f"{DIGITS}.claim").symlink_to(next(outside.glob("*.safetensors")))
    (inside / "folder").symlink_to(outside)
    assert remove_store(inside) == [inside / "folder"]
    assert tree(elsewhere) == before
    assert [path.name for path in inside.iterdir()] == ["folder"]


def test_a_store_that_becomes_a_link_while_it_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, outside, original = store(tmp_path / "root"), store(tmp_path / "elsewhere"), os.replace
    before = tree(outside)

    def replaced(old: Path, new: Path) -> None:
        original(old, new)
        original(new, tmp_path / "away")
        Path(new).symlink_to(outside)

    monkeypatch.setattr(os, "replace", replaced)
    assert remove_store(folder) == []
    assert tree(outside) == before


def test_a_store_of_a_newer_version_is_not_removed(tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as monkeypatch:
        newer(monkeypatch, "manifest")
        newer(monkeypatch, "shard")
        folder = store(tmp_path)
    assert not is_store(folder)
    assert cleanup_steps(tmp_path, older_than=0) == []


def test_folders_of_others_do_not_count_as_too_large(tmp_path: Path) -> None:
    folder = store(tmp_path)
    _of_others(tmp_path / DIGITS)
    (tmp_path / DIGITS / "large").write_bytes(bytes(100_000))
    (folder / "large").write_bytes(bytes(100_000))
    assert cleanup_steps(tmp_path, max_bytes=10_000) == []


def test_a_store_that_goes_during_a_clean_up_is_passed_over(tmp_path: Path) -> None:
    """The other steps are done."""
    for key in (KEY, OTHER):
        folder = filled(tmp_path, values(30), key=key).folder
        (folder / f"{DIGITS}.safetensors.corrupt").write_text("")
    steps = cleanup_steps(tmp_path)
    assert len(steps) == 4
    shutil.rmtree(tmp_path / KEY.digest())
    assert [carry_out(step) for step in steps] == [[]] * 4
    assert [path.name for path in tmp_path.iterdir()] == [OTHER.digest()]
    assert len(shard_paths(tmp_path / OTHER.digest())) == 1
    assert cleanup_steps(tmp_path) == []
    steps = cleanup_steps(tmp_path, older_than=0)
    shutil.rmtree(tmp_path / OTHER.digest())
    assert [carry_out(step) for step in steps] == [[]]


def test_a_store_that_may_not_be_removed_is_left_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = store(tmp_path)
    before = tree(folder)
    monkeypatch.setattr(os, "replace", failing(13))
    with pytest.raises(PermissionError):
        remove_store(folder)
    assert tree(folder) == before
