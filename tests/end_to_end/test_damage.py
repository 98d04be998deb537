"""A checkpoint of which any file is not as it was saved is refused, in one message with another one to go on from."""

import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from checkpoints import DAMAGES, copied, cut, flip, make_earlier, manifest_of, put_fifo, put_folder, record_again
from families import tiny_model
from holdfast.checkpoint import files
from holdfast.checkpoint.manifest import read_manifest
from holdfast.reference.identity.digests import digest
from policies import POLICIES, config, logged, trainer

pytestmark = pytest.mark.slow

OPTIONS = {"save_strategy": "steps", "save_steps": 2, "optim": "adamw_torch", "learning_rate": 0.01}
OPTIONS |= {"sync_ref_model": True, "ref_model_mixup_alpha": 0.3, "ref_model_sync_steps": 1}
FILES = [
    "model.safetensors", "config.json", "generation_config.json", "optimizer.pt", "scheduler.pt", "rng_state.pth",
    "trainer_state.json", "training_args.bin", "tokenizer.json", "tokenizer_config.json", "reference/state.safetensors",
]  # fmt: skip


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run with two checkpoints."""
    folder = tmp_path_factory.mktemp("saved")
    trainer(tiny_model(), config(folder, **OPTIONS)).train()
    return folder


@pytest.fixture(scope="module")
def later(saved: Path) -> Any:
    """A trainer of the same run, which reads nothing but what it is told to."""
    return trainer(tiny_model(), config(saved, **OPTIONS))


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    """A copy of the run's folder."""
    return Path(shutil.copytree(saved, tmp_path / "run"))


def refused(later: Any, checkpoint: Path, what: str, *, sound: Path | None) -> None:
    """Resuming and restoring raise one error that names all there is to know."""
    way_on = (
        rf"{sound}; go on from there: resume_from_checkpoint='{sound}' \(or `--set training.resume_from_checkpoint="
    )
    end = way_on if sound is not None else "holds no other complete checkpoint"
    for read in (lambda: later.train(resume_from_checkpoint=str(checkpoint)), lambda: later.restore(str(checkpoint))):
        with pytest.raises(
            ValueError, match=rf"^Resuming from {checkpoint} was asked for, but .*{what}.*{end}"
        ) as found:
            read()
        assert len(str(found.value)) < 1500


