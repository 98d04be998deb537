"""Runs scenarios and writes their numbers: `main.py FOLDER [NAME ...]`, plainly or under `torch.distributed.run`.

A process that fails ends at once with its traceback, for the others would wait for it.
"""

import datetime
import gc
import json
import os
import sys
import time
import traceback
from pathlib import Path

import batch_losses
import scenarios
import sharded
import torch
import torch.distributed as dist


def main() -> None:
    """Runs the named scenarios, or all of them, and writes FOLDER/results.json."""
    table = scenarios.SCENARIOS | batch_losses.SCENARIOS | (sharded.SCENARIOS if scenarios.WORLD > 1 else {})
    folder, names = Path(sys.argv[1]), sys.argv[2:] or [*table]
    torch.set_num_threads(1)
    gc.freeze()  # every run collects garbage, which takes longer than the run with all that was imported
    if scenarios.WORLD > 1:
        dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=60))
    results, seconds = {}, {}
    for name in names:
        began = time.time()
        (folder / name).mkdir(parents=True, exist_ok=True)
        os.environ["HOLDFAST_HOME"] = str(folder / name / "home")
        try:
            results[name] = table[name](folder / name)
        except BaseException:
            where = f"scenario {name!r}, process {scenarios.RANK} of {scenarios.WORLD}"
            sys.stderr.write(f"\n--- {where}:\n{traceback.format_exc()}---\n")
            sys.stderr.flush()
            os._exit(1)
        seconds[name] = round(time.time() - began, 2)
    if scenarios.RANK == 0:
        (folder / "results.json").write_text(json.dumps(results))
        sys.stdout.write(f"seconds: {seconds}, in all {sum(seconds.values()):.1f}\n")
    if scenarios.WORLD > 1:
        dist.barrier()
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
