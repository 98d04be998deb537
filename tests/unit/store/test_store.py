"""`LogpStore`: what goes in comes out, bit for bit, and nothing else ever does; when a shard is written."""

import contextlib
import errno
import os
import random
import shutil
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from holdfast.batch import ContentId
from holdfast.store import store
from holdfast.store.index import Index
from holdfast.store.maintenance import merge, verify
from holdfast.store.shard import shard_paths
from holdfast.store.store import LogpStore, default_root
from stores import KEY, OTHER, failing, filled, in_shard, same, tree, values

few = st.integers(-2, 2) | st.integers(-(2**63), 2**63 - 1)


some_values = st.dictionaries(
    st.tuples(few, few), st.lists(st.floats(-(2.0**90), 0, width=32), max_size=5).map(torch.tensor), max_size=8
)


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
    bits = torch.tensor([0, -(2**31), 1, -(2**31) + 1, 0x3DCCCCCD, -0x00800001], dtype=torch.int32)
    numbers = bits.view(torch.float32)  # zeros, the smallest and the largest log-probs, of both signs
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
        (torch.tensor([-1.0, 5.0]), "one of them is 5, and none can be above 0"),
    ],
)
def test_what_no_log_prob_is_is_refused(tmp_path, value, found):
    opened = LogpStore.open(tmp_path, KEY)
    with pytest.raises(
        ValueError, match=f"were to be stored[,;].*{found}.*(Compute them|Check the reference|Check what)"
    ):
        opened.add({(0, 0): torch.zeros(1), (1, 2): value})
    assert opened.num_completions == 0
    assert tree(tmp_path) == {}


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
        writer.add({(0, number): torch.rand(1) - seed - 1 for number in range(20)})
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
