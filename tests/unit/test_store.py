"""The store of log-probs: what goes in comes out, bit for bit, and nothing else ever does."""

import contextlib
import errno
import hashlib
import itertools
import json
import logging
import os
import random
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor
from typer.testing import CliRunner

import holdfast
from holdfast.batch import ContentId
from holdfast.cli import store as store_cli
from holdfast.store import maintenance as upkeep
from holdfast.store import shard as shards
from holdfast.store import store
from holdfast.store import work_sharing as claims
from holdfast.store.index import Index
from holdfast.store.maintenance import carry_out, find_store, merge, plan, stores, verify
from holdfast.store.manifest import MANIFEST, Manifest, StoreKey
from holdfast.store.parquet import coverage, export_store, import_store
from holdfast.store.shard import Shard, shard_paths
from holdfast.store.store import LAST_USED, LogpStore, default_root
from holdfast.store.work_sharing import CLAIM, CLAIM_SECONDS, claimed_blocks

KEY = StoreKey(
    weights="5a" * 16,
    config="c0" * 16,
    numerics={"dtype": "torch.bfloat16", "autocast": None, "attention": "sdpa", "is_tf32": False},
    description="tiny policy, bf16",
)
OTHER = StoreKey(weights="5b" * 16, config="c0" * 16, numerics=KEY.numerics, description="another policy")

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


