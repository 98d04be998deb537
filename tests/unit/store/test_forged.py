"""Files of a store made by hand, digests and checksums right: a header, a value or a fact that cannot be is damage."""

import json
import math
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xxhash
from typer.testing import CliRunner

from holdfast.cli import store as store_cli
from holdfast.store import manifest as manifests
from holdfast.store.maintenance import cleanup_steps, stores, verify
from holdfast.store.manifest import MANIFEST
from holdfast.store.shard import MOST_NATS, MOST_TOKENS
from holdfast.store.store import LogpStore
from stores import KEY, OTHER, filled, same, values

CONTENT = values(30)
DEEP = "[" * 100_000 + "]" * 100_000


def invoke(*arguments: object) -> Any:
    result = CliRunner().invoke(store_cli.app, [str(argument) for argument in arguments], env={"COLUMNS": "300"})
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


# --- shards -----------------------------------------------------------------------------------------------------------


def forged(folder: Path, header: Any = None, data: bytes | None = None, **changed: Any) -> Path:
    """A shard of one completion of two tokens with such a header (text, or facts), or with other arrays or metadata."""
    arrays = {"content": np.array([[7, 8]]), "lengths": np.array([2]), "logps": np.array([-1, -2], "f4")}
    arrays |= {name: np.asarray(changed.pop(name)) for name in list(arrays) if name in changed}
    facts: dict[str, Any] = {"__metadata__": {"holdfast": json.dumps({"format": 1, "key": folder.name} | changed)}}
    body = b""
    for name, array in arrays.items():
        offsets = [len(body), len(body) + array.nbytes]
        dtype = {"int64": "I64", "float32": "F32", "int32": "I32", "float64": "F64"}[str(array.dtype)]
        facts[name] = {"dtype": dtype, "shape": list(array.shape), "data_offsets": offsets}
        body += array.tobytes()
    if callable(header):
        header(facts)
    text = header if isinstance(header, str) else json.dumps(facts)
    written = struct.pack("<Q", len(text)) + text.encode() + body if data is None else data
    path = folder / f"{xxhash.xxh3_128_hexdigest(written)}.safetensors"
    path.write_bytes(written)
    return path


def put(*keys: str, value: Any) -> Any:
    """A change of a header: the entry at `keys` is `value`."""

    def change(facts: dict[str, Any]) -> None:
        for key in keys[:-1]:
            facts = facts[key]
        facts[keys[-1]] = value

    return change


def in_words(words: str) -> Any:
    return put("__metadata__", "holdfast", value=words)


SHARDS: dict[str, dict[str, Any]] = {
    "header nested deep": {"header": DEEP[:60_000]},
    "header nested very deep": {"header": DEEP},
    "header of another kind": {"header": "[1, 2]"},
    "header that is none": {"header": "{"},
    "header with a number of 5000 digits": {"header": "1" * 5_000},
    "no header": {"data": b""},
    "header of no length": {"data": bytes(8)},
    "header longer than the file": {"data": struct.pack("<Q", 2**63) + b"{}"},
    "header that is not UTF-8": {"data": struct.pack("<Q", 4) + b"\xff\xfe\x00\x01"},
    "no metadata": {"header": lambda facts: facts.pop("__metadata__")},
    "metadata of others": {"header": put("__metadata__", value={"format": "pt"})},
    "metadata that is a list": {"header": put("__metadata__", value=[])},
    "words that are a number": {"header": in_words(3)},  # type: ignore[arg-type]
    "words nested deep": {"header": in_words(DEEP[:40_000])},
    "words that are a surrogate": {"header": in_words("\ud800")},
    "format that is text": {"format": "1"},
    "format that is true": {"format": True},
    "format 0": {"format": 0},
    "format that is a float": {"format": 1.5},
    "no key": {"header": in_words('{"format": 1}')},
    "key that is a number": {"key": 5},
    "key of another store": {"key": OTHER.digest()},
    "key with an escape": {"key": "\x1b]0;owned\x07"},
    "shape that is text": {"header": put("lengths", "shape", value=["1"])},
    "shape that is negative": {"header": put("logps", "shape", value=[-2])},
    "shape that is huge": {"header": put("logps", "shape", value=[10**30])},
    "shape that is a float": {"header": put("lengths", "shape", value=[1.0])},
    "shape that is true": {"header": put("lengths", "shape", value=[True])},
    "shape that is none": {"header": put("lengths", "shape", value=[])},
    "shape of two": {"lengths": [[2]]},
    "shapes that do not fit": {"content": [[7, 8], [9, 9]]},
    "content of three": {"content": [[7, 8, 9]]},
    "array that is none": {"header": put("logps", value=5)},
    "array that is missing": {"header": lambda facts: facts.pop("logps")},
    "another array": {"header": put("more", value={"dtype": "F32", "shape": [0], "data_offsets": [0, 0]})},
    "dtype of ints": {"lengths": np.array([2], "i4")},
    "dtype of floats": {"logps": np.array([-1, -2], "f8")},
    "dtype that is a list": {"header": put("logps", "dtype", value=[])},
    "offsets that overlap": {"header": put("lengths", "data_offsets", value=[0, 8])},
    "offsets beyond the file": {"header": put("logps", "data_offsets", value=[24, 2**40])},
    "offsets that are text": {"header": put("logps", "data_offsets", value=["24", "32"])},
    "offsets backwards": {"header": put("logps", "data_offsets", value=[32, 24])},
    "length that is negative": {"content": [[7, 8], [9, 9]], "lengths": [3, -1]},
    "lengths whose sum overflows": {"content": [[1, 1], [2, 2], [3, 3]], "lengths": [2**63 - 1, 2**63 - 1, 4]},
    "lengths that are too long": {"lengths": [3]},
    "lengths that are too short": {"lengths": [1]},
    "a completion twice": {"content": [[7, 8], [7, 8]], "lengths": [1, 1]},
    "NaN": {"logps": np.array([-1, math.nan], "f4")},
    "infinity": {"logps": np.array([-math.inf, -1], "f4")},
    "positive infinity": {"logps": np.array([math.inf, -1], "f4")},
    "above 0": {"logps": np.array([-1, 0.2], "f4")},
}


