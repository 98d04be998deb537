"""Time and memory of the head, from hidden states to log-probs and back, in each way to compute it.

    python benchmarks/bench_head.py

A padded batch of dialogue pairs has 4,416 positions, of which 612 predict completion tokens. There are four ways.
`ours` is `scoring.head.linear_logps`: for a frozen head the gradient is computed in the forward pass, for a trained one
the logits are computed again. `checkpointed` is the way for heads that are more than a matrix. `dense` saves all logits
of the completions. `peer` is TRL's chunked function, if it is installed: on all positions, as its trainer calls it, and
on completions alone.

Times are medians over interleaved repeats in one process. The memory of temporaries is measured in a process of its
own. It is the growth of the kernel's peak (VmHWM, reset before the measurement) above inputs and wanted gradients.
Needs Linux. Writes results/head.json.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from holdfast.scoring.head import linear_logps, token_logps
from holdfast.scoring.transform import LogitTransform

PEER_CHUNK = 32768
"""Tokens of the vocabulary to a tile of TRL's function."""

WAYS = ("ours", "checkpointed", "dense", "peer_completions", "peer_all_positions")


def ours(states: Tensor, weight: Tensor, source: Tensor, target: Tensor, chunk_tokens: int) -> Tensor:
    """`holdfast.scoring.head.linear_logps`."""
    return linear_logps(states[source], weight, None, target, LogitTransform(), chunk_tokens=chunk_tokens)[0]


def checkpointed(states: Tensor, weight: Tensor, source: Tensor, target: Tensor, chunk_tokens: int) -> Tensor:
    """The way of `holdfast.scoring.completion_head` for other heads: autograd computes a chunk's logits again."""

    def column(hidden: Tensor, target: Tensor) -> Tensor:
        return token_logps(nn.functional.linear(hidden, weight).float(), target, False)[0]

    chunks = zip(states[source].split(chunk_tokens), target.split(chunk_tokens), strict=True)
    return torch.cat([checkpoint(column, *chunk, use_reentrant=False) for chunk in chunks])


def dense(states: Tensor, weight: Tensor, source: Tensor, target: Tensor, chunk_tokens: int) -> Tensor:
    """All logits of the completions at once."""
    return token_logps(nn.functional.linear(states[source], weight).float(), target, False)[0]


def peer(states: Tensor, weight: Tensor, source: Tensor | None, target: Tensor) -> Tensor:
    """TRL's function, with the chunk size that its trainer takes, and without statistics."""
    from trl.kernels import ChunkedLogProbFunction

    hidden = states if source is None else states[source]
    return ChunkedLogProbFunction.apply(hidden, weight, None, target, 1.0, PEER_CHUNK, None, 1.0, ())[0]


def has_peer() -> bool:
    """Whether TRL has the function."""
    try:
        from trl.kernels import ChunkedLogProbFunction  # noqa: F401
    except ImportError:
        return False
    return True


class Setting:
    """Inputs of one size, and a forward and backward pass over them in each way."""

    def __init__(self, options: argparse.Namespace, *, is_trained: bool) -> None:
        draw = torch.Generator().manual_seed(0)
        num_positions, num_completion = options.positions, options.completion
        self.chunk_tokens = options.chunk_tokens
        self.states = torch.randn(num_positions, options.width, generator=draw).requires_grad_()
        weight = 0.02 * torch.randn(options.vocabulary, options.width, generator=draw)
        self.weight = weight.requires_grad_(is_trained)
        self.source = torch.randperm(num_positions, generator=draw)[:num_completion].sort().values
        self.target = torch.randint(options.vocabulary, (num_completion,), generator=draw)
        self.target_of_all = torch.zeros(num_positions, dtype=torch.long).index_put((self.source,), self.target)
        self.upstream = torch.randn(num_completion, generator=draw)

    def logps(self, way: str) -> Tensor:
        """The log-probs of the completion tokens."""
        if way == "peer_all_positions":
            return peer(self.states, self.weight, None, self.target_of_all)[self.source]
        if way == "peer_completions":
            return peer(self.states, self.weight, self.source, self.target)
        function = {"ours": ours, "checkpointed": checkpointed, "dense": dense}[way]
        return function(self.states, self.weight, self.source, self.target, self.chunk_tokens)

    def step(self, way: str) -> tuple[float, list[Tensor]]:
        """Seconds of a forward and backward pass, and the gradients it left."""
        self.states.grad = self.weight.grad = None
        start = time.perf_counter()
        (self.logps(way) @ self.upstream).backward()
        seconds = time.perf_counter() - start
        return seconds, [leaf.grad for leaf in (self.states, self.weight) if leaf.grad is not None]