@pytest.fixture(autouse=True, scope="module")
def _quick() -> Iterator[None]:
    """Nothing here outlives the machine, so nothing waits for the disk."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(os, "fsync", lambda descriptor: None)
        yield


# What goes in comes out ----------------------------------------------------------------------------------------------

few = st.integers(-2, 2) | st.integers(-(2**63), 2**63 - 1)
some_values = st.dictionaries(
    st.tuples(few, few), st.lists(st.floats(-(2.0**90), 0, width=32), max_size=5).map(torch.tensor), max_size=8
)


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


@given(st.lists(st.tuples(some_values, st.sampled_from(["keep on", "flush", "reopen", "merge"])), max_size=8))
def test_round_trip(added):
    """Against a plain dict, in which the first value of an id and length stays."""
    expected: dict[tuple[ContentId, int], Tensor] = {}
    with tempfile.TemporaryDirectory() as folder:
        opened = LogpStore.open(folder, KEY)
        for content, then in added:
            content = {key: value.float() for key, value in content.items()}
            opened.add(content)
            for key, value in content.items():
                expected.setdefault((key, len(value)), value)
            if then != "keep on":
                opened.flush()
            if then == "merge":
                merge(opened.folder)
            if then in ("merge", "reopen"):
                opened = LogpStore.open(folder, KEY)
        opened.flush()
        for reader in (opened, LogpStore.open(folder, KEY)):
            for (key, length), value in expected.items():
                assert same(reader.get([key], [length]), {key: value})
                assert reader.get([key])[key].numpy().tobytes() in {
                    other.numpy().tobytes() for (of, _), other in expected.items() if of == key
                }
                assert reader.missing([key, key], [length, 7]) == [key]
                assert reader.has(key)
                assert not reader.has(key, 7)
            assert reader.num_completions == len(expected)
            assert reader.num_tokens == sum(length for _, length in expected)
        absent = [(key[0] ^ 1, key[1] ^ 5) for key, _ in expected]
        absent = [key for key in absent if key not in {of for of, _ in expected}]
        assert opened.missing(absent) == list(dict.fromkeys(absent))
        assert opened.get(absent) == {}
        assert verify(Path(folder)) == []


def test_many_shards_of_many_sizes(tmp_path):
    content = values(3_000)
    items, draw = list(content.items()), random.Random(1)
    opened = LogpStore.open(tmp_path, KEY)
    begin = 0
    while begin < len(items):
        end = begin + draw.randint(1, 100)
        opened.add(dict(items[begin:end]))
        opened.flush()
        begin = end
    wanted = draw.sample(sorted(content), 2_000)
    lengths = [len(content[key]) for key in wanted]
    for reader in (opened, LogpStore.open(tmp_path, KEY)):
        assert same(reader.get(wanted, lengths), {key: content[key] for key in wanted})
        assert reader.missing([*wanted, (0, 0)]) == [(0, 0)]
        assert (reader.num_completions, reader.num_tokens) == (3_000, sum(map(len, content.values())))
        assert reader.num_bytes == sum(path.stat().st_size for path in shard_paths(reader.folder))


def test_each_bit_of_a_number_is_kept(tmp_path):
    bits = torch.tensor([0, -(2**31), 1, -(2**31) + 1, 0x7F7FFFFF, -0x00800001], dtype=torch.int32)
    numbers = bits.view(torch.float32)  # zeros, the smallest and the largest numbers, of both signs
    filled(tmp_path, {(0, 0): numbers})
    assert LogpStore.open(tmp_path, KEY).get([(0, 0)])[0, 0].view(torch.int32).tolist() == bits.tolist()


def test_what_is_handed_out_and_in_is_the_caller_s_own(tmp_path):
    content = {(1, 2): torch.tensor([-1.0, -2.0])}
    with LogpStore.open(tmp_path, KEY) as opened:
        opened.add(content)
        content[1, 2].zero_()
        opened.get([(1, 2)])[1, 2].zero_()
        assert opened.get([(1, 2)])[1, 2].tolist() == [-1, -2]
        opened.flush()
        opened.get([(1, 2)])[1, 2].zero_()
        assert opened.get([(1, 2)])[1, 2].tolist() == [-1, -2]
    assert LogpStore.open(tmp_path, KEY).get([(1, 2)])[1, 2].tolist() == [-1, -2]


def test_the_first_value_stays_and_another_length_is_another_completion(tmp_path):
    with LogpStore.open(tmp_path, KEY) as opened:
        for value in ([-1.0, -2.0], [-3.0, -4.0], [-5.0]):
            opened.add({(1, 2): torch.tensor(value)})
            opened.flush()
    assert len(shard_paths(opened.folder)) == 2
    for reader in (opened, LogpStore.open(tmp_path, KEY)):
        assert reader.get([(1, 2)], [2])[1, 2].tolist() == [-1, -2]
        assert reader.get([(1, 2)], [1])[1, 2].tolist() == [-5]
        assert reader.get([(1, 2)], [3]) == {}
        assert reader.missing([(1, 2)], [3]) == [(1, 2)]


@pytest.mark.parametrize("length", [-1, 2**32, 2**40 + 2])
def test_a_length_that_none_can_have_is_missing(tmp_path, length):
    opened = filled(tmp_path, {(1, 2): torch.zeros(2)})
    assert opened.missing([(1, 2)], [length]) == [(1, 2)]


def test_nothing_asked_nothing_given(tmp_path):
    opened = filled(tmp_path, values(3))
    assert (opened.get([]), opened.missing([]), opened.get([], [])) == ({}, [], {})
    assert Index().find(np.zeros((0, 2), dtype=np.int64), None).shard.tolist() == []


@pytest.mark.parametrize(
    ("value", "found"),
    [
        (torch.zeros(2, dtype=torch.bfloat16), r"found a torch\.bfloat16 tensor of shape \(2,\)"),
        (torch.zeros(2, 1), r"found a torch\.float32 tensor of shape \(2, 1\)"),
        (torch.tensor([-1.0, float("nan")]), "1 of them hold NaN or infinity"),
        (torch.tensor([float("-inf")]), "1 of them hold NaN or infinity"),
    ],
)
def test_what_no_log_prob_is_is_refused(tmp_path, value, found):
    opened = LogpStore.open(tmp_path, KEY)
    with pytest.raises(ValueError, match=f"were to be stored[,;].*{found}.*(Compute them|Check the reference)"):
        opened.add({(0, 0): torch.zeros(1), (1, 2): value})
    assert opened.num_completions == 0
    assert tree(tmp_path) == {}


# The key -------------------------------------------------------------------------------------------------------------


def test_the_key_s_digest_is_that_of_its_facts():
    numerics = '{"attention": "sdpa", "autocast": null, "dtype": "torch.bfloat16", "is_tf32": false}'
    text = f'{{"config": "{KEY.config}", "numerics": {numerics}, "version": null, "weights": "{KEY.weights}"}}'
    assert KEY.digest() == hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def test_every_fact_changes_the_key_and_nothing_else_does():
    facts: dict[str, Any] = {"weights": "w", "config": "c", "numerics": {"a": 1, "b": "x"}}
    key = StoreKey(**facts)
    others = [
        facts | {"weights": "v"},
        facts | {"config": "d"},
        facts | {"version": 0},
        facts | {"version": 1},
        *(facts | {"numerics": numerics} for numerics in ({"a": 1}, {"a": 2, "b": "x"}, {"a": True, "b": "x"})),
        facts | {"numerics": {"a": 1, "b": None}},
    ]
    digests = {StoreKey(**other).digest() for other in others}
    assert len(digests) == len(others)
    assert key.digest() not in digests
    same_facts = facts | {"numerics": {"b": "x", "a": 1}, "description": "in words"}
    assert StoreKey(**same_facts).digest() == key.digest()
    assert StoreKey(**same_facts) == key


def test_numerics_that_are_no_text_or_number_are_refused():
    key = StoreKey(weights="w", config="c", numerics={"dtype": torch.float32})  # type: ignore[dict-item]
    with pytest.raises(TypeError, match=r"must be text, numbers.*found \{'dtype': torch\.float32\}.*Write"):
        key.digest()


def test_stores_of_two_keys_know_nothing_of_each_other(tmp_path):
    ours, theirs = values(5), {key: value - 1 for key, value in values(5).items()}
    filled(tmp_path, ours)
    filled(tmp_path, theirs, key=OTHER)
    assert same(LogpStore.open(tmp_path, KEY).get(ours), ours)
    assert same(LogpStore.open(tmp_path, OTHER).get(ours), theirs)


@pytest.mark.parametrize(
    ("platform", "environment", "place"),
    [
        ("linux", {"HOLDFAST_HOME": "~/hf"}, "hf/store"),
        ("linux", {"XDG_CACHE_HOME": "XDG"}, "XDG/holdfast/store"),
        ("linux", {}, ".cache/holdfast/store"),
        ("darwin", {"XDG_CACHE_HOME": "XDG"}, "Library/Caches/holdfast/store"),
        ("win32", {"LOCALAPPDATA": "LOCAL"}, "LOCAL/holdfast/store"),
        ("win32", {}, "AppData/Local/holdfast/store"),
    ],
)
def test_default_root(monkeypatch, tmp_path, platform, environment, place):
    for name in ("HOLDFAST_HOME", "XDG_CACHE_HOME", "LOCALAPPDATA"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    for name, value in environment.items():
        monkeypatch.setenv(name, value if value.startswith("~") else str(tmp_path / value))
    monkeypatch.setattr(sys, "platform", platform)
    assert default_root() == tmp_path / place


# When it is written --------------------------------------------------------------------------------------------------


def test_opening_and_reading_make_nothing(tmp_path):
    opened = LogpStore.open(tmp_path / "root", KEY)
    assert opened.missing([(0, 1)]) == [(0, 1)]
    with opened:
        opened.add({})
    assert not (tmp_path / "root").exists()


def test_a_shard_is_written_when_it_is_full(tmp_path, monkeypatch):
    monkeypatch.setattr(store, "SHARD_COMPLETIONS", 4)
    opened = LogpStore.open(tmp_path, KEY)
    counts = []
    for key, value in values(10).items():
        opened.add({key: value})
        counts.append(LogpStore.open(tmp_path, KEY).num_completions)
    assert counts == [0, 0, 0, 4, 4, 4, 4, 8, 8, 8]
    assert opened.num_completions == 10


def test_a_shard_is_written_when_time_has_passed(tmp_path, monkeypatch):
    now = 1_000.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    opened = LogpStore.open(tmp_path, KEY)
    counts = []
    for key, value in values(7).items():
        opened.add({key: value})
        counts.append(LogpStore.open(tmp_path, KEY).num_completions)
        now += store.SHARD_SECONDS / 3
    assert counts == [0, 0, 0, 4, 4, 4, 7]


def test_what_was_added_is_written_where_an_error_ends_it(tmp_path):
    content = values(3)
    with contextlib.suppress(KeyboardInterrupt), LogpStore.open(tmp_path, KEY) as opened:
        opened.add(content)
        raise KeyboardInterrupt
    assert same(LogpStore.open(tmp_path, KEY).get(content), content)


def test_an_error_is_not_hidden_by_that_of_writing(tmp_path, monkeypatch, caplog):
    def work() -> None:
        with LogpStore.open(tmp_path, KEY) as opened:
            opened.add(values(3))
            monkeypatch.setattr(os, "write", failing(errno.ENOSPC))
            raise RuntimeError("the first")

    with pytest.raises(RuntimeError, match="the first"):
        work()
    assert "there is no room for them" in caplog.text


def test_what_others_write_is_there_after_a_refresh(tmp_path):
    first, second = values(8, 1), values(5, 2)
    reader = LogpStore.open(tmp_path, KEY)
    filled(tmp_path, first)
    assert reader.missing(first) == list(first)
    assert reader.refresh() == 8
    filled(tmp_path, second)
    assert reader.refresh() == 5
    assert reader.refresh() == 0
    assert same(reader.get([*first, *second]), first | second)


def test_both_may_add_the_same(tmp_path):
    content = values(8)
    one, two = LogpStore.open(tmp_path, KEY), LogpStore.open(tmp_path, KEY)
    one.add(content)
    two.add(dict(list(content.items())[:5]))
    one.flush()
    two.flush()
    assert one.refresh() == 0
    assert two.refresh() == 3
    for reader in (one, two, LogpStore.open(tmp_path, KEY)):
        assert same(reader.get(content), content)
        assert reader.num_completions == 8
    assert verify(tmp_path) == []


def test_of_several_values_each_opening_takes_the_same(tmp_path):
    """That of the shard whose name comes first: shards have no age, and a copy of a folder has no order."""
    for seed in range(40):
        writer = LogpStore(tmp_path, KEY)  # has not read what is there, as one that began at the same time
        writer.add({(0, number): torch.rand(1) - seed for number in range(20)})
        writer.flush()
    first = load_file(shard_paths(writer.folder)[0])
    found = LogpStore.open(tmp_path, KEY)
    assert (
        torch.cat(list(found.get(in_shard(shard_paths(writer.folder)[0])).values())).tolist() == first["logps"].tolist()
    )
    merge(writer.folder)
    merged = LogpStore.open(tmp_path, KEY)
    assert merged.num_completions == found.num_completions == 20
    assert same(merged.get(in_shard(shard_paths(writer.folder)[0])), found.get([(0, number) for number in range(20)]))


def test_threads_may_share_a_store(tmp_path, monkeypatch):
    monkeypatch.setattr(store, "SHARD_COMPLETIONS", 16)
    content = values(400)
    items = list(content.items())
    opened = LogpStore.open(tmp_path, KEY)

    def work(seed: int) -> None:
        for part in random.Random(seed).sample(range(40), 30):
            opened.add(dict(items[10 * part : 10 * part + 10]))
            opened.get(content)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    opened.add(content)
    opened.flush()
    written = [key for path in shard_paths(opened.folder) for key in in_shard(path)]
    assert sorted(written) == sorted(content)
    assert same(LogpStore.open(tmp_path, KEY).get(content), content)


def test_a_store_can_be_copied(tmp_path):
    content = values(20)
    filled(tmp_path / "here", content)
    assert not [name for name, data in tree(tmp_path / "here").items() if str(tmp_path).encode() in data]
    shutil.copytree(tmp_path / "here", tmp_path / "there")
    shutil.rmtree(tmp_path / "here")
    assert same(LogpStore.open(tmp_path / "there", KEY).get(content), content)
    assert verify(tmp_path / "there") == []


def test_a_dropped_store_is_gone_at_once(tmp_path):
    opened = filled(tmp_path, values(20))
    opened.drop()
    assert opened.missing(values(20)) == list(values(20))
    assert list(tmp_path.iterdir()) == []
    opened.drop()


def test_a_store_dropped_by_another_process_is_begun_again(tmp_path):
    opened = filled(tmp_path, values(20))
    LogpStore.open(tmp_path, KEY).drop()
    more = values(5, 2)
    opened.add(more)
    opened.flush()
    found = LogpStore.open(tmp_path, KEY)
    assert same(found.get([*values(20), *more]), more)
    assert verify(tmp_path) == []


# Damage --------------------------------------------------------------------------------------------------------------


def damaged(path: Path, draw: random.Random) -> None:
    """Flips a bit of a file, or cuts it off."""
    data = bytearray(path.read_bytes())
    place = draw.randrange(len(data))
    if draw.random() < 0.5:
        data[place] ^= 1 << draw.randrange(8)
    else:
        del data[place:]
    path.write_bytes(data)


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
        plan(root)

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


def test_a_folder_under_another_store_s_name_is_not_used(tmp_path, caplog):
    content = values(6)
    filled(tmp_path, content, key=OTHER).folder.rename(tmp_path / KEY.digest())
    assert len(verify(tmp_path)) == 2
    assert LogpStore.open(tmp_path, KEY).get(content) == {}
    assert "that of another store" in caplog.text
    assert verify(tmp_path) == []


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


def test_a_missing_manifest_is_written_again(tmp_path, caplog):
    content = values(6)
    folder = filled(tmp_path, content).folder
    (folder / MANIFEST).unlink()
    assert [damage.reason for damage in verify(tmp_path)] == ["it is missing"]
    assert same(LogpStore.open(tmp_path, KEY).get(content), content)
    assert verify(tmp_path) == []
    assert stores(tmp_path)[0].description == "tiny policy, bf16"
    assert caplog.records == []


def test_a_manifest_says_what_the_store_is(tmp_path):
    folder = filled(tmp_path, values(6)).folder
    facts = json.loads((folder / MANIFEST).read_bytes())
    assert facts["format"] == 1
    assert facts["key"] == {
        "weights": "5a" * 16, "config": "c0" * 16, "numerics": dict(KEY.numerics), "version": None,
    }  # fmt: skip
    assert facts["description"] == "tiny policy, bf16"
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", facts["created"])


def newer(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Writes shards or manifests as a newer version of the package would."""
    monkeypatch.setattr(f"holdfast.store.{name}.FORMAT", 2)


