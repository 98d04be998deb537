"""Products of pairs beside the shards: found for a pair in either order, and kept as carefully as log-probs."""

import json
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from holdfast.store import pair_shard
from holdfast.store.exported_pairs import PAIRS, metadata_of, pairs_of
from holdfast.store.files import DamagedError, NewerFormatError
from holdfast.store.maintenance import carry_out, cleanup_steps, merge, stores, verify
from holdfast.store.pair_shard import PairProducts, open_pair_shard, pair_shard_paths, write_pair_shard
from holdfast.store.pair_table import PairTable
from holdfast.store.parquet import export_store, import_store
from holdfast.store.store import LogpStore
from holdfast.store.trust import Trust
from stores import KEY, OTHER, damaged, filled, read_only, values

Found = dict[Any, tuple[float, float, float]]


def products(num: int, seed: int = 0) -> Found:
    """Products of vectors of so many random pairs, by content ids and lengths."""
    draw, ids = np.random.default_rng(seed), list(values(2 * num, seed))
    found: Found = {}
    for first, second in zip(ids[:num], ids[num:], strict=True):
        a, b = draw.normal(size=(2, 5))
        found[(first, second), (3, 4)] = float(a @ b), float(a @ a), float(b @ b)
    return found


def asked(found: Found, *, swapped: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """What `PairTable.find` takes for these pairs, or for the same with their sides exchanged."""
    step = -1 if swapped else 1
    content = [[number for side in pair[::step] for number in side] for pair, _ in found]
    return np.array(content, dtype=np.int64).reshape(-1, 4), np.array([lengths[::step] for _, lengths in found])


def with_pairs(root: Path, found: Found, num_per_file: int = 1000) -> LogpStore:
    """A store with log-probs, and these products in files of so many pairs."""
    opened = filled(root, values(20))
    items = list(found.items())
    for begin in range(0, len(items), num_per_file):
        table = PairTable.open(opened)
        table.add(dict(items[begin : begin + num_per_file]))
        table.flush()
    return opened


def test_a_pair_is_found_in_either_order(tmp_path):
    """<a, b> stays, and <a, a> and <b, b> change places."""
    found = products(30)
    opened = with_pairs(tmp_path, found)
    table = PairTable.open(opened)
    expected = np.array([*found.values()])
    assert len(table) == 30
    assert np.array_equal(table.find(*asked(found)), expected)
    assert np.array_equal(table.find(*asked(found, swapped=True)), expected[:, [0, 2, 1]])


def test_a_pair_of_other_lengths_or_completions_is_not_known(tmp_path):
    found = products(3)
    table = PairTable.open(with_pairs(tmp_path, found))
    content, lengths = asked(found)
    assert np.isnan(table.find(content, lengths + np.array([0, 1]))).all()
    assert np.isnan(table.find(content[:, [0, 1, 0, 1]], lengths)).all()
    assert table.find(content[:0], lengths[:0]).shape == (0, 3)


def test_an_older_store_has_no_products(tmp_path):
    opened = filled(tmp_path, values(20))
    table = PairTable.open(opened)
    assert np.isnan(table.find(*asked(products(2)))).all()
    assert verify(tmp_path) == []


def test_what_another_process_writes_is_read_on_demand(tmp_path):
    found = products(8)
    opened = filled(tmp_path, values(4))
    first, second = PairTable.open(opened), PairTable.open(opened)
    first.add(found)
    assert np.isnan(second.find(*asked(found))).all()
    first.flush()
    second.refresh()
    assert np.array_equal(second.find(*asked(found)), np.array([*found.values()]))
    assert len(first) == len(second) == 8


def test_products_that_are_no_numbers_are_refused(tmp_path):
    table = PairTable.open(filled(tmp_path, values(4)))
    with pytest.raises(ValueError, match=r"products of the hidden states.*they are nan, 1, 1\. Check the model's"):
        table.add({key: (float("nan"), 1.0, 1.0) for key in products(1)})


def test_a_store_that_cannot_be_written_says_so(tmp_path):
    table = PairTable.open(LogpStore.open(tmp_path, KEY))
    table.add(products(2))
    with read_only(), pytest.raises(ValueError, match="cannot be written to"):
        table.flush()
    table.flush()  # nothing is lost
    assert len(PairTable.open(LogpStore.open(tmp_path, KEY))) == 2


def test_every_flipped_bit_and_every_truncation_is_found_and_nothing_of_it_used(tmp_path, caplog):
    found, draw = products(6), random.Random(3)
    with_pairs(tmp_path / "sound", found, num_per_file=3)
    for trial in range(60):
        root = tmp_path / f"{trial}"
        shutil.copytree(tmp_path / "sound", root)
        path = pair_shard_paths(root / KEY.digest())[trial % 2]
        damaged(path, draw)
        assert [damage.path for damage in verify(root)] == [path]
        caplog.clear()
        table = PairTable.open(LogpStore.open(root, KEY))
        assert len(caplog.records) == 1
        assert path.name in caplog.text
        assert int(np.isnan(table.find(*asked(found))[:, 0]).sum()) == 3
        assert (path.parent / f"{path.name}.corrupt").exists()
        assert verify(root) == []
        (step,) = (step for step in cleanup_steps(root) if step.action == "remove file")
        assert step.path.name == f"{path.name}.corrupt"
        shutil.rmtree(root)


def changed(pairs: PairProducts, **arrays: Any) -> PairProducts:
    return PairProducts(**{name: getattr(pairs, name) for name in ("content", "lengths", "products")} | arrays)


SOUND = PairProducts(
    content=np.arange(8).reshape(2, 4), lengths=np.ones((2, 2), np.int64), products=np.array([[1.0, 1, 2], [0, 0, 0]])
)
FORGED = {
    "NaN": ({"products": np.array([[np.nan, 1, 2], [0, 0, 0]])}, "NaN or infinite"),
    "negative square": ({"products": np.array([[0.0, -1, 2], [0, 0, 0]])}, "squares below 0"),
    "beyond Cauchy and Schwarz": ({"products": np.array([[1.5, 1, 2], [0, 0, 0]])}, "larger than the norms allow"),
    "no tokens": ({"lengths": np.array([[1, 0], [1, 1]])}, "impossible number of tokens"),
    "twice": ({"content": np.zeros((2, 4), np.int64)}, "a pair twice"),
    "shape": ({"products": np.zeros((2, 2))}, "header is not that of a shard"),
    "dtype": ({"products": np.zeros((2, 3), np.float32)}, "header is not that of a shard"),
    "rows": ({"lengths": np.ones((3, 2), np.int64)}, "header is not that of a shard"),
}


@pytest.mark.parametrize("case", FORGED.values(), ids=FORGED)
def test_numbers_that_cannot_be_are_damage(tmp_path, case):
    """Under a name that fits their bytes."""
    arrays, reason = case
    folder = filled(tmp_path, values(4)).folder
    assert verify(tmp_path) == []
    path = write_pair_shard(folder, KEY.digest(), changed(SOUND, **arrays))
    assert [(damage.path, reason in damage.reason) for damage in verify(tmp_path)] == [(path, True)]
    assert len(PairTable.open(LogpStore.open(tmp_path, KEY))) == 0


def test_products_of_another_store_are_not_used(tmp_path, caplog):
    folder = filled(tmp_path, values(4)).folder
    path = write_pair_shard(folder, OTHER.digest(), SOUND)
    assert [damage.reason for damage in verify(tmp_path)] == [f"it belongs to another store, {OTHER.digest()}"]
    assert len(PairTable.open(LogpStore.open(tmp_path, KEY))) == 0
    assert path.name in caplog.text


def test_a_newer_format_is_refused(tmp_path, monkeypatch):
    folder = filled(tmp_path, values(4)).folder
    monkeypatch.setattr("holdfast.store.shard.FORMAT", 2)
    path = write_pair_shard(folder, KEY.digest(), SOUND)
    monkeypatch.undo()
    with pytest.raises(NewerFormatError, match="Update holdfast"):
        open_pair_shard(path, KEY.digest())
    assert stores(tmp_path)[0].num_damaged == 1


def test_files_of_a_user_who_is_not_believed_stay_and_are_not_used(tmp_path, monkeypatch, caplog):
    folder = with_pairs(tmp_path, products(3)).folder
    monkeypatch.setattr(Trust, "of", lambda folder: Trust(users=frozenset({1_234_567})))
    assert len(PairTable.open(LogpStore(tmp_path, KEY))) == 0
    assert "left in place" in caplog.text
    assert len(pair_shard_paths(folder)) == 1


def test_merging_and_removing(tmp_path):
    found = products(40)
    folder = with_pairs(tmp_path, found, num_per_file=3).folder
    reader = PairTable.open(LogpStore.open(tmp_path, KEY))
    assert len(pair_shard_paths(folder)) == 14
    num_bytes = sum(path.stat().st_size for path in folder.iterdir())
    assert stores(tmp_path)[0].num_bytes == num_bytes
    assert merge(folder) == 14 + 2
    assert len(pair_shard_paths(folder)) == 1
    reader.refresh()
    for table in (reader, PairTable.open(LogpStore.open(tmp_path, KEY))):
        assert np.array_equal(table.find(*asked(found)), np.array([*found.values()]))
        assert len(table) == 40
    assert merge(folder) == 0
    (step,) = cleanup_steps(tmp_path, max_bytes=0)
    assert carry_out(step) == []
    assert not folder.exists()


def test_a_clean_up_merges_files_of_products_alone(tmp_path):
    folder = with_pairs(tmp_path, products(9), num_per_file=3).folder
    merge(folder)
    table = PairTable.open(LogpStore.open(tmp_path, KEY))
    table.add(products(2, seed=5))
    table.flush()
    (step,) = cleanup_steps(tmp_path)
    assert (step.action, step.reason) == ("merge shards", "2 small shards into larger ones")
    carry_out(step)
    assert cleanup_steps(tmp_path) == []


def test_export_and_import(tmp_path, monkeypatch):
    monkeypatch.setattr("holdfast.store.exported_pairs.MOST_PAIRS_TOGETHER", 7)
    found = products(20)
    folder = with_pairs(tmp_path / "store", found, num_per_file=6).folder
    file = tmp_path / "out.parquet"
    export_store(folder, file)
    metadata = pq.read_metadata(file).metadata
    assert sum(name.startswith(PAIRS) for name in metadata) == 3
    import_store(tmp_path / "other", file)
    table = PairTable.open(LogpStore.open(tmp_path / "other", KEY))
    assert np.array_equal(table.find(*asked(found)), np.array([*found.values()]))
    import_store(tmp_path / "other", file)
    assert len(pair_shard_paths(tmp_path / "other" / KEY.digest())) == 1  # nothing new
    assert verify(tmp_path / "other") == []


def test_a_store_without_products_is_exported_as_before(tmp_path):
    opened = filled(tmp_path / "store", values(20))
    export_store(opened.folder, tmp_path / "out.parquet")
    assert not any(name.startswith(PAIRS) for name in pq.read_metadata(tmp_path / "out.parquet").metadata)
    assert import_store(tmp_path / "other", tmp_path / "out.parquet").num_new == 20
    assert pair_shard_paths(tmp_path / "other" / KEY.digest()) == []


def test_a_damaged_store_is_not_exported(tmp_path):
    folder = with_pairs(tmp_path / "store", products(3)).folder
    (path,) = pair_shard_paths(folder)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match="not all of it can be read"):
        export_store(folder, tmp_path / "out.parquet")


