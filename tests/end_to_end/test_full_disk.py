"""A disk that is full in a checkpoint or in the final save: one message, nothing half-written, and the run goes on.

The disk is made full by a limit on the size of files, which the system reports at the very byte, to whichever library
writes. The sizes are random. The resumed run is the uninterrupted one, bit for bit.
"""

import contextlib
import errno
import json
import math
import random
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM

from families import tiny_model
from holdfast.checkpoint.disk_error import DiskError, writing
from holdfast.checkpoint.manifest import complete_checkpoints
from holdfast.checkpoint.sound import check_sound
from holdfast.reference.identity.digests import digest
from policies import POLICIES, config, logged, rows, tiny_tokenizer, trainer

resource = pytest.importorskip("resource", reason="no limits on the size of files here")

pytestmark = pytest.mark.slow

OPTIONS = {"save_strategy": "steps", "save_steps": 2, "optim": "adamw_torch", "learning_rate": 0.01}
MOVING = {"sync_ref_model": True, "ref_model_mixup_alpha": 0.3, "ref_model_sync_steps": 1}
ROOM = r"but there is no room for it: .*, [\d,]+ bytes are free\. What was written of it is removed\. Free some space"
MANY, FEW = 20, 2


@contextlib.contextmanager
def files_up_to(num_bytes: int) -> Iterator[None]:
    """No file of this process gets larger."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def limited(method: Callable[..., Any], num_bytes: int) -> Callable[..., Any]:
    """The method, under the limit."""

    def called(*args: Any, **kwargs: Any) -> Any:
        with files_up_to(num_bytes):
            return method(*args, **kwargs)

    return called


def sizes(kind: str, largest: int) -> list[Any]:
    """Random sizes on a logarithmic scale, below `largest`; most of them for the night."""
    draw = random.Random(kind)
    drawn = [int(math.exp(draw.uniform(0, math.log(largest)))) - 1 for _ in range(MANY)]
    return [pytest.param(size, marks=[] if turn < FEW else pytest.mark.nightly) for turn, size in enumerate(drawn)]


def contents(folder: Path) -> dict[str, bytes]:
    """All files in a folder, by path."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The run that never met a full disk."""
    ours = trainer(tiny_model(), config(tmp_path_factory.mktemp("whole"), **OPTIONS | MOVING))
    ours.train()
    return ours


@pytest.mark.parametrize("size", sizes("checkpoint", 80_000))
def test_full_in_a_checkpoint(size: int, whole: Any, tmp_path: Path) -> None:
    args = config(tmp_path, **OPTIONS | MOVING | {"save_total_limit": 1})
    ours: Any = trainer(tiny_model(), args)
    save = ours._save_checkpoint
    ours._save_checkpoint = lambda *a: (limited(save, size) if ours.state.global_step == 4 else save)(*a)
    checkpoint = tmp_path / "checkpoint-2"
    with pytest.raises(ValueError, match=rf"to be written to {tmp_path}, {ROOM}.* resume from {checkpoint}, the last"):
        ours.train()
    assert complete_checkpoints(tmp_path) == [checkpoint] == list(tmp_path.glob("checkpoint-*"))
    assert not (tmp_path / "_saving").exists()
    check_sound(checkpoint, "")
    resumed: Any = trainer(tiny_model(), args)
    resumed.train(resume_from_checkpoint=True)
    assert logged(resumed) == logged(whole)
    assert digest(resumed.model.named_parameters()) == digest(whole.model.named_parameters())
    assert digest(resumed.reference.state_dict().items()) == digest(whole.reference.state_dict().items())


def test_full_in_the_first_checkpoint(tmp_path: Path) -> None:
    ours = trainer(tiny_model(), config(tmp_path, **OPTIONS))
    ours._save_checkpoint = limited(ours._save_checkpoint, 5_000)
    with pytest.raises(
        ValueError, match=rf"the checkpoint checkpoint-2 was .*{ROOM}.*start again: there is no complete"
    ):
        ours.train()
    assert {path.name for path in tmp_path.iterdir()} == {"README.md", "record"}


@pytest.mark.parametrize("size", sizes("final", 80_000))
def test_full_in_the_final_save(size: int, whole: Any, tmp_path: Path) -> None:
    """An earlier model there stays whole, and is replaced once there is room."""
    trainer(tiny_model(seed=3), config(tmp_path, **OPTIONS)).save_model()
    before = contents(tmp_path)
    ours = trainer(tiny_model(), config(tmp_path, **OPTIONS | MOVING))
    ours.train()
    with pytest.raises(
        ValueError, match=rf"the trained model was .*{ROOM}.*resume from {tmp_path / 'checkpoint-4'}, the"
    ):
        limited(ours.save_model, size)()
    after = contents(tmp_path)
    assert {name: after[name] for name in before} == before
    assert {name.split("/")[0] for name in after.keys() - before.keys()} == {
        "checkpoint-2",
        "checkpoint-4",
        "README.md",
        "record",
    }
    resumed = trainer(tiny_model(), config(tmp_path, **OPTIONS | MOVING))
    resumed.train(resume_from_checkpoint=True)
    resumed.save_model()
    found = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert digest(found.named_parameters()) == digest(whole.model.named_parameters())


def small_saves(ours: Any) -> dict[str, Callable[[], None]]:
    """What is written beside the model, by its file."""
    return {
        "trainer_state.json": ours.save_state,
        "train_results.json": lambda: ours.save_metrics("train", {"train_loss": 0.5}),
        "all_results.json": lambda: ours.save_metrics("eval", {f"eval_{number}": 0.5 for number in range(200)}),
        "README.md": ours.create_model_card,
    }


