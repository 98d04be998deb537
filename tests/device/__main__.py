"""Runs cells on the pretend accelerator and prints what they do there: `python tests/device CELL [--groups]`."""

import argparse
import logging
import os
import sys
import warnings
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent), str(HERE.parents[1] / "src"), str(HERE.parents[1] / "benchmarks")]

from pretend import build

os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "TORCHDYNAMO_DISABLE": "1"}
build.load()

from pretend.stage import set_up

set_up()
import torch

torch.set_num_threads(1)
import datasets

datasets.disable_progress_bars()

from cells import Cell
from report import lines_of
from run import run


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("cells", nargs="+", help="policy/layout/way, and after further slashes what is varied")
    parser.add_argument("--bf16", action="store_true", help="under bf16 autocast")
    parser.add_argument("--shape", help="a size of benchmarks/workload.py, such as 0.5b")
    parser.add_argument("--pairs", type=int)
    parser.add_argument("--routes", help="the attention routes that work, such as flex+dense")
    parser.add_argument("--groups", action="store_true", help="operations by the part of a step")
    parser.add_argument("--trace", action="store_true", help="the whole traceback of an error")
    asked = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    more = "/bf16" if asked.bf16 else ""
    for key in ("shape", "pairs", "routes"):
        more += f"/{key}={getattr(asked, key)}" if getattr(asked, key) is not None else ""
    is_ok = True
    for name in asked.cells:
        result = run(Cell.named(name + more), with_groups=asked.groups)
        is_ok = is_ok and result.error is None
        print("\n".join(lines_of(result)))
        if asked.trace and result.error:
            print(result.trace)
    return 0 if is_ok else 1


if __name__ == "__main__":
    sys.exit(main())
