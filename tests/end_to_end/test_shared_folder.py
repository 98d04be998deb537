"""Two runs in one output folder, in turn and at once: each keeps its reference, and the second is told of the first."""

import gc
import logging
import os
import sys
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerCallback

from families import tiny_model
from policies import POLICIES, config, logged, rows, trainer

pytestmark = pytest.mark.slow

DISK = {"reference": "snapshot", "snapshot_device": "disk"}
SOFT = {"sync_ref_model": True, "ref_model_mixup_alpha": 0.3, "ref_model_sync_steps": 2}
WAYS_ON_DISK: dict[str, dict[str, Any]] = {
    "snapshot": DISK,
    "snapshot, windowed": DISK | {"reference_window": 2},
    "snapshot, synced": DISK | SOFT,
    "offloaded": {"reference": "precomputed"},
}
"""References that keep something in the output folder."""


def make_trainer(folder: Path, way: str, kind: str = "full", seed: int = 0, **options: Any) -> Any:
    """A trainer whose reference depends on `seed`."""
    policy = tiny_model(seed=seed) if kind == "full" else POLICIES[kind]()
    arguments: dict[str, Any] = {}
    if way == "offloaded":
        arguments["ref_model"] = tiny_model(seed=seed + 20)
        options["reference_store"] = str(folder / f"store-{seed}")
    return trainer(policy, config(folder, **WAYS_ON_DISK[way], **options), **arguments)


def files(folder: Path) -> dict[Path, bytes]:
    """What is in `_reference`, by path."""
    return {path: path.read_bytes() for path in (folder / "_reference").rglob("*.safetensors")}


@pytest.mark.covering(1)
@pytest.mark.parametrize("way", WAYS_ON_DISK)
@pytest.mark.parametrize("kind", ["full", "lora_fresh"])
def test_a_second_run_leaves_the_reference_of_the_first(kind: str, way: str, tmp_path: Path) -> None:
    """In turn: another trainer trains in the same folder; the first one's reference has the same weights afterwards,
    the same files byte for byte, and says the same of data that nobody asked about before."""
    first = make_trainer(tmp_path, way, kind)
    first.train()
    before, written = first.reference.identity().weights_digest, files(tmp_path)
    assert written
    expected = first.evaluate(rows(5, 7))
    second = make_trainer(tmp_path, way, kind, seed=9)
    second.train()
    assert first.reference.identity().weights_digest == before
    found = files(tmp_path)
    assert {path: found[path] for path in written} == written
    assert len({path.parent for path in found}) == 2
    again = first.evaluate(rows(5, 7))
    assert again["eval_loss"] == expected["eval_loss"]
    if kind == "full":
        assert second.reference.identity().weights_digest != before


