"""Law L7 for terms of the loss that are no mean of one number per pair: sorted pairs, likelihoods per token, routers.

See `batch_losses`. What several processes log and end with is what one process does with the same batches.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from differences import differences
from distributed.conftest import launch, results

pytestmark = pytest.mark.slow

Runs = dict[int, tuple[Path, dict[str, Any]]]

TRAININGS = [
    "batch_sorted",
    "batch_sorted_unpaired_of_a_stream",
    "batch_likelihood",
    "batch_likelihood_accumulated",
    "batch_orpo_of_lora",
    "batch_cpo",
    "batch_moments",
    "batch_moments_accumulated",
    "batch_pair_values",
    "batch_routed",
    "batch_routed_padded",
    "batch_routed_packed",
    "batch_routed_of_a_stream",
]


def faults(one: Path, other: Path, name: str, numbers: tuple[Any, Any]) -> list[str]:
    """Where logs and final weights of a training differ between two launches."""
    found = list(differences(*numbers))
    ours, theirs = (load_file(folder / name / "weights.safetensors") for folder in (one, other))
    assert ours.keys() == theirs.keys()
    return found + [key for key in ours if not torch.allclose(ours[key], theirs[key], rtol=0, atol=1e-5)]


def test_every_training_is_compared(runs: Runs) -> None:
    assert {name for name in runs[1][1] if name.startswith("batch_")} == {*TRAININGS}


@pytest.mark.parametrize("name", TRAININGS)
def test_two_processes_train_as_one(name: str, runs: Runs) -> None:
    """Losses, gradient norms, metrics of training and of evaluation, also by source, and the weights at the end."""
    (one, of_one), (two, of_two) = runs[1], runs[2]
    assert faults(one, two, name, (of_one[name], of_two[name])) == []
    assert len(set(of_two[name]["weights_of_each_process"])) == 1


@pytest.mark.parametrize("name", ["batch_sorted", "batch_moments", "batch_routed"])
def test_sharded_processes_log_what_one_does(name: str, runs: Runs) -> None:
    """Over FSDP2, whose gradients are averaged as DDP's are, and where no process may leave out an exchange."""
    found = runs[2][1][f"sharded_{name}"]
    assert found["engine"] == "DistributedType.FSDP"
    assert list(differences(runs[1][1][name]["logs"], found["logs"])) == []


@pytest.mark.nightly
def test_four_processes_train_as_one(runs: Runs, tmp_path: Path) -> None:
    """Three of them have no real pair in the last batch of an epoch."""
    folder = tmp_path / "four processes"
    names = [name for name in TRAININGS if "accumulated" not in name]
    found = results(launch(4, folder, *names, "by_hand"), folder)
    assert {name: faults(runs[1][0], folder, name, (runs[1][1][name], found[name])) for name in names} == {
        name: [] for name in names
    }
    assert list(differences(runs[1][1]["by_hand"], found["by_hand"])) == []


@pytest.mark.parametrize("num_processes", [1, 2])
def test_gathered_losses_by_hand(num_processes: int, runs: Runs) -> None:
    """Margins 2, -1, 0.5 of the policy and 0, 1, -0.5 of the reference are, sorted, -0.5, 0.5 and 1 apart. So `aot` is
    (L(-0.5) + L(0.5) + L(1)) / 3 = (0.974077 + 0.474077 + 0.313262) / 3, and the gradients of the pairs in their order
    are -sigma(-1) / 3, -sigma(0.5) / 3 and -sigma(-0.5) / 3. `sft` is (3 + 5 + 4) / (2 + 3 + 1) = 2 on all processes;
    as the mean of two processes' own it would be (8 / 5 + 4) / 2 = 2.8."""
    found = runs[num_processes][1]["by_hand"]
    assert found["aot of each_process"] == pytest.approx([0.587139] * num_processes, abs=1e-6)
    assert found["gradients of aot"] == pytest.approx([-0.089647, -0.207486, -0.125847], abs=1e-6)
    assert found["sft of each_process"] == pytest.approx([2.0] * num_processes, abs=1e-6)
    assert found["gradients of sft"] == pytest.approx([-1 / 6] * 3, abs=1e-6)


def test_processes_that_exchange_nothing_are_found(runs: Runs) -> None:
    """The comparison above would find it: one process is the same, two are not."""
    for name in ("batch_sorted", "batch_routed"):
        alone, both = (runs[num_processes][1]["unexchanged"][name] for num_processes in (1, 2))
        assert list(differences(runs[1][1][name]["logs"][:2], alone[:2])) == []
        assert list(differences(alone[0], both[0])) != []


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("even_batches", "even_batches=False was asked for on 2 processes, but they step together"),
        ("collator", "The data collator (function) returned 1 pairs for 2 rows. Several processes step together"),
        ("router", "was asked for on 2 processes, but that of DogeForCausalLM is not the common one"),
    ],
)
def test_what_is_refused_on_several_processes(kind: str, message: str, runs: Runs) -> None:
    said = runs[2][1]["refused"][f"{kind} of each_process"]
    assert len(said) == 2
    assert all(message in line for line in said)
