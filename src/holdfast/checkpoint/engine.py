"""The engine that wrote a checkpoint, as its manifest records it, and whether this run's engine can go on from it.

Whole state dicts are read by every engine with any number of processes, and so are those in parts of FSDP2. DeepSpeed
reads its own alone, with the same ZeRO stage and as many processes as wrote it. Whatever cannot be read is refused
before anything of the checkpoint is loaded: transformers would leave the optimizer as it is, without a word.
"""

from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self, final

from holdfast.checkpoint.sound import resuming

WHOLE, PARTS, ZERO = "whole", "in parts", "DeepSpeed's own"
"""The forms of a checkpoint's state dicts."""


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Engine:
    """What spreads a run over processes: its `name`, the number of processes, and the form of its state dicts."""

    name: str
    num_processes: int
    state_dicts: str

    @classmethod
    def recorded_in(cls, manifest: Mapping[str, Any], names: Collection[str]) -> Self | None:
        """The engine that a checkpoint's manifest records. Of one of an earlier version, with the files `names`, what
        these say; None where that is nothing."""
        record = manifest.get("engine")
        if record is not None:
            return cls(**{name: record[name] for name in cls.__slots__})
        num_processes = sum(name.startswith("rng_state_") for name in names) or 1
        if any(name.startswith("global_step") for name in names):
            return cls(name="DeepSpeed", num_processes=num_processes, state_dicts=ZERO)
        return None

    def record(self) -> dict[str, Any]:
        """What a manifest records."""
        return asdict(self)

    def __str__(self) -> str:
        return f"{self.name} with {self.num_processes} process{'es' if self.num_processes > 1 else ''}"


def check_engine(checkpoint: Path, writer: Engine | None, ours: Engine) -> None:
    """ValueError where a run over the engine `ours` cannot go on from a checkpoint that `writer` wrote."""
    if writer is None or ZERO not in (writer.state_dicts, ours.state_dicts):
        return
    is_same = writer.state_dicts == ours.state_dicts and writer.name in ("DeepSpeed", ours.name)
    if is_same and writer.num_processes == ours.num_processes:
        return
    if is_same:
        reason = (
            "DeepSpeed divides its optimizer state by the number of processes, and puts it together only for as many"
        )
        remedy = f"Launch {writer.num_processes} processes"
    elif writer.state_dicts == ZERO:
        reason = "the state of its optimizer is in DeepSpeed's own files, which no other engine reads"
        remedy = f"Resume it with {writer}"
    else:
        reason = "DeepSpeed reads its own files only, of the same ZeRO stage"
        remedy = f"Resume it with {writer}"
    raise ValueError(
        f"{resuming(checkpoint)}, which was written by {writer}; this run is {ours}, and {reason}. {remedy}, or "
        "start a new run from the weights in it, with `ref_model` as that run's was."
    )
