"""Processes that have loaded parts of unlike models (`policy.loaded_files`)."""

from pathlib import Path
from typing import Any

import pytest

from families import tiny_model
from holdfast.policy import loaded_files
from holdfast.policy.loaded_files import check_same_files


def _gathered(*folders: Path) -> Any:
    """What `gather_object` returns where process i has loaded from the i-th folder."""
    return lambda _: [({file.name: loaded_files._sampled(file) for file in folder.glob("*.safetensors")}, str(folder))
                      for folder in folders]  # fmt: skip


def test_other_files_in_another_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Copies of one model in two folders are one model; a model of another seed is another."""
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        tiny_model(seed=seed).save_pretrained(tmp_path / name)
    monkeypatch.setattr(loaded_files, "gather_object", _gathered(tmp_path / "a", tmp_path / "b"))
    check_same_files(tiny_model())
    monkeypatch.setattr(loaded_files, "gather_object", _gathered(tmp_path / "a", tmp_path / "c"))
    with pytest.raises(ValueError, match=r"by process 1, and `model\.safetensors` is not the same file"):
        check_same_files(tiny_model())


def test_a_model_of_no_local_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is known of its files."""
    monkeypatch.setattr(loaded_files, "gather_object", lambda own: own * 2)
    check_same_files(tiny_model())
