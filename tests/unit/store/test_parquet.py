"""Stores in one file and back, and files that are refused."""

import random
import re
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from holdfast.store.key import StoreKey
from holdfast.store.maintenance import verify
from holdfast.store.parquet import coverage, export_store, import_store
from holdfast.store.shard import shard_paths
from holdfast.store.store import LogpStore
from stores import KEY, OTHER, damaged, exported, filled, newer, same, values


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
    other = StoreKey(
        weights_digest=KEY.weights_digest, config_digest=KEY.config_digest, numerics={"dtype": "torch.float32"}
    )
    with pytest.raises(
        ValueError, match=r"were to be imported; .* \(tiny policy, bf16\), whose 'numerics' is .*Export"
    ):
        import_store(tmp_path / "other", file, other)
    with pytest.raises(ValueError, match=f"whose 'weights' is '{KEY.weights_digest}', not '{OTHER.weights_digest}'"):
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
