"""Pairs per second of computing the reference's log-probs ahead: holdfast's store, TRL's pass, and row by row.

    python benchmarks/bench_fill.py --profiles dialogue as_is
    python benchmarks/bench_fill.py --profiles four_completions

`ours` fills an empty store; the digest of the weights and the writing are timed too. `peer` is TRL's precompute pass as
its trainer runs it, with its cache file. `padded_pairs` scores two padded rows for every pair with holdfast's forward
pass, in the order of the data, and stores nothing. Building models and tokenizing is not timed. `four_completions` has
all six pairs of four completions for each dialogue prompt. Tokens are those that reach the model, padding included.
Each run is a process of its own, sides take turns, and all must give the same log-probs. Adds to results/fill.json.
"""

import argparse
import contextlib
import json
import statistics
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import measure
import workload
from bench_step import BATCH, MAX_LENGTH, ratio

SIDES = ("ours", "peer", "padded_pairs")
PROFILES = (*workload.PROFILES, "four_completions")
NUM_ROWS = {"dialogue": 150, "as_is": 60, "four_completions": 25}
"""Rows of the data that are taken; of `four_completions`, prompts."""


# --- one measurement, in a process of its own -------------------------------------------------------------------------


class Pass:
    """Seconds of a pass, and the tokens that reached the embeddings in it."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self.num_tokens = 0

    @contextlib.contextmanager
    def measured(self) -> Iterator[None]:
        """Inside, time and tokens are counted."""
        import torch

        plain = torch.nn.Embedding.forward

        def counting(module: torch.nn.Embedding, ids: torch.Tensor) -> torch.Tensor:
            self.num_tokens += ids.numel()
            return plain(module, ids)

        torch.nn.Embedding.forward = counting
        start = measure.clock()
        try:
            yield
        finally:
            self.seconds += measure.clock() - start
            torch.nn.Embedding.forward = plain


def measured(work: dict[str, Any]) -> dict[str, Any]:
    """Seconds and tokens of a pass, and the sums of its log-probs."""
    import torch

    torch.set_num_threads(work["threads"])
    rows = [json.loads(line) for line in (Path(work["inputs"]) / "pairs.jsonl").read_text("utf-8").splitlines()]
    found = Pass()
    function = {"ours": fill_ours, "peer": fill_peer, "padded_pairs": score_padded_pairs}[work["side"]]
    chosen, rejected = function(work, rows, found)
    return {
        "seconds": found.seconds,
        "tokens": found.num_tokens,
        "logps": {"chosen": float(chosen), "rejected": float(rejected)},
    }


def arguments(work: dict[str, Any]) -> dict[str, Any]:
    """The training arguments that both packages get."""
    import torch

    has_gpu = torch.cuda.is_available()
    return {
        "output_dir": str(Path(work["folder"]) / "run"), "per_device_train_batch_size": BATCH, "save_strategy": "no",
        "report_to": "none", "disable_tqdm": True, "use_cpu": not has_gpu, "bf16": has_gpu, "max_length": MAX_LENGTH,
        "precompute_ref_log_probs": True, "model_init_kwargs": {"dtype": "float32"},
    }  # fmt: skip


def fill_ours(work: dict[str, Any], rows: list[Any], found: Pass) -> tuple[float, float]:
    """Sums of log-probs in holdfast's store, which is filled while the trainer is made."""
    from datasets import Dataset

    from holdfast import DPOConfig, DPOTrainer, Reference
    from holdfast.batch import PairBatch

    plain = Reference.prepare

    def prepare(*args: Any) -> None:
        with found.measured():
            plain(*args)

    Reference.prepare = prepare
    model = str(Path(work["inputs"]) / "model")
    trainer = DPOTrainer(model, args=DPOConfig(**arguments(work)), train_dataset=Dataset.from_list(rows))
    chosen = rejected = 0.0
    dataset: Any = trainer.train_dataset
    for start in range(0, len(dataset), BATCH):
        part = [dataset[row] for row in range(start, min(start + BATCH, len(dataset)))]
        batch = PairBatch.from_tensors(trainer.data_collator(part))
        sums = trainer.reference.logps(batch).sums()
        chosen, rejected = chosen + float(sums[batch.chosen].sum()), rejected + float(sums[batch.rejected].sum())
    return chosen, rejected


