"""The parts of `gpu_acceptance.py` that count what a step costs: device operations, bytes, seconds."""

import importlib.util
import math
import random
import re
import statistics
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import bench_step
import measure
import workload
from gpu_runs import LAYOUTS, Row, after_each_step, lora, model_of, pairs, row, trainer_of

STEPS: dict[str, tuple[str, float]] = {"full": ("model", 0.9), "lora": ("adapter", 0.8)}
"""By what trains: the reference beside it, and the most device operations of shared rows over those of padded rows."""


def launches(work: Mapping[str, Any]) -> Iterator[Row]:
    """Device operations of a step of a 0.5B shape at 4 pairs, recomputing activations, over those of padded rows."""
    for policy, (way, most) in STEPS.items():
        counts: dict[str, int] = {}
        for layout in LAYOUTS:
            counts[layout], said = (pretended if work["is_dry"] else profiled)(policy, layout, way)
            yield row(
                "launches", f"{policy}, {layout}: device operations", f"{counts[layout]:,}; {said}", "", is_ok=None
            )
        share = counts["prefix_shared"] / counts["padded"]
        asked = f"{policy}, prefix_shared: operations over those of padded rows"
        yield row("launches", asked, f"{share:.2f}", f"<= {most}", is_ok=share <= most)


def pretended(policy: str, layout: str, way: str) -> tuple[int, str]:
    """Operations of a step on the pretend accelerator, and its attention kernels. ValueError where the step fails, or
    reads or copies in a way that waits."""
    name = {"lora": "lora_fresh"}.get(policy, policy)
    cell = f"{name}/{layout}/{way}/bf16/checkpointing/shape=0.5b/pairs=4"
    command = [sys.executable, str(Path(__file__).parent.parent / "tests" / "device"), cell]
    said = subprocess.run(command, capture_output=True, text=True, check=False).stdout
    found = re.search(r"(\d+) operations; attention kernels: (.*)", said)
    if found is None or ": ok" not in said or "BLOCKING" in said or "read" in said:
        raise ValueError(f"a step of {cell} was to run without waits on the pretend accelerator; it said:\n{said}")
    return int(found[1]), found[2]


def profiled(policy: str, layout: str, way: str) -> tuple[int, str]:
    """Kernels that the third step launches, by torch's profiler, and those of them that are attention."""
    import torch
    from torch.profiler import ProfilerActivity, profile
    from transformers import AutoModelForCausalLM

    size = workload.SIZES["0.5b"]
    with torch.device("cuda"):
        model = AutoModelForCausalLM.from_config(size.config(), dtype=torch.float32)
    with tempfile.TemporaryDirectory() as folder:
        trainer = trainer_of(
            model, pairs(12, vocabulary=size.vocabulary), folder, layout=layout, bf16=True, max_steps=3,
            reference=way, gradient_checkpointing=True, logging_steps=100,
            peft_config=lora() if policy == "lora" else None,
        )  # fmt: skip
        profiler = profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA])
        after_each_step(trainer, lambda: begin_and_end(profiler, trainer.state.global_step))
    events = profiler.events()
    launched = sum("LaunchKernel" in event.name for event in events)
    kernels = Counter(event.name[:60] for event in events if re.search("flash|fmha|attn|attention|flex", event.name))
    return launched, ", ".join(f"{count} x {name}" for name, count in kernels.most_common(3))


def begin_and_end(profiler: Any, step: int) -> None:
    """Has `profiler` watch the third step; called after each step with its number."""
    if step == 2:
        profiler.start()
    if step == 3:
        profiler.stop()


BYTES = 0.55
"""Most of a LoRA's base that may be held, as a share of its bytes in fp32. Embeddings and norms stay as they are."""


def frozen_bytes(work: Mapping[str, Any]) -> Iterator[Row]:
    """Bytes of a LoRA's base while it trains: by arithmetic for 8B, and as a small run holds them."""
    import torch
    from peft import get_peft_model
    from transformers import AutoModelForCausalLM

    from holdfast.policy.frozen_linears import frozen_linears

    with torch.device("meta"):
        config = workload.SIZES["8b"].config()
        policy = get_peft_model(AutoModelForCausalLM.from_config(config, dtype=torch.float32), lora())
    base = base_bytes(policy)
    held = base - sum(parameter.nbytes for parameter in frozen_linears([policy]).values()) // 2
    said = f"{held / 2**30:.1f} of {base / 2**30:.1f} GiB: {held / base:.3f}"
    yield row(
        "bytes", "8b, lora: base as held over fp32, by arithmetic", said, f"<= {BYTES}", is_ok=held <= BYTES * base
    )
    for way in ("adapter", "model"):
        found = {dtype: bytes_in_a_run(way, dtype) for dtype in ("as_loaded", "auto")}
        asked = f"small llama, lora, {way}: weights as held in a run, and by arithmetic"
        by_arithmetic = found["as_loaded"][0] - found["as_loaded"][1]
        is_ok = found["auto"][0] == by_arithmetic < found["as_loaded"][0]
        said = f"{found['auto'][0]:,} of {found['as_loaded'][0]:,}"
        yield row("bytes", asked, said, f"{by_arithmetic:,}", is_ok=is_ok)