@pytest.mark.parametrize("way", WAYS_ON_DISK)
def test_two_runs_at_once_come_to_what_each_comes_to_alone(
    way: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """After the first one's second step another run trains from its beginning to its end; both save. Losses, weights
    and references are those of each alone, and one line tells the second of the first."""

    class Begins(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 2:
                second.train()

    saving = {"save_strategy": "steps", "save_steps": 4}
    alone = {seed: make_trainer(tmp_path / f"alone-{seed}", way, seed=seed, **saving) for seed in (0, 9)}
    for ours in alone.values():
        ours.train()
    caplog.clear()
    first, second = (make_trainer(tmp_path / "both", way, seed=seed, **saving) for seed in (0, 9))
    first.add_callback(Begins())
    with caplog.at_level(logging.WARNING):
        first.train()
    for ours, expected in ((first, alone[0]), (second, alone[9])):
        assert logged(ours) == logged(expected)
        assert ours.reference.identity() == expected.reference.identity()
        for one, other in zip(ours.model.parameters(), expected.model.parameters(), strict=True):
            assert torch.equal(one, other)
    told = [record.getMessage() for record in caplog.records if "in use by another run" in record.getMessage()]
    (line,) = told
    assert f"{tmp_path / 'both'} is in use by another run (process {os.getpid()} on" in line
    assert "give each run an output_dir" in line


def test_a_run_that_is_over_is_no_other_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Nothing is said of a run that ended, by an exception or well, though its trainer is still there."""

    class Fails(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            raise RuntimeError("of the user's")

    saving = {"save_strategy": "steps", "save_steps": 2}
    failed, ended = make_trainer(tmp_path, "snapshot", **saving), make_trainer(tmp_path, "snapshot", **saving)
    failed.add_callback(Fails())
    with pytest.raises(RuntimeError, match="of the user's"):
        failed.train()
    ended.train()
    make_trainer(tmp_path, "snapshot", **saving).train(resume_from_checkpoint=True)
    assert not [record for record in caplog.records if "another run" in record.getMessage()]
    assert len(files(tmp_path)) >= 2


def test_a_reference_on_disk_goes_with_its_trainer(tmp_path: Path) -> None:
    ours = make_trainer(tmp_path, "snapshot", save_strategy="steps", save_steps=2)
    ours.train()
    assert files(tmp_path)
    del ours
    gc.collect()
    assert not (tmp_path / "_reference").exists()


def test_a_snapshot_that_was_changed_on_disk_is_no_reference(tmp_path: Path) -> None:
    """Written over in the middle of a run: an error that names the tensor, before a loss is made of it."""

    class Writes(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            (file,) = files(tmp_path)
            content = bytearray(file.read_bytes())
            content[-4:] = b"\x00\x00\x80\x3f"
            file.write_bytes(content)

    ours = make_trainer(tmp_path, "snapshot")
    ours.add_callback(Writes())
    with pytest.raises(ValueError, match=r"'.*weight' was to be read from .*another than was written.*Start again"):
        ours.train()
    assert len(logged(ours)) == 1


# --- the files of a run -----------------------------------------------------------------------------------------------

OWNED = {
    "checkpoint-*": "named by the step; a second run is told",
    "_reference/*": "of random names",
    "README.md": "replaced as a whole, with the same for the same run",
    "_saving/*": "of random names, each locked by its process",
    "store/*": "claims and random names: see test_store_kills.py",
    "record": "one for the folder: a new run's replaces it, and a second run is told",
    "record/*": "facts are replaced as a whole, entries are appended in one write each, by the main process alone",
    "runs/*": "tensorboard's, with time, machine and process in their names",
}
"""What a run writes into its output folder, and why two runs don't meet there."""


@pytest.fixture
def written() -> Iterator[set[str]]:
    """The paths that are made or opened for writing from here on."""
    found: set[str] = set()
    is_on = [True]

    def heard(event: str, args: Any) -> None:
        if not is_on[0]:
            return
        if event == "open" and isinstance(args[0], str | os.PathLike) and (args[2] or 0) & (os.O_WRONLY | os.O_RDWR):
            found.add(os.fspath(args[0]))
        elif event in ("os.mkdir", "os.rename"):
            found.add(os.fspath(args[1] if event == "os.rename" else args[0]))

    sys.addaudithook(heard)
    yield found
    is_on[0] = False


@pytest.mark.parametrize("way", [*WAYS_ON_DISK, "model"])
def test_every_file_of_a_run_is_in_the_table(way: str, tmp_path: Path, written: set[str]) -> None:
    ways = WAYS_ON_DISK | {"model": {"reference": "model"}}
    store = {"reference_store": str(tmp_path / "store")} if way == "offloaded" else {}
    saving = {"save_strategy": "steps", "save_steps": 2, "eval_strategy": "steps", "eval_steps": 2}
    arguments: dict[str, Any] = {"ref_model": tiny_model(seed=5)} if way == "offloaded" else {}
    args = config(tmp_path, **ways[way], **store, **saving)
    ours = trainer(tiny_model(), args, eval_dataset=rows(4, 5), **arguments)
    ours.train()
    ours.train(resume_from_checkpoint=True)
    ours.predict(rows(4, 6))
    inside = [Path(path).relative_to(tmp_path) for path in written if Path(path).is_relative_to(tmp_path)]
    inside = [path for path in inside if path.parts and str(path) not in ("store", "_reference", "_saving")]
    strangers = {path for path in inside if not any(fnmatch(str(path), pattern) for pattern in OWNED)}
    assert {"checkpoint-2", "README.md"} <= {path.parts[0] for path in inside}
    assert not strangers