@pytest.mark.parametrize("name", ["manifest", "shard"])
def test_a_newer_format_is_refused_and_left_as_it_is(tmp_path, name):
    content = values(6)
    with pytest.MonkeyPatch.context() as monkeypatch:
        newer(monkeypatch, name)
        filled(tmp_path, content)
    before = tree(tmp_path)
    with pytest.raises(ValueError, match=r"was to be read; it has format 2, and.*reads up to 1\. Update holdfast"):
        LogpStore.open(tmp_path, KEY)
    assert [damage.reason.split(";")[1] for damage in verify(tmp_path)] == [
        " it has format 2, and this version of holdfast reads up to 1. Update holdfast, or choose another folder for "
        "the store (`$HOLDFAST_HOME`)."
    ]
    if name == "manifest":
        assert stores(tmp_path)[0].description == "written by a newer version of holdfast"
    assert tree(tmp_path) == before


# Where it cannot be written ------------------------------------------------------------------------------------------


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
from holdfast.store.manifest import StoreKey
from holdfast.store.store import LogpStore
resource.setrlimit(resource.RLIMIT_FSIZE, (4000, 4000))
store = LogpStore.open(sys.argv[1], StoreKey(weights="w", config="c", numerics={}))
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
    opened = LogpStore.open(tmp_path, StoreKey(weights="w", config="c", numerics={}))
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


