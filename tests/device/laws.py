"""What every cell must hold, and what is allowed nevertheless, each with its reason."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from cells import Cell
from pretend.places import Place
from run import Result

BUDGET = Path(__file__).parent / "budget.json"
TOLERANCE = 0.05


class Allowed(NamedTuple):
    """What a function may do that the host waits for: at most so often while a cell is watched, and why. With a `way`,
    only where the reference is held that way."""

    most: int
    reason: str
    way: str | None = None


_TOKENS = "peft makes the indices of trainable tokens in host memory in each forward pass"
_EVALUATED = "after the last batch of an evaluation"
_EXPERTS = "torch has a grouped product for bf16 weights alone; of others it reads how many tokens each expert has"
_SYNCED = "the length of a move is read once in a sync"

_MOVED_IN_HOST_MEMORY = "a sync of a snapshot in host memory moves it there"
_FROM_A_FILE = "the values of a snapshot on disk are read from its file, once per window"

BLOCKING_COPIES = {
    ("holdfast/reference/moving/average.py", "move"): Allowed(99, _MOVED_IN_HOST_MEMORY),
    ("holdfast/reference/scorers/snapshot.py", "like_parameters"): Allowed(99, _FROM_A_FILE, "snapshot_disk"),
    ("holdfast/reference/moving/lora_products.py", "<dictcomp>"): Allowed(99, _MOVED_IN_HOST_MEMORY),
    ("peft/tuners/trainable_tokens/layer.py", "get_merged_weights"): Allowed(10, _TOKENS),
    ("transformers/trainer_pt_utils.py", "nested_numpify"): Allowed(1, _EVALUATED),
    ("holdfast/training/pair_trainer.py", "_sum_over_processes"): Allowed(2, _EVALUATED),
    ("holdfast/training/margins.py", "_read"): Allowed(1, f"{_EVALUATED}: the margins of its pairs"),
    ("holdfast/metrics.py", "<listcomp>"): Allowed(2, f"{_EVALUATED}: the sums of each source"),
}
"""By file and function: copies for which the host waits."""

READS = {
    ("holdfast/metrics.py", "reset"): Allowed(1, _EVALUATED),
    ("holdfast/metrics.py", "over_processes"): Allowed(1, _EVALUATED),
    ("holdfast/metrics.py", "total"): Allowed(1, _EVALUATED),
    ("holdfast/checkpoint/finite.py", "not_finite"): Allowed(2, "buffers are looked at once, before the first numbers"),
    ("holdfast/policy/untouched.py", "untouched"): Allowed(9, "buffers are compared once after a dataset was scored"),
    ("transformers/integrations/moe.py", "_grouped_mm"): Allowed(99, _EXPERTS),
    ("holdfast/reference/moving/squares.py", "read"): Allowed(2, _SYNCED),
    ("holdfast/reference/moving/lora_products.py", "_mix"): Allowed(8, "a sync asks of each layer whether A is frozen"),
}
"""By file and function: reads of values."""


def broken_laws(result: Result, budget: Mapping[str, Mapping[str, int]]) -> list[str]:
    """What the cell did that it must not, a line each; none where all is well.

    A run ends without an error, which a mix of devices is. Nothing waits for the device. Metrics are added up there.
    There are as many operations as `budget` says of the cell, where it has the cell, within `TOLERANCE`: neither more
    nor far fewer.
    """
    if result.error is not None:
        return [f"{result.error} at {result.place}"]
    watch, found = result.watch, []
    for (place, detail, blocks), count in watch.copies.items():
        if blocks and not _is_allowed(result.cell, place, count, BLOCKING_COPIES):
            found.append(f"the host waits for {count} copies {detail} at {place}")
    for (place, name), count in watch.reads.items():
        if not _is_allowed(result.cell, place, count, READS):
            found.append(f"the host reads {count} values by {name} at {place}")
    if result.tallies != {"cuda"}:
        found.append(f"metrics are added up on {sorted(result.tallies)}")
    return found + _beyond_budget(result, budget)


def _is_allowed(cell: Cell, place: Place, count: int, table: Mapping[tuple[str, str], Allowed]) -> bool:
    allowed = table.get((f"{place.package}/{place.file}", place.function))
    return allowed is not None and count <= allowed.most and allowed.way in (None, cell.way)


def _beyond_budget(result: Result, budget: Mapping[str, Mapping[str, int]]) -> list[str]:
    expected = budget.get(result.cell.name)
    if expected is None:
        return []
    total, allowed = result.watch.num_operations, sum(expected.values())
    if abs(total - allowed) <= TOLERANCE * allowed:
        return []
    names = sorted({*expected, *result.watch.groups})
    counts = {name: (expected.get(name, 0), result.watch.groups[name]) for name in names}
    changed = ", ".join(f"{name} {before} -> {now}" for name, (before, now) in counts.items() if before != now)
    advice = "find what was added" if total > allowed else "if that is right, write the budget anew with --write-budget"
    return [f"{total} operations, where the budget has {allowed} ({changed}): {advice}"]


def read_budget() -> dict[str, dict[str, int]]:
    """The budget: of each cell, by name, its operations by group."""
    return json.loads(BUDGET.read_text(encoding="utf-8")) if BUDGET.exists() else {}


def write_budget(results: list[Result]) -> None:
    """Writes the budget of these cells; those of others stay."""
    budget = read_budget() | {r.cell.name: dict(sorted(r.watch.groups.items())) for r in results if r.error is None}
    lines = [f"{json.dumps(name)}: {json.dumps(groups)}" for name, groups in sorted(budget.items())]
    BUDGET.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")
