"""The parts of `gpu_acceptance.py`: each returns rows of what was asked, what was found and what it may be."""

import contextlib
import copy
import importlib.metadata
import importlib.util
import math
import random
import re
import statistics
import subprocess
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import bench_step
import measure
import workload

Row = dict[str, Any]

SHAPE = {
    "vocab_size": 2048, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 2048, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {}),
    "qwen3": ("Qwen3Config", {"head_dim": 64}),
    "mistral, window 64": ("MistralConfig", {"sliding_window": 64}),
    "gemma2, soft-caps, window 64": (
        "Gemma2Config",
        {"head_dim": 64, "sliding_window": 64, "tie_word_embeddings": False},
    ),
}
LAYOUTS = ("padded", "packed", "prefix_shared")
WAYS: dict[str, dict[str, Any]] = {
    "model": {"reference": "model"},
    "snapshot": {"reference": "snapshot"},
    "snapshot in host memory": {"reference": "snapshot", "snapshot_device": "cpu", "reference_window": 1},
    "adapter": {"reference": "adapter"},
    "stored": {"precompute_ref_log_probs": True},
}
MARGIN_STORED = 0.05
"""Most of a first margin (beta times nats) where the reference's log-probs were computed in other batches."""


def row(part: str, asked: str, found: str, bound: str, *, is_ok: bool | None) -> Row:
    """One line of the table; `is_ok` is None for what is no verdict."""
    return {"part": part, "asked": asked, "found": found, "bound": bound, "is_ok": is_ok}


def needs_gpu(part: str, asked: str) -> Row:
    """The row of what only a GPU can show."""
    return row(part, asked, "needs a GPU", "", is_ok=None)


# --- what is run ------------------------------------------------------------------------------------------------------


def model_of(family: str, *, seed: int = 0) -> Any:
    """A small fp32 model of a family, with weights at a scale where attention matters."""
    import torch
    import transformers

    name, more = FAMILIES[family]
    torch.manual_seed(seed)
    config = getattr(transformers, name)(**SHAPE | {"initializer_range": 0.08} | more)
    return transformers.AutoModelForCausalLM.from_config(config).float().eval()


