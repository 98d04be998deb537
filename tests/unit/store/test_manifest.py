"""Manifests: what a folder says of itself, also where the manifest is missing, of another store or newer."""

import json
import re

import pytest

from holdfast.store.maintenance import stores, verify
from holdfast.store.manifest import MANIFEST
from holdfast.store.store import LogpStore
from stores import KEY, OTHER, filled, newer, same, tree, values


def test_a_folder_under_another_store_s_name_is_not_used(tmp_path, caplog):
    content = values(6)
    filled(tmp_path, content, key=OTHER).folder.rename(tmp_path / KEY.digest())
    assert len(verify(tmp_path)) == 2
    assert LogpStore.open(tmp_path, KEY).get(content) == {}
    assert "that of another store" in caplog.text
    assert verify(tmp_path) == []


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