DAMAGED = {
    "digest": (lambda name, value: {name: value[:-1] + b"x"}, "do not have their digest"),
    "length": (lambda name, value: metadata_named(value[:-1]), "end within a pair"),
    "numbers": (lambda name, value: metadata_of(changed(SOUND, products=np.full((2, 3), -1.0))), "squares below 0"),
    "twice": (lambda name, value: {name: value} | metadata_of(SOUND.where(np.array([1]))), "a pair twice"),
}


def metadata_named(value: bytes) -> dict[bytes, bytes]:
    import xxhash

    return {PAIRS + xxhash.xxh3_128_hexdigest(value).encode(): value}


@pytest.mark.parametrize("case", DAMAGED.values(), ids=DAMAGED)
def test_damaged_products_of_an_exported_store_are_refused_before_anything_is_taken(tmp_path, monkeypatch, case):
    spoil, reason = case
    ((name, value),) = metadata_of(SOUND).items()
    with pytest.raises(DamagedError, match=reason):
        pairs_of(spoil(name, value))
    folder = with_pairs(tmp_path / "store", products(3)).folder
    monkeypatch.setattr("holdfast.store.parquet.metadata_of", lambda pairs: spoil(name, value))
    export_store(folder, tmp_path / "out.parquet")
    with pytest.raises(ValueError, match=f"its products of pairs are damaged: .*{reason}.*nothing was taken"):
        import_store(tmp_path / "other", tmp_path / "out.parquet")
    assert not (tmp_path / "other").exists()