@pytest.mark.parametrize("kind", SHARDS)
def test_a_forged_shard_is_damage(tmp_path: Path, kind: str, caplog: pytest.LogCaptureFixture) -> None:
    folder = filled(tmp_path, CONTENT).folder
    path = forged(folder, **SHARDS[kind])
    assert [damage.path for damage in verify(tmp_path)] == [path]
    (facts,) = stores(tmp_path)
    is_seen = facts.num_damaged == 1
    assert (facts.num_damaged, facts.num_completions) in [(1, 30), (0, 31), (0, 32), (0, 33)]
    result = invoke("list", "--root", tmp_path)
    assert (result.exit_code, "1 file(s) damaged" in result.output) == (0, is_seen)
    result = invoke("verify", "--root", tmp_path)
    assert (result.exit_code, "1 file(s) damaged" in result.output) == (1, True)
    assert "\x1b" not in result.output
    result = invoke("export", folder.name, tmp_path / "out.parquet", "--root", tmp_path)
    assert (result.exit_code, "not all of it can be read" in result.stderr) == (1, True)
    assert invoke("gc", "--yes", "--root", tmp_path).exit_code == 0
    assert path.exists()  # it is not merged
    opened = LogpStore.open(tmp_path, KEY)
    assert opened.num_completions == 30
    assert same(opened.get([*CONTENT, (7, 8)]), CONTENT)
    assert caplog.text.count("1 damaged file(s)") == 1
    assert verify(tmp_path) == []


@pytest.mark.parametrize(
    "changed",
    [
        {},
        {"logps": np.array([-0.0, MOST_NATS], "f4")},
        {"logps": np.array([-(2.0**120), 1e-45], "f4")},
        {"content": [[7, 8], [7, 8]], "lengths": [0, 2]},
        {"content": np.zeros((0, 2), int), "lengths": np.zeros(0, int), "logps": np.zeros(0, "f4")},
        {"header": lambda facts: facts.update(reversed(list(facts.items())))},
    ],
)
def test_what_is_sound_is_no_damage(tmp_path: Path, changed: dict[str, Any]) -> None:
    path = forged(filled(tmp_path, CONTENT).folder, **changed)
    assert verify(tmp_path) == []
    assert stores(tmp_path)[0].num_damaged == 0
    LogpStore.open(tmp_path, KEY)
    assert path.exists()


def test_a_completion_has_at_most_so_many_tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert MOST_TOKENS == 16 * 2**20
    path = forged(filled(tmp_path, CONTENT).folder)
    assert verify(tmp_path) == []
    monkeypatch.setattr("holdfast.store.shard.MOST_TOKENS", 1)
    assert path in [damage.path for damage in verify(tmp_path)]
    monkeypatch.setattr("holdfast.store.refusals.MOST_TOKENS", 8)
    with pytest.raises(ValueError, match=r"one has 9 tokens, and the store takes 8 at most\. Cut it"):
        LogpStore.open(tmp_path / "n", KEY).add(CONTENT)


# --- manifests --------------------------------------------------------------------------------------------------------


def manifest_of(text: str) -> bytes:
    """A manifest of this text, its checksum right."""
    body = text.encode("utf-8", "surrogatepass").removesuffix(b"}").rstrip()
    return body + manifests._CHECKSUM + manifests._checksum(body) + manifests._END


