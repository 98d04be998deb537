"""Windows: what one costs, how far it reads ahead, and that nothing outside of it notices.

That a run in windows has the trajectory of a run without them is the table's (`test_table.py`).
"""

import contextlib
import functools
import math
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from datasets import IterableDataset
from torch import Tensor, nn
from transformers import TrainerCallback

from holdfast import DPOTrainer
from holdfast.reference import look_ahead
from holdfast.reference.moving import soft_snapshot
from holdfast.reference.scorers import snapshot
from policies import POLICIES, config, logged, rows, trainer

SNAPSHOT = {"reference": "snapshot"}


def moving(alpha: float, steps: int = 3) -> dict[str, Any]:
    return {"sync_ref_model": True, "ref_model_mixup_alpha": alpha, "ref_model_sync_steps": steps}


def make_trainer(folder: Path, kind: str = "full", parts: dict[str, Any] | None = None, **options: Any) -> DPOTrainer:
    """Nine pairs in batches of two, so five steps per epoch, and seven steps; in the order of the rows. `parts` are
    what the trainer gets beside the policy and its options."""
    defaults = {"max_steps": 7, "per_device_train_batch_size": 2, "train_sampling_strategy": "sequential"}
    return trainer(POLICIES[kind](), config(folder, **defaults | options), **{"train_dataset": rows(9)} | (parts or {}))


@pytest.fixture
def exchanges(monkeypatch: pytest.MonkeyPatch) -> Callable[[nn.Module], list[int]]:
    """For a policy: the number of its forward passes within each exchange of its weights, exchange by exchange."""
    counts: list[int] = []
    inside: list[bool] = []
    plain = snapshot.exchanged

    @contextlib.contextmanager
    def exchanged(policy: nn.Module, values: Mapping[str, Tensor]) -> Iterator[None]:
        counts.append(0)
        inside.append(True)
        with plain(policy, values):
            yield
        inside.pop()

    def count(*_: Any) -> None:
        if inside:
            counts[-1] += 1

    def watch(policy: nn.Module) -> list[int]:
        policy.register_forward_pre_hook(count)
        return counts

    monkeypatch.setattr(snapshot, "exchanged", exchanged)
    monkeypatch.setattr(soft_snapshot, "exchanged", exchanged)
    return watch


@pytest.mark.covering(1)
@pytest.mark.parametrize(
    "place", [*(pytest.param(place, marks=pytest.mark.slow) for place in ("device", "cpu")), "disk"]
)
@pytest.mark.parametrize("data", ["map", "stream"])
@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"reference_window": 1}, [1, 1, 1, 1, 1, 1, 1]),
        ({"reference_window": 2}, [2, 2, 1, 2]),  # an epoch has five steps
        ({"reference_window": 2} | moving(0.3), [2, 1, 2, 1, 1]),  # syncs after steps 3 and 6
        ({"reference_window": 100}, [5, 2]),
        ({"reference_window": 100} | moving(0.3), [3, 2, 1, 1]),
        ({"reference_window": 2, "gradient_accumulation_steps": 2, "max_steps": 3}, [4, 2]),
        # After a hard sync the policy itself is the reference, until it trains: steps 4, 5 and 7 need no other weights.
        ({"reference_window": 2} | moving(1.0), [2, 1, 1]),
        ({"reference_window": 3} | moving(1.0), [3, 1]),  # step 6 is in a new epoch, so in a new window
        ({"reference_window": 5} | moving(1.0, steps=5), [5]),
    ],
)
def test_weights_are_exchanged_once_per_window(
    place: str, data: str, options: dict[str, Any], expected: list[int], exchanges: Any, tmp_path: Path
) -> None:
    pairs = rows(12) if "gradient_accumulation_steps" in options else rows(9)
    pairs = pairs.to_iterable_dataset() if data == "stream" else pairs
    options = {"snapshot_device": place, "reference_audit": False} | SNAPSHOT | options  # an audit asks as well
    ours = make_trainer(tmp_path, parts={"train_dataset": pairs}, **options)
    found = exchanges(ours.model)
    ours.train()
    assert found == expected


def counted_stream(reads: list[int], num_pairs: int = 200) -> IterableDataset:
    """A stream that counts the rows read of it, pass by pass."""
    table = rows(num_pairs).to_list()

    def generate() -> Iterator[dict[str, list[int]]]:
        reads.append(0)
        for row in table:
            reads[-1] += 1
            yield row

    return IterableDataset.from_generator(generate)


class ReadAtEachStep(TrainerCallback):
    """Keeps the number of rows read when each optimizer step begins."""

    def __init__(self, reads: list[int]) -> None:
        self.reads = reads
        self.at_step: list[int] = []

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self.at_step.append(self.reads[-1])


