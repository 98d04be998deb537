"""How near a training step comes to the machine's arithmetic, and how its cost grows with the length of a row.

    python benchmarks/bench_limit.py

`share`: the floating-point operations that a step needs by formula (`step_flops`), over its time, as a share of the
rate at which the machine multiplies matrices of the step's own shapes. The step is the trainer's, optimizer included,
on rows of 1,000 tokens and more. The formula counts neither padding nor anything that is computed again, so padding,
recomputed logits and activations, and everything that is no matrix product, all lower the share. The formula has every
layer compute every token, as is usual. `share_computed` leaves out the tokens of the last layer that nobody reads.

`dialogue`: the same share for a small model on pairs of dialogue length, whose lengths spread as those of real dialogue
do. Matrix products are smaller there, so all else weighs more.

`growth`: seconds of a forward and backward pass over one row of up to 32k tokens, made longer by more pairs of dialogue
length (`pairs`) or by more completions of one prompt (`completions`). Each completion sees as many tokens as before, so
the exponent of a power law through the points is 1 where cost is linear.

Adds to results/limit.json.
"""

import argparse
import json
import math
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from random import Random
from typing import Any

import measure
import workload

BATCH = 4
STEP = {"prompt": 600, "chosen": 250, "rejected": 250}
"""Tokens of the pairs of `share`, each a row of 1,100 where prompts are shared."""

DIALOGUE_SIZE = "dialogue"
"""The model of `dialogue`, a size of `workload`."""

PAIR = {"prompt": 116, "chosen": 37, "rejected": 49}
TREE = {"prompt": 512, "completion": 40}
ROWS = (1024, 2048, 4096, 8192, 16_384, 32_768)

REFERENCES: dict[str, dict[str, Any]] = {
    "live": {},
    "stored": {"precompute_ref_log_probs": True},
}


# --- the formula ------------------------------------------------------------------------------------------------------


def body_parameters(size: workload.Size) -> int:
    """Weights of the matrices in the layers: four of the attention, three of the feed-forward part."""
    keys = size.hidden // size.heads * size.key_heads
    return size.layers * (2 * size.hidden * (size.hidden + keys) + 3 * size.hidden * size.intermediate)


def seen_pairs(prompt: int, completions: Sequence[int]) -> int:
    """(query, key) pairs of a prompt and these completions, each of which sees the prompt and itself, causally."""
    return prompt * (prompt + 1) // 2 + sum(c * prompt + c * (c + 1) // 2 for c in completions)


def forward_flops(size: workload.Size, trees: Sequence[tuple[int, Sequence[int]]]) -> int:
    """Of trees (prompt, completions): 2 * body parameters per token, 4 * hidden per layer and pair of positions that
    see each other (scores and mixing), and 2 * hidden * vocabulary per completion token."""
    num_tokens = sum(prompt + sum(completions) for prompt, completions in trees)
    num_completion = sum(sum(completions) for _, completions in trees)
    body = 2 * body_parameters(size) * num_tokens
    attention = 4 * size.hidden * size.layers * sum(seen_pairs(*tree) for tree in trees)
    return body + attention + 2 * size.hidden * size.vocabulary * num_completion


