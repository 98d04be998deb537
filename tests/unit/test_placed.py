"""Files that are moved into a folder: at every instant it holds one whole model, or none that is taken for one."""

import contextlib
import itertools
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from holdfast.checkpoint import placed as module
from holdfast.checkpoint.placed import move_into, placed, remove_what_a_kill_left, write_text
from holdfast.reference.run_folder import RunFolder

INDEX = "model.safetensors.index.json"
MODELS: dict[str, list[str]] = {
    "nothing": [],
    "single": ["config.json", "model.safetensors"],
    "two shards": ["config.json", INDEX, *(f"model-0000{number}-of-00002.safetensors" for number in (1, 2))],
    "three shards": ["config.json", INDEX, *(f"model-0000{number}-of-00003.safetensors" for number in (1, 2, 3))],
    "adapters": ["README.md", "adapter_config.json", "adapter_model.safetensors", "dpo/adapter_model.safetensors"],
}


class Killed(BaseException):
    """In place of a kill: nothing is cleaned up that must not count on it."""


def write(folder: Path, model: str, generation: str) -> None:
    """The model's files; each holds its generation, an index the names of the shards too."""
    for name in MODELS[model]:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(generation)


def weights(folder: Path) -> list[str]:
    """The generations of the weights that a library would load from the folder, as transformers chooses: the single
    file, else what the index lists. An index that lists what is not there is an error, and nothing is loaded."""
    if (folder / "model.safetensors").exists():
        return [(folder / "model.safetensors").read_text()]
    if not (folder / INDEX).exists():
        return []
    generation = (folder / INDEX).read_text()
    num_shards = 2 if "two" in generation else 3
    shards = [folder / f"model-{number:05}-of-{num_shards:05}.safetensors" for number in range(1, num_shards + 1)]
    return [shard.read_text() for shard in shards] if all(shard.exists() for shard in shards) else []


@pytest.mark.parametrize("before", ["nothing", "single", "two shards", "three shards"])
@pytest.mark.parametrize("after", ["single", "two shards", "three shards"])
def test_a_kill_between_two_moves(before: str, after: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However far the move gets, no two generations are mixed, and in the end there is the new one alone."""
    old, new = f"old {before}", f"new {after}"
    for turn in itertools.count():
        folder, staged = tmp_path / f"folder-{turn}", tmp_path / f"staged-{turn}"
        folder.mkdir()
        staged.mkdir()
        write(folder, before, old)
        (folder / "notes.txt").write_text("mine")
        write(staged, after, new)
        is_killed = killed_after(turn, staged, folder, monkeypatch)
        found = set(weights(folder))
        assert found in ({old}, {new}, set()), f"after {turn} steps: {found}"
        if before == "single" or after == "single":  # no window in which there is none
            assert found or before == "nothing"
        if not is_killed:
            assert found == {new}
            assert {path.name for path in folder.iterdir()} == {*MODELS[after], "notes.txt"}
            return


def killed_after(turn: int, staged: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Moves, but ends before step `turn`; whether it came to that."""
    steps = itertools.count()

    def step(plain: Any) -> Any:
        def called(*args: Any, **kwargs: Any) -> Any:
            if next(steps) == turn:
                raise Killed
            return plain(*args, **kwargs)

        return called

    with monkeypatch.context() as patch:
        patch.setattr(module.os, "replace", step(os.replace))
        patch.setattr(Path, "unlink", step(Path.unlink))
        try:
            move_into(staged, folder)
        except Killed:
            return True
    return False


def test_adapters_are_moved_with_their_folders(tmp_path: Path) -> None:
    write(tmp_path, "single", "the base")
    with placed(tmp_path, "an adapter", lambda: "go on") as staged:
        write(staged, "adapters", "new")
    assert (tmp_path / "dpo" / "adapter_model.safetensors").read_text() == "new"
    assert (tmp_path / "model.safetensors").read_text() == "the base"
    assert not (tmp_path / "_saving").exists()


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt(), RuntimeError("no")])
def test_nothing_is_moved_after_an_error(error: BaseException, tmp_path: Path) -> None:
    write(tmp_path, "single", "old")
    with contextlib.suppress(ValueError, KeyboardInterrupt, RuntimeError), placed(tmp_path, "it", str) as staged:
        write(staged, "single", "new")
        raise error
    assert weights(tmp_path) == ["old"]
    assert {path.name for path in tmp_path.iterdir()} == set(MODELS["single"])


def test_a_folder_where_a_file_should_be_is_named_and_nothing_is_moved(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").mkdir()
    message = r"the model was to be written to .*, which cannot be written to \(model.safetensors is a folder there\)"
    with pytest.raises(ValueError, match=message), placed(tmp_path, "the model", lambda: "go on") as staged:
        write(staged, "single", "new")
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]


def test_what_a_kill_left_is_removed(tmp_path: Path) -> None:
    """But not what a process that lives is writing."""
    living = RunFolder(tmp_path / "_saving")
    (living.path() / "model.safetensors").write_text("half")
    left = tmp_path / "_saving" / "left"
    left.mkdir()
    (left / "model.safetensors").write_text("half")
    left.with_suffix(".lock").write_text("")
    remove_what_a_kill_left(tmp_path)
    assert not left.exists()
    assert living.path().exists()
    living.remove()
    remove_what_a_kill_left(tmp_path)
    assert list(tmp_path.iterdir()) == []
    remove_what_a_kill_left(tmp_path / "nowhere")


def test_a_text_is_replaced_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_text(tmp_path / "run.yaml", "a: 1\n", lambda: "go on")
    shutil.copy(tmp_path / "run.yaml", tmp_path / "copy")
    monkeypatch.setattr(
        module, "move_into", lambda *args: (_ for _ in ()).throw(OSError(28, "No space left on device"))
    )
    with pytest.raises(ValueError, match=r"run.yaml was to be written to .* no room for it: No space .*, then go on"):
        write_text(tmp_path / "run.yaml", "a: 2\n", lambda: "go on")
    assert (tmp_path / "run.yaml").read_text() == "a: 1\n"