# Merging and clearing out --------------------------------------------------------------------------------------------


def test_merging_changes_no_number_and_no_reader_notices(tmp_path):
    content = values(200)
    folder = filled(tmp_path, content, num_per_shard=7).folder
    reader, writer = LogpStore.open(tmp_path, KEY), LogpStore.open(tmp_path, KEY)
    assert merge(folder) == 29
    assert len(shard_paths(folder)) == 1
    assert same(reader.get(content), content)
    assert reader.refresh() == 0
    writer.add(values(3, 1))
    writer.flush()
    assert reader.refresh() == 3
    for opened in (reader, LogpStore.open(tmp_path, KEY)):
        assert same(opened.get([*content, *values(3, 1)]), content | values(3, 1))
    assert merge(folder) == 2
    assert merge(folder) == 0
    assert verify(tmp_path) == []


def test_merging_leaves_one_of_each(tmp_path):
    content = values(20)
    for seed in range(3):
        writer = LogpStore(tmp_path, KEY)  # has not read what is there, as one that began at the same time
        writer.add(dict(random.Random(seed).sample(sorted(content.items()), 15)))
        writer.flush()
    assert stores(tmp_path)[0].num_completions == 45
    merge(writer.folder)
    (path,) = shard_paths(writer.folder)
    written = in_shard(path)
    assert len(written) == len(set(written)) == LogpStore.open(tmp_path, KEY).num_completions
    assert same(LogpStore.open(tmp_path, KEY).get(written), {key: content[key] for key in written})


def test_merging_twice_at_once_gives_the_same_shard(tmp_path):
    content = values(60)
    folder = filled(tmp_path, content).folder
    shutil.copytree(folder, tmp_path / "late")
    merge(folder)
    once = tree(folder)
    for path in shard_paths(tmp_path / "late"):  # as one that had read them all before the first had removed them
        shutil.copy(path, folder)
    merge(folder)
    assert {name for name in tree(folder) if name != LAST_USED} == {name for name in once if name != LAST_USED}


def test_merged_shards_are_not_too_large(tmp_path, monkeypatch):
    monkeypatch.setattr(upkeep, "MERGED_COMPLETIONS", 50)
    content = values(230)
    folder = filled(tmp_path, content).folder
    merge(folder)
    sizes = sorted(len(in_shard(path)) for path in shard_paths(folder))
    assert sizes == [30, 50, 50, 50, 50]
    assert same(LogpStore.open(tmp_path, KEY).get(content), content)


def test_merging_passes_over_what_is_damaged(tmp_path):
    content = values(30)
    folder = filled(tmp_path, content).folder
    path = shard_paths(folder)[1]
    held = in_shard(path)
    path.write_bytes(path.read_bytes()[:-1] + b"!")
    assert merge(folder) == 2
    assert path.exists()
    assert sorted(LogpStore.open(tmp_path, KEY).missing(content)) == sorted(held)


