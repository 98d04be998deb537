"""Stores in a folder: listed, merged and cleaned up, under running jobs as well."""

import os
import random
import shutil
import time
from pathlib import Path
from typing import Any

import pytest

from holdfast.store import maintenance as upkeep
from holdfast.store import shard as shards
from holdfast.store import store
from holdfast.store.maintenance import carry_out, cleanup_steps, find_store, merge, stores, verify
from holdfast.store.manifest import MANIFEST
from holdfast.store.shard import shard_paths
from holdfast.store.store import LAST_USED, LogpStore
from stores import KEY, OTHER, filled, in_shard, same, tree, values


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
    steps = cleanup_steps(root, **options)
    assert tree(root) == before
    names = {key.digest(): key.weights_digest for key in keys}
    assert [names[step.path.name] for step in steps] == list(removed)
    assert sum(step.num_bytes for step in steps) == sum(sizes["abc".index(name)] for name in removed)
    for step in steps:
        carry_out(step)
    assert sorted(names[facts.name] for facts in stores(root)) == sorted(set("abc") - set(removed))
    assert cleanup_steps(root, **options) == []


def test_what_kills_left_behind_is_cleared_out_when_it_is_old(tmp_path):
    folder = filled(tmp_path, values(6)).folder
    new, old, theirs = "1" * 32, "0" * 32, ("notes.txt", "thesis.partial", "old.claim", "my.safetensors.corrupt")
    ours = (f"{new}.partial", f"{old}.partial", f"{new}.claim", f"{old}.claim", f"{old}.safetensors.corrupt")
    for name in (*ours, *theirs):
        (folder / name).write_bytes(b"1234")
        moment = time.time() - (0 if name.startswith(new) else 7_200)
        os.utime(folder / name, (moment, moment))
    (folder / f"{'2' * 32}.safetensors.corrupt").mkdir()
    dropped = filled(tmp_path, values(6), key=OTHER).folder
    dropped = dropped.rename(tmp_path / f"{dropped.name}.{old}.dropped")
    steps = cleanup_steps(tmp_path)
    assert {step.path.name: step.num_bytes for step in steps} == {
        dropped.name: sum(map(len, tree(dropped).values())),
        f"{old}.partial": 4, f"{old}.claim": 4, f"{old}.safetensors.corrupt": 4,
    }  # fmt: skip
    for step in steps:
        assert carry_out(step) == []
    assert {path.name for path in folder.iterdir()} == {
        MANIFEST, LAST_USED, f"{new}.partial", f"{new}.claim", *theirs, f"{'2' * 32}.safetensors.corrupt",
        shard_paths(folder)[0].name,
    }  # fmt: skip
    assert [path.name for path in tmp_path.iterdir()] == [folder.name]


def test_clearing_out_merges_small_shards(tmp_path):
    content = values(30)
    filled(tmp_path, content)
    (step,) = cleanup_steps(tmp_path)
    assert (step.action, step.reason) == ("merge shards", "3 small shards into larger ones")
    carry_out(step)
    assert len(shard_paths(step.path)) == 1
    assert same(LogpStore.open(tmp_path, KEY).get(content), content)
    assert cleanup_steps(tmp_path) == []


def test_nothing_is_where_there_is_no_folder(tmp_path):
    assert (stores(tmp_path / "no"), verify(tmp_path / "no"), cleanup_steps(tmp_path / "no", max_bytes=0)) == (
        [],
        [],
        [],
    )


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
