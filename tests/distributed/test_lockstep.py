"""Whatever one process knows, finds, measures or meets: all go on together, to the numbers of one process.

The scenarios are those of `lockstep_scenarios`. A hang is a failure, since the processes wait for each other for a
limited time.
"""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from differences import differences

pytestmark = pytest.mark.slow

SCENARIOS = {
    "agreement_itself": True,
    "plain": False,
    "samples_of_a_snapshot": True,
    "samples_of_a_moving_module": False,
    "samples_of_adapters": False,
    "transform_known_to_one": True,
    "transform_known_to_one_without_reference": False,
    "transform_forgotten_by_one": False,
    "store_half_full": False,
    "store_full": False,
    "store_of_each_process": True,
    "missed_by_one": True,
    "claimed_by_another_job": False,
    "window_measured_by_each": True,
    "window_of_unlike_bytes": False,
    "windows_of_a_stream": False,
    "collator_of_the_user": False,
    "columns_of_the_user": False,
    "new_data": False,
    "nan_of_one": True,
    "wrong_weights_of_one": False,
    "audit_of_one": False,
    "disk_of_one_full": False,
    "signal_to_one": True,
    "pairs_of_hidden_states": True,
}
"""The scenarios, and whether `make test` runs them, over FSDP2 on two processes. `make nightly` runs all of `WAYS`."""

WAYS = [(2, "fsdp2"), (4, "fsdp2"), (2, "native")]
OF_EACH = ("weights", "messages", "seconds")

Outcome = Callable[[int, str], dict[str, Any]]

table = pytest.mark.parametrize(
    ("num_processes", "run"),
    [
        pytest.param(
            n, f"{engine}/lockstep/{name}", marks=() if is_quick and (n, engine) == WAYS[0] else pytest.mark.nightly
        )
        for n, engine in WAYS
        for name, is_quick in SCENARIOS.items()
    ],
)


def faults(one: dict[str, Any], several: dict[str, Any]) -> Iterator[str]:
    """What differs between a scenario of one process and the same over an engine, except for messages."""
    for found in (one, several):
        if "errors" in found:
            yield f"it failed: {found['errors']}"
            return
    ours, theirs = (
        {key: value for key, value in found.items() if key not in OF_EACH and not key.endswith("each_process")}
        for found in (several, one)
    )
    yield from differences(theirs, ours)
    if "weights" in one:
        trained = load_file(several["weights"])
        for tensor, value in load_file(one["weights"]).items():
            if not torch.allclose(trained[tensor], value, rtol=0, atol=1e-5):
                yield f"{tensor} differs by {float((trained[tensor] - value).abs().max())}"


@table
def test_all_go_on_to_the_numbers_of_one_process(num_processes: int, run: str, engine_outcome: Outcome) -> None:
    """Losses, gradient norms, metrics, evaluations, weights, and all that is stored, under the same key."""
    rest = run.split("/", 1)[1]
    found = engine_outcome(num_processes, run)
    assert list(faults(engine_outcome(1, f"one/{rest}"), found)) == []
    if check := CHECKS.get(rest.removeprefix("lockstep/")):
        check(found, num_processes)


def _agrees(found: dict[str, Any], n: int) -> None:
    """With two processes, "some" are one, and it is the last."""
    each = found["found_by_each_process"]
    assert each == [each[0]] * n
    last = n - 1
    assert each[0] == {
        "values": [*range(n)],
        "flags": [True, False],
        "largest": [float(last), 0.0],
        "of one": f"ValueError: Process {last} of {n}: a",
        "of some": f"ValueError: Process 1 of {n}: of 1",
        "of all": "TypeError: b",
        "of the disk": f"RuntimeError: Process {last} of {n}: OSError: c",
        "of none": "nothing",
    }


def _named(*words: str) -> Callable[[dict[str, Any], int], None]:
    """All processes raise one message, which names the process and has these words."""

    def check(found: dict[str, Any], n: int) -> None:
        assert found["messages"] == [found["messages"][0]] * n
        assert found["messages"][0].startswith(f"ValueError: Process {n - 1} of {n}: ")
        assert all(word in found["messages"][0] for word in words)

    return check


def _nan(found: dict[str, Any], n: int) -> None:
    _named("gave a log-prob of nan")(found, n)
    kept = found["kept_of_each_process"]
    assert kept == [kept[0]] * n
    assert kept[0] > 0


def _ended(found: dict[str, Any], n: int) -> None:
    assert found["messages"] == ["Stopped: 143"] * n
    kept = found["kept_of_each_process"]
    assert kept == [kept[0]] * n
    assert 0 < kept[0] < 26


def _paired(found: dict[str, Any], n: int) -> None:
    assert len(found["first"]) == len(found["again"]) == found["num_pairs"] == 9


def _windows(found: dict[str, Any], n: int) -> None:
    lengths = found["window_of_each_process"]
    assert lengths == [lengths[0]] * n
    assert lengths[0] > 1


def _copies(found: dict[str, Any], n: int) -> None:
    assert found["are_alike"]
    assert [len(values) for values in found["stores"].values()] == [26]


def _said_by_all(found: dict[str, Any], n: int) -> None:
    assert found["texts of each_process"] == [found["texts"]] * n
    assert any("eval_win_rate" in log for log in found["logs"])


CHECKS: dict[str, Callable[[dict[str, Any], int], None]] = {
    "agreement_itself": _agrees,
    "samples_of_a_snapshot": _said_by_all,
    "samples_of_a_moving_module": _said_by_all,
    "samples_of_adapters": _said_by_all,
    "store_of_each_process": _copies,
    "window_measured_by_each": _windows,
    "nan_of_one": _nan,
    "wrong_weights_of_one": _named("NaN or infinite weights, in `model.embed_tokens.weight`"),
    "audit_of_one": _named("found a gap of 2 nats in one token", "All weights, buffers, adapters and settings agree"),
    "disk_of_one_full": _named("the disk is full"),
    "signal_to_one": _ended,
    "pairs_of_hidden_states": _paired,
}
"""What else is looked at, by scenario."""


def test_faults_are_found() -> None:
    """A number that differs, a store under another key, and a failure."""
    one = {"logs": [{"loss": 0.5}], "stores": {"a": {"1": [0.5]}}, "window_of_each_process": [1]}
    assert list(faults(one, one | {"window_of_each_process": [1, 1]})) == []
    for changed in ({"logs": [{"loss": 0.6}]}, {"stores": {"b": {"1": [0.5]}}}, {"errors": ["gloo", "gloo"]}):
        assert list(faults(one, one | changed)) != [], changed