def test_a_shard_that_is_merged_while_a_store_is_opened(tmp_path, monkeypatch):
    content = values(60)
    folder = filled(tmp_path, content).folder
    stale = [shard_paths(folder)]
    merge(folder)
    monkeypatch.setattr(store, "shard_paths", lambda folder: stale.pop() if stale else shard_paths(folder))
    assert same(LogpStore.open(tmp_path, KEY).get(content), content)
    assert stale == []


def test_a_shard_that_is_merged_as_soon_as_it_is_written(tmp_path, monkeypatch):
    content = values(8)
    opened = filled(tmp_path, values(8, 1))

    def written_and_merged(folder: Path, *arguments: Any) -> Path:
        path = shards.write_shard(folder, *arguments)
        merge(folder)
        return path

    monkeypatch.setattr(store, "write_shard", written_and_merged)
    opened.add(content)
    opened.flush()
    assert same(opened.get(content), content)


def used(root: Path, key: StoreKey, days_ago: float) -> None:
    """Marks a store as last used so long ago."""
    moment = time.time() - days_ago * 86_400
    for path in (root / key.digest()).iterdir():
        os.utime(path, (moment, moment))


@pytest.fixture
def three(tmp_path) -> tuple[Path, list[StoreKey], list[int]]:
    """Three stores of one shard each, last used 1, 10 and 100 days ago, and the sizes of their folders."""
    keys = [StoreKey(weights=name, config="c", numerics={}, description=f"policy {name}") for name in "abc"]
    for key, num, days in zip(keys, (3, 30, 300), (1, 10, 100), strict=True):
        filled(tmp_path, values(num), key=key, num_per_shard=1_000)
        used(tmp_path, key, days)
    return tmp_path, keys, [sum(map(len, tree(tmp_path / key.digest()).values())) for key in keys]


def test_stores_are_listed_by_last_use_with_their_sizes(three):
    root, keys, sizes = three
    found = stores(root)
    assert [facts.name for facts in found] == [key.digest() for key in keys]
    assert [facts.description for facts in found] == ["policy a", "policy b", "policy c"]
    assert [facts.num_completions for facts in found] == [3, 30, 300]
    assert [facts.num_tokens for facts in found] == [sum(map(len, values(num).values())) for num in (3, 30, 300)]
    assert [facts.num_bytes for facts in found] == sizes
    assert [round((time.time() - facts.last_used) / 86_400) for facts in found] == [1, 10, 100]
    LogpStore.open(root, keys[2])
    assert stores(root)[0].name == keys[2].digest()


@pytest.mark.parametrize(
    ("options", "removed"),
    [
        ({}, ""),
        ({"older_than": 50}, "c"),
        ({"older_than": 5}, "cb"),
        ({"older_than": 200}, ""),
        ({"max_bytes": 0}, "cba"),
        ({"max_bytes": "all"}, ""),
        ({"max_bytes": "all but one"}, "c"),
        ({"max_bytes": "the first"}, "cb"),
        ({"older_than": 50, "max_bytes": "the first"}, "cb"),
    ],
)
def test_what_is_cleared_out(three, options, removed):
    root, keys, sizes = three
    limits = {"all": sum(sizes), "all but one": sum(sizes) - 1, "the first": sizes[0]}
    options = {name: limits.get(value, value) for name, value in options.items()}
    before = tree(root)
    steps = plan(root, **options)
    assert tree(root) == before
    names = {key.digest(): key.weights for key in keys}
    assert [names[step.path.name] for step in steps] == list(removed)
    assert sum(step.num_bytes for step in steps) == sum(sizes["abc".index(name)] for name in removed)
    for step in steps:
        carry_out(step)
    assert sorted(names[facts.name] for facts in stores(root)) == sorted(set("abc") - set(removed))
    assert plan(root, **options) == []


def test_what_kills_left_behind_is_cleared_out_when_it_is_old(tmp_path):
    folder = filled(tmp_path, values(6)).folder
    for name in ("new.partial", "old.partial", "new.claim", "old.claim", "x.safetensors.corrupt", "notes.txt"):
        (folder / name).write_bytes(b"1234")
        moment = time.time() - (7_200 if name.startswith("old") else 0)
        os.utime(folder / name, (moment, moment))
    (tmp_path / "1f.dropped").mkdir()
    (tmp_path / "1f.dropped" / "file").write_bytes(b"12")
    steps = plan(tmp_path)
    assert {step.path.name: step.num_bytes for step in steps} == {
        "1f.dropped": 2, "old.partial": 4, "old.claim": 4, "x.safetensors.corrupt": 4,
    }  # fmt: skip
    for step in steps:
        carry_out(step)
    assert {path.name for path in folder.iterdir()} == {
        MANIFEST, LAST_USED, "new.partial", "new.claim", "notes.txt", shard_paths(folder)[0].name,
    }  # fmt: skip
    assert [path.name for path in tmp_path.iterdir()] == [folder.name]


def test_clearing_out_merges_small_shards(tmp_path):
    content = values(30)
    filled(tmp_path, content)
    (step,) = plan(tmp_path)
    assert (step.action, step.reason) == ("merge shards", "3 small shards into larger ones")
    carry_out(step)
    assert len(shard_paths(step.path)) == 1
    assert same(LogpStore.open(tmp_path, KEY).get(content), content)
    assert plan(tmp_path) == []


def test_nothing_is_where_there_is_no_folder(tmp_path):
    assert (stores(tmp_path / "no"), verify(tmp_path / "no"), plan(tmp_path / "no", max_bytes=0)) == ([], [], [])