def fill_peer(work: dict[str, Any], rows: list[Any], found: Pass) -> tuple[float, float]:
    """Sums of log-probs that TRL's trainer adds to its dataset while it is made."""
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    class Timed(DPOTrainer):
        def _precompute_ref_logps(self, *args: Any, **kwargs: Any) -> Any:
            with found.measured():
                return super()._precompute_ref_logps(*args, **kwargs)

    model = str(Path(work["inputs"]) / "model")
    trainer = Timed(model, args=DPOConfig(**arguments(work)), train_dataset=Dataset.from_list(rows))
    columns = trainer.train_dataset
    return sum(columns["ref_chosen_logps"]), sum(columns["ref_rejected_logps"])


def score_padded_pairs(work: dict[str, Any], rows: list[Any], found: Pass) -> tuple[float, float]:
    """Sums of the log-probs of all pairs, from two padded rows each."""
    from contextlib import nullcontext

    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from holdfast.batch import PairBatch
    from holdfast.data.layouts.padded import PaddedLayout
    from holdfast.data.prepare import prepare_dataset
    from holdfast.scoring.frozen import frozen_logps

    folder = Path(work["inputs"]) / "model"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(device)
    prepared: Any = prepare_dataset(Dataset.from_list(rows), tokenizer, max_length=MAX_LENGTH)
    autocast = (lambda: torch.autocast("cuda", torch.bfloat16)) if device == "cuda" else nullcontext
    layout = PaddedLayout(tokenizer.pad_token_id, MAX_LENGTH)
    parts = [[prepared[row] for row in range(s, min(s + BATCH, len(prepared)))] for s in range(0, len(prepared), BATCH)]
    chosen = rejected = 0.0
    with found.measured():
        for part in parts:
            batch = PairBatch.from_tensors({name: tensor.to(device) for name, tensor in layout(part).items()})
            sums = frozen_logps(model, batch, autocast).sums()
            chosen, rejected = chosen + float(sums[batch.chosen].sum()), rejected + float(sums[batch.rejected].sum())
    return chosen, rejected


# --- every side -------------------------------------------------------------------------------------------------------


def check_same_logps(runs: dict[str, dict[str, Any]], name: str, *, is_half: bool) -> None:
    """ValueError unless all sides give the same log-probs."""
    for side, run in runs.items():
        for which, found in run["logps"].items():
            wanted = next(iter(runs.values()))["logps"][which]
            if abs(found - wanted) > (1e-2 if is_half else 1e-5) * abs(wanted):
                raise ValueError(
                    f"the sides of {name} were to score the same pairs, but {side} found log-probs of {found} in all "
                    f"({which}) where {next(iter(runs))} found {wanted}. Find out which is wrong before comparing."
                )


def summary(runs: list[dict[str, dict[str, Any]]], num_pairs: int) -> dict[str, Any]:
    """Medians by side, and of the ratios of ours to each of the others."""
    speeds = {side: [num_pairs / run[side]["seconds"] for run in runs] for side in runs[0]}
    found: dict[str, Any] = {
        "sides": {
            side: {
                "pairs_per_second": round(statistics.median(speeds[side]), 4),
                "tokens": runs[0][side]["tokens"],
                "seconds": [round(run[side]["seconds"], 4) for run in runs],
                "idle_before": [run[side]["idle_before"] for run in runs],
                "logps": runs[0][side]["logps"],
            }
            for side in speeds
        }
    }
    for other in speeds.keys() - {"ours"} if "ours" in speeds else ():
        found[f"speed_over_{other}"] = round(ratio(speeds["ours"], speeds[other]), 3)
        found[f"tokens_over_{other}"] = round(runs[0]["ours"]["tokens"] / runs[0][other]["tokens"], 4)
    return found


