"""Whether holdfast does on this machine's GPU what it promises: one command, a table, and a file of JSON.

    python benchmarks/gpu_acceptance.py             # on a GPU, within 10 minutes
    python benchmarks/gpu_acceptance.py --dry       # without one

Each part is a process of its own, so that one that fails or hangs leaves the others. A part gives rows of what was
asked, what was found and what it may be. `speed` compares with `trl` where that is installed. The exit code is 1 where
a row is not as it must be.

Dry, the same parts run without a GPU: numbers on the CPU, device operations and copies on the pretend accelerator of
`tests/device`, bytes by arithmetic. What only a GPU can show has the verdict "needs a GPU", and is no failure. Given up
there: speed, kernels and compiled graphs.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import gpu_costs
import gpu_numbers
import measure
from gpu_runs import Row, row

PARTS: dict[str, tuple[Callable[[dict[str, Any]], Iterable[Row]], int]] = {
    "machine": (gpu_numbers.machine, 60),
    "routes": (gpu_numbers.routes, 120),
    "layouts": (gpu_numbers.layouts, 120),
    "margins": (gpu_numbers.margins, 180),
    "graphs": (gpu_numbers.graphs, 180),
    "waits": (gpu_numbers.waits, 120),
    "launches": (gpu_costs.launches, 180),
    "bytes": (gpu_costs.frozen_bytes, 120),
    "speed": (gpu_costs.speed, 420),
}
"""By part: what runs it, and the most seconds that it may take."""

MINUTES = 10
DRY = 6
"""A CPU takes as many times longer."""
VERDICTS = {True: "ok", False: "FAILED", None: "-"}


def run_part(name: str, *, is_dry: bool, seconds: float, folder: Path) -> list[dict[str, Any]]:
    """The rows of a part, from a process of its own; one row that says what went wrong where it gives none."""
    work = {"is_dry": is_dry, "folder": str(folder)}
    command = [sys.executable, __file__, "--one", name, json.dumps(work)]
    environment = os.environ | {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    environment["HOLDFAST_HOME"] = str(folder / "holdfast")
    environment["PYTHONPATH"] = os.pathsep.join([*sys.path[1:], environment.get("PYTHONPATH", "")])
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, timeout=seconds, env=environment
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return [row(name, "ends in time", f"not after {seconds:.0f} s", "", is_ok=False)]
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        sys.stderr.write(done.stderr[-3000:])
        return [row(name, "runs", f"exit code {done.returncode}: {last}", "", is_ok=False)]
    return json.loads(done.stdout.splitlines()[-1])


def table(rows: Iterable[dict[str, Any]]) -> str:
    """The rows as lines of text in columns."""
    cells = [("part", "asked", "found", "may be", "")]
    cells += [(r["part"], r["asked"], r["found"], r["bound"], VERDICTS[r["is_ok"]]) for r in rows]
    widths = [max(len(line[column]) for line in cells) for column in range(5)]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip() for line in cells)  # noqa: B905


def parsed() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--one", nargs=2, metavar=("PART", "WORK"), help="run one part here, and print it as JSON")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--dry", action="store_true", help="without a GPU")
    parser.add_argument("--output", type=Path, help="JSON file (default: results/gpu_acceptance.json; dry, none)")
    options = parser.parse_args()
    if not options.one and not options.dry:
        measure.choose_device("cuda")
        options.output = options.output or measure.RESULTS / "gpu_acceptance.json"
    return options


def main() -> int:
    """Runs one part and prints its rows (`--one`), or all of them, and says whether all is as it must be."""
    options = parsed()
    if options.one:
        name, work = options.one
        sys.stdout.write("\n" + json.dumps(list(PARTS[name][0](json.loads(work)))) + "\n")
        return 0
    rows: list[dict[str, Any]] = []
    end = time.monotonic() + 60 * MINUTES
    with tempfile.TemporaryDirectory() as folder:
        for name in options.only:
            measure.say(name)
            left = max(1.0, min(end - time.monotonic(), PARTS[name][1]))
            seconds = DRY * PARTS[name][1] if options.dry else left
            rows += run_part(name, is_dry=options.dry, seconds=seconds, folder=Path(folder))
    sys.stdout.write(table(rows) + "\n")
    failed = [r for r in rows if r["is_ok"] is False]
    sys.stdout.write(f"{len(rows)} rows, {len(failed)} failed\n")
    if options.output is not None:
        document = {"benchmark": "gpu_acceptance", "is_dry": options.dry, "environment": measure.environment(1)}
        options.output.write_text(json.dumps(document | {"rows": rows}, indent=2) + "\n", encoding="utf-8")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
