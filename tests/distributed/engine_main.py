"""Runs scenarios of `engine_scenarios` and writes what each came to: `engine_main.py FOLDER NAME ...`.

A run that fails on all processes together is an outcome, and the next one follows. Where one process fails and another
waits for it, the time-out of their group ends both, and what is left to run is for another launch.
"""

import datetime
import gc
import json
import os
import sys
import time
import traceback
from pathlib import Path

import engine_mutations
import engine_resumes
import engine_scenarios
import lockstep_scenarios
import torch
import torch.distributed as dist
from scenarios import RANK, WORLD

SECONDS = 60
AGAIN = 75
"""The exit code of a launch that has runs left."""


def main() -> None:
    """Runs the names that have no outcome yet."""
    folder, names = Path(sys.argv[1]), sys.argv[2:]
    torch.set_num_threads(1)
    gc.freeze()
    if WORLD > 1:
        dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=SECONDS))
        agreeing = dist.new_group(backend="gloo", timeout=datetime.timedelta(seconds=4 * SECONDS))
    for name in names:
        file = folder / f"{name.replace('/', '.')}.json"
        if file.exists():
            continue
        began, own = time.time(), folder / name
        own.mkdir(parents=True, exist_ok=True)
        os.environ["HOLDFAST_HOME"] = str(own / "home")
        try:
            resumed = engine_resumes.run if name.count("/") > 3 else engine_scenarios.run
            run = lockstep_scenarios.run if "/lockstep/" in name else resumed
            run = engine_mutations.run if "/mutated/" in name else run
            outcome = run(name, own)
        except Exception:
            outcome = {"error": traceback.format_exc()}
        outcomes = [outcome.get("error")]
        if WORLD > 1:
            outcomes = [None] * WORLD
            dist.all_gather_object(outcomes, outcome.get("error"), group=agreeing)
        if any(outcomes):
            outcome = {"errors": outcomes}
        if RANK == 0:
            file.write_text(json.dumps(outcome | {"seconds": round(time.time() - began, 2)}))
        said = [None if error is None else error.strip().splitlines()[-1][:300] for error in outcomes]
        if RANK == 0:
            sys.stdout.write(f"{name}: {'ok' if not any(said) else said} {time.time() - began:.1f} s\n")
            sys.stdout.flush()
        if any(outcomes) and (not all(outcomes) or any(error and is_of_the_group(error) for error in outcomes)):
            os._exit(AGAIN)
    if WORLD > 1:
        dist.barrier()
        dist.destroy_process_group()


def is_of_the_group(error: str) -> bool:
    """Whether an error says that the processes no longer reach each other."""
    return "gloo" in error.splitlines()[-1] or "pair closure" in error


if __name__ == "__main__":
    main()
