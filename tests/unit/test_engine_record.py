"""Which engine goes on from whose checkpoint, and what is said where none may."""

from pathlib import Path

import pytest

from holdfast.checkpoint.engine import PARTS, WHOLE, ZERO, Engine, check_engine

ONE = Engine(name="no engine", num_processes=1, state_dicts=WHOLE)
DDP = Engine(name="DDP", num_processes=4, state_dicts=WHOLE)
FSDP2 = Engine(name="FSDP2", num_processes=2, state_dicts=WHOLE)
FSDP2_IN_PARTS = Engine(name="FSDP2", num_processes=2, state_dicts=PARTS)
ZERO2 = Engine(name="DeepSpeed ZeRO-2", num_processes=2, state_dicts=ZERO)
ZERO3 = Engine(name="DeepSpeed ZeRO-3", num_processes=2, state_dicts=ZERO)
ZERO3_ON_4 = Engine(name="DeepSpeed ZeRO-3", num_processes=4, state_dicts=ZERO)
EARLIER = Engine(name="DeepSpeed", num_processes=2, state_dicts=ZERO)
SHARED = (ONE, DDP, FSDP2, FSDP2_IN_PARTS)
CHECKPOINT = Path("run/checkpoint-2")


@pytest.mark.parametrize("writer", [*SHARED, None], ids=str)
@pytest.mark.parametrize("ours", SHARED, ids=str)
def test_whole_state_dicts_and_parts_are_read_by_all(writer: Engine | None, ours: Engine) -> None:
    check_engine(CHECKPOINT, writer, ours)


@pytest.mark.parametrize(("writer", "ours"), [(ZERO3, ZERO3), (EARLIER, ZERO2), (None, ZERO2)], ids=str)
def test_deepspeed_reads_its_own(writer: Engine | None, ours: Engine) -> None:
    check_engine(CHECKPOINT, writer, ours)


@pytest.mark.parametrize(
    ("writer", "ours", "said"),
    [
        (
            ZERO3,
            ZERO3_ON_4,
            "written by DeepSpeed ZeRO-3 with 2 processes.*puts it together only for as many.*Launch 2",
        ),
        (EARLIER, ZERO3_ON_4, "written by DeepSpeed with 2 processes.*Launch 2 processes"),
        (
            ZERO3,
            ZERO2,
            "this run is DeepSpeed ZeRO-2 with 2 processes.*no other engine.*Resume it with DeepSpeed ZeRO-3",
        ),
        (
            ZERO3,
            ONE,
            "this run is no engine with 1 process, and the state of its optimizer is in DeepSpeed's own files",
        ),
        (ZERO3, FSDP2, "this run is FSDP2 with 2 processes.*Resume it with DeepSpeed ZeRO-3 with 2 processes"),
        (
            DDP,
            ZERO3,
            "written by DDP with 4 processes; this run is DeepSpeed.*reads its own files only.*Resume it with DDP",
        ),
        (FSDP2_IN_PARTS, ZERO2, "written by FSDP2 with 2 processes; this run is DeepSpeed ZeRO-2"),
    ],
    ids=str,
)
def test_others_are_refused_by_name(writer: Engine, ours: Engine, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        check_engine(CHECKPOINT, writer, ours)


def test_an_earlier_manifest_is_read_by_its_files() -> None:
    """The record of this version; DeepSpeed's folder and the random states of its processes; nothing."""
    assert Engine.recorded_in({"engine": FSDP2.record()}, []) == FSDP2
    names = ["global_step2/mp_rank_00_model_states.pt", "rng_state_0.pth", "rng_state_1.pth"]
    assert Engine.recorded_in({}, names) == EARLIER
    assert Engine.recorded_in({}, ["model.safetensors", "optimizer.pt"]) is None
