"""What every cell must hold, and what is allowed nevertheless, each with its reason."""

import json
from collections.abc import Mapping
from pathlib import Path

from pretend.places import Place
from run import Result

BUDGET = Path(__file__).parent / "budget.json"
TOLERANCE = 0.05

BLOCKING_COPIES: dict[tuple[str, str], str] = {}
"""By file and function: copies for which the host waits, and why they may."""

READS: dict[tuple[str, str], str] = {}
"""By file and function: reads of values, and why they may be."""


def broken_laws(result: Result, budget: Mapping[str, Mapping[str, int]]) -> list[str]:
    """What the cell did that it must not, a line each; none where all is well.

    A run ends without an error, which a mix of devices is; nothing waits for the device; metrics are added up there; and
    there are as many operations as `budget` says of the cell, within `TOLERANCE`, neither more nor far fewer.
    """
    if result.error is not None:
        return [f"{result.error} at {result.place}"]
    watch, found = result.watch, []
    for (place, detail, blocks), count in watch.copies.items():
        if blocks and not _is_allowed(place, BLOCKING_COPIES):
            found.append(f"the host waits for {count} copies {detail} at {place}")
    for (place, name), count in watch.reads.items():
        if not _is_allowed(place, READS):
            found.append(f"the host reads {count} values by {name} at {place}")
    if result.tallies != {"cuda"}:
        found.append(f"metrics are added up on {sorted(result.tallies)}")
    return found + _beyond_budget(result, budget)


def _is_allowed(place: Place, table: Mapping[tuple[str, str], str]) -> bool:
    return (f"{place.package}/{place.file}", place.function) in table


def _beyond_budget(result: Result, budget: Mapping[str, Mapping[str, int]]) -> list[str]:
    expected = budget.get(result.cell.name)
    if expected is None:
        return ["there is no budget for it: write one with --write-budget"]
    total, allowed = result.watch.num_operations, sum(expected.values())
    if abs(total - allowed) <= TOLERANCE * allowed:
        return []
    names = sorted({*expected, *result.watch.groups})
    changes = [f"{name} {expected.get(name, 0)} -> {result.watch.groups[name]}" for name in names]
    changed = ", ".join(
        c for c, name in zip(changes, names, strict=True) if expected.get(name) != result.watch.groups[name]
    )
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
