"""A run that was stopped and resumed is the run that was not (law L5): weights, reference and logs, bit for bit."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel

from checkpoints import flip, make_earlier
from families import tiny_model
from holdfast.reference.identity.digests import digest
from policies import POLICIES, config, logged, rows, trainer

SAVING = {"save_strategy": "steps", "save_steps": 2, "optim": "adamw_torch", "learning_rate": 0.01}
MOMENTS = {"loss_type": ["beta_dpo", "alpha_dpo"], "beta_dpo_share": 0.6, "alpha_dpo_alpha": 2.0}
MOVING = {"sync_ref_model": True, "ref_model_mixup_alpha": 0.3, "ref_model_sync_steps": 1}


def halves(kind: str, folder: Path, **options: Any) -> tuple[Any, Any]:
    """The uninterrupted trainer, and one resumed after half of the steps by another trainer."""
    whole = trainer(POLICIES[kind](), config(folder / "whole", **SAVING | options))
    whole.train()
    trainer(POLICIES[kind](), config(folder / "parts", **SAVING | options | {"max_steps": 2})).train()
    resumed = trainer(POLICIES[kind](), config(folder / "parts", **SAVING | options))
    resumed.train(resume_from_checkpoint=True)
    return whole, resumed


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("full", {}),
        ("full", {"reference": "precomputed"}),
        ("full", MOVING),
        ("full", MOVING | {"ref_model_mixup_alpha": 1.0}),
        ("full", {"reference": "snapshot"}),
        ("full", {"reference": "snapshot", "snapshot_device": "disk"}),
        ("full", MOVING | {"reference": "snapshot", "snapshot_device": "cpu"}),
        pytest.param("lora_fresh", {}, marks=pytest.mark.nightly),
        ("lora_fresh", MOVING),
        ("lora_sft", {}),
        pytest.param("lora_sft", MOVING, marks=pytest.mark.nightly),
        pytest.param("lora_fresh", {"reference": "precomputed"}, marks=pytest.mark.nightly),
        ("lora_sft", {"reference": "precomputed"}),
        ("lora_fresh_over_sft", {"ref_adapter_name": "default", "model_adapter_name": "dpo"}),
        pytest.param("pissa", {}, marks=pytest.mark.nightly),
        ("full", {"loss_type": "simpo"}),
        ("full", MOMENTS),
        pytest.param("lora_fresh", MOMENTS | {"reference": "precomputed"}, marks=pytest.mark.nightly),
    ],
)
def test_resumed_is_uninterrupted(kind: str, options: dict[str, Any], tmp_path: Path) -> None:
    whole, resumed = halves(kind, tmp_path, **options)
    assert logged(resumed) == logged(whole)
    assert logged(resumed, "num_tokens") == logged(whole, "num_tokens")
    assert digest(resumed.model.named_parameters()) == digest(whole.model.named_parameters())
    if whole.reference is not None:
        assert resumed.reference.version == whole.reference.version == (4 if "sync_ref_model" in options else 0)
        assert digest(resumed.reference.tensors()) == digest(whole.reference.tensors())


def test_a_moved_bf16_reference_keeps_its_fp32_state(tmp_path: Path) -> None:
    """What bf16 weights cannot hold is in the checkpoint as well."""
    args = config(tmp_path, **SAVING | MOVING | {"max_steps": 2})
    first = trainer(tiny_model().bfloat16(), args)
    first.train()
    second = trainer(tiny_model().bfloat16(), config(tmp_path, **SAVING | MOVING))
    second.train(resume_from_checkpoint=True)
    third = trainer(tiny_model().bfloat16(), config(tmp_path / "whole", **SAVING | MOVING))
    third.train()
    assert digest(second.reference.tensors()) == digest(third.reference.tensors())
    state = dict(second.reference.tensors())
    rounded = state["lm_head.weight.fp32"].bfloat16().float()
    assert not torch.equal(rounded, state["lm_head.weight.fp32"])


def test_the_manifest_says_what_the_reference_is(tmp_path: Path) -> None:
    ours = trainer(POLICIES["lora_sft"](), config(tmp_path, **SAVING | MOVING))
    expected = ours.reference.fingerprint()
    ours.train()
    manifest = json.loads((tmp_path / "checkpoint-2" / "reference" / "manifest.json").read_text())
    assert manifest["weights"] == expected
    assert manifest["version"] == 2
    assert manifest["mixup_alpha"] == 0.3
    assert manifest["adapters"] == ["default"]
    assert manifest["kind"] == "SnapshotReference"


def test_save_total_limit(tmp_path: Path) -> None:
    options = SAVING | {"save_steps": 1, "save_total_limit": 2}
    ours = trainer(tiny_model(), config(tmp_path, **options))
    ours.train()
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-3", "checkpoint-4"]
    assert ours.args.save_total_limit == 2


def test_the_best_checkpoint_is_kept_and_loaded(tmp_path: Path) -> None:
    options = SAVING | {"save_steps": 1, "save_total_limit": 1, "eval_strategy": "steps", "eval_steps": 1}
    options |= {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss", "learning_rate": 0.3}
    ours = trainer(tiny_model(), config(tmp_path, **options), eval_dataset=rows(6, seed=2))
    ours.train()
    losses = logged(ours, "eval_loss")
    assert ours.evaluate()["eval_loss"] == pytest.approx(min(losses), abs=1e-6)


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.fixture
def interrupted(tmp_path: Path) -> Path:
    trainer(tiny_model(), config(tmp_path, **SAVING | {"max_steps": 2})).train()
    return tmp_path


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_length": 64}, "differs in max_length: recorded 1024, found 64"),
        ({"reference": "precomputed"}, "differs in the option `reference`: recorded 'auto', found 'precomputed'"),
        (MOVING, "differs in ref_model_mixup_alpha: recorded None, found 0.3"),
        ({"loss_type": "simpo"}, "kind 'ModelReference'; this run has none"),
    ],
)
def test_resuming_another_run_is_refused(options: dict[str, Any], message: str, interrupted: Path) -> None:
    ours = trainer(tiny_model(), config(interrupted, **SAVING | options))
    with pytest.raises(ValueError, match=message):
        ours.train(resume_from_checkpoint=True)


def test_another_base_is_refused(interrupted: Path) -> None:
    with pytest.raises(ValueError, match=r"differs in the weights of the reference \(pass the model"):
        trainer(tiny_model(seed=1), config(interrupted, **SAVING)).train(resume_from_checkpoint=True)


def test_a_checkpoint_does_not_become_the_reference(interrupted: Path) -> None:
    """`model=checkpoint` and resuming it would make the trained policy its own anchor."""
    model = type(tiny_model()).from_pretrained(interrupted / "checkpoint-2")
    with pytest.raises(ValueError, match=r"weights of the reference .*not the checkpoint"):
        trainer(model, config(interrupted, **SAVING)).train(resume_from_checkpoint=True)


def test_neither_does_an_adapter_from_a_checkpoint(tmp_path: Path) -> None:
    trainer(POLICIES["lora_sft"](), config(tmp_path, **SAVING | {"max_steps": 2})).train()
    policy = PeftModel.from_pretrained(tiny_model(), tmp_path / "checkpoint-2", is_trainable=True)
    with pytest.raises(ValueError, match=r"weights of the reference"):
        trainer(policy, config(tmp_path, **SAVING)).train(resume_from_checkpoint=True)


def test_other_data_is_refused(interrupted: Path) -> None:
    ours = trainer(tiny_model(), config(interrupted, **SAVING), train_dataset=rows(12, seed=9))
    with pytest.raises(ValueError, match="differs in the training data"):
        ours.train(resume_from_checkpoint=True)


def test_a_half_written_checkpoint_is_never_chosen(interrupted: Path) -> None:
    whole = trainer(tiny_model(), config(interrupted / "whole", **SAVING))
    whole.train()
    half = interrupted / "checkpoint-3"
    shutil.copytree(interrupted / "checkpoint-2", half)
    (half / "reference" / "manifest.json").unlink()
    with pytest.raises(ValueError, match=r"checkpoint-3 was asked for, but it has no reference/manifest.json"):
        trainer(tiny_model(), config(interrupted, **SAVING)).train(resume_from_checkpoint=str(half))
    resumed = trainer(tiny_model(), config(interrupted, **SAVING))
    resumed.train(resume_from_checkpoint=True)
    assert logged(resumed) == logged(whole)


def test_a_damaged_state_is_refused(tmp_path: Path) -> None:
    trainer(tiny_model(), config(tmp_path, **SAVING | MOVING | {"max_steps": 2})).train()
    path = tmp_path / "checkpoint-2" / "reference" / "state.safetensors"
    flip(path)
    for message in (
        r"its file reference/state.safetensors has another",
        r"does not have the digest.*no other complete",
    ):
        with pytest.raises(ValueError, match=message):
            trainer(tiny_model(), config(tmp_path, **SAVING | MOVING)).train(resume_from_checkpoint=True)
        make_earlier(tmp_path / "checkpoint-2")


def test_a_manifest_of_a_newer_format_is_refused(interrupted: Path) -> None:
    path = interrupted / "checkpoint-2" / "reference" / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format": 99}))
    with pytest.raises(ValueError, match=r"has format 99; this version of holdfast reads up to 2"):
        trainer(tiny_model(), config(interrupted, **SAVING)).train(resume_from_checkpoint=True)


def test_nothing_to_resume(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no complete checkpoint"):
        trainer(tiny_model(), config(tmp_path, **SAVING)).train(resume_from_checkpoint=True)


# --- kills ------------------------------------------------------------------------------------------------------------

PLACES = ["save@3", "manifest@3", "sync@3", "rotate@3"]
KILLED = """
import json, os, shutil, signal, sys
from pathlib import Path
from families import tiny_model
from policies import config, trainer
from test_resume import MOVING, SAVING