@pytest.mark.parametrize("accumulated", [1, 2])
@pytest.mark.parametrize(
    ("options", "ends"),
    [
        ({"reference": "model"}, [1, 2, 3, 4, 5, 6, 7]),
        ({"reference_window": 3} | SNAPSHOT, [3, 3, 3, 6, 6, 6, 7]),
        ({"reference_window": 3} | SNAPSHOT | moving(0.3, steps=2), [2, 2, 4, 4, 6, 6, 7]),
        ({"reference": "precomputed"} | moving(1.0), [3, 3, 3, 6, 6, 6, 7]),
    ],
)
def test_a_stream_is_read_no_further_than_the_window(
    accumulated: int, options: dict[str, Any], ends: list[int], tmp_path: Path
) -> None:
    """At step s the rows up to the end of its window are read, and the one batch that a data loader is always ahead;
    `ends` are the last steps of the windows. A window never goes past the last step of the run."""
    reads: list[int] = []
    callback = ReadAtEachStep(reads)
    parts = {"train_dataset": counted_stream(reads), "callbacks": [callback]}
    make_trainer(tmp_path, parts=parts, gradient_accumulation_steps=accumulated, **options).train()
    assert callback.at_step == [2 * (end * accumulated + 1) for end in ends]


def test_batches_that_wait_are_bounded_in_bytes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No room for a single batch: each step is a window of its own, with both of its batches, whatever was asked."""
    monkeypatch.setattr(look_ahead, "WAITING_BYTES", 1)
    reads: list[int] = []
    callback = ReadAtEachStep(reads)
    options = {"gradient_accumulation_steps": 2, "reference_window": 100, "max_steps": 4} | SNAPSHOT
    make_trainer(tmp_path, parts={"train_dataset": counted_stream(reads), "callbacks": [callback]}, **options).train()
    assert callback.at_step == [2 * (2 * step + 1) for step in (1, 2, 3, 4)]


def test_an_epoch_may_end_inside_a_step(exchanges: Any, tmp_path: Path) -> None:
    """Five batches by twos: the third step of an epoch has one, and a window of two steps does not reach into the next
    epoch to fill it."""
    options = {"gradient_accumulation_steps": 2, "reference_audit": False}
    ours = make_trainer(tmp_path, reference_window=2, **SNAPSHOT, **options)
    theirs = make_trainer(tmp_path, reference="model", **options)
    found = exchanges(ours.model)
    ours.train()
    theirs.train()
    assert found == [4, 1, 4, 1, 2]
    assert logged(ours) == pytest.approx(logged(theirs), abs=1e-5)


IN_THE_MIDDLE = {
    "window": {"reference_window": 3} | SNAPSHOT,
    "disk": {"reference_window": 3, "snapshot_device": "disk"} | SNAPSHOT,
    "open": {"snapshot_device": "disk"} | SNAPSHOT,
    "precomputed": {"reference": "precomputed"},
    "precomputed_window": {"reference": "precomputed", "reference_window": 3},
}


def losses(kind: str, alpha: float, data: str, folder: Path, **options: Any) -> dict[str, list[float]]:
    """Of a run that evaluates after every step, and then on pairs that nobody announced."""
    held_out = rows(3, seed=3)
    parts = {"eval_dataset": held_out.to_iterable_dataset() if data == "stream" else held_out}
    options |= {"eval_strategy": "steps", "eval_steps": 1, "per_device_eval_batch_size": 2, "max_steps": 6}
    ours = make_trainer(folder, kind, parts, **(moving(alpha, steps=4) if alpha else {}), **options)
    ours.train()
    found = {name: logged(ours, name) for name in ("loss", "eval_loss")}
    return found | {"new": [ours.evaluate(rows(3, seed=9))["eval_loss"]]}


@functools.cache
def losses_asked_per_batch(kind: str, alpha: float, data: str) -> dict[str, list[float]]:
    with tempfile.TemporaryDirectory() as folder:
        return losses(kind, alpha, data, Path(folder), reference="model")


@pytest.mark.covering(1)
@pytest.mark.parametrize("data", ["map", pytest.param("stream", marks=pytest.mark.slow)])
@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("way", IN_THE_MIDDLE)
@pytest.mark.parametrize("kind", [pytest.param("full", marks=pytest.mark.slow), "lora_sft"])
def test_evaluating_inside_a_window(kind: str, way: str, alpha: float, data: str, tmp_path: Path) -> None:
    """After every step the loss on held-out pairs is that of a second model asked per batch, and so is that of pairs
    that nobody announced, after training."""
    found, expected = (
        losses(kind, alpha, data, tmp_path, **IN_THE_MIDDLE[way]),
        losses_asked_per_batch(kind, alpha, data),
    )
    assert [len(values) for values in found.values()] == [6, 6, 1]
    for name, values in expected.items():
        assert found[name] == pytest.approx(values, abs=1e-5), name
        assert max(abs(value - math.log(2)) for value in values) > 1e-4
