"""`holdfast store ...`: what the commands print and do."""

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import holdfast
from holdfast.cli import store as store_cli
from holdfast.store.maintenance import stores
from holdfast.store.shard import shard_paths
from holdfast.store.store import LogpStore
from stores import KEY, OTHER, filled, read_only, same, tree, values

runner = CliRunner()


def invoke(*arguments: object) -> Any:
    result = runner.invoke(store_cli.app, [str(argument) for argument in arguments], env={"COLUMNS": "200"})
    assert "Traceback" not in result.output
    return result


def test_list(three, monkeypatch):
    root, keys, sizes = three
    monkeypatch.setenv("HOLDFAST_HOME", str(root.parent))
    result = invoke("list", "--root", root)
    assert result.exit_code == 0
    lines = result.output.splitlines()
    rows = {line.split()[1]: line for line in lines if "policy" in line}
    assert list(rows) == [key.digest()[:12] for key in keys]
    last = rows[keys[2].digest()[:12]]
    num_tokens = sum(map(len, values(300).values()))
    assert [part.strip() for part in re.split("[│┃]", last)[2:-1]] == [
        "policy c", "300", f"{num_tokens:,}", store_cli.human_bytes(sizes[2]), "100 days ago",
    ]  # fmt: skip
    assert lines[-1] == f"3 store(s) in {root}, {store_cli.human_bytes(sum(sizes))}"


def test_list_takes_the_default_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOLDFAST_HOME", str(tmp_path))
    filled(tmp_path / "store", values(3))
    assert invoke("list").output.splitlines()[-1].startswith(f"1 store(s) in {tmp_path / 'store'}, ")


def test_verify_names_what_is_damaged(tmp_path):
    folder = filled(tmp_path, values(20)).folder
    filled(tmp_path, values(20), key=OTHER)
    result = invoke("verify", "--root", tmp_path)
    assert (result.exit_code, result.output) == (0, f"2 store(s) in {tmp_path} verified, no file(s) damaged\n")
    path = shard_paths(folder)[0]
    path.write_bytes(path.read_bytes() + b"!")
    result = invoke("verify", "--root", tmp_path)
    assert result.exit_code == 1
    assert f"damaged: {path}: its bytes have the digest" in result.output
    assert "2 store(s) in" in result.output
    assert "1 file(s) damaged" in result.output
    assert invoke("verify", OTHER.digest()[:10], "--root", tmp_path).exit_code == 0
    assert invoke("verify", KEY.digest()[:10], "--root", tmp_path).exit_code == 1
    result = invoke("verify", "no", "--root", tmp_path)
    assert result.exit_code == 1
    assert "error: the store 'no' in" in result.stderr


def test_gc_says_what_it_would_do_and_does_it_when_told(three):
    root, keys, sizes = three
    before = tree(root)
    result = invoke("gc", "--older-than", 50, "--root", root)
    size = store_cli.human_bytes(sizes[2])
    expected = f"remove store: {root / keys[2].digest()} ({size}): not used for 100 days\n"
    assert result.output == f"{expected}{size} would be freed; nothing was changed. Add --yes to do it.\n"
    assert tree(root) == before
    result = invoke("gc", "--older-than", 50, "--root", root, "--yes")
    assert result.output == f"{expected}{size} freed\n"
    assert len(stores(root)) == 2
    assert invoke("gc", "--older-than", 50, "--root", root, "--yes").output == "nothing to do\n"
    assert "not used for longest" in invoke("gc", "--max-size", "1kB", "--root", root).output
    result = invoke("gc", "--max-size", "1 parsec", "--root", root)
    assert result.exit_code == 1
    assert "error: --max-size is a size such as 500MB" in result.stderr


def test_gc_that_is_not_permitted(three):
    root, _, _ = three
    with read_only():
        result = invoke("gc", "--older-than", 50, "--root", root, "--yes")
    assert result.exit_code == 1
    assert "Read-only file system" in result.stderr


def test_export_and_import_by_command(tmp_path):
    content = values(40)
    filled(tmp_path / "a", content)
    file, name = tmp_path / "out.parquet", KEY.digest()[:12]
    num_tokens = sum(map(len, content.values()))
    summary = f"{name} (tiny policy, bf16): 40 completions, {num_tokens} tokens"
    result = invoke("export", name, file, "--root", tmp_path / "a")
    assert result.output == f"{summary} exported to {file} ({store_cli.human_bytes(file.stat().st_size)})\n"
    result = invoke("import", file, "--root", tmp_path / "b", "--key", name)
    assert result.output == f"{summary} imported, 40 of them new here\n"
    assert same(LogpStore.open(tmp_path / "b", KEY).get(content), content)
    result = invoke("import", file, "--root", tmp_path / "c", "--key", "abc")
    assert result.exit_code == 1
    assert "error: the store abc was to be imported;" in result.stderr
    assert not (tmp_path / "c").exists()


def test_a_traceback_when_asked(tmp_path):
    result = runner.invoke(store_cli.app, ["export", "no", "out", "--root", str(tmp_path), "--debug"])
    assert isinstance(result.exception, ValueError)


@pytest.mark.parametrize(
    ("num_bytes", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1_000, "1.0 kB"),
        (999_949, "999.9 kB"),
        (999_950, "1.0 MB"),
        (5 * 10**13, "50.0 TB"),
    ],
)
def test_sizes_for_people(num_bytes, text):
    assert store_cli.human_bytes(num_bytes) == text


@pytest.mark.parametrize(
    ("text", "num_bytes"), [("0", 0), ("500MB", 500_000_000), ("1.5 GiB", 3 * 2**29), ("2tb", 2 * 10**12), ("7B", 7)]
)
def test_sizes_from_people(text, num_bytes):
    assert store_cli.parsed_bytes(text) == num_bytes


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "1e9", "5 apples"])
def test_sizes_that_are_none(text):
    with pytest.raises(ValueError, match=re.escape(f"found {text!r}. Give a number and one of the units")):
        store_cli.parsed_bytes(text)


def test_the_commands_are_light():
    code = "import sys, holdfast.cli.store; print({'torch', 'numpy', 'pyarrow', 'safetensors'} & sys.modules.keys())"
    environment = os.environ | {"PYTHONPATH": str(Path(holdfast.__file__).parent.parent)}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    assert done.stdout == "set()\n"