def pairs(count: int, *, seed: int = 0, vocabulary: int = 2048, longest: int = 120) -> list[dict[str, list[int]]]:
    """Tokenized pairs of random ids and unlike lengths; each second one shares its prompt with the one before."""
    draw = random.Random(seed)

    def ids(low: int, high: int) -> list[int]:
        return [draw.randrange(3, vocabulary) for _ in range(draw.randint(low, high))]

    made: list[dict[str, list[int]]] = []
    for number in range(count):
        prompt = made[-1]["prompt_ids"] if number % 2 else ids(longest // 3, longest)
        made.append({"prompt_ids": prompt, "chosen_ids": ids(5, longest // 2), "rejected_ids": ids(5, longest // 2)})
    return made


def trainer_of(model: Any, rows: Sequence[Mapping[str, Any]], folder: str, **options: Any) -> Any:
    """A trainer of `model` on tokenized pairs, quiet and short."""
    import torch
    from datasets import Dataset
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    from holdfast import DPOConfig, DPOTrainer

    words = {f"w{number}": number for number in range(model.get_input_embeddings().weight.shape[0])}
    backend = Tokenizer(models.WordLevel(words, unk_token="w0"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="w0", bos_token="w1", eos_token="w2")
    peft_config = options.pop("peft_config", None)
    defaults = {
        "output_dir": str(Path(folder) / "run"), "per_device_train_batch_size": 4, "max_steps": 1, "logging_steps": 1,
        "learning_rate": 1e-4, "save_strategy": "no", "report_to": "none", "disable_tqdm": True, "beta": 0.1,
        "gradient_checkpointing": False, "use_cpu": not torch.cuda.is_available(),
    }  # fmt: skip
    return DPOTrainer(
        model,
        args=DPOConfig(**defaults | options),
        train_dataset=Dataset.from_list(list(rows)),
        processing_class=tokenizer,
        peft_config=peft_config,
    )


def lora() -> Any:
    """LoRA of rank 16 on every linear layer."""
    from peft import LoraConfig

    return LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM")


def device_name() -> str:
    """The kind of device that is measured."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


# --- the parts --------------------------------------------------------------------------------------------------------


def machine(work: Mapping[str, Any]) -> Iterator[Row]:
    """The device and the versions."""
    import torch

    for name, value in measure.environment(torch.get_num_threads()).items():
        if name != "date" and value is not None:
            yield row("machine", name, str(value), "", is_ok=None)
    if torch.cuda.is_available():
        major, minor = torch.cuda.get_device_capability()
        yield row("machine", "compute capability", f"{major}.{minor}", "", is_ok=None)
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        yield row("machine", "triton", importlib.metadata.version("triton"), "", is_ok=None)


def layouts(work: Mapping[str, Any]) -> Iterator[Row]:
    """Log-probs of packed and shared rows against those of padded ones.

    They may differ by 3 times the error of padded rows in this precision: by their gap to the same weights in fp32, or
    to themselves at another padding. Another prompt must move them further, or the comparison would show nothing.
    """
    import torch

    for family in FAMILIES:
        for precision in ("fp32", "bf16 autocast", "bf16 weights"):
            model = model_of(family).to(device_name())
            model = model.bfloat16() if precision == "bf16 weights" else model
            exact = logps(copy.deepcopy(model).float(), "padded")
            with torch.autocast(device_name(), torch.bfloat16, enabled=precision == "bf16 autocast"):
                padded, again = logps(model, "padded"), logps(model, "padded", multiple=64)
                found = {layout: logps(model, layout) for layout in LAYOUTS[1:]}
                moved = logps(model, "prefix_shared", prompt=7)
            most = 3 * max(gap(padded, exact), gap(padded, again), 5e-5)
            for layout, values in found.items():
                value = gap(padded, values)
                asked = f"{family}, {precision}: {layout} against padded, mean nats per token"
                yield row("layouts", asked, f"{value:.1e}", f"<= {most:.1e}", is_ok=value <= most)
            value = gap(dict(enumerate(padded.values())), dict(enumerate(moved.values())))
            asked = f"{family}, {precision}: another prompt against it"
            yield row("layouts", asked, f"{value:.1e}", f"> {most:.1e}", is_ok=value > most)


def logps(model: Any, layout: str, *, multiple: int | None = None, prompt: int | None = None) -> dict[Any, Any]:
    """The log-probs of eight pairs, by content id; with `prompt`, their prompts begin with this token."""
    import torch

    from holdfast.batch import PairBatch
    from holdfast.data.layouts.choose import LAYOUTS as CLASSES
    from holdfast.scoring.score import score

    rows = pairs(8)
    if prompt is not None:
        rows = [pair | {"prompt_ids": [prompt, *pair["prompt_ids"][1:]]} for pair in rows]
    made = CLASSES[layout](0, pad_to_multiple_of=multiple)(rows)
    tensors = {name: value.to(model.device) if hasattr(value, "to") else value for name, value in made.items()}
    batch = PairBatch.from_tensors(tensors)
    with torch.no_grad():
        per_token = score(model, batch).logps.per_token.float().cpu().split(batch.lengths())
    return dict(zip(batch.content_ids(), per_token, strict=True))


def gap(expected: Mapping[Any, Any], found: Mapping[Any, Any]) -> float:
    """The mean gap of two sets of log-probs per token."""
    import torch

    return float(torch.cat([(found[key] - value).abs() for key, value in expected.items()]).mean())


def margins(work: Mapping[str, Any]) -> Iterator[Row]:
    """The first loss and margin of every way to hold a reference: ln 2 and 0 for those asked batch by batch."""
    for policy in ("full", "lora"):
        for way, options in WAYS.items():
            for layout in LAYOUTS:
                if way == "adapter" and policy == "full":
                    continue
                with tempfile.TemporaryDirectory() as folder:
                    more = {"layout": layout, "bf16": True, "peft_config": lora() if policy == "lora" else None}
                    trainer = trainer_of(model_of("llama"), pairs(4), folder, **more | options)
                    trainer.train()
                first = trainer.state.log_history[0]
                loss, margin = abs(first["loss"] - math.log(2)), abs(first["rewards/margins"])
                most = MARGIN_STORED if way == "stored" else 0.0
                is_ok = margin <= most and loss <= max(most, 1e-6)
                found = f"margin {margin:.1e}, loss - ln 2 {loss:.1e}"
                yield row("margins", f"{policy}, {way}, {layout}", found, f"{most:g}", is_ok=is_ok)


def waits(work: Mapping[str, Any]) -> Iterator[Row]:
    """How often the host waits for the device in steps that neither log nor save."""
    if work["is_dry"]:
        yield needs_gpu("waits", "waits of a step (`launches` lists blocking copies and reads)")
        return
    for layout in LAYOUTS:
        for way in ("model", "stored"):
            with tempfile.TemporaryDirectory() as folder:
                trainer = trainer_of(
                    model_of("llama"), pairs(32), folder, layout=layout, bf16=True, max_steps=8, logging_steps=100,
                    dataloader_pin_memory=True, **WAYS[way],
                )  # fmt: skip
                found = waits_of(trainer)
            said = ", ".join(f"{count} x {place}" for place, count in found.most_common(4)) or "none"
            yield row("waits", f"{layout}, {way}: waits in steps 3 to 7", said, "none", is_ok=not found)


def waits_of(trainer: Any) -> Counter[str]:
    """Where torch says that the host waited, from the third step to the last but one."""
    import torch
    from transformers import TrainerCallback

    class Watch(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            torch.cuda.set_sync_debug_mode("warn" if 2 <= state.global_step < args.max_steps - 1 else "default")

        def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            torch.cuda.set_sync_debug_mode("default")

    trainer.add_callback(Watch())
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        trainer.train()
    waited = [each for each in said if "synchronizing" in str(each.message)]
    return Counter(f"{Path(each.filename).name}:{each.lineno}" for each in waited)


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
        for layout in LAYOUTS[2:]:
            share = counts[layout] / counts["padded"]
            asked = f"{policy}, {layout}: operations over those of padded rows"
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


def begin_and_end(profiler: Any, step: int) -> int:
    """Has `profiler` watch the third step."""
    if step == 2:
        profiler.start()
    if step == 3:
        profiler.stop()
    return step


def graphs(work: Mapping[str, Any]) -> Iterator[Row]:
    """How many graphs are compiled after the first step, over 50 batches of unlike shapes."""
    from torch._dynamo.utils import counters

    for family, precision in (("llama", "fp32"), ("gemma2, soft-caps, window 64", "bf16")):
        asked = f"{family}, {precision}: graphs compiled after the first step, over 50 batches"
        if work["is_dry"]:
            yield needs_gpu("graphs", asked)
            continue
        with tempfile.TemporaryDirectory() as folder:
            trainer = trainer_of(
                model_of(family), pairs(200), folder, layout="prefix_shared", bf16=precision == "bf16", max_steps=50,
                reference="model",
            )  # fmt: skip
            compiled = after_each_step(trainer, lambda: counters["stats"]["unique_graphs"])
        found = f"{compiled[-1] - compiled[0]} (in all {compiled[-1]})"
        yield row("graphs", asked, found, "0", is_ok=compiled[-1] == compiled[0])


def after_each_step(trainer: Any, number: Callable[[], int]) -> list[int]:
    """Trains, and returns what `number` says after each step."""
    from transformers import TrainerCallback

    numbers: list[int] = []

    class After(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            numbers.append(number())

    trainer.add_callback(After())
    trainer.train()
    return numbers


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

    found: list[tuple[int, int]] = []
    with tempfile.TemporaryDirectory() as folder:
        trainer = trainer_of(
            model_of("llama"), pairs(8), folder, bf16=True, max_steps=2, reference=way, peft_config=lora(),
            frozen_weights_dtype=dtype,
        )  # fmt: skip
        own = trainer.reference.fixed_modules()

        def number() -> int:
            modules = [trainer.model, *own]
            saved = sum(parameter.nbytes for parameter in frozen_linears(modules).values()) // 2
            found.append((sum(parameter.nbytes for module in modules for parameter in module.parameters()), saved))
            return 0

        after_each_step(trainer, number)
    return found[0]


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