def unread_flops(size: workload.Size, trees: Sequence[tuple[int, Sequence[int]]]) -> int:
    """What of `forward_flops` holdfast leaves out, since nobody reads it: the last layer's feed-forward part, and what
    attention gathers, for all tokens of a prompt but its last one."""
    unread = sum(prompt - 1 for prompt, _ in trees)
    asked = sum(prompt * (prompt - 1) // 2 for prompt, _ in trees)
    return 2 * 3 * size.hidden * size.intermediate * unread + 4 * size.hidden * asked


def step_flops(size: workload.Size, trees: Sequence[tuple[int, Sequence[int]]], reference: str) -> int:
    """Operations of the forward pass, twice as many of the backward pass, and a second forward for a live reference."""
    return forward_flops(size, trees) * (4 if reference == "live" else 3)


def products(size: workload.Size, num_tokens: int, num_completion: int) -> list[tuple[int, int, int, int]]:
    """The matrix products of a forward pass: (rows, inputs, outputs, number of such products)."""
    keys = size.hidden // size.heads * size.key_heads
    return [
        (num_tokens, size.hidden, size.hidden, 2 * size.layers),
        (num_tokens, size.hidden, keys, 2 * size.layers),
        (num_tokens, size.hidden, size.intermediate, 2 * size.layers),
        (num_tokens, size.intermediate, size.hidden, size.layers),
        (num_completion, size.hidden, size.vocabulary, 1),
    ]


# --- the machine ------------------------------------------------------------------------------------------------------


def product_rate(size: workload.Size, num_tokens: int, num_completion: int, repeats: int) -> float:
    """FLOPs per second of the matrix products of a step, forward and backward, each repeated alone."""
    import torch

    flops = seconds = 0.0
    for rows, inputs, outputs, count in products(size, num_tokens, num_completion):
        x, w, y = (_operand(*shape) for shape in ((rows, inputs), (outputs, inputs), (rows, outputs)))
        for left, right in ((x, w.T), (y, w), (y.T, x)):
            out = torch.empty((left.shape[0], right.shape[1]), dtype=left.dtype, device=left.device)
            times = [_seconds_of(torch.mm, left, right, out=out) for _ in range(repeats + 1)][1:]
            seconds += count * statistics.median(times)
            flops += count * 2 * left.shape[0] * left.shape[1] * right.shape[1]
    return flops / seconds


def _operand(*shape: int) -> Any:
    import torch

    has_gpu = torch.cuda.is_available()
    made = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    return made.to("cuda", torch.bfloat16) if has_gpu else made


def _seconds_of(function: Any, *args: Any, **kwargs: Any) -> float:
    start = measure.clock()
    function(*args, **kwargs)
    return measure.clock() - start


# --- one measurement, in a process of its own -------------------------------------------------------------------------


def ids(count: int, vocabulary: int, seed: int) -> list[int]:
    """Random token ids without the special ones."""
    import torch

    return torch.randint(3, vocabulary, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def row_of(lengths: Mapping[str, int], row: int, vocabulary: int) -> dict[str, list[int]]:
    """The tokenized pair number `row`, of these lengths."""
    return {f"{side}_ids": ids(num, vocabulary, 3 * row + place) for place, (side, num) in enumerate(lengths.items())}


def rows_of(lengths: Mapping[str, int], count: int, vocabulary: int) -> list[dict[str, list[int]]]:
    """Tokenized pairs of these lengths."""
    return [row_of(lengths, row, vocabulary) for row in range(count)]


def dialogue_lengths(count: int) -> list[dict[str, int]]:
    """Lengths of so many pairs, drawn log-normally around the means of dialogue."""
    draw, spread = Random(0), workload.DIALOGUE_SPREAD
    return [
        {
            side: max(3, round(mean * math.exp(spread * draw.gauss(0, 1) - spread**2 / 2)))
            for side, mean in workload.DIALOGUE_MEANS.items()
        }
        for _ in range(count)
    ]


def step_lengths(kind: str, steps: int) -> list[list[dict[str, int]]]:
    """The lengths of the pairs of so many steps: all alike (`share`), or those of `dialogue`."""
    lengths = dialogue_lengths(BATCH * steps) if kind == "dialogue" else [STEP] * (BATCH * steps)
    return [lengths[start : start + BATCH] for start in range(0, len(lengths), BATCH)]


def trees_of(lengths: Sequence[Mapping[str, int]]) -> list[tuple[int, tuple[int, int]]]:
    """Pairs as (prompt, completions)."""
    return [(pair["prompt"], (pair["chosen"], pair["rejected"])) for pair in lengths]


def measured_share(work: dict[str, Any]) -> dict[str, Any]:
    """Seconds of the trainer's steps, and the rate of their matrix products before and after."""
    import torch
    from datasets import Dataset

    from holdfast import DPOConfig, DPOTrainer

    torch.set_num_threads(work["threads"])
    size, inputs = workload.SIZES[work["size"]], Path(work["inputs"])
    steps = work["warmup"] + work["timed"]
    lengths = step_lengths(work["kind"], steps)
    pairs = [pair for step in lengths for pair in step]
    num_tokens = sum(sum(pair.values()) for pair in pairs) // steps
    num_completion = sum(pair["chosen"] + pair["rejected"] for pair in pairs) // steps
    before = product_rate(size, num_tokens, num_completion, work["repeats"])
    watch = measure.watch(work["warmup"], work["timed"])
    has_gpu = torch.cuda.is_available()
    trainer = DPOTrainer(
        str(inputs / "model"),
        args=DPOConfig(
            output_dir=str(Path(work["folder"]) / "run"), max_steps=steps, per_device_train_batch_size=BATCH,
            gradient_checkpointing=False, max_length=None, save_strategy="no", report_to="none", disable_tqdm=True,
            use_cpu=not has_gpu, bf16=has_gpu, model_init_kwargs={"dtype": "float32"},
            train_sampling_strategy="sequential", **REFERENCES[work["reference"]],
        ),
        train_dataset=Dataset.from_list([row_of(pair, row, size.vocabulary) for row, pair in enumerate(pairs)]),
        callbacks=[watch],
    )  # fmt: skip
    trainer.train()
    after = product_rate(size, num_tokens, num_completion, work["repeats"])
    return {"seconds": watch.seconds, "rates": [before, after], "layout": getattr(trainer.data_collator, "name", "")}


def measured_growth(work: dict[str, Any]) -> dict[str, Any]:
    """Seconds of a forward and backward pass over one row, by its tokens; lengths take turns."""
    import torch
    from transformers import LlamaForCausalLM

    torch.set_num_threads(work["threads"])
    torch.manual_seed(0)
    size = workload.SIZES[work["size"]]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = LlamaForCausalLM(size.config()).to(device)
    batches = [long_row(work["kind"], num_tokens, size.vocabulary, device) for num_tokens in work["rows"]]
    points = [
        {
            "tokens": int(batch.inputs["attention_mask"].count_nonzero()),
            "rows": len(batch.inputs["input_ids"]),
            "seconds": [],
        }
        for batch in batches
    ]
    for repeat in range(work["repeats"] + 1):
        for point, batch in zip(points, batches, strict=True):
            seconds = _seconds_of(forward_and_backward, model, batch)
            if repeat:
                point["seconds"].append(seconds)
    return {"points": points}


def long_row(kind: str, num_tokens: int, vocabulary: int, device: str) -> Any:
    """One row of at most so many tokens, of `pairs` or of one prompt's `completions`."""
    from holdfast.batch import PairBatch
    from holdfast.data.layouts.prefix_shared import SharedLayout

    layout = SharedLayout(pad_token_id=0, row_tokens=num_tokens)
    if kind == "pairs":
        rows = rows_of(PAIR, num_tokens // sum(PAIR.values()), vocabulary)
    else:
        rows = rows_of({"chosen": TREE["completion"], "rejected": TREE["completion"]}, num_tokens, vocabulary)
        rows = rows[: (num_tokens - TREE["prompt"]) // (2 * TREE["completion"])]
        prompt = ids(TREE["prompt"], vocabulary, num_tokens)
        rows = [{"prompt_ids": prompt, **row} for row in rows]
    batch = layout(rows).items()
    return PairBatch.from_tensors({
        name: value.to(device) if hasattr(value, "to") else value for name, value in batch
    })  # fmt: skip


def forward_and_backward(model: Any, batch: Any) -> None:
    """A forward and backward pass of the log-probs of all completions."""
    import torch

    from holdfast.scoring.score import score

    model.zero_grad()
    with torch.autocast("cuda", torch.bfloat16, enabled=torch.cuda.is_available()):
        logps = score(model, batch).logps
    logps.per_token.sum().backward()


# --- every part -------------------------------------------------------------------------------------------------------


def share(kind: str, size_name: str, reference: str, options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """The summary of all runs of `kind` with one way to hold the reference."""
    size = workload.SIZES[size_name]
    timed = step_lengths(kind, 2 + options.timed)[2:]
    trees = [tree for lengths in timed for tree in trees_of(lengths)]
    flops, forward, unread = step_flops(size, trees, reference), forward_flops(size, trees), unread_flops(size, trees)
    runs = []
    for repeat in range(options.repeats):
        work = {
            "kind": kind, "reference": reference, "size": size_name, "inputs": str(folder),
            "warmup": 2, "timed": options.timed, "repeats": 3,
        }  # fmt: skip
        with tempfile.TemporaryDirectory() as own:
            run = measure.in_a_process(__file__, work, threads=options.threads, folder=Path(own))
        rate = statistics.mean(run["rates"])
        run["share"] = flops / _sum_of_steps(kind, run["seconds"]) / rate
        run["share_computed"] = run["share"] * (1 - unread / forward)
        label = f"{size_name}/{kind}/{reference}  {repeat + 1}/{options.repeats}"
        measure.say(f"{label}  {run['share']:.1%} of {rate / 1e9:,.1f} GFLOP/s")
        runs.append(run)
    return {
        "tokens": STEP if kind == "share" else workload.DIALOGUE_MEANS, "batch_pairs": BATCH, "model": size.facts(),
        "gflop": round(flops / len(timed) / 1e9, 2),
        "seconds": round(statistics.median(statistics.median(run["seconds"]) for run in runs), 4),
        "gflop_per_second_of_products": round(statistics.median(statistics.mean(r["rates"]) for r in runs) / 1e9, 2),
        "share": round(statistics.median(run["share"] for run in runs), 4),
        "share_computed": round(statistics.median(run["share_computed"] for run in runs), 4),
        "runs": runs,
    }  # fmt: skip


def _sum_of_steps(kind: str, seconds: Sequence[float]) -> float:
    """The seconds of all timed steps. Where steps are alike, each counts as the median one."""
    return sum(seconds) if kind == "dialogue" else statistics.median(seconds) * len(seconds)


def growth(kind: str, options: argparse.Namespace) -> dict[str, Any]:
    """The summary of the run over one kind of rows."""
    size = options.growth_size
    work = {"kind": kind, "size": size, "rows": options.rows, "repeats": options.repeats}
    with tempfile.TemporaryDirectory() as own:
        run = measure.in_a_process(__file__, work, threads=options.threads, folder=Path(own))
    points = run["points"]
    for point in points:
        assert point["rows"] == 1
        point["microseconds_per_token"] = round(1e6 * statistics.median(point["seconds"]) / point["tokens"], 2)
        measure.say(f"{size}/growth/{kind}  {point['tokens']:>6} tokens{point['microseconds_per_token']:>9} us each")
    costs = [(point["tokens"], statistics.median(point["seconds"])) for point in points]
    lengths = {"pairs": PAIR, "completions": TREE}[kind]
    model = workload.SIZES[size].facts()
    found = {"exponent": round(exponent(costs), 4), "idle_before": run["idle_before"], "points": points}
    return {"lengths": lengths, "model": model} | found


def exponent(costs: Sequence[tuple[float, float]]) -> float:
    """b of the least-squares fit log seconds = a + b log tokens."""
    x, y = [math.log(tokens) for tokens, _ in costs], [math.log(seconds) for _, seconds in costs]
    return statistics.linear_regression(x, y).slope


def parsed() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--one", help="measure here, and print it as JSON")
    parts = ["share", "dialogue", "growth"]
    parser.add_argument("--only", nargs="+", choices=parts, default=parts)
    parser.add_argument("--references", nargs="+", choices=REFERENCES, default=list(REFERENCES))
    parser.add_argument("--data", type=Path, default=workload.DATA, help="JSONL file on which the tokenizer is trained")
    parser.add_argument("--size", choices=workload.SIZES, default="medium")
    parser.add_argument("--growth-size", choices=workload.SIZES, default="small")
    parser.add_argument("--rows", nargs="+", type=int, default=list(ROWS), help="tokens of the rows of `growth`")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--timed", type=int, default=4, help="steps of a run that are timed")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="a tiny model, one repeat, short rows")
    parser.add_argument("--output", type=Path, help="JSON file (default: results/limit.json; with --quick, none)")
    options = parser.parse_args()
    if not options.quick:
        options.output = options.output or measure.RESULTS / "limit.json"
    else:
        options.size, options.growth_size, options.repeats, options.rows = "tiny", "tiny", 1, [1024, 2048]
    return options


def main() -> None:
    """Measures one part and prints it as JSON (`--one`), or all of them and writes the results."""
    options = parsed()
    if options.one:
        work = json.loads(options.one)
        found = measured_share(work) if work["kind"] in ("share", "dialogue") else measured_growth(work)
        sys.stdout.write("\n" + json.dumps(found) + "\n")
        return
    results = measure.Results(options.output, "limit", options.threads)
    small = options.size if options.quick else DIALOGUE_SIZE
    for kind, size_name in (("share", options.size), ("dialogue", small)):
        if kind not in options.only:
            continue
        with tempfile.TemporaryDirectory() as name:
            size = workload.SIZES[size_name]
            tokenizer = workload.make_tokenizer(workload.read_pairs(options.data), size.vocabulary)
            workload.write_model(Path(name) / "model", size, tokenizer)
            for reference in options.references:
                results.add(f"{size_name}/{kind}/{reference}", share(kind, size_name, reference, options, Path(name)))
    for kind in ("pairs", "completions") if "growth" in options.only else ():
        results.add(f"{options.growth_size}/growth/{kind}", growth(kind, options))


if __name__ == "__main__":
    main()
