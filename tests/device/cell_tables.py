"""The tables of cells. `FAST` stands for the rest in `make test`; the others run in `make nightly`."""

import itertools
from collections.abc import Iterator

import families
import policies
from cells import LAYOUTS, VARIANTS, Cell
from holdfast.losses import LOSSES

NO_ROWS_OF_SEVERAL = ("lfm2", "falcon_h1", "opt")
"""Families that are laid out in padded rows only: they carry state along a row."""

ONLY_PADDED = ("prompt_tuning", "prefix_tuning")
OUT_OF_REACH = {
    "prompt_tuning": "peft keeps a tensor of its virtual tokens outside of parameters and buffers",
    "prefix_tuning": "its keys and values go through a cache, which transformers makes anew by values",
}
"""Policies that the pretend device cannot run, and why."""


_CORE = ("full", "lora_fresh", "lora_sft"), ("model", "adapter", "snapshot", "snapshot_cpu", "precomputed")


def _core() -> Iterator[Cell]:
    for policy, layout, way in itertools.product(_CORE[0], LAYOUTS, _CORE[1]):
        for precision in ("fp32", "bf16") if policy != "full" or way != "adapter" else ():
            yield Cell(policy=policy, layout=layout, way=way, precision=precision)


def _around_the_core() -> Iterator[Cell]:
    policies, ways = (*_CORE[0], "partly_frozen"), (*_CORE[1], "snapshot_disk", "window")
    for policy, layout, way in itertools.product(policies, LAYOUTS, ways):
        for precision in ("fp32", "bf16", "bf16_weights") if policy.startswith("lora") or way != "adapter" else ():
            yield Cell(policy=policy, layout=layout, way=way, precision=precision)


def _policies() -> Iterator[Cell]:
    for policy in policies.POLICIES:
        if policy in OUT_OF_REACH or policy in ("full", "partly_frozen"):
            continue
        for layout, precision in (("padded", "fp32"), ("prefix_shared", "bf16")):
            yield Cell(policy=policy, layout=layout, way="auto", precision=precision)


def _ways() -> Iterator[Cell]:
    for way in ("ref_model", "ref_path", "mixture", "none"):
        for policy in ("full", "lora_sft"):
            yield Cell(policy=policy, way=way, precision="bf16")
    yield Cell(policy="lora_sft_named_ref", way="auto", precision="bf16")


def _variants() -> Iterator[Cell]:
    for variant, policy in itertools.product(VARIANTS, ("full", "lora_sft")):
        for layout in LAYOUTS:
            yield Cell(policy=policy, layout=layout, way=_way_of(variant), precision="bf16", variant=variant)
    for way, variant in itertools.product(("snapshot", "snapshot_cpu", "model"), ("soft_sync", "hard_sync")):
        for policy in ("lora_fresh", "full"):
            yield Cell(policy=policy, way=way, precision="fp32", variant=variant)
    yield Cell(way="precomputed", variant="evaluation")
    yield Cell(way="window", variant="accumulation", precision="bf16")


def _way_of(variant: str) -> str:
    return "precomputed" if variant == "filling" else "snapshot" if "sync" in variant else "model"


def _losses() -> Iterator[Cell]:
    for loss, definition in LOSSES.items():
        yield Cell(way="model" if definition.needs_reference else "auto", precision="bf16", loss=loss)


def _families() -> Iterator[Cell]:
    for family in families.CONFIGS:
        for layout in LAYOUTS if family not in NO_ROWS_OF_SEVERAL else ("padded",):
            for precision in ("fp32", "bf16"):
                yield Cell(layout=layout, precision=precision, family=family)


def _shapes() -> Iterator[Cell]:
    for policy, way in (("full", "model"), ("lora_fresh", "adapter")):
        for layout in ("padded", "prefix_shared"):
            yield Cell(policy=policy, layout=layout, way=way, precision="bf16", shape="0.5b", pairs=4)


def _routes() -> Iterator[Cell]:
    for route in ("varlen", "flex", "dense", "pieces"):
        yield Cell(precision="bf16", routes=(route,))
        yield Cell(precision="bf16", routes=(route,), family="qwen3", variant="checkpointing")


TABLES = {
    "core": list(_core()),
    "around the core": list(_around_the_core()),
    "policies": list(_policies()),
    "ways": list(_ways()),
    "variants": list(_variants()),
    "losses": list(_losses()),
    "families": list(_families()),
    "routes": list(_routes()),
    "shapes": list(_shapes()),
}

FAST = [
    Cell.named(name)
    for name in (
        "full/prefix_shared/model/bf16",
        "full/padded/precomputed/bf16",
        "full/packed/snapshot_cpu/fp32",
        "lora_fresh/prefix_shared/adapter/bf16",
        "lora_sft/packed/snapshot/bf16",
        "lora_sft/padded/model/fp32",
        "partly_frozen/prefix_shared/window/bf16",
        "dora/prefix_shared/auto/bf16",
        "full/prefix_shared/model/bf16/checkpointing",
        "full/prefix_shared/model/bf16/offloading",
        "full/prefix_shared/model/bf16/parts",
        "full/prefix_shared/model/bf16/evaluation_by_source",
        "full/prefix_shared/precomputed/bf16/filling",
        "lora_sft/prefix_shared/snapshot/bf16/soft_sync",
        "full/prefix_shared/snapshot/bf16/hard_sync",
        "full/prefix_shared/model/bf16/wpo",
        "full/prefix_shared/model/bf16/family=gemma2",
        "full/prefix_shared/model/bf16/routes=pieces",
    )
]
TABLES["fast"] = FAST

BUDGETED = ("fast", "core", "shapes")
"""Tables of which every cell has a budget. Others are held to one where there is one."""
