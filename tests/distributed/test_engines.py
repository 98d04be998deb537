"""Every engine gives the numbers of one process, for every way to hold a reference (law L7; see `engine_scenarios`).

The runs of one process are computed once for each name without its engine.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from differences import differences

pytestmark = pytest.mark.slow

ENGINE_TYPES = {"ddp": "MULTI_CPU", "native": "MULTI_CPU", "fsdp2": "FSDP", "one": "NO"}
SHARDING = ("fsdp2", "native", "zero3")
"""How the names of engines begin that spread the weights."""


def faults(one: dict[str, Any], several: dict[str, Any], name: str) -> Iterator[str]:
    """What differs between a run of one process and the same over an engine, and what makes the latter dishonest."""
    engine, policy, _, motion = name.split("/")[:4]
    engine = engine.split("_")[0]
    if errors := several.get("errors") or one.get("errors"):
        yield f"it failed: {errors}"
        return
    yield from differences(*({**found, "weights": "", "seconds": 0} for found in (one, several)))
    ours, theirs = load_file(several["weights"]), load_file(one["weights"])
    if ours.keys() != theirs.keys():
        yield f"other tensors were trained: {sorted(ours.keys() ^ theirs.keys())[:3]}"
    for tensor in ours.keys() & theirs.keys():
        if not torch.allclose(ours[tensor], theirs[tensor], rtol=0, atol=1e-5):
            yield f"{tensor} differs by {float((ours[tensor] - theirs[tensor]).abs().max())}"
    facts = several["facts of each_process"]
    if facts["engine"] != ENGINE_TYPES.get(engine, "DEEPSPEED"):
        yield f"the engine was {facts['engine']}"
    if engine.startswith(SHARDING) and max(facts["num_own"]) > 0.7 * facts["num_whole"]:
        yield f"a process held {facts['num_own']} of {facts['num_whole']} numbers"
    whole_bytes, num_processes = one["facts of each_process"]["alive"][0], len(facts["alive"])
    has_own_adapter = engine == "native" and policy != "full"  # every process has all of what peft added after loading
    if (
        engine in ("fsdp2", "native")
        and not has_own_adapter
        and max(facts["alive"]) > 1.1 * whole_bytes / num_processes
    ):
        yield f"a process had {facts['alive']} of {whole_bytes} bytes in memory"
    if set(facts["digest"]) != set(one["facts of each_process"]["digest"]):
        yield f"the reference's digest is {facts['digest']}, not {one['facts of each_process']['digest']}"
    gaps = facts["gap"]
    if motion == "fixed" and min(gaps) < 1e-3:
        yield f"the reference was the policy: {gaps}"
    if max(gaps) - min(gaps) > 1e-5 or abs(gaps[0] - one["facts of each_process"]["gap"][0]) > 1e-5:
        yield f"the reference differs from the policy by {gaps}, not {one['facts of each_process']['gap']}"


def read(folder: Path, name: str) -> dict[str, Any]:
    """The outcome of a run."""
    return json.loads((folder / f"{name.replace('/', '.')}.json").read_text())


def test_faults_of_a_run_are_found(tmp_path: Path) -> None:
    """A number, the engine, a whole model in one process, and a reference that is the policy."""
    from safetensors.torch import save_file

    save_file({"weight": torch.zeros(2)}, tmp_path / "weights.safetensors")
    facts = {
        "engine": "FSDP",
        "num_own": [50, 50],
        "num_whole": 100,
        "gap": [0.5, 0.5],
        "alive": [54, 50],
        "digest": ["a", "a"],
    }
    two = {"logs": [{"loss": 0.5}], "weights": str(tmp_path / "weights.safetensors"), "facts of each_process": facts}
    one = two | {"facts of each_process": facts | {"alive": [100]}}
    name = "fsdp2/full/device/fixed"
    assert list(faults(one, two, name)) == []
    assert len(list(faults(one, two | {"logs": [{"loss": 0.6}]}, name))) == 1
    dishonest: list[dict[str, Any]] = [
        {"engine": "MULTI_CPU"}, {"num_own": [100, 100]}, {"alive": [54, 60]}, {"gap": [0.0, 0.0]}, {"gap": [0.5, 0.6]},
        {"digest": ["a", "b"]},
    ]  # fmt: skip
    for changed in dishonest:
        assert list(faults(one, two | {"facts of each_process": facts | changed}, name)) != [], changed
