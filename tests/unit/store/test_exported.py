"""A file to import is checked whole, sizes before they are unpacked and every value, before anything is taken."""

import json
import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from holdfast.store import exported as exports
from holdfast.store.exported import SCHEMA, Batch, Checksum, read_exported
from holdfast.store.manifest import Manifest
from holdfast.store.parquet import export_store, import_store
from holdfast.store.store import LogpStore
from stores import KEY, exported, filled, same, values

SOUND = Manifest.new(KEY)
NUM = 100


def logps_of(lengths: list[int], value: float = -0.5) -> Any:
    offsets = pa.array(np.concatenate([[0], np.cumsum(lengths)]), pa.int64())
    return pa.LargeListArray.from_arrays(offsets, pa.array(np.full(sum(lengths), value, "f4"), pa.float32()))


def made(
    file: Path,
    lengths: list[int],
    *,
    value: float = -0.5,
    last: list[float] | None = None,
    ids: Any = None,
    **options: Any,
) -> Path:
    """An exported file of these completions, its checksum right. `last` are the log-probs of the last one."""
    logps = logps_of(lengths, value)
    if last is not None:
        logps = pa.concat_arrays([logps[:-1], pa.array([last], pa.large_list(pa.float32()))])
    ids = np.arange(2 * len(lengths)).reshape(-1, 2) if ids is None else np.array(ids)
    checksum = Checksum(SOUND)
    flat, sizes = logps.flatten().to_numpy(), logps.value_lengths().to_numpy()
    checksum.update(Batch(content=ids, lengths=sizes, logps=flat))
    table = pa.Table.from_arrays([pa.array(ids[:, 0]), pa.array(ids[:, 1]), logps], schema=SCHEMA)
    metadata = {exports.MANIFEST: SOUND.to_bytes(), exports.CHECKSUM: checksum.digest().encode()}
    pq.write_table(table.replace_schema_metadata(metadata), file, compression="zstd", **options)
    return file


FILES: dict[str, tuple[dict[str, Any], str]] = {
    "NaN in the last of many": ({"lengths": [1] * 17_000, "last": [math.nan]}, "NaN, infinite or above 0"),
    "infinity": ({"lengths": [1, 1], "last": [-math.inf]}, "NaN, infinite or above 0"),
    "above 0": ({"lengths": [1] * 17_000, "last": [5.0]}, "NaN, infinite or above 0"),
    "a completion twice": ({"lengths": [2, 2, 2], "ids": [[1, 2], [3, 4], [1, 2]]}, "a completion twice"),
    "one too long": ({"lengths": [1_001]}, "1,001 log-probs in 1 row"),
    "one too long among short ones": (
        {"lengths": [1] * 9 + [1_001]},
        "a completion has 1,001 tokens; 1,000 are the most",
    ),
    "too many for its bytes": ({"lengths": [1_000] * 4_000}, "rows, too many for its"),
    "too many rows for its bytes": (
        {"lengths": [0] * 300_000, "ids": np.zeros((300_000, 2), int), "row_group_size": 300_000},
        "rows, too many for its",
    ),
}


@pytest.mark.parametrize("kind", FILES)
def test_an_import_takes_nothing_of_a_file_that_cannot_be(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exports, "MOST_TOKENS", 1_000)
    options, reason = FILES[kind]
    file = made(tmp_path / "out.parquet", **options)
    with pytest.raises(ValueError, match=f"damaged or something else: .*{reason}.*nothing was taken from it"):
        import_store(tmp_path / "root", file)
    assert not (tmp_path / "root").exists()


@pytest.mark.nightly
def test_sizes_are_compared_before_anything_is_unpacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A hundred million log-probs in a file of some kilobytes."""
    file = made(tmp_path / "out.parquet", [10**8])
    assert file.stat().st_size < 100_000
    monkeypatch.setattr(exports, "batches", None)
    with pytest.raises(
        ValueError, match=r"a row group has 100,000,000 log-probs in 1 row\(s\); a completion has at most"
    ):
        read_exported(file)


def test_a_row_group_is_not_too_large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = made(tmp_path / "out.parquet", [60, 60])
    monkeypatch.setattr(exports, "MOST_GROUP_TOKENS", 100)
    with pytest.raises(ValueError, match=r"a row group has 120 log-probs in 2 row\(s\).* a row group at most 100"):
        read_exported(file)


@pytest.mark.parametrize("lengths", [[2**16], [0], [0, 0, 3], []])
def test_what_is_sound_is_taken(tmp_path: Path, lengths: list[int]) -> None:
    report = import_store(tmp_path / "root", made(tmp_path / "out.parquet", lengths))
    assert (report.num_new, report.num_tokens) == (len(lengths), sum(lengths))


def test_completions_of_one_id_and_several_lengths_are_all_taken(tmp_path: Path) -> None:
    file = made(tmp_path / "out.parquet", [1, 2, 3], ids=[[7, 7], [7, 7], [8, 8]])
    assert import_store(tmp_path / "root", file).num_new == 3
    assert len(LogpStore.open(tmp_path / "root", KEY).get([(7, 7)], [1])[7, 7]) == 1
    assert len(LogpStore.open(tmp_path / "root", KEY).get([(7, 7)], [2])[7, 7]) == 2


def test_batches_are_small_in_both_directions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Written and read in parts by rows and by tokens, the content is the same."""
    content = values(200)
    whole = exported(tmp_path, content, num_per_shard=200)
    checksum = pq.read_metadata(whole).metadata[exports.CHECKSUM]
    assert pq.read_metadata(whole).num_row_groups == 1
    for name in ("holdfast.store.exported", "holdfast.store.parquet"):
        monkeypatch.setattr(f"{name}.BATCH_ROWS", 30)
        monkeypatch.setattr(f"{name}.BATCH_TOKENS", 100)
    export_store(tmp_path / "store" / KEY.digest(), tmp_path / "parts.parquet")
    metadata = pq.read_metadata(tmp_path / "parts.parquet")
    assert metadata.metadata[exports.CHECKSUM] == checksum
    groups = [metadata.row_group(number) for number in range(metadata.num_row_groups)]
    assert max(group.num_rows for group in groups) <= 30
    assert max(group.column(2).num_values for group in groups) <= 100 + 9
    for number, file in enumerate((whole, tmp_path / "parts.parquet")):
        import_store(tmp_path / f"{number}", file)
        assert same(LogpStore.open(tmp_path / f"{number}", KEY).get(content), content)