def test_full_in_the_small_files(whole: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(whole.args, "output_dir", str(tmp_path))
    for save in small_saves(whole).values():
        save()
    before = contents(tmp_path)
    assert json.loads(before["all_results.json"]).keys() >= {"train_loss", "eval_199"}
    for name, save in small_saves(whole).items():
        for size in (0, 3, len(before[name]) // 2, len(before[name]) - 1):
            with pytest.raises(ValueError, match=rf"was to be written to {tmp_path}, {ROOM}.*(train|start) again"):
                limited(save, size)()
            assert contents(tmp_path) == before, name
    (tmp_path / "all_results.json").write_text('{"a half')  # as an earlier version left it
    whole.save_metrics("train", {"train_loss": 0.25})
    assert json.loads((tmp_path / "all_results.json").read_text()) == {"train_loss": 0.25}


@pytest.mark.parametrize("strategy", ["steps", "epoch", "best"])
@pytest.mark.parametrize("more", [{}, {"load_best_model_at_end": True, "save_total_limit": 1}])
def test_a_final_save_can_be_finished_by_resuming(
    strategy: str, more: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """After the last step there is a checkpoint to resume, whenever checkpoints are saved at all. Where the best step
    has none, the last one's model is what both runs end with, and that is said."""
    options = OPTIONS | {"save_strategy": strategy, "save_steps": 3, "eval_strategy": "steps", "eval_steps": 1, **more}
    if strategy == "epoch":
        options["eval_strategy"] = "epoch"
    if strategy == "best" or more:
        options["metric_for_best_model"] = "eval_loss"
    ours = trainer(tiny_model(), config(tmp_path, **options), eval_dataset=rows(6, seed=2))
    ours.train()
    (last, *_) = reversed(complete_checkpoints(tmp_path))
    assert last.name == "checkpoint-4" or strategy == "best" or more
    said = [message for message in caplog.messages if "the model stays that of the last step" in message]
    assert len(said) == (strategy == "steps" and bool(more))
    with pytest.raises(
        ValueError, match=rf"the trained model .* resume from {last}, the last complete checkpoint: resume"
    ):
        limited(ours.save_model, 1_000)()
    resumed = trainer(tiny_model(), config(tmp_path, **options), eval_dataset=rows(6, seed=2))
    resumed.train(resume_from_checkpoint=str(last))
    assert digest(resumed.model.named_parameters()) == digest(ours.model.named_parameters())


def test_without_checkpoints_the_model_in_memory_is_named(tmp_path: Path) -> None:
    left = tmp_path / "_saving" / "left"
    left.mkdir(parents=True)
    left.with_suffix(".lock").touch()  # as a run leaves it that was killed in its final save
    ours = trainer(tiny_model(), config(tmp_path))
    ours.train()
    assert not left.parent.exists()
    with pytest.raises(ValueError, match=rf"{ROOM}.*then call this again, or train again"):
        limited(ours.save_model, 1_000)()
    ours.save_model()
    found = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert digest(found.named_parameters()) == digest(ours.model.named_parameters())


@pytest.mark.parametrize("kind", ["lora_sft", "lora_fresh_over_sft"])
def test_adapters_too(kind: str, tmp_path: Path) -> None:
    ours = trainer(POLICIES[kind](), config(tmp_path))
    ours.save_model()
    before = contents(tmp_path)
    with pytest.raises(ValueError, match=ROOM):
        limited(ours.save_model, 500)()
    assert contents(tmp_path) == before


# --- what libraries say -----------------------------------------------------------------------------------------------


def to_full_device(path: Path) -> dict[str, Callable[[], object]]:
    """What writes to `path`."""
    return {
        "json": lambda: path.write_text("x" * 100_000),
        "torch": lambda: torch.save({"a": torch.ones(100_000)}, path),
        "torch, few bytes": lambda: torch.save({"a": 1}, path),
        "tokenizers": lambda: tiny_tokenizer().backend_tokenizer.save(str(path)),
    }


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
@pytest.mark.parametrize("library", ["json", "torch", "torch, few bytes", "tokenizers"])
def test_every_library_s_error_is_known(library: str, tmp_path: Path) -> None:
    (tmp_path / "full").symlink_to("/dev/full")
    message = rf"a file was to be written to {tmp_path}, {ROOM}.*, then go on\."
    with pytest.raises(ValueError, match=message), writing("a file", tmp_path, lambda: "go on"):
        to_full_device(tmp_path / "full")[library]()


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (OSError(errno.EDQUOT, "Disk quota exceeded"), ("Disk quota exceeded", True)),
        (OSError(errno.EROFS, "Read-only file system"), ("Read-only file system", False)),
        (PermissionError(errno.EACCES, "Permission denied"), ("Permission denied", False)),
        (SafetensorError("I/O error: No space left on device (os error 28)"), ("No space left on device", True)),
        (SafetensorError("I/O error: Permission denied (os error 13)"), ("Permission denied", False)),
        (ConnectionResetError(errno.ECONNRESET, "the hub"), None),
        (RuntimeError("shapes differ"), None),
        (ValueError("no"), None),
    ],
)
def test_what_is_an_error_of_the_disk(error: Exception, expected: tuple[str, bool] | None) -> None:
    found = DiskError.of(error)
    assert (found and (found.reason, found.is_full)) == expected


def test_a_folder_that_cannot_be_written_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ours = trainer(tiny_model(), config(tmp_path, **OPTIONS))

    def refuse(*args: Any) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(ours, "_save_optimizer_and_scheduler", refuse)
    message = re.escape(
        f"checkpoint-2 was to be written to {tmp_path}, which cannot be written to (Permission denied)."
    )
    with pytest.raises(ValueError, match=message):
        ours.train()
    assert not list(tmp_path.glob("checkpoint-*"))
