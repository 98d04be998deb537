"""Pairs per second and peak memory of a training step, of holdfast, of holdfast with padded rows, and of TRL.

    python benchmarks/bench_step.py --profiles dialogue --modes full
    python benchmarks/bench_step.py --profiles as_is --modes lora --checkpointing

Each run is a process of its own that trains a small Llama from the same folder on the same pairs in the same order,
with each package's own defaults for the mode; sides take turns. Building the model, tokenizing, log-probs ahead, and
the first steps are not timed. A few more steps then measure memory (see `measure`). All sides must log the same losses
and log-probs; otherwise the benchmark would compare unlike work, and it fails. Reported are medians over the repeats,
of each side and of the ratios of consecutive runs.

On a GPU (`--device cuda`; `auto` takes one where there is one): bf16 autocast, `--size 0.5b`. Adds to
results/step.json, which holds runs of one environment; those of other machines, threads or versions go into files of
their own (`--output results/step_gpu.json`).
"""

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import measure
import workload

SIDES = ("ours", "peer", "ours_padded")
BATCH = 4
MAX_LENGTH = 1024  # the default of both
SYNC = {"sync_ref_model": True, "ref_model_mixup_alpha": 0.6, "ref_model_sync_steps": 2}
AHEAD = {"precompute_ref_log_probs": True}

MODES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "full": ({}, {}),
    "stored": (AHEAD, AHEAD),
    "synced": (SYNC, SYNC),
    "lora": ({"lora": True}, {"lora": True}),
    "lora_stored": ({"lora": True} | AHEAD, {"lora": True} | AHEAD),
    "lora_stored_against_live": ({"lora": True} | AHEAD, {"lora": True}),
}
"""By mode: what ours and the peer's are given."""


# --- one measurement, in a process of its own -------------------------------------------------------------------------


def measured(work: dict[str, Any]) -> dict[str, Any]:
    """Seconds of the timed steps, MiB at the peaks of the others, and the logged numbers."""
    import torch

    torch.set_num_threads(work["threads"])
    watch = measure.watch(work["warmup"], work["timed"])
    trainer = make_trainer(work, watch, steps=work["warmup"] + work["timed"] + work["memory"])
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    names = ("loss", "logps/chosen", "logps/rejected", "rewards/margins")
    assert len(watch.seconds) == work["timed"]
    return {
        "seconds": watch.seconds,
        "peaks": watch.peaks,
        "resident": watch.resident,
        "first": {name: logs[0][name] for name in names},
        "last": {name: logs[-1][name] for name in names},
    }


def make_trainer(work: dict[str, Any], watch: Any, *, steps: int) -> Any:
    """The side's trainer on the model and the pairs in the folder `inputs`."""
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoTokenizer

    if work["side"] == "peer":
        from trl import DPOConfig, DPOTrainer
    else:
        from holdfast import DPOConfig, DPOTrainer
    inputs = Path(work["inputs"])
    options = MODES[work["mode"]][work["side"] == "peer"].copy()
    is_lora = options.pop("lora", False)
    if work["side"] != "peer":
        options["layout"] = "padded" if work["side"] == "ours_padded" else "auto"
    has_gpu = torch.cuda.is_available()
    model = workload.model_in(inputs / "model", "cuda" if has_gpu else "cpu")
    if isinstance(model, str):
        options["model_init_kwargs"] = {"dtype": "float32"}
    args = DPOConfig(
        output_dir=str(Path(work["folder"]) / "run"), max_steps=steps, per_device_train_batch_size=BATCH,
        gradient_checkpointing=work["checkpointing"], max_length=MAX_LENGTH, logging_first_step=True,
        logging_steps=steps, save_strategy="no", report_to="none", disable_tqdm=True, use_cpu=not has_gpu, bf16=has_gpu,
        **options,
    )  # fmt: skip
    rows = [json.loads(line) for line in (inputs / "pairs.jsonl").read_text(encoding="utf-8").splitlines()]
    lora = LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM")
    return DPOTrainer(
        model=model,
        args=args,
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(inputs / "model"),
        callbacks=[watch],
        peft_config=lora if is_lora else None,
    )


# --- every side -------------------------------------------------------------------------------------------------------


def check_same_work(runs: dict[str, dict[str, Any]], name: str, *, is_half: bool) -> None:
    """ValueError unless all sides logged the same numbers on the first batch, and the same loss on the last."""
    expected = next(iter(runs.values()))
    for side, run in runs.items():
        for when, fields in (("first", run["first"].keys() - {"rewards/margins"}), ("last", {"loss"})):
            for field in fields:
                found, wanted = run[when][field], expected[when][field]
                if abs(found - wanted) > (3e-2 if is_half else 1e-4) * max(1.0, abs(wanted)):
                    raise ValueError(
                        f"the sides of {name} were to do the same work, but {side} logged {field} {found} where "
                        f"{next(iter(runs))} logged {wanted} ({when} log). Find out which is wrong before comparing."
                    )