METADATA: dict[str, dict[bytes, bytes]] = {
    "no manifest": {exports.CHECKSUM: b"0"},
    "no checksum": {exports.MANIFEST: SOUND.to_bytes()},
    "a manifest nested deep": {exports.MANIFEST: b"[" * 100_000, exports.CHECKSUM: b"0"},
    "a manifest that is none": {exports.MANIFEST: b"{}", exports.CHECKSUM: b"0"},
    "a manifest that is not UTF-8": {exports.MANIFEST: b"\xff" * 40, exports.CHECKSUM: b"0"},
    "a checksum that is not UTF-8": {exports.MANIFEST: SOUND.to_bytes(), exports.CHECKSUM: b"\xff"},
}


@pytest.mark.parametrize("kind", METADATA)
def test_odd_metadata(tmp_path: Path, kind: str) -> None:
    file = tmp_path / "out.parquet"
    table = pq.read_table(made(tmp_path / "sound.parquet", [1, 2]))
    pq.write_table(table.replace_schema_metadata(METADATA[kind]), file)
    with pytest.raises(ValueError, match="it is damaged or something else"):
        import_store(tmp_path / "root", file)
    assert not (tmp_path / "root").exists()


@pytest.mark.parametrize(
    "schema",
    [
        [("content_high", pa.int64()), ("content_low", pa.int64())],
        [("content_high", pa.int64()), ("logps", pa.large_list(pa.float32())), ("content_low", pa.int64())],
        [("content_high", pa.int64()), ("content_low", pa.string()), ("logps", pa.large_list(pa.float32()))],
        [
            ("content_high", pa.int64()),
            ("content_low", pa.int64()),
            ("logps", pa.large_list(pa.large_list(pa.float32()))),
        ],
        [("content_high", pa.int64()), ("content_low", pa.int64()), ("logps", pa.float32())],
        [],
    ],
)
def test_other_columns(tmp_path: Path, schema: list[Any]) -> None:
    metadata = {exports.MANIFEST: SOUND.to_bytes(), exports.CHECKSUM: b"0"}
    pq.write_table(pa.schema(schema).empty_table().replace_schema_metadata(metadata), tmp_path / "out.parquet")
    with pytest.raises(ValueError, match=r"damaged or something else: its columns are \["):
        read_exported(tmp_path / "out.parquet")


def test_what_was_checked_is_taken_though_the_file_is_another_by_then(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = values(20)
    file, other = exported(tmp_path, content), made(tmp_path / "other.parquet", [3], value=-9.0)
    original = LogpStore.open

    def opened(*arguments: Any) -> LogpStore:
        other.replace(file)
        return original(*arguments)

    monkeypatch.setattr(LogpStore, "open", opened)
    import_store(tmp_path / "root", file)
    monkeypatch.undo()
    assert same(LogpStore.open(tmp_path / "root", KEY).get([*content, (0, 1)]), content)


@pytest.mark.parametrize("kind", ["folder", "pipe", "no parent", "parent is a file"])
def test_where_nothing_can_be_exported_to(tmp_path: Path, kind: str) -> None:
    folder = filled(tmp_path / "store", values(3)).folder
    target = tmp_path / "out"
    if kind == "folder":
        target.mkdir()
    elif kind == "pipe":
        os.mkfifo(target)
    else:
        target = target / "out"
        if kind == "parent is a file":
            (tmp_path / "out").write_text("mine")
    before = sorted(tmp_path.iterdir())
    with pytest.raises(
        ValueError, match=r"a store was to be exported to .*, where there is (no|something).*Give the path"
    ):
        export_store(folder, target)
    assert sorted(tmp_path.iterdir()) == before


def test_an_export_through_a_link_leaves_the_link(tmp_path: Path) -> None:
    folder = filled(tmp_path / "store", values(3)).folder
    (tmp_path / "link").symlink_to(tmp_path / "out")
    export_store(folder, tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert json.loads(pq.read_metadata(tmp_path / "out").metadata[exports.MANIFEST])["format"] == 1