def test_a_store_is_found_by_its_first_digits(three):
    root, keys, _ = three
    assert find_store(root, keys[1].digest()[:8]).description == "policy b"
    with pytest.raises(ValueError, match=r"'zz' in .* was asked for; none of its stores .*there: .* Give"):
        find_store(root, "zz")
    with pytest.raises(ValueError, match="was asked for; none"):
        find_store(root, "")
    (root / ("0" * 32)).mkdir()
    (root / ("0" * 31 + "1")).mkdir()
    with pytest.raises(ValueError, match=r"'000' in .* was asked for; 2 of its stores"):
        find_store(root, "000")


# One file ------------------------------------------------------------------------------------------------------------


def exported(folder: Path, content: Values, **options: Any) -> Path:
    """An exported store with that content."""
    export_store(filled(folder / "store", content, **options).folder, folder / "out.parquet")
    return folder / "out.parquet"


def test_export_and_import(tmp_path):
    content = values(100)
    file = exported(tmp_path, content)
    LogpStore(tmp_path / "store", KEY).add(content)
    num_tokens = sum(map(len, content.values()))
    done = import_store(tmp_path / "other", file, KEY)
    assert (done.key, done.key.description) == (KEY, "tiny policy, bf16")
    assert (done.num_completions, done.num_tokens, done.num_new) == (100, num_tokens, 100)
    assert same(LogpStore.open(tmp_path / "other", KEY).get(content), content)
    assert import_store(tmp_path / "other", file).num_new == 0
    assert verify(tmp_path / "other") == []
    rows = pq.read_table(file).to_pylist()  # any other reader
    assert {(row["content_high"], row["content_low"]): row["logps"] for row in rows} == {
        key: value.tolist() for key, value in content.items()
    }
    assert [path.name for path in tmp_path.glob("*.partial")] == []


def test_an_exported_store_has_each_completion_once(tmp_path):
    content = values(20)
    for seed in range(3):
        writer = LogpStore(tmp_path / "store", KEY)
        writer.add(dict(random.Random(seed).sample(sorted(content.items()), 15)))
        writer.flush()
    done = export_store(writer.folder, tmp_path / "out.parquet")
    found = LogpStore.open(tmp_path / "store", KEY)
    assert done.num_completions == found.num_completions == pq.read_metadata(tmp_path / "out.parquet").num_rows
    assert done.num_tokens == found.num_tokens


def test_an_empty_store_is_exported(tmp_path):
    opened = LogpStore(tmp_path / "store", KEY)
    opened.check_writable()
    export_store(opened.folder, tmp_path / "out.parquet")
    assert import_store(tmp_path / "other", tmp_path / "out.parquet").num_completions == 0


def test_coverage(tmp_path):
    content = values(30)
    file = exported(tmp_path, content)
    asked = [*list(content)[:10], *list(content)[:5], *values(7, 1)]
    assert coverage(file, asked) == coverage(LogpStore.open(tmp_path / "store", KEY), asked) == (10, 17)
    assert coverage(file, []) == (0, 0)


def test_a_damaged_export_is_refused(tmp_path):
    """Some bits of a Parquet file mean nothing to a reader: where one of those is flipped, the content is whole."""
    content = values(40)
    file = exported(tmp_path, content)
    sound, draw = file.read_bytes(), random.Random(5)
    refusals = []
    for trial in range(150):
        file.write_bytes(sound)
        damaged(file, draw)
        root = tmp_path / f"{trial}"
        try:
            import_store(root, file)
        except ValueError as error:
            refusals.append(str(error))
            assert not root.exists()
        else:
            assert same(LogpStore.open(root, KEY).get(content), content)
    assert len(refusals) > 120
    said = re.compile(r"(?s)the exported store .* it is damaged or something else: .*nothing was taken from it\.")
    assert [refusal for refusal in refusals if not said.fullmatch(refusal)] == []


def rewritten(file: Path, **changed: Any) -> None:
    """The exported file with other columns, and the same metadata."""
    table = pq.read_table(file)
    metadata = {name: value for name, value in pq.read_metadata(file).metadata.items() if name != b"ARROW:schema"}
    for name, column in changed.items():
        table = table.set_column(table.schema.get_field_index(name), name, column)
    pq.write_table(table.replace_schema_metadata(metadata), file)


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"logps": pa.array([[-0.5], [-1.0, -2.0]], pa.large_list(pa.float32()))}, "does not have its checksum"),
        ({"content_low": pa.array([1, 2])}, "does not have its checksum"),
        ({"content_low": pa.array([1, None])}, "it has empty cells"),
        ({"logps": pa.array([[-0.5], None], pa.large_list(pa.float32()))}, "it has empty cells"),
        ({"logps": pa.array([[-0.5], [None]], pa.large_list(pa.float32()))}, "it has empty cells"),
        ({"logps": pa.array([[-0.5], [-1.0]], pa.large_list(pa.float64()))}, "of other types"),
    ],
)
def test_an_export_that_was_changed_is_refused(tmp_path, changed, reason):
    file = exported(tmp_path, {(1, 2): torch.tensor([-0.25]), (3, 4): torch.tensor([-1.0, -2.0])})
    rewritten(file)
    assert import_store(tmp_path / "same", file).num_new == 2
    rewritten(file, **changed)
    with pytest.raises(ValueError, match=f"was to be read, but it is damaged or something else: .*{reason}.*Copy or"):
        import_store(tmp_path / "changed", file)
    assert not (tmp_path / "changed").exists()