def die(): os.kill(os.getpid(), signal.SIGKILL)

def live(folder, place):
    step = int(place.split("@")[1])
    ours = trainer(tiny_model(), config(Path(folder), **SAVING | MOVING | {"save_steps": 1, "save_total_limit": 1}))
    if place.startswith("save"):      # weights are written, optimizer and reference are not
        def save(*args): die() if ours.state.global_step == step else plain(*args)
        plain, ours._save_optimizer_and_scheduler = ours._save_optimizer_and_scheduler, save
    elif place.startswith("manifest"):  # all of the reference is written, but not its manifest
        plain, json.dumps = json.dumps, None
        def dumps(*args, **kwargs): die() if ours.state.global_step == step else None; return plain(*args, **kwargs)
        json.dumps = dumps
    elif place.startswith("sync"):    # half of the weights have moved
        plain = ours.reference.scorer._average.move
        def move(reference, policy, alpha):
            if ours.state.global_step == step:
                some = list(reference)[: len(reference) // 2]
                plain({n: reference[n] for n in some}, {n: policy[n] for n in some}, alpha)
                die()
            return plain(reference, policy, alpha)
        ours.reference.scorer._average.move = move
    elif place.startswith("rotate"):
        plain = shutil.rmtree
        def rmtree(path, **kwargs):
            if ours.state.global_step == step and "checkpoint-" in Path(path).name:
                next(Path(path).glob("*.safetensors")).unlink()
                die()
            plain(path, **kwargs)
        shutil.rmtree = rmtree
    ours.train()

root, *places = sys.argv[1:]
codes = []
for place in places:
    child = os.fork()
    if child == 0:
        try:
            live(os.path.join(root, place), place)
        except BaseException:
            import traceback
            traceback.print_exc()
        os._exit(1)
    codes.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
Path(root, "codes.txt").write_text(" ".join(map(str, codes)))
"""


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a folder for each of `PLACES`, in which a run was killed there; each in a fork of one process."""
    root = tmp_path_factory.mktemp("killed")
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), str(Path(__file__).parent.parent), *sys.path])
    }
    process = subprocess.run(
        [sys.executable, "-c", KILLED, str(root), *PLACES],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    codes = (root / "codes.txt").read_text().split() if process.returncode == 0 else []
    assert codes == [str(-signal.SIGKILL)] * len(PLACES), process.stderr[-2000:]
    return root


@pytest.mark.slow
@pytest.mark.parametrize("place", PLACES)
def test_a_kill_loses_nothing(place: str, killed: Path, tmp_path: Path) -> None:
    """SIGKILL inside a save, before the manifest, inside a sync and inside the deletion of an older checkpoint."""
    options = SAVING | MOVING | {"save_steps": 1, "save_total_limit": 1}
    whole = trainer(tiny_model(), config(tmp_path / "whole", **options))
    whole.train()
    resumed = trainer(tiny_model(), config(killed / place, **options))
    resumed.train(resume_from_checkpoint=True)
    assert logged(resumed) == logged(whole)
    assert resumed.reference.version == whole.reference.version == 4
    assert digest(resumed.model.named_parameters()) == digest(whole.model.named_parameters())
    assert digest(resumed.reference.tensors()) == digest(whole.reference.tensors())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("full", {"reference": "precomputed"}),
        ("full", MOVING | {"reference": "precomputed"}),
        ("full", MOVING | {"reference": "precomputed", "ref_model_mixup_alpha": 1.0, "ref_model_sync_steps": 3}),
        ("full", {"reference": "snapshot", "snapshot_device": "disk", "reference_window": 3}),
        ("lora_sft", {}),
        ("lora_sft", MOVING),
        ("dora", MOVING | {"reference": "snapshot", "snapshot_device": "cpu"}),
    ],
)
def test_a_checkpoint_is_evaluated_by_a_later_trainer(kind: str, options: dict[str, Any], tmp_path: Path) -> None:
    """Policy and reference as they were, on pairs that nobody announced."""
    first = trainer(POLICIES[kind](), config(tmp_path, **SAVING | options))
    first.train()
    expected = first.evaluate(rows(5, seed=9))
    later = trainer(POLICIES[kind](), config(tmp_path, **SAVING | options))
    assert later.evaluate(rows(5, seed=9))["eval_loss"] != pytest.approx(expected["eval_loss"], abs=1e-3)
    later.restore()
    found = later.evaluate(rows(5, seed=9))
    for name in ("eval_loss", "eval_rewards/margins", "eval_logps/chosen"):
        assert found[name] == pytest.approx(expected[name], abs=1e-5)
    assert later.reference.version == first.reference.version
    with pytest.raises(ValueError, match=r"differs in the weights of the reference"):
        trainer(POLICIES["pissa"](), config(tmp_path, **SAVING | options)).restore(str(tmp_path / "checkpoint-4"))


