"""Whose shards are used: in a folder that a group or everybody can write to, this user's, root's and those of the owner
of the folder of stores, and others' where they are named."""

import os
import pwd
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from holdfast.cli import store as store_cli
from holdfast.store import trust
from holdfast.store.maintenance import merge, verify
from holdfast.store.manifest import MANIFEST
from holdfast.store.shard import shard_paths
from holdfast.store.store import LAST_USED, LogpStore
from stores import KEY, filled, in_shard, same, values

CONTENT = values(40)
ME, ADMIN, MATE = 501, 7, 502


@pytest.fixture
def owners(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Who owns what, by name; all else is this user's."""
    owners: dict[int, int] = {}

    class Owners(dict[str, Any]):
        def __setitem__(self, path: Any, user: int) -> None:
            owners[Path(path).stat().st_ino] = user

    monkeypatch.setattr(trust, "_owner", lambda status: owners.get(status.st_ino, ME))
    monkeypatch.setattr(trust, "_this_user", lambda: ME)
    monkeypatch.delenv("HOLDFAST_STORE_TRUST", raising=False)
    return Owners()


@pytest.fixture
def shared(tmp_path: Path, owners: dict[Any, int]) -> tuple[Path, Path, Any]:
    """A folder of stores, a store in it, and the store's first shard, which is another user's."""
    root = tmp_path / "root"
    folder = filled(root, CONTENT).folder
    shard = shard_paths(folder)[0]
    owners[shard] = MATE
    root.chmod(0o755)
    folder.chmod(0o755)
    return root, folder, shard


def num_used(root: Path) -> int:
    opened = LogpStore.open(root, KEY)
    assert same(opened.get(CONTENT), {key: CONTENT[key] for key in opened.get(CONTENT)})
    return opened.num_completions


@pytest.mark.parametrize(
    ("root_mode", "folder_mode", "root_owner", "folder_owner", "owner", "is_used"),
    [
        (0o755, 0o755, ME, ME, MATE, True),  # only one user can have put it there
        (0o755, 0o755, MATE, MATE, MATE, True),  # whom the reader chose
        (0o700, 0o700, ADMIN, MATE, MATE, True),
        (0o775, 0o755, ME, ME, MATE, False),
        (0o777, 0o755, ME, ME, MATE, False),
        (0o1777, 0o755, ME, ME, MATE, False),
        (0o755, 0o775, ME, ME, MATE, False),
        (0o755, 0o757, ME, ME, MATE, False),
        (0o755, 0o1777, ME, ME, MATE, False),
        (0o777, 0o777, ME, ME, ME, True),
        (0o777, 0o777, ME, ME, 0, True),
        (0o777, 0o777, MATE, ME, MATE, True),  # the owner of the folder of stores
        (0o777, 0o777, ADMIN, ME, MATE, False),
        (0o1777, 0o755, 0, MATE, MATE, False),  # a store that a stranger began where everybody can
        (0o755, 0o777, ADMIN, MATE, MATE, True),  # a store that only that owner can have given him
        (0o2775, 0o2775, ADMIN, ADMIN, MATE, False),
        (0o2775, 0o2775, ADMIN, ADMIN, ADMIN, True),
    ],
)
def test_whose_shards_are_used(
    shared: Any, owners: Any, root_mode: int, folder_mode: int, root_owner: int, folder_owner: int, owner: int,
    is_used: bool,
) -> None:  # fmt: skip
    root, folder, shard = shared
    for path, mode, user in ((root, root_mode, root_owner), (folder, folder_mode, folder_owner)):
        path.chmod(mode)
        owners[path] = user
    owners[shard] = owner
    assert num_used(root) == (40 if is_used else 30)
    assert len(verify(root)) == int(not is_used)


@pytest.mark.parametrize(
    ("named", "is_used"),
    [("", False), ("all", True), (str(MATE), True), (f" 7, {MATE},", True), ("7", False), ("root", False)],
)
def test_others_are_used_where_they_are_named(
    shared: Any, monkeypatch: pytest.MonkeyPatch, named: str, is_used: bool
) -> None:
    root, _, _ = shared
    root.chmod(0o777)
    monkeypatch.setenv("HOLDFAST_STORE_TRUST", named)
    assert num_used(root) == (40 if is_used else 30)


def test_a_user_by_name(shared: Any, owners: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    root, _, shared_shard = shared
    root.chmod(0o777)
    nobody = pwd.getpwall()[-1]
    owners[shared_shard] = nobody.pw_uid
    monkeypatch.setenv("HOLDFAST_STORE_TRUST", nobody.pw_name)
    assert num_used(root) == 40


@pytest.mark.parametrize("named", ["no one here", "-1", "1e3", "\x1b[1m", "9" * 40, "*"])
def test_who_is_no_user(shared: Any, monkeypatch: pytest.MonkeyPatch, named: str) -> None:
    root, _, _ = shared
    monkeypatch.setenv("HOLDFAST_STORE_TRUST", named)
    with pytest.raises(
        ValueError, match=r"HOLDFAST_STORE_TRUST names users .*; found .*, who is no user here\. Correct"
    ):
        LogpStore.open(root, KEY)


def test_what_is_not_used_stays_and_is_said(shared: Any, caplog: pytest.LogCaptureFixture) -> None:
    """It is neither set aside, nor merged into this user's shard, nor exported; it is computed again."""
    root, folder, shard = shared
    root.chmod(0o777)
    held = in_shard(shard)
    opened = LogpStore.open(root, KEY)
    assert sorted(opened.missing(CONTENT)) == sorted(held)
    (record,) = caplog.records
    assert "1 file(s) of the log-prob store" in record.getMessage()
    assert f"it is user {MATE}'s, in a folder that others than its owner can write to; HOLDFAST_STORE_TRUST={MATE}" in (
        record.getMessage()
    )
    assert "left in place" in record.getMessage()
    opened.refresh()
    assert len(caplog.records) == 1
    assert merge(folder) == 3
    assert shard.exists()
    runner = CliRunner()
    result = runner.invoke(store_cli.app, ["verify", "--root", str(root)])
    assert (result.exit_code, f"{shard}: it is user {MATE}'s" in result.output) == (1, True)
    result = runner.invoke(store_cli.app, ["export", KEY.digest(), str(root / "out"), "--root", str(root)])
    assert (result.exit_code, f"it is user {MATE}'s" in result.stderr) == (1, True)
    with opened:
        opened.add(CONTENT)
    assert same(opened.get(CONTENT), CONTENT)
    assert num_used(root) == 40


def test_what_this_process_wrote_is_used_whoever_it_belongs_to(shared: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file server may give root's files to another user."""
    root, _, _ = shared
    root.chmod(0o777)
    opened = LogpStore.open(root, KEY)
    monkeypatch.setattr(trust, "_owner", lambda status: 65_534)
    more = values(5, 1)
    opened.add(more)
    opened.flush()
    assert same(opened.get(more), more)


def test_a_file_that_is_replaced_while_it_is_checked(shared: Any, owners: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was checked is read, not what has the name by then."""
    root, folder, shard = shared
    root.chmod(0o777)
    owners[shard] = ME
    original = trust.Trust.check

    def check(self: Any, status: os.stat_result) -> None:
        original(self, status)
        if shard.exists() and status.st_ino == shard.stat().st_ino:
            (folder / "new").write_bytes(b"of somebody")
            (folder / "new").replace(shard)

    monkeypatch.setattr(trust.Trust, "check", check)
    assert num_used(root) == 40
    assert shard.read_bytes() == b"of somebody"


def test_only_its_owner_may_change_a_file(tmp_path: Path) -> None:
    """So whoever owns a shard has written it. The date of the last use is changed by whoever uses the store."""
    before = os.umask(0)
    try:
        folder = filled(tmp_path, CONTENT).folder
    finally:
        os.umask(before)
    modes = {path.name: path.stat().st_mode & 0o777 for path in folder.iterdir()}
    assert {modes[path.name] for path in shard_paths(folder)} | {modes[MANIFEST]} == {0o644}
    assert modes[LAST_USED] == 0o666