def summary(runs: list[dict[str, dict[str, Any]]]) -> dict[str, Any]:
    """Medians by side, and of the ratios of ours to each of the others, from one dict by side for each repeat."""
    speeds = {side: [BATCH * len(run[side]["seconds"]) / sum(run[side]["seconds"]) for run in runs] for side in runs[0]}
    peaks = {side: [max(run[side]["peaks"]) for run in runs] for side in runs[0]}
    sides = {
        side: {
            "pairs_per_second": round(statistics.median(speeds[side]), 4),
            "peak_mib": round(statistics.median(peaks[side]), 1),
            "resident_mib": round(statistics.median(run[side]["resident"] for run in runs), 1),
            "runs": [
                {
                    "idle_before": run[side]["idle_before"],
                    "seconds": [round(second, 4) for second in run[side]["seconds"]],
                    "peaks_mib": [round(peak, 1) for peak in run[side]["peaks"]],
                }
                for run in runs
            ],
            "first": runs[0][side]["first"],
            "last": runs[0][side]["last"],
        }
        for side in speeds
    }  # fmt: skip
    found: dict[str, Any] = {"sides": sides}
    for other in sides.keys() - {"ours"} if "ours" in sides else ():
        found[f"speed_over_{other}"] = round(ratio(speeds["ours"], speeds[other]), 3)
        found[f"peak_over_{other}"] = round(ratio(peaks["ours"], peaks[other]), 4)
    return found


def ratio(ours: list[float], others: list[float]) -> float:
    """The median of the ratios of consecutive runs."""
    return statistics.median(one / other for one, other in zip(ours, others, strict=True))


def compare(name: str, work: dict[str, Any], options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """The summary of all repeats of one setting; the side that begins changes from repeat to repeat."""
    runs: list[dict[str, dict[str, Any]]] = []
    for repeat in range(options.repeats):
        found: dict[str, dict[str, Any]] = {}
        shift = repeat % len(options.sides)
        for side in options.sides[shift:] + options.sides[:shift]:
            with tempfile.TemporaryDirectory(dir=folder) as own:
                found[side] = measure.in_a_process(
                    __file__, {**work, "side": side}, threads=options.threads, folder=Path(own)
                )
            speed = BATCH * work["timed"] / sum(found[side]["seconds"])
            measure.say(
                f"{name}  {repeat + 1}/{options.repeats}  {side:<12}{speed:8.3f} pairs/s"
                f"{max(found[side]['peaks']):10.1f} MiB"
            )
        check_same_work(found, name, is_half=work["is_half"])
        runs.append(found)
    return summary(runs)


def parsed() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--one", help="measure one side here, and print it as JSON")
    parser.add_argument("--data", type=Path, default=workload.DATA, help="JSONL file of preference conversations")
    parser.add_argument("--size", choices=workload.SIZES, default="small")
    parser.add_argument("--profiles", nargs="+", choices=workload.PROFILES, default=list(workload.PROFILES))
    parser.add_argument("--modes", nargs="+", choices=MODES, default=["full"])
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--checkpointing", action="store_true", help="recompute activations, on all sides")
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--warmup", type=int, default=1, help="steps before those that are timed")
    parser.add_argument("--timed", type=int, default=4)
    parser.add_argument("--memory", type=int, default=2, help="steps after them, whose peak is measured")
    parser.add_argument("--quick", action="store_true", help="a tiny model, one repeat, two timed steps")
    parser.add_argument("--output", type=Path, help="JSON file (default: results/step.json; with --quick, none)")
    options = parser.parse_args()
    if not options.quick:
        options.output = options.output or measure.RESULTS / "step.json"
    else:
        options.size, options.repeats, options.timed, options.memory = "tiny", 1, 3, 1
    measure.choose_device(options.device)
    if min(options.warmup, options.timed, options.memory, options.repeats) < 1:
        parser.error("--warmup, --timed, --memory and --repeats count from 1")
    return options


def main() -> None:
    """Measures one side and prints it as JSON (`--one`), or all sides in turn and writes the results."""
    options = parsed()
    if options.one:
        sys.stdout.write("\n" + json.dumps(measured(json.loads(options.one))) + "\n")
        return
    import torch

    results = measure.Results(options.output, "step", options.threads)
    all_pairs = workload.read_pairs(options.data)
    size = workload.SIZES[options.size]
    steps = {name: getattr(options, name) for name in ("warmup", "timed", "memory")}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tokenizer = workload.make_tokenizer(all_pairs, size.vocabulary)
        workload.write_model(folder / "model", size, tokenizer)
        for profile in options.profiles:
            inputs = folder / profile
            inputs.mkdir()
            (inputs / "model").symlink_to(folder / "model")
            pairs = workload.sample(all_pairs, profile, BATCH * sum(steps.values()), tokenizer, MAX_LENGTH)
            workload.write_pairs(inputs / "pairs.jsonl", pairs)
            facts = workload.facts(pairs, tokenizer, BATCH, MAX_LENGTH)
            for mode in options.modes:
                key = f"{options.size}/{profile}/{mode}" + ("/checkpointing" if options.checkpointing else "")
                work = {
                    "mode": mode, "inputs": str(inputs), "checkpointing": options.checkpointing, **steps,
                    "is_half": torch.cuda.is_available(),
                }  # fmt: skip
                found = compare(key, work, options, folder)
                setting = {"profile": profile, "mode": mode, "checkpointing": options.checkpointing, **steps}
                shape = {"size": options.size, "model": size.facts(), "batch_pairs": BATCH, "max_length": MAX_LENGTH}
                results.add(key, setting | shape | {"data": facts} | found)


if __name__ == "__main__":
    main()