def base_bytes(policy: Any) -> int:
    """The bytes of all weights but the adapter's."""
    return sum(parameter.nbytes for name, parameter in policy.named_parameters() if "lora_" not in name)


def bytes_in_a_run(way: str, dtype: str) -> tuple[int, int]:
    """The bytes of all weights of a run after its first step, and what half precision would save of them."""
    from holdfast.policy.frozen_linears import frozen_linears

    with tempfile.TemporaryDirectory() as folder:
        trainer = trainer_of(
            model_of("llama"), pairs(8), folder, bf16=True, max_steps=2, reference=way, peft_config=lora(),
            frozen_weights_dtype=dtype,
        )  # fmt: skip
        own = trainer.reference.fixed_modules()

        def held_and_saved() -> tuple[int, int]:
            modules = [trainer.model, *own]
            saved = sum(parameter.nbytes for parameter in frozen_linears(modules).values()) // 2
            return sum(parameter.nbytes for module in modules for parameter in module.parameters()), saved

        return after_each_step(trainer, held_and_saved)[0]


SPEEDS = (("0.5b", "full", False), ("0.5b", "full", True), ("8b", "lora", False), ("8b", "lora", True))
"""What is compared with the peer: the size, the mode of `bench_step`, and whether activations are recomputed."""


def speed(work: Mapping[str, Any]) -> Iterator[Row]:
    """Pairs per second and the peak of memory beside the peer's, in steps of four pairs."""
    has_peer = importlib.util.find_spec("trl") is not None
    sides = ["ours", "peer"] if has_peer else ["ours"]
    for size, mode, checkpointing in SPEEDS:
        size = "tiny" if work["is_dry"] else size
        asked = f"{size}, {mode}{', recomputing' if checkpointing else ''}: 4 pairs a step"
        with tempfile.TemporaryDirectory() as folder:
            found = {side: speed_of(side, size, mode, checkpointing, Path(folder)) for side in sides}
        ours = found["ours"]
        said = f"{ours[0]:.2f} pairs/s, peak {ours[1]:,.0f} MiB"
        if not has_peer:
            yield row("speed", asked, said, "the peer is not installed", is_ok=None)
            continue
        faster, lighter = ours[0] / found["peer"][0], ours[1] / found["peer"][1]
        said += f"; {faster:.2f} x the peer's speed, {lighter:.2f} x its peak"
        is_ok = None if work["is_dry"] else faster >= 1 and lighter <= 1
        yield row("speed", asked, said, ">= 1 x, <= 1 x", is_ok=is_ok)


def speed_of(side: str, size: str, mode: str, checkpointing: bool, folder: Path) -> tuple[float, float]:
    """Pairs per second and MiB at the peak of a side's steps, measured in a process of its own."""
    inputs = folder / "inputs"
    steps = {"warmup": 3, "timed": 8, "memory": 2}
    if not inputs.exists():
        inputs.mkdir()
        rows = conversations(bench_step.BATCH * sum(steps.values()))
        tokenizer = workload.make_tokenizer(rows, workload.SIZES[size].vocabulary)
        workload.write_model(inputs / "model", workload.SIZES[size], tokenizer)
        workload.write_pairs(inputs / "pairs.jsonl", rows)
    setting = {"side": side, "mode": mode, "inputs": str(inputs), "checkpointing": checkpointing, "is_half": True}
    found = measure.in_a_process(bench_step.__file__, setting | steps, threads=2, folder=folder / side)
    return bench_step.BATCH / statistics.median(found["seconds"]), max(found["peaks"])


def conversations(count: int) -> list[workload.Pair]:
    """Conversations of made-up words, of lengths like those of dialogues."""
    draw = random.Random(0)
    words = ["".join(draw.choices("abcdefghijklmnopqrstuvwxyz", k=draw.randint(2, 7))) for _ in range(500)]

    def message(role: str, mean: int) -> list[dict[str, str]]:
        length = max(3, round(draw.lognormvariate(math.log(mean), 0.5)))
        return [{"role": role, "content": " ".join(draw.choices(words, k=length))}]

    means = {"prompt": 100, "chosen": 35, "rejected": 45}
    return [{side: message(workload.ROLES[side], mean) for side, mean in means.items()} for _ in range(count)]
