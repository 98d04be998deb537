"""Runs the experiments and publishes what came of them.

    python benchmarks/science/run.py [EXPERIMENT ...] [--seeds 5] [--workers 2] [--draw]

Writes benchmarks/results/science/NAME.json, docs/science/NAME.svg and the tables of docs/science.md. Interrupted and
started again it goes on: finished runs are kept in build/science, and what the trainer said in its log.txt. `--draw`
runs nothing, and writes claims, pictures and tables of the result files that are there.
"""

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

# The folder itself would hide modules of the standard library: it has a `statistics` too.
sys.path[0] = str(Path(__file__).resolve().parents[1])
# One thread for each process, before torch is imported: sums do not depend on the number of processors.
os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}

from science.experiments import EXPERIMENTS
from science.page import PAGE, PICTURES, RESULTS, documents, updated
from science.performing import Task, cpu_seconds, machine, numbers, perform_all
from science.records import Experiment, Results, claim_entry, document
from science.settings import FULL, QUICK, Scale, published_numbers


def main() -> None:
    parser = argparse.ArgumentParser(description="Runs the experiments and publishes what came of them.")
    parser.add_argument("experiments", nargs="*", metavar="EXPERIMENT", help=f"of {', '.join(EXPERIMENTS)} (all)")
    parser.add_argument("--seeds", type=int, default=5, help="number of seeds, the first being 0")
    parser.add_argument("--workers", type=int, default=2, help="processes at work")
    parser.add_argument("--work", type=Path, default=Path("build/science"), help="where finished runs are kept")
    parser.add_argument("--results", type=Path, default=RESULTS, help="where result files are written")
    parser.add_argument("--page", type=Path, default=PAGE, help="the page whose tables are written")
    parser.add_argument("--pictures", type=Path, default=PICTURES, help="where pictures are written")
    parser.add_argument("--draw", action="store_true", help="run nothing; write claims, pictures and tables anew")
    parser.add_argument("--quick", action="store_true", help="runs so small that their numbers mean nothing")
    options = parser.parse_args()
    unknown = sorted({*options.experiments} - {*EXPERIMENTS})
    if unknown:
        parser.error(f"there is no experiment {', '.join(unknown)}: there are {', '.join(EXPERIMENTS)}")
    if options.seeds < 1 or options.workers < 1:
        parser.error(f"--seeds {options.seeds} --workers {options.workers}: both must be at least 1")
    chosen = [EXPERIMENTS[name] for name in options.experiments or EXPERIMENTS]
    options.results.mkdir(parents=True, exist_ok=True)
    options.pictures.mkdir(parents=True, exist_ok=True)
    if not options.draw:
        run(chosen, QUICK if options.quick else FULL, options)
    publish(chosen, options.results, options.pictures, options.page)


def run(chosen: list[Experiment], scale: Scale, options: argparse.Namespace) -> None:
    """Performs all runs and writes the result files."""
    seeds, work = range(options.seeds), options.work.resolve()
    tasks = {
        each.NAME: [Task(run=run, seed=seed, scale=scale, work=work) for seed in seeds for run in each.runs(scale)]
        for each in chosen
    }
    perform_all([task for of_experiment in tasks.values() for task in of_experiment], num_workers=options.workers)
    for experiment in chosen:
        of_experiment = tasks[experiment.NAME]
        folders = {task.seed: task.setting_folder for task in of_experiment}
        settings = [published_numbers(folders[seed]) for seed in seeds]
        found = {
            run.name: [numbers(task) for task in of_experiment if task.run.name == run.name]
            for run in experiment.runs(scale)
        }
        made_with = machine() | {"cpu_seconds": cpu_seconds(of_experiment)}
        _write(
            options.results / f"{experiment.NAME}.json", document(experiment, scale, seeds, settings, found, made_with)
        )


def publish(chosen: list[Experiment], results: Path, pictures: Path, page: Path) -> None:
    """Writes what follows from the result files: their claims, the pictures, and the tables of the page."""
    found = documents(results)
    for experiment in chosen:
        if (content := found.get(experiment.NAME)) is None:
            continue
        of_experiment = Results(content)
        content["claims"] = [claim_entry(claim) for claim in experiment.claims(of_experiment)]
        _write(results / f"{experiment.NAME}.json", content)
        experiment.draw(of_experiment, pictures / f"{experiment.NAME}.svg")
        for claim in content["claims"]:
            print(f"{experiment.NAME}: {claim['text']}: {claim['verdict']}")
    if page.exists():
        page.write_text(updated(page.read_text(encoding="utf-8"), found), encoding="utf-8")


def _write(path: Path, content: dict[str, Any]) -> None:
    path.write_text(f"{json.dumps(content, indent=1)}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