def test_another_parquet_file_is_no_export(tmp_path):
    pq.write_table(pa.table({"prompt": ["a"]}), tmp_path / "data.parquet")
    with pytest.raises(ValueError, match="it has no manifest of a store"):
        import_store(tmp_path / "root", tmp_path / "data.parquet")
    with pytest.raises(ValueError, match=r"nowhere\.parquet was to be read; there is no such file\. Give"):
        coverage(tmp_path / "nowhere.parquet", [])


def test_an_export_of_another_key_is_refused_naming_what_differs(tmp_path):
    file = exported(tmp_path, values(5))
    other = StoreKey(weights=KEY.weights, config=KEY.config, numerics={"dtype": "torch.float32"})
    with pytest.raises(
        ValueError, match=r"were to be imported; .* \(tiny policy, bf16\), whose 'numerics' is .*Export"
    ):
        import_store(tmp_path / "other", file, other)
    with pytest.raises(ValueError, match=f"whose 'weights' is '{KEY.weights}', not '{OTHER.weights}'"):
        import_store(tmp_path / "other", file, OTHER)
    assert not (tmp_path / "other").exists()


def test_an_export_of_a_newer_format_is_refused(tmp_path):
    with pytest.MonkeyPatch.context() as monkeypatch:
        newer(monkeypatch, "manifest")
        monkeypatch.setattr("holdfast.store.manifest.newer_format", None)
        file = exported(tmp_path, values(5))
    with pytest.raises(ValueError, match=r"has format 2, and this version of holdfast reads up to 1\. Update"):
        import_store(tmp_path / "other", file)


def test_a_damaged_store_is_not_exported(tmp_path):
    folder = filled(tmp_path, values(20)).folder
    path = shard_paths(folder)[0]
    path.write_bytes(path.read_bytes()[1:])
    with pytest.raises(ValueError, match=r"was to be exported, but not all of it can be read: its bytes have.*verify"):
        export_store(folder, tmp_path / "out.parquet")
    assert not list(tmp_path.glob("*.parquet"))


# Work shared out -----------------------------------------------------------------------------------------------------


def test_blocks_are_those_that_are_missing(tmp_path):
    content = values(25)
    ids = list(content)
    opened = LogpStore.open(tmp_path, KEY)
    opened.add({key: content[key] for key in ids[8:12]})
    blocks = []
    for block in claimed_blocks(opened, [*ids, *ids], 10):
        assert len(list(opened.folder.glob(f"*{CLAIM}"))) == 1
        blocks.append(block)
        opened.add({key: content[key] for key in block})
    assert blocks == [ids[:8], ids[12:20], ids[20:]]
    assert not list(opened.folder.glob(f"*{CLAIM}"))
    assert same(LogpStore.open(tmp_path, KEY).get(ids), content)
    assert list(claimed_blocks(opened, ids, 10)) == []


def test_two_that_fill_one_store_do_not_do_the_same(tmp_path):
    """Turn by turn: each has one block in progress, so at the end both do the last one."""
    content = values(70)
    both = [LogpStore.open(tmp_path, KEY) for _ in range(2)]
    work = [claimed_blocks(opened, list(content), 10) for opened in both]
    done: list[ContentId] = []
    alive = [0, 1]
    for turn in itertools.cycle((0, 1)):
        block = next(work[turn], None)
        if block is None:
            alive.remove(turn)
            if not alive:
                break
            continue
        done += block
        both[turn].add({key: content[key] for key in block})
    assert set(done) == set(content)
    assert len(done) - len(content) <= 10
    assert LogpStore.open(tmp_path, KEY).num_completions == 70


def test_a_block_that_was_given_up_is_taken_by_another(tmp_path):
    content = values(20)
    one, two = LogpStore.open(tmp_path, KEY), LogpStore.open(tmp_path, KEY)
    ids = list(content)
    first = claimed_blocks(one, ids, 10)
    assert next(first) == ids[:10]
    second = claimed_blocks(two, ids, 10)
    assert next(second) == ids[10:]
    two.add({key: content[key] for key in ids[10:]})
    assert next(second) == ids[:10]  # only claimed ones are left
    first.close()
    assert next(claimed_blocks(one, ids, 10)) == ids[:10]


@pytest.mark.parametrize(
    ("claim", "age", "is_void"),
    [
        ("{alive} {host}", 0, False),
        ("{dead} {host}", 0, True),
        ("{dead} elsewhere", 0, False),
        ("{dead} elsewhere", CLAIM_SECONDS + 9, True),
        ("", 0, False),
    ],
)
def test_a_claim_ends_with_its_process(tmp_path, claim, age, is_void):
    ids = list(values(20))
    opened = LogpStore.open(tmp_path, KEY)
    next(abandoned := claimed_blocks(opened, ids, 10))
    (path,) = opened.folder.glob(f"*{CLAIM}")
    alive, host = path.read_text().split(" ")
    assert int(alive) == os.getpid()
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    path.write_text(claim.format(alive=alive, host=host, dead=ended.pid))
    os.utime(path, (time.time() - age, time.time() - age))
    assert next(claimed_blocks(LogpStore.open(tmp_path, KEY), ids, 10)) == (ids[:10] if is_void else ids[10:])
    abandoned.close()


