"""The parts of `gpu_acceptance.py` that compare numbers: of layouts, of first margins, of kernels."""

import contextlib
import copy
import importlib.metadata
import math
import tempfile
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import measure
from gpu_runs import (
    FAMILIES,
    LAYOUTS,
    Row,
    after_each_step,
    device_name,
    lora,
    model_of,
    needs_gpu,
    pairs,
    row,
    trainer_of,
)

BEST_ROUTES = {
    "llama": ("varlen", "flex"), "qwen3": ("varlen", "flex"), "mistral, window 64": ("varlen", "flex"),
    "gemma2, soft-caps, window 64": ("flex", "flex"),
}  # fmt: skip
"""By family: the best way to compute attention in half precision, and in fp32."""
WAYS: dict[str, dict[str, Any]] = {
    "model": {"reference": "model"},
    "snapshot": {"reference": "snapshot"},
    "snapshot in host memory": {"reference": "snapshot", "snapshot_device": "cpu", "reference_window": 1},
    "adapter": {"reference": "adapter"},
    "stored": {"precompute_ref_log_probs": True},
}
MARGIN_STORED = 0.05
"""Most of a first margin (beta times nats) where the reference's log-probs were computed in other batches."""


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


def routes(work: Mapping[str, Any]) -> Iterator[Row]:
    """How attention over shared rows is computed for each family, and how the head's softmax is."""
    import torch

    from holdfast.scoring.routes.choice import routes_of
    from holdfast.scoring.softmax_choice import softmax_class
    from holdfast.scoring.transform import LogitTransform

    device = torch.device(device_name())
    for family, (best_in_half, best) in BEST_ROUTES.items():
        for dtype, expected in ((torch.bfloat16, best_in_half), (torch.float32, best)):
            model = model_of(family).to(device, dtype)
            logps(model, "prefix_shared")
            found = sorted({route.name for route in routes_of(model, device, dtype)}) or ["pieces"]
            asked = f"{family}, {str(dtype)[6:]}: attention over shared rows"
            is_ok = None if work["is_dry"] else found == [expected]
            yield row("routes", asked, " and ".join(found), expected if not work["is_dry"] else "", is_ok=is_ok)
    for dtype in (torch.bfloat16, torch.float32):
        for transform in (LogitTransform(), LogitTransform(cap=30.0)):
            found = softmax_class(device, dtype, transform).__name__
            asked = f"{str(dtype)[6:]}, {'with' if transform.cap else 'without'} a cap: the head's softmax"
            is_ok = None if work["is_dry"] else found == "KernelSoftmax"
            yield row("routes", asked, found, "" if work["is_dry"] else "KernelSoftmax", is_ok=is_ok)
    yield wide_product(device, is_dry=work["is_dry"])


def wide_product(device: Any, *, is_dry: bool) -> Row:
    """The sum of two products of bf16 matrices, as a trained head's gradient is added up, against fp64."""
    import torch

    from holdfast.scoring.weight_gradient import add_product, has_wide_products

    draw = torch.Generator().manual_seed(0)
    errors, states = (torch.randn(2, 64, size, generator=draw).bfloat16() for size in (96, 48))
    total = torch.empty(96, 48, device=device)
    for chunk in range(2):
        add_product(total, errors[chunk].to(device), states[chunk].to(device), is_first=chunk == 0)
    expected = sum(errors[chunk].double().T @ states[chunk].double() for chunk in range(2))
    error = float((total.cpu().double() - expected).abs().max() / expected.abs().max())
    is_wide = has_wide_products(device, torch.bfloat16)
    found = f"{error:.1e} of the largest, {'in fp32' if is_wide else 'each product in bf16'}"
    is_ok = error <= 1e-2 if is_dry else is_wide and error <= 1e-5
    asked = "bf16: a trained head's gradient over two chunks, against fp64"
    return row("routes", asked, found, "<= 1e-2" if is_dry else "<= 1e-5", is_ok=is_ok)


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
