"""A cell: one kind of run on the pretend device, by name. The tables of cells are in `cell_tables`."""

from dataclasses import dataclass, replace
from typing import Any, Self

LAYOUTS = ("padded", "packed", "prefix_shared")
PRECISIONS: dict[str, dict[str, Any]] = {"fp32": {}, "bf16": {"bf16": True}, "bf16_weights": {}}

WAYS: dict[str, dict[str, Any]] = {
    "model": {"reference": "model"},
    "adapter": {"reference": "adapter"},
    "auto": {},
    "snapshot": {"reference": "snapshot"},
    "snapshot_cpu": {"reference": "snapshot", "snapshot_device": "cpu", "reference_window": 1},
    "snapshot_disk": {"reference": "snapshot", "snapshot_device": "disk", "reference_window": 1},
    "precomputed": {"precompute_ref_log_probs": True},
    "window": {"reference": "snapshot", "snapshot_device": "cpu", "reference_window": 2},
    "other_adapter": {"ref_adapter_name": "ref"},
    "ref_model": {},
    "ref_path": {},
    "mixture": {"ref_model_weights": [0.25, 0.75]},
    "none": {"loss_type": "simpo"},
}
"""By name: the options of a way to hold the reference."""

VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "accumulation": {"gradient_accumulation_steps": 2},
    "parts": {"tokens_per_batch": 24},
    "soft_sync": {"sync_ref_model": True, "ref_model_sync_steps": 1, "ref_model_mixup_alpha": 0.5},
    "hard_sync": {"sync_ref_model": True, "ref_model_sync_steps": 1, "ref_model_mixup_alpha": 1.0},
    "wpo": {"use_weighting": True},
    "ld": {"ld_alpha": 0.5},
    "checkpointing": {"activation_checkpointing": True},
    "offloading": {"activation_offloading": True},
    "evaluation": {},
    "evaluation_by_source": {},
    "filling": {},
}
"""By name: what is varied in a run."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """One kind of run. `policy` is of `tests/policies.py`, `family` of `tests/families.py`; `shape` is a size of
    `benchmarks/workload.py` or "tiny"; `routes` are the attention routes that work on the device; none
    means all."""

    policy: str = "full"
    layout: str = "prefix_shared"
    way: str = "model"
    precision: str = "fp32"
    variant: str = "plain"
    family: str = "llama"
    shape: str = "tiny"
    pairs: int = 3
    routes: tuple[str, ...] = ()
    loss: str = "sigmoid"

    @classmethod
    def named(cls, name: str) -> Self:
        """The cell of this `name`. ValueError where it is none."""
        policy, layout, way, *more = name.split("/")
        changes: dict[str, Any] = {}
        for each in more:
            if each in PRECISIONS:
                changes["precision"] = each
            elif each in VARIANTS:
                changes["variant"] = each
            elif "=" in each:
                key, value = each.split("=")
                changes[key] = int(value) if key == "pairs" else tuple(value.split("+")) if key == "routes" else value
            else:
                raise ValueError(f"{each!r} in {name!r} is no precision, no variant and no key=value")
        return replace(cls(policy=policy, layout=layout, way=way), **changes)

    @property
    def name(self) -> str:
        """`policy/layout/way/precision`, and what is not as by default."""
        parts = [self.policy, self.layout, self.way, self.precision]
        parts += [self.variant] if self.variant != "plain" else []
        default = type(self)()
        for key in ("family", "shape", "pairs", "loss"):
            if getattr(self, key) != getattr(default, key):
                parts.append(f"{key}={getattr(self, key)}")
        if self.routes:
            parts.append("routes=" + "+".join(self.routes))
        return "/".join(parts)

    def options(self) -> dict[str, Any]:
        """The run's options."""
        options = {"layout": self.layout, "bf16": False} | WAYS[self.way] | PRECISIONS[self.precision]
        options |= VARIANTS[self.variant]
        if self.loss != "sigmoid":
            options["loss_type"] = self.loss
        if self.loss == "exo_pair":
            options["label_smoothing"] = 1e-3
        return options