def resident(name: str) -> float:
    """A field of this process's status, in MiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(f"{name}:"))


def temporaries(way: str, options: argparse.Namespace, *, is_trained: bool) -> float:
    """MiB at the peak of one step, above what is resident before it and the wanted gradients."""
    small = argparse.Namespace(**vars(options) | {"positions": 64, "completion": 16, "vocabulary": 256})
    Setting(small, is_trained=is_trained).step(way)  # for what is allocated once: threads, the autograd engine
    setting = Setting(options, is_trained=is_trained)
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    gradients = setting.step(way)[1]
    return resident("VmHWM") - before - sum(gradient.nbytes for gradient in gradients) / 2**20


def in_a_process(way: str, options: argparse.Namespace, *, is_trained: bool) -> float:
    """`temporaries` in a fresh process."""
    sizes = ("positions", "completion", "width", "vocabulary", "chunk_tokens", "threads")
    arguments = [part for size in sizes for part in (f"--{size.replace('_', '-')}", str(getattr(options, size)))]
    command = [sys.executable, __file__, "--one", way, *arguments, *(["--trained"] if is_trained else [])]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{way}: exit code {done.returncode}\n{done.stderr[-3000:]}")
    return float(done.stdout.splitlines()[-1])


def compare(options: argparse.Namespace, ways: list[str], *, is_trained: bool) -> dict[str, dict[str, Any]]:
    """By way: times, memory, and the largest difference of a gradient from the dense way's."""
    setting = Setting(options, is_trained=is_trained)
    expected = setting.step("dense")[1]
    errors = {
        way: max(float((a - b).abs().max()) for a, b in zip(setting.step(way)[1], expected, strict=True))
        for way in ways
    }
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(options.repeats):
        for way in ways:
            seconds[way].append(setting.step(way)[0])
    return {
        way: {
            "median_seconds": round(statistics.median(seconds[way]), 4),
            "seconds": [round(second, 4) for second in seconds[way]],
            "over_dense": round(statistics.median(seconds[way]) / statistics.median(seconds["dense"]), 3),
            "temporaries_mib": round(in_a_process(way, options, is_trained=is_trained), 1),
            "gradient_error": errors[way],
        }
        for way in ways
    }


def environment(options: argparse.Namespace) -> dict[str, Any]:
    """The machine, threads and versions that the numbers depend on."""
    sizes = ("positions", "completion", "width", "vocabulary", "chunk_tokens", "repeats")
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "system": f"{platform.system()} {platform.machine()}",
        "num_cpus": os.cpu_count(),
        "num_threads": torch.get_num_threads(),
        "load_average": os.getloadavg()[0],
        "dtype": "float32",
        **{size: getattr(options, size) for size in sizes},
    }


def main() -> None:
    """Measures the memory of one way and prints it (`--one`), or compares all and writes the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--one", choices=WAYS, help="measure the memory of this way here, and print it")
    parser.add_argument("--trained", action="store_true", help="with --one: the head is trained")
    parser.add_argument("--positions", type=int, default=4416)
    parser.add_argument("--completion", type=int, default=612)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--vocabulary", type=int, default=32_000)
    parser.add_argument("--chunk-tokens", type=int, default=512)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "head.json")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.one:
        sys.stdout.write(f"{temporaries(options.one, options, is_trained=options.trained)}\n")
        return
    ways = [way for way in options.ways if not way.startswith("peer") or has_peer()]
    results = {name: compare(options, ways, is_trained=name == "trained") for name in ("frozen", "trained")}
    for name, found in results.items():
        for way, r in found.items():
            line = f"{name:<9}{way:<20}{r['median_seconds']:>9} s {r['over_dense']:>7} x dense"
            sys.stdout.write(f"{line} {r['temporaries_mib']:>8} MiB  {r['gradient_error']:.1e}\n")
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps({"environment": environment(options), "results": results}, indent=2) + "\n")


if __name__ == "__main__":
    main()