def facts_with(*keys: str, value: Any) -> str:
    facts = {
        "format": 1,
        "key": KEY.facts(),
        "description": "tiny policy, bf16",
        "created": "2026-01-01T00:00:00+00:00",
    }
    put(*keys, value=value)(facts)
    return json.dumps(facts)


ODD_VALUES: dict[str, Any] = {
    "text": "x", "a number": 5, "negative": -1, "true": True, "null": None, "a list": [], "an object": {},
    "NaN": math.nan, "infinity": math.inf, "huge": 10**400, "nested": {"a": [{"b": 1}]},
}  # fmt: skip
FITTING = {
    ("format",): (),  # a number is that of a newer one
    ("key",): (),
    ("key", "weights"): (),
    ("key", "config"): (),
    ("key", "numerics"): (),
    ("key", "numerics", "dtype"): (),
    ("key", "version"): ("null",),
    ("description",): ("text",),
    ("created",): ("text",),
}
"""The entries of a manifest, and those of the odd values that do no harm there."""
TEXTS = {
    "nested deep": DEEP[:200_000],
    "an object nested deep": '{"a":' * 20_000 + "1" + "}" * 20_000,
    "a number of 5000 digits": '{"format": ' + "1" * 5_000 + "}",
    "a list": "[1]",
    "nothing": "",
    "not UTF-8": '{"format": "\udc80"}',
    "huge": json.dumps({"format": 1, "description": "x" * manifests.MOST_BYTES}),
}


def check_manifest(root: Path, folder: Path, is_damaged: bool) -> None:
    damage = [found.path for found in verify(root)]
    assert damage == ([folder / MANIFEST] if is_damaged else [])
    result = invoke("list", "--root", root)
    assert result.exit_code == 0
    assert ("damaged or something else" in result.output) == is_damaged
    assert "another policy" in result.output
    assert invoke("verify", "--root", root).exit_code == int(is_damaged)
    assert [step.action for step in cleanup_steps(root, older_than=0)] == ["remove store"] * 2  # all shards are ours
    opened = LogpStore.open(root, KEY)
    assert same(opened.get(CONTENT), CONTENT)
    assert verify(root) == []


@pytest.mark.covering(1)
@pytest.mark.parametrize("odd", ODD_VALUES)
@pytest.mark.parametrize("keys", FITTING, ids=".".join)
def test_a_forged_manifest_is_damaged_or_something_else(tmp_path: Path, keys: tuple[str, ...], odd: str) -> None:
    """Of a newer format, where it claims that."""
    folder = filled(tmp_path, CONTENT).folder
    filled(tmp_path, CONTENT, key=OTHER)
    (folder / MANIFEST).write_bytes(manifest_of(facts_with(*keys, value=ODD_VALUES[odd])))
    if keys == ("format",) and odd == "a number":
        assert "newer version" in invoke("list", "--root", tmp_path).output
        assert invoke("verify", "--root", tmp_path).exit_code == 1
        with pytest.raises(ValueError, match="it has format 5"):
            LogpStore.open(tmp_path, KEY)
        return
    check_manifest(tmp_path, folder, odd not in FITTING[keys])


@pytest.mark.parametrize("kind", TEXTS)
def test_a_manifest_of_odd_text(tmp_path: Path, kind: str) -> None:
    folder = filled(tmp_path, CONTENT).folder
    filled(tmp_path, CONTENT, key=OTHER)
    (folder / MANIFEST).write_bytes(manifest_of(TEXTS[kind]))
    check_manifest(tmp_path, folder, True)


HOSTILE = "a\x1b]0;owned\x07b\nc\u202ed\x9be[red]f"


def test_text_of_others_is_shown_with_escapes(tmp_path: Path) -> None:
    folder = filled(tmp_path / "a\x1b[2J", CONTENT).folder
    (folder / MANIFEST).write_bytes(manifest_of(facts_with("description", value=HOSTILE)))
    result = invoke("list", "--root", folder.parent)
    shown = r"a\x1b]0;owned\x07b\nc\u202ed\x9be[red]f"
    assert shown in result.output
    outputs = [result.output]
    file = tmp_path / "out.parquet"
    for arguments in (
        ("verify",), ("gc", "--older-than", 0), ("export", folder.name, file), ("import", file),
        ("import", file, "--key", "0"), ("import", file, "--key", "\x9b"), ("import", "\x1b[3m"),
        ("export", "no\x1b[1m", file),
    ):  # fmt: skip
        result = invoke(*arguments, "--root", folder.parent)
        outputs += [result.output, result.stderr]
    assert sum(shown in output for output in outputs) >= 4
    assert not [output for output in outputs if {"\x1b", "\x07", "\u202e", "\x9b"} & set(output)]