class Other:
    """A process that has claimed the first ten of twenty completions; the rest is stored. Sleeping costs no time."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.content = values(20)
        self.ids = list(self.content)
        self._work = claimed_blocks(LogpStore.open(folder, KEY), self.ids, 10)
        next(self._work)
        self.ours = filled(folder, {key: self.content[key] for key in self.ids[10:]})
        (self.claim,) = self.ours.folder.glob(f"*{CLAIM}")
        self.machine = self.claim.read_text().split(" ")[1]
        self.is_of(os.getppid())  # which is there
        self.num_sleeps, self.told = 0, []
        self._now = time.monotonic()
        self.on_sleep: Callable[[int], None] = lambda num_sleeps: None
        monkeypatch.setattr(claims.time, "monotonic", lambda: self._now)
        monkeypatch.setattr(claims.time, "sleep", self._sleep)

    def is_of(self, process: int) -> None:
        self.claim.write_text(f"{process} {self.machine}")

    def _sleep(self, seconds: float) -> None:
        assert claims.SHORTEST_POLL_SECONDS / 2 <= seconds <= claims.LONGEST_POLL_SECONDS
        self._now += seconds
        self.num_sleeps += 1
        self.on_sleep(self.num_sleeps)
        assert self.num_sleeps < 10_000, "it waits for ever"

    def waited(self) -> list[list[ContentId]]:
        """What is left to us."""
        blocks = []
        for block in claimed_blocks(self.ours, self.ids, 10, self.told.append):
            blocks.append(block)
            self.ours.add({key: self.content[key] for key in block})
        assert same(LogpStore.open(self.ours.folder.parent, KEY).get(self.ids), self.content)
        return blocks


@pytest.fixture
def other(tmp_path, monkeypatch):
    return Other(tmp_path, monkeypatch)


def test_a_live_claim_is_waited_for(other):
    def done(num_sleeps: int) -> None:
        if num_sleeps == 7:
            filled(other.ours.folder.parent, {key: other.content[key] for key in other.ids[:10]})
            os.unlink(other.claim)

    other.on_sleep = done
    assert other.waited() == []
    assert (other.num_sleeps, other.told) == (7, [1] * 7)


def test_a_claim_that_is_gone_while_something_is_missing_is_taken_over(other):
    some = {key: other.content[key] for key in other.ids[:4]}  # what its owner had written

    def given_up(num_sleeps: int) -> None:
        if num_sleeps == 3:
            filled(other.ours.folder.parent, some)
            os.unlink(other.claim)

    other.on_sleep = given_up
    assert other.waited() == [other.ids[4:10]]
    assert other.num_sleeps == 3
    assert not other.claim.exists()


def test_a_claim_whose_owner_dies_is_taken_over(other):
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        other.is_of(process.pid)
        other.on_sleep = lambda num_sleeps: process.communicate() and None if num_sleeps == 5 else None
        assert other.waited() == [other.ids[:10]]
    assert other.num_sleeps == 5
    assert not other.claim.exists()


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere a process is there until its parent asks for its end")
def test_a_process_that_has_ended_unnoticed_is_gone(other):
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        other.is_of(process.pid)
        assert other.waited() == [other.ids[:10]]
        assert other.num_sleeps == 0


@pytest.mark.parametrize("claim", ["{alive} {machine}", "{alive} elsewhere", ""])
def test_no_wait_is_for_ever(other, claim):
    """A process that hangs, one of another machine, or one that died before it had put its name down."""
    other.claim.write_text(claim.format(alive=os.getppid(), machine=other.machine))
    begin = time.monotonic()
    assert other.waited() == [other.ids[:10]]
    assert claims.PATIENCE_SECONDS < time.monotonic() - begin <= claims.PATIENCE_SECONDS + claims.LONGEST_POLL_SECONDS
    assert not other.claim.exists()


def test_a_claim_that_is_renewed_is_waited_for_longer(other):
    """Every 100 polls of a second at most; after 1,000 it is not renewed any more."""
    begin = time.time()
    other.on_sleep = lambda num: os.utime(other.claim, (begin + num,) * 2) if num <= 1_000 and num % 100 == 0 else None
    assert other.waited() == [other.ids[:10]]
    assert 1_000 + claims.PATIENCE_SECONDS <= other.num_sleeps <= 1_000 + 2 * claims.PATIENCE_SECONDS + 1


def test_a_claim_that_cannot_be_removed_is_no_obstacle(other, monkeypatch):
    monkeypatch.setattr(claims, "remove", lambda path: False)
    assert other.waited() == [other.ids[:10]]
    assert other.claim.exists()


def test_each_addition_renews_the_claim(tmp_path):
    content = values(10)
    opened = LogpStore.open(tmp_path, KEY)
    work = claimed_blocks(opened, list(content), 10)
    next(work)
    (path,) = opened.folder.glob(f"*{CLAIM}")
    for key, value in content.items():
        os.utime(path, (0, 0))
        opened.add({key: value})
        assert time.time() - path.stat().st_mtime < 60
    assert next(work, None) is None
    opened.add(values(1, seed=1))
    assert not path.exists()


def test_what_is_finished_between_the_look_and_the_claim_is_not_done_again(tmp_path, monkeypatch):
    content = values(10)
    opened = LogpStore.open(tmp_path, KEY)
    plain = LogpStore.check_writable

    def finished(self: LogpStore) -> None:
        plain(self)
        monkeypatch.setattr(LogpStore, "check_writable", plain)
        filled(tmp_path, content)

    monkeypatch.setattr(LogpStore, "check_writable", finished)
    assert list(claimed_blocks(opened, list(content), 10)) == []
    assert same(opened.get(content), content)
    assert not list(opened.folder.glob(f"*{CLAIM}"))


# The commands --------------------------------------------------------------------------------------------------------

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


def test_a_shard_is_a_record():
    shard = Shard(
        name="x", content=np.zeros((3, 2), np.int64), lengths=np.array([2, 0, 3]), logps=np.zeros(5, "f4"), num_bytes=1
    )
    assert shard.starts().tolist() == [0, 2, 2]
    manifest = Manifest.new(KEY)
    assert Manifest.from_bytes(manifest.to_bytes(), Path("x")) == manifest
