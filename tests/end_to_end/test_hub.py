"""What is pushed to the hub is complete when the upload begins, and options are written as the user gave them."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers.trainer

from families import tiny_model
from policies import POLICIES, config, logged, trainer

pytestmark = pytest.mark.filterwarnings("ignore:Cannot enable progress bars")  # the environment switches them off

OPTIONS = {"save_strategy": "steps", "save_steps": 1, "max_steps": 3, "push_to_hub": True}
OPTIONS |= {"hub_model_id": "someone/tuned", "hub_always_push": True}
MOVING = {"sync_ref_model": True, "ref_model_mixup_alpha": 0.5, "ref_model_sync_steps": 1}


class Hub:
    """Records the files of a folder at the moment at which its upload begins."""

    def __init__(self) -> None:
        self.uploads: list[tuple[str, str | None, set[str]]] = []

    def __call__(self) -> "Hub":
        return self

    def upload_folder(self, *, folder_path: str, path_in_repo: str | None = None, **options: Any) -> Any:
        root = Path(folder_path)
        files = {str(path.relative_to(root)) for path in root.rglob("*") if path.is_file()}
        self.uploads.append((root.name, path_in_repo, files))
        return Done()


class Done:
    def done(self) -> bool:
        return True

    def result(self) -> None: ...


def set_repo_name(trainer: Any, **options: Any) -> None:
    """In place of making a repository."""
    trainer.hub_model_id, trainer.push_in_progress = "someone/tuned", None


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Hub:
    recorded = Hub()
    monkeypatch.setattr(transformers.trainer, "hf_api", recorded)
    monkeypatch.setattr(transformers.Trainer, "init_hf_repo", set_repo_name)
    return recorded


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["full", "lora_sft"])
@pytest.mark.parametrize(
    ("strategy", "names"),
    [
        ("checkpoint", ["last-checkpoint"] * 3),
        ("all_checkpoints", ["checkpoint-1", "checkpoint-2", "checkpoint-3"]),
        ("every_save", []),
        ("end", []),
    ],
)
def test_a_pushed_checkpoint_is_complete(kind: str, strategy: str, names: list[str], hub: Hub, tmp_path: Path) -> None:
    trainer(POLICIES[kind](), config(tmp_path, **OPTIONS | MOVING | {"hub_strategy": strategy})).train()
    pushed = [upload for upload in hub.uploads if upload[0].startswith("checkpoint-")]
    assert [name for _, name, _ in pushed] == names
    for step, (folder, _, files) in enumerate(pushed, start=1):
        assert folder == f"checkpoint-{step}"
        assert {"reference/manifest.json", "reference/state.safetensors", "trainer_state.json"} <= files
        assert files == {str(p.relative_to(tmp_path / folder)) for p in (tmp_path / folder).rglob("*") if p.is_file()}
    assert len(hub.uploads) - len(pushed) == (0 if strategy == "end" else 3)  # the model itself


@pytest.mark.parametrize("strategy", ["checkpoint", pytest.param("all_checkpoints", marks=pytest.mark.nightly)])
def test_a_pushed_checkpoint_can_be_resumed(
    strategy: str, hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From a download of it, with a reference that has moved: the run that follows is the uninterrupted one."""

    def upload_folder(*, folder_path: str, path_in_repo: str | None = None, **options: Any) -> Any:
        if path_in_repo is not None:
            shutil.copytree(folder_path, tmp_path / "hub" / path_in_repo, dirs_exist_ok=True)
        return Done()

    monkeypatch.setattr(hub, "upload_folder", upload_folder)
    options = OPTIONS | MOVING | {"optim": "adamw_torch", "learning_rate": 0.01}
    pushing = config(tmp_path / "run", **options | {"hub_strategy": strategy, "max_steps": 2})
    trainer(tiny_model(), pushing).train()
    without = options | {"push_to_hub": False, "hub_model_id": None, "hub_always_push": False}
    whole, resumed = (trainer(tiny_model(), config(tmp_path / name, **without)) for name in ("whole", "resumed"))
    whole.train()
    name = "last-checkpoint" if strategy == "checkpoint" else "checkpoint-2"
    resumed.train(resume_from_checkpoint=str(tmp_path / "hub" / name))
    assert logged(resumed) == logged(whole)
    assert logged(resumed, "reference/drift") == logged(whole, "reference/drift")


