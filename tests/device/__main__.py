"""Runs cells on the pretend accelerator and prints what they do there.

python tests/device full/prefix_shared/model --bf16 --groups     one cell (see `cells.Cell.named`)
python tests/device --table fast --check                         a table of `cell_tables`, held to the laws
python tests/device --table fast --write-budget                  the budget of its cells, written anew
python tests/device --faults                                     faults are planted, and must be found
"""

import argparse
import logging
import os
import sys
import time
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent), str(HERE.parents[1] / "src"), str(HERE.parents[1] / "benchmarks")]

from pretend import build

os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "TORCHDYNAMO_DISABLE": "1"}
build.load()

from pretend.stage import set_up

set_up()

import datasets
import torch

torch.set_num_threads(1)
datasets.disable_progress_bars()

from cell_tables import BUDGETED, TABLES
from cells import Cell
from faults import FAULTS, planted
from found_faults import missed_faults
from laws import broken_laws, read_budget, write_budget
from report import lines_of
from run import run


def main() -> int:
    """0 where no run ended with an error and, with --check, no law is broken."""
    asked = _parser().parse_args()
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    cells = [cell for name in asked.table or () for cell in TABLES[name]]
    cells += [Cell.named(name + _more(asked)) for name in asked.cells]
    is_ok, results, budget = True, [], read_budget()
    start = time.monotonic()
    if asked.faults:
        missed = missed_faults()
        print("\n".join([*missed, f"{len(FAULTS) - len(missed)} of {len(FAULTS)} faults found"]))
        is_ok = not missed
    if asked.check:
        missing = _without_budget(asked.table or (), budget)
        print("".join(f"{name}: it has no budget; write one with --write-budget\n" for name in missing), end="")
        is_ok = is_ok and not missing
    with planted(asked.plant):
        for cell in {cell.name: cell for cell in cells}.values():
            result = run(cell)
            results.append(result)
            lines = lines_of(result, with_groups=asked.groups)
            if asked.check:
                lines = [f"{cell.name}: {line}" for line in broken_laws(result, budget)]
                is_ok = is_ok and not lines
            is_ok = is_ok and result.error is None
            print("".join(f"{line}\n" for line in lines), end="", flush=True)
            if asked.trace and result.error:
                print(result.trace, flush=True)
    if asked.write_budget:
        write_budget(results)
    print(f"{len(results)} cells in {time.monotonic() - start:.0f} s")
    return 0 if is_ok else 1


def _without_budget(tables: Sequence[str], budget: Mapping[str, Any]) -> list[str]:
    """The names of cells that must have a budget, and have none."""
    names = [cell.name for table in tables if table in BUDGETED for cell in TABLES[table]]
    return [name for name in names if name not in budget]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cells", nargs="*", help="policy/layout/way, and after further slashes what is varied")
    parser.add_argument("--table", action="append", choices=[*TABLES], help="all cells of a table; may be repeated")
    parser.add_argument("--bf16", action="store_true", help="under bf16 autocast")
    parser.add_argument("--shape", help="a size of benchmarks/workload.py, such as 0.5b")
    parser.add_argument("--pairs", type=int, help="pairs of a batch")
    parser.add_argument("--routes", help="the attention routes that work, such as flex+dense; default: all")
    parser.add_argument("--groups", action="store_true", help="operations by the part of a step")
    parser.add_argument("--check", action="store_true", help="print broken laws only, and fail where there are any")
    parser.add_argument("--write-budget", action="store_true", help="write the operations of these cells to the budget")
    parser.add_argument("--faults", action="store_true", help="plant every fault in turn, and see that it is found")
    parser.add_argument("--plant", choices=[*FAULTS], help="plant a fault, to see that it is found")
    parser.add_argument("--trace", action="store_true", help="the whole traceback of an error")
    return parser


def _more(asked: argparse.Namespace) -> str:
    more = "/bf16" if asked.bf16 else ""
    for key in ("shape", "pairs", "routes"):
        more += f"/{key}={getattr(asked, key)}" if getattr(asked, key) is not None else ""
    return more


if __name__ == "__main__":
    sys.exit(main())