def compare(name: str, inputs: Path, num_pairs: int, options: argparse.Namespace) -> dict[str, Any]:
    """The summary of all repeats of one profile; the side that begins changes from repeat to repeat."""
    import torch

    runs: list[dict[str, dict[str, Any]]] = []
    for repeat in range(options.repeats):
        found: dict[str, dict[str, Any]] = {}
        shift = repeat % len(options.sides)
        for side in options.sides[shift:] + options.sides[:shift]:
            with tempfile.TemporaryDirectory() as own:
                work = {"side": side, "inputs": str(inputs)}
                found[side] = measure.in_a_process(__file__, work, threads=options.threads, folder=Path(own))
            speed, num_tokens = num_pairs / found[side]["seconds"], found[side]["tokens"]
            label = f"{name}  {repeat + 1}/{options.repeats}  {side:<13}"
            measure.say(f"{label}{speed:9.3f} pairs/s{num_tokens:10,} tokens")
        check_same_logps(found, name, is_half=torch.cuda.is_available())
        runs.append(found)
    return summary(runs, num_pairs)


def pairs_of(profile: str, all_pairs: list[Any], tokenizer: Any, num_rows: int) -> list[Any]:
    """The pairs of one of `PROFILES`."""
    if profile != "four_completions":
        return workload.sample(all_pairs, profile, num_rows, tokenizer, MAX_LENGTH)
    return workload.four_completions(workload.sample(all_pairs, "dialogue", num_rows, tokenizer, MAX_LENGTH))


def parsed() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--one", help="measure one side here, and print it as JSON")
    parser.add_argument("--data", type=Path, default=workload.DATA, help="JSONL file of preference conversations")
    parser.add_argument("--size", choices=workload.SIZES, default="small")
    parser.add_argument("--profiles", nargs="+", choices=PROFILES, default=list(PROFILES))
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES))
    parser.add_argument("--rows", type=int, help=f"rows of the data that are taken (default: {NUM_ROWS})")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="a tiny model, one repeat, eight rows")
    parser.add_argument("--output", type=Path, help="JSON file (default: results/fill.json; with --quick, none)")
    options = parser.parse_args()
    if not options.quick:
        options.output = options.output or measure.RESULTS / "fill.json"
    else:
        options.size, options.repeats, options.rows = "tiny", 1, 8
    return options


def main() -> None:
    """Measures one side and prints it as JSON (`--one`), or all sides in turn and writes the results."""
    options = parsed()
    if options.one:
        sys.stdout.write("\n" + json.dumps(measured(json.loads(options.one))) + "\n")
        return
    results = measure.Results(options.output, "fill", options.threads)
    all_pairs = workload.read_pairs(options.data)
    size = workload.SIZES[options.size]
    tokenizer = workload.make_tokenizer(all_pairs, size.vocabulary)
    for profile in options.profiles:
        with tempfile.TemporaryDirectory() as name:
            pairs = pairs_of(profile, all_pairs, tokenizer, options.rows or NUM_ROWS[profile])
            workload.write_model(Path(name) / "model", size, tokenizer)
            workload.write_pairs(Path(name) / "pairs.jsonl", pairs)
            key = f"{options.size}/{profile}"
            found = compare(key, Path(name), len(pairs), options)
            setting = {"profile": profile, "size": options.size, "model": size.facts(), "batch_pairs": BATCH}
            data = workload.facts(pairs, tokenizer, BATCH, MAX_LENGTH)
            results.add(key, setting | {"max_length": MAX_LENGTH, "data": data} | found)


if __name__ == "__main__":
    main()