@pytest.mark.parametrize("strategy", ["checkpoint", "every_save"])
def test_no_secret_is_uploaded_and_the_upload_has_it(
    strategy: str, hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens: list[str | None] = []

    def upload_folder(*, folder_path: str, token: str | None = None, **options: Any) -> Any:
        tokens.append(token)
        files = [path for path in Path(folder_path).rglob("*") if path.is_file()]
        assert "training_args.bin" in {path.name for path in files}
        assert [path for path in files if b"hf_secret" in path.read_bytes()] == []
        return Done()

    monkeypatch.setattr(hub, "upload_folder", upload_folder)
    options = OPTIONS | {"hub_strategy": strategy, "hub_token": "hf_secret", "max_steps": 1}
    trainer(tiny_model(), config(tmp_path, **options)).train()
    assert set(tokens) == {"hf_secret"}


def test_what_is_being_uploaded_is_not_deleted(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An upload that takes two saves: with a limit of one checkpoint, its folder goes only after that."""
    seen: list[list[str]] = []
    is_done = iter([False, True, True])
    monkeypatch.setattr(Done, "done", lambda self: next(is_done, True))
    ours = trainer(tiny_model(), config(tmp_path, **OPTIONS | {"save_total_limit": 1, "hub_strategy": "checkpoint"}))
    push = transformers.Trainer._push_from_checkpoint

    def looked(self: Any, folder: str) -> None:
        seen.append(sorted(path.name for path in tmp_path.glob("checkpoint-*")))
        push(self, folder)

    monkeypatch.setattr(transformers.Trainer, "_push_from_checkpoint", looked)
    ours.train()
    assert seen == [["checkpoint-1"], ["checkpoint-1", "checkpoint-2"], ["checkpoint-3"]]


def test_what_is_not_finite_is_not_pushed(hub: Hub, tmp_path: Path) -> None:
    ours = trainer(tiny_model(), config(tmp_path, **OPTIONS | {"hub_strategy": "all_checkpoints", "logging_steps": 9}))
    step = ours.training_step

    def broken(*args: Any, **kwargs: Any) -> Any:
        loss = step(*args, **kwargs)
        if ours.state.global_step == 1:
            gradient = ours.model.get_parameter("lm_head.weight").grad
            assert gradient is not None
            gradient[0, 0] = float("nan")
        return loss

    ours.training_step = broken
    with pytest.raises(
        ValueError, match=r"at step 2, NaN .* is in the policy's `.* resume from .*checkpoint-1, the last"
    ):
        ours.train()
    assert [name for _, name, _ in hub.uploads] == [None, "checkpoint-1"]


def test_a_full_disk_leaves_no_half_of_what_was_to_be_pushed(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers copies the checkpoint's model into the output folder, from where it is pushed."""

    def cut(source: str, target: str) -> None:
        Path(target).write_bytes(Path(source).read_bytes()[:100])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(transformers.trainer.shutil, "copy", cut)
    message = rf"pushed was to be written to {tmp_path}, but there is no room .* resume from .*checkpoint-1, the last"
    with pytest.raises(ValueError, match=message):
        trainer(tiny_model(), config(tmp_path, **OPTIONS)).train()
    assert hub.uploads == []
    assert not list(tmp_path.glob("*.safetensors"))


@pytest.mark.parametrize("limit", [None, 1, 2])
def test_the_options_are_written_as_they_were_given(
    limit: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`training_args.bin` is what transformers writes; it is looked at here as it is handed to `torch.save`."""
    written: dict[str, int | None] = {}
    plain = torch.save

    def save(value: Any, file: Any, *args: Any, **kwargs: Any) -> None:
        if str(file).endswith("training_args.bin"):
            written[str(file)] = value.save_total_limit
        plain(value, file, *args, **kwargs)

    monkeypatch.setattr(torch, "save", save)
    options = {"save_strategy": "steps", "save_steps": 1, "save_total_limit": limit}
    args = config(tmp_path, **options)
    ours = trainer(tiny_model(), args)
    ours.train()
    assert set(written.values()) == {limit}
    assert len(written) == 4
    assert ours.args is args
    assert args.save_total_limit == limit
    assert len(list(tmp_path.glob("checkpoint-*"))) == (limit or 4)
