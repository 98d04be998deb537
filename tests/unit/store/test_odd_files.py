"""Whatever a file of a store is (cut, a folder, a pipe, unreadable), the commands and runs go on with the rest."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from holdfast.cli import store as store_cli
from holdfast.store import work_sharing as claims
from holdfast.store.files import CLAIM
from holdfast.store.maintenance import verify
from holdfast.store.manifest import MANIFEST
from holdfast.store.shard import shard_paths
from holdfast.store.store import LAST_USED, LogpStore
from holdfast.store.work_sharing import claimed_blocks
from stores import KEY, ODD, OTHER, Values, exported, filled, in_shard, odd, same, values

CONTENT, OTHERS = values(30), values(12, 1)
FILES = ("manifest", "shard", "last-used", "claim", "partial", "corrupt")
NEVER_DAMAGE = ("last-used", "claim", "partial", "corrupt")
"""What is wrong with these costs nobody a number."""


@pytest.fixture
def place(tmp_path: Path) -> tuple[Path, dict[str, Path], Values]:
    """Two stores, an exported one, and the files of the first by name; what its first shard does not hold."""
    folder = filled(tmp_path / "root", CONTENT).folder
    filled(tmp_path / "root", OTHERS, key=OTHER)
    exported(tmp_path, values(5, 2))
    shard, left = shard_paths(folder)[0], "0" * 32
    files = {
        "manifest": folder / MANIFEST,
        "shard": shard,
        "last-used": folder / LAST_USED,
        "claim": folder / f"{claims._digest(list(CONTENT))}{CLAIM}",
        "partial": folder / f"{left}.partial",
        "corrupt": folder / f"{left}.safetensors.corrupt",
    }
    files["claim"].write_text("1 elsewhere")
    for name in ("partial", "corrupt"):
        files[name].write_bytes(b"1234")
    held = in_shard(shard)
    return tmp_path, files, {key: value for key, value in CONTENT.items() if key not in held}


def invoke(*arguments: object) -> Any:
    result = CliRunner().invoke(store_cli.app, [str(argument) for argument in arguments], env={"COLUMNS": "300"})
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    assert "Traceback" not in result.output
    return result


def are_others_whole(root: Path) -> bool:
    return same(LogpStore.open(root, OTHER).get(OTHERS), OTHERS)


@pytest.mark.covering(1)
@pytest.mark.parametrize("kind", ODD)
@pytest.mark.parametrize("name", FILES)
def test_commands_go_on(place: Any, name: str, kind: str) -> None:
    """`list` says what is damaged, `verify` as well with exit code 1, `gc` and `import` do their work, and `export`
    refuses the damaged store alone."""
    folder, files, rest = place
    root = folder / "root"
    for path in files.values():
        os.utime(path, (0, 0))  # so `gc` looks at what was left behind
    with odd(files[name], kind):
        is_damaged = name not in NEVER_DAMAGE and (name, kind) != ("shard", "missing")
        result = invoke("list", "--root", root)
        assert result.exit_code == 0
        assert "2 store(s) in" in result.output
        assert "another policy" in result.output
        # a list reads headers alone
        is_seen = is_damaged and not (name == "shard" and kind == "flipped")
        assert ("damaged" in result.output or "missing" in result.output) == is_seen

        result = invoke("verify", "--root", root)
        assert result.exit_code == int(is_damaged)
        assert result.output.count(f"damaged: {files[name]}: ") == int(is_damaged)
        assert invoke("verify", OTHER.digest(), "--root", root).exit_code == 0

        result = invoke("export", KEY.digest(), folder / "new.parquet", "--root", root)
        assert result.exit_code == int(is_damaged)
        assert not is_damaged or "not all of it can be read" in result.stderr
        assert invoke("export", OTHER.digest(), folder / "new.parquet", "--root", root).exit_code == 0

        result = invoke("gc", "--yes", "--root", root)
        assert result.exit_code == 0
        assert len(shard_paths(root / OTHER.digest())) == 1
        assert "merge shards" in result.output
        if kind == "folder":
            assert (files[name] / "thesis.tex").exists()

        assert invoke("import", folder / "out.parquet", "--root", root).exit_code == 0
        opened = LogpStore.open(root, KEY)
        assert same(opened.get(values(5, 2)), values(5, 2))
        assert opened.get(rest).keys() == rest.keys()
        assert same(opened.get(CONTENT), {key: CONTENT[key] for key in opened.get(CONTENT)})
        assert are_others_whole(root)


@pytest.mark.covering(1)
@pytest.mark.parametrize("kind", ODD)
@pytest.mark.parametrize("name", FILES)
def test_a_run_goes_on(place: Any, name: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is missing is computed again, in a block that somebody else seems to do, and nothing is damaged then."""
    folder, files, rest = place
    root = folder / "root"
    monkeypatch.setattr(claims, "PATIENCE_SECONDS", 0.05)
    with odd(files[name], kind):
        computed: Values = {}
        with LogpStore.open(root, KEY) as opened:
            assert opened.get(rest).keys() == rest.keys()
            for block in claimed_blocks(opened, list(CONTENT), len(CONTENT)):
                computed |= {key: CONTENT[key] for key in block}
                opened.add({key: CONTENT[key] for key in block})
        assert computed.keys() == (CONTENT.keys() - rest.keys() if name == "shard" else set())
        assert same(opened.get(CONTENT), CONTENT)
        assert same(LogpStore.open(root, KEY).get(CONTENT), CONTENT)
    assert verify(root) == []
    assert are_others_whole(root)


@pytest.mark.covering(1)
@pytest.mark.parametrize("kind", ODD)
@pytest.mark.parametrize("command", ["import", "import --key"])
def test_a_file_to_import_that_is_none(place: Any, command: str, kind: str) -> None:
    folder, _, _ = place
    file = folder / "out.parquet"
    with odd(file, kind):
        result = invoke(*command.split(), *([KEY.digest()] if "--key" in command else []), file, "--root", folder / "n")
    assert result.exit_code == 1
    assert f"error: the exported store {file} was to be read" in result.stderr
    assert not (folder / "n").exists()


def test_a_completion_that_was_left_in_place_is_found_once_it_is_written_again(tmp_path: Path) -> None:
    """The new shard has the very name of the one that cannot be read."""
    content = {(1, 2): torch.tensor([-1.0])}
    folder = filled(tmp_path, content).folder
    with odd(shard_paths(folder)[0], "unreadable"):
        opened = LogpStore.open(tmp_path, KEY)
        assert opened.missing(content) == [(1, 2)]
    opened.add(content)
    opened.flush()
    assert same(opened.get(content), content)