def test_every_file_has_a_digest(saved: Path) -> None:
    manifest = read_manifest(saved / "checkpoint-4")
    found = {path.relative_to(saved / "checkpoint-4").as_posix() for path in (saved / "checkpoint-4").rglob("*.*")}
    assert set(manifest["files"]) == found - {"reference/manifest.json"}
    assert set(FILES) <= set(manifest["files"])
    for name, (num_bytes, _) in manifest["files"].items():
        assert (saved / "checkpoint-4" / name).stat().st_size == num_bytes


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("file", FILES)
def test_a_damaged_file_is_named(
    file: str, damage: str, later: Any, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint, harm = folder / "checkpoint-4", DAMAGES[damage]
    harm[0](checkpoint / file)
    if damage == "unreadable":
        make_unreadable(checkpoint / file, monkeypatch)
    refused(later, checkpoint, f"its file {file} {harm[1]}", sound=folder / "checkpoint-2")


def make_unreadable(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = files.os.open

    def opened(asked: Any, *args: Any, **kwargs: Any) -> int:
        if Path(asked) == path:
            raise OSError(5, "Input/output error")
        return plain(asked, *args, **kwargs)

    monkeypatch.setattr(files.os, "open", opened)


MANIFESTS: dict[str, tuple[Any, str]] = {
    "cut": (cut, "is no JSON"),
    "empty": (lambda path: path.write_bytes(b""), "is no JSON"),
    "binary": (lambda path: path.write_bytes(bytes(range(256))), "is no JSON"),
    "nested": (lambda path: path.write_text("[" * 100_000), "is no JSON"),
    "a list": (lambda path: path.write_text("[]"), "holds list, and no mapping"),
    "of nothing": (lambda path: path.write_text("{}"), "has no number as `format`"),
    "a folder": (put_folder, "is a folder"),
    "a FIFO": (put_fifo, "is a FIFO"),
    "flipped": (lambda path: flip(path, path.read_bytes().index(b'"version": ') + 11), "does not have the checksum"),
    "without a checksum": (
        lambda path: path.write_text(path.read_text().replace('"checksum"', '"chess"')), "does not have the checksum",
    ),
}  # fmt: skip


@pytest.mark.parametrize("damage", MANIFESTS)
def test_a_damaged_manifest_is_named(damage: str, later: Any, folder: Path) -> None:
    harm, what = MANIFESTS[damage]
    harm(manifest_of(folder / "checkpoint-4"))
    refused(later, folder / "checkpoint-4", f"its file reference/manifest.json {what}", sound=folder / "checkpoint-2")
    assert read_manifest(folder / "checkpoint-2")


MISSING = ("format", "kind", "place", "version", "drift", "state")
TYPES = {  # what is of the right type is left out
    "format": ("x", True, [1], None), "kind": (-1, True, [1], None), "place": ("x", -1, {}, {"num_passes": 0}),
    "version": ("x", True, 1.5, None), "drift": ("x", True, {}), "state": (-1, True, {}), "settings": ("x", -1, [1]),
    "numerics": ("x", True, [1]), "files": ("x", -1, None, {"config.json": 1}, {"../a": [1, "x"]}), "policy": (1, [1]),
    "optimizer": ("x", True, [1]), "template_date": (20260131, [1]),
}  # fmt: skip


@pytest.mark.parametrize(
    ("field", "value"),
    [*((name, "gone") for name in MISSING), *((name, value) for name in TYPES for value in TYPES[name])],
)
def test_fields_of_another_type_are_refused(field: str, value: Any, later: Any, folder: Path) -> None:
    """Also in manifests of earlier versions, which have no checksum."""
    checkpoint = folder / "checkpoint-4"
    if field == "files":
        record_again(checkpoint, files=value)
    else:
        make_earlier(checkpoint)
        manifest = json.loads(manifest_of(checkpoint).read_text()) | {field: value}
        manifest_of(checkpoint).write_text(
            json.dumps({key: manifest[key] for key in manifest if manifest[key] != "gone"})
        )
    refused(later, checkpoint, "its (file reference/manifest.json|manifest)", sound=folder / "checkpoint-2")


def test_every_flip_in_the_manifest_is_found_or_changes_nothing(folder: Path) -> None:
    draw, checkpoint = random.Random(0), folder / "checkpoint-4"
    content = manifest_of(checkpoint).read_bytes()
    expected = read_manifest(checkpoint)
    for _ in range(200):
        manifest_of(checkpoint).write_bytes(content)
        flip(manifest_of(checkpoint), draw.randrange(len(content)))
        try:
            found = read_manifest(checkpoint)
        except ValueError as error:
            found, message = None, str(error)
            assert "reference/manifest.json" in message or "has format" in message
        assert found in (None, expected)


@pytest.mark.parametrize(
    ("content", "what"),
    [
        ('{"global_step": 2', "was cut or changed"),
        ("[]", "was cut or changed .it holds list"),
        ('{"nobody": 1}', "was cut or changed .*unexpected keyword"),
        ('{"global_step": 2}', "is of step 2"),
        ('{"global_step": "4"}', "has '4' as `global_step`"),
        ('{"global_step": 4, "log_history": {}}', "has {} as `log_history`"),
        ('{"global_step": 4, "log_history": [1]}', "has 1 in `log_history`"),
        ('{"global_step": 4, "best_model_checkpoint": 1}', "has 1 as `best_model_checkpoint`"),
        ('{"global_step": 4, "stateful_callbacks": {"a": 1}}', "has 1 as the state of a"),
    ],
)
@pytest.mark.parametrize("is_earlier", [True, False])
def test_a_trainer_state_of_something_else_is_refused(
    content: str, what: str, is_earlier: bool, later: Any, folder: Path
) -> None:
    checkpoint = folder / "checkpoint-4"
    (checkpoint / "trainer_state.json").write_text(content)
    if is_earlier:
        make_earlier(checkpoint)
    what = what if is_earlier else r"has \d+ bytes"
    refused(later, checkpoint, f"its file trainer_state.json {what}", sound=folder / "checkpoint-2")


def test_a_checkpoint_of_another_step_is_refused(later: Any, folder: Path) -> None:
    (folder / "checkpoint-4").rename(folder / "checkpoint-6")
    what = "its file trainer_state.json is of step 4"
    refused(later, folder / "checkpoint-6", what, sound=folder / "checkpoint-2")


# --- which one is taken -----------------------------------------------------------------------------------------------


def test_the_newest_sound_one_is_named(later: Any, folder: Path) -> None:
    """Not another damaged one; and where all are, that is said."""
    copied(folder / "checkpoint-4", folder / "copies")
    flip(folder / "copies" / "checkpoint-4" / "optimizer.pt")
    refused(later, folder / "copies" / "checkpoint-4", "its file optimizer.pt", sound=None)
    flip(folder / "checkpoint-4" / "optimizer.pt")
    refused(later, folder / "checkpoint-2x", "there is no such folder", sound=folder / "checkpoint-2")
    flip(folder / "checkpoint-2" / "scheduler.pt")
    refused(later, folder / "checkpoint-4", "its file optimizer.pt", sound=None)


@pytest.mark.parametrize("file", ["optimizer.pt", "reference/manifest.json"])
def test_a_damaged_newest_one_is_not_passed_over(file: str, folder: Path) -> None:
    cut(folder / "checkpoint-4" / file)
    with pytest.raises(ValueError, match=rf"its file {file} .*{folder / 'checkpoint-2'}; go on from there"):
        trainer(tiny_model(), config(folder, **OPTIONS)).train(resume_from_checkpoint=True)
    with pytest.raises(ValueError, match=rf"its file {file} .*{folder / 'checkpoint-2'}; go on from there"):
        trainer(tiny_model(), config(folder, **OPTIONS, resume_from_checkpoint=True))


def test_files_that_came_later_are_ignored(saved: Path, folder: Path) -> None:
    (folder / "checkpoint-2" / "notes.txt").write_text("mine")
    (folder / "checkpoint-2" / "reference" / "notes.txt").write_text("mine")
    resumed = trainer(tiny_model(), config(folder, **OPTIONS))
    resumed.train(resume_from_checkpoint=str(folder / "checkpoint-2"))
    for name, (_, found) in read_manifest(folder / "checkpoint-4")["files"].items():
        if name == "model.safetensors" or name.startswith("reference"):
            assert found == read_manifest(saved / "checkpoint-4")["files"][name][1]
    (folder / "checkpoint-4" / "pytorch_model.bin").write_text("of an earlier run")
    (folder / "checkpoint-4" / "reference" / "manifest.json").unlink()
    resumed.train(resume_from_checkpoint=str(folder / "checkpoint-2"))
    assert not (folder / "checkpoint-4" / "pytorch_model.bin").exists()


def test_a_checkpoint_of_an_earlier_version_is_read_and_said(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    whole = trainer(tiny_model(), config(tmp_path / "whole", **OPTIONS))
    whole.train()
    make_earlier(folder / "checkpoint-2")
    resumed = trainer(tiny_model(), config(folder, **OPTIONS))
    caplog.clear()
    resumed.train(resume_from_checkpoint=str(folder / "checkpoint-2"))
    assert [message for message in caplog.messages if "recorded no digests" in message] == [caplog.messages[0]]
    assert logged(resumed) == logged(whole)
    assert digest(resumed.model.named_parameters()) == digest(whole.model.named_parameters())


@pytest.mark.covering(1)
@pytest.mark.parametrize(
    "damage",
    [cut, lambda path: path.write_bytes(b""), put_fifo, put_folder],
    ids=["cut", "empty", "a FIFO", "a folder"],
)
@pytest.mark.parametrize(
    "file",
    ["model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "reference/state.safetensors"],
)
def test_damage_without_digests_is_named_too(file: str, damage: Any, folder: Path) -> None:
    make_earlier(folder / "checkpoint-4")
    damage(folder / "checkpoint-4" / file)
    ours = trainer(tiny_model(), config(folder, **OPTIONS | {"max_steps": 5}))
    name = rf"{file}|rng_state\*.pth" if "rng" in file else f"{file}|model or adapter files"
    with pytest.raises(ValueError, match=rf"^Resuming from .*checkpoint-4 .*({name}).*checkpoint-2; go on from there"):
        ours.train(resume_from_checkpoint=True)


# --- what starts afresh -----------------------------------------------------------------------------------------------

AFRESH = {
    "optimizer": "the optimizer's state and the learning rate's schedule (no optimizer.pt and no scheduler.pt)",
    "schedule": "the optimizer's state and the learning rate's schedule (no scheduler.pt)",
    "random": "the random state of process 0 (no rng_state.pth",
}


@pytest.mark.parametrize(
    ("gone", "expected"),
    [
        ([], []),
        (["optimizer.pt", "scheduler.pt"], ["optimizer"]),
        (["scheduler.pt"], ["schedule"]),
        (["rng_state.pth"], ["random"]),
        (["optimizer.pt", "scheduler.pt", "rng_state.pth"], ["optimizer", "random"]),
    ],
)
def test_what_starts_afresh_is_said(
    gone: list[str], expected: list[str], folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Whether the manifest says that it was never saved, or an earlier version wrote it."""
    for name in gone:
        (folder / "checkpoint-4" / name).unlink()
    records = read_manifest(folder / "checkpoint-4")["files"]
    record_again(folder / "checkpoint-4", files={name: records[name] for name in records if name not in gone})
    for _ in range(2):
        caplog.clear()
        trainer(tiny_model(), config(folder, **OPTIONS)).train(resume_from_checkpoint=True)
        said = [message for message in caplog.messages if "What starts afresh" in message]
        assert len(said) == bool(expected)
        assert [name for name in AFRESH if said and AFRESH[name] in said[0]] == expected
        make_earlier(folder / "checkpoint-4")


def test_a_checkpoint_of_weights_alone_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    trainer(tiny_model(), config(tmp_path, **OPTIONS | {"max_steps": 2}, save_only_model=True)).train()
    trainer(tiny_model(), config(tmp_path, **OPTIONS)).train(resume_from_checkpoint=True)
    (said,) = [message for message in caplog.messages if "What starts afresh" in message]
    assert AFRESH["optimizer"] in said
    assert AFRESH["random"] in said


def test_the_random_states_of_other_processes_are_named(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    """As two processes wrote them."""
    records = read_manifest(folder / "checkpoint-2")["files"]
    for rank in range(2):
        shutil.copy(folder / "checkpoint-2" / "rng_state.pth", folder / "checkpoint-2" / f"rng_state_{rank}.pth")
        records[f"rng_state_{rank}.pth"] = records["rng_state.pth"]
    del records["rng_state.pth"]
    (folder / "checkpoint-2" / "rng_state.pth").unlink()
    record_again(folder / "checkpoint-2", files=records)
    ours = trainer(tiny_model(), config(folder, **OPTIONS))
    ours.train(resume_from_checkpoint=str(folder / "checkpoint-2"))
    expected = "process 0 (no rng_state.pth, but ['rng_state_0.pth', 'rng_state_1.pth'])"
    assert [message for message in caplog.messages if expected in message]


@pytest.mark.parametrize(
    ("kind", "options", "what"),
    [
        ("full", {"optim": "sgd"}, r"is of AdamW with groups of \[\d+, \d+\] parameters; this run's optimizer is SGD"),
        ("full", {"optim": "adafactor"}, r"is of AdamW .*; this run's optimizer is Adafactor"),
        ("partly_frozen", {}, r"is of AdamW .*; this run's optimizer is AdamW with groups of"),
    ],
)
def test_another_optimizer_is_refused(kind: str, options: dict[str, Any], what: str, folder: Path) -> None:
    policy = POLICIES[kind]()
    with pytest.raises(ValueError, match=rf"checkpoint-4 was asked for, whose optimizer state {what}"):
        trainer(policy, config(folder, **OPTIONS | options | {"max_steps": 5})).train(resume_from_checkpoint=True)


def test_an_optimizer_of_ones_own_is_compared_too(tmp_path: Path) -> None:
    for make in (torch.optim.AdamW, torch.optim.SGD):
        policy = tiny_model()
        ours = trainer(policy, config(tmp_path, **OPTIONS), optimizers=(make(policy.parameters(), lr=0.01), None))
        if make is torch.optim.AdamW:
            ours.train()
        else:
            with pytest.raises(ValueError, match=r"is of AdamW .*optimizer is SGD"):
                ours.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