def test_the_header_says_whose_it_is(tmp_path):
    folder = filled(tmp_path, values(4)).folder
    path = write_pair_shard(folder, KEY.digest(), SOUND)
    assert pair_shard.PAIR_NAME.fullmatch(path.name)
    assert pair_shard.pair_shard_header(path).sizes == {"M": 2}
    size = int.from_bytes(path.read_bytes()[:8], "little")
    header = json.loads(path.read_bytes()[8 : 8 + size])
    assert json.loads(header["__metadata__"]["holdfast"]) == {"format": 1, "key": KEY.digest()}


def test_sums_are_those_of_single_tokens(tmp_path):
    """In fp64, of completions in several shards, one of them not written yet; NaN for another length."""
    content = values(50)
    opened = filled(tmp_path, content)
    extra = values(3, seed=9)
    opened.add(extra)
    everything = content | extra
    ids = np.array([*everything], dtype=np.int64)
    lengths = np.array([len(value) for value in everything.values()])
    expected = [float(value.to(torch.float64).sum()) for value in everything.values()]
    assert opened.sums(ids, lengths) == pytest.approx(expected, abs=1e-12)
    assert np.isnan(opened.sums(ids, lengths + 1)).all()
    assert opened.sums(ids[:0], lengths[:0]).shape == (0,)