@pytest.mark.slow
@pytest.mark.covering(1)
@pytest.mark.parametrize("step", [2, 6, 8])
@pytest.mark.parametrize("options", [{}, {"reference": "snapshot", "snapshot_device": "disk", "reference_window": 3}])
def test_a_stream_that_begins_again_is_resumed_where_it_was(options: dict[str, Any], step: int, tmp_path: Path) -> None:
    """15 rows in batches of 3 are passes of 5 steps: it stops in the first pass, and at two places in the second."""
    options = SAVING | options | {"max_steps": 10}
    whole = trainer(tiny_model(), config(tmp_path / "whole", **options), train_dataset=rows(15).to_iterable_dataset())
    whole.train()
    name = f"checkpoint-{step}"
    shutil.copytree(tmp_path / "whole" / name, tmp_path / "parts" / name)
    resumed = trainer(tiny_model(), config(tmp_path / "parts", **options), train_dataset=rows(15).to_iterable_dataset())
    resumed.train(resume_from_checkpoint=True)
    assert logged(resumed) == logged(whole)
    assert logged(resumed, "epoch") == logged(whole, "epoch")
    assert digest(resumed.model.named_parameters()) == digest(whole.model.named_parameters())


def test_a_finished_run_that_is_resumed_takes_no_step(tmp_path: Path) -> None:
    """Of a run that ends inside an epoch, transformers would take another."""
    for train_dataset in (rows(), rows().to_iterable_dataset()):
        first = trainer(tiny_model(), config(tmp_path, **SAVING | {"max_steps": 2}), train_dataset=train_dataset)
        first.train()
        again = trainer(tiny_model(), config(tmp_path, **SAVING | {"max_steps": 2}), train_dataset=train_dataset)
        again.train(resume_from_checkpoint=True)
        assert again.state.global_step == 2
        assert digest(again.model.named_parameters()) == digest(first.model.named_parameters())
        shutil.rmtree(tmp_path)
