"""Half precision, stated: the first loss and margins by policy, layout, way and dtype, and what stored log-probs may
differ by. docs/references.md has the same bounds.

bf16 and fp16 are computed on the CPU. accelerate runs fp16 on GPUs only, so there its autocast is replaced.
"""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator

import oracle
from families import tiny_model
from holdfast.batch import PairBatch
from holdfast.data.layouts.packed import PackedLayout
from holdfast.data.layouts.padded import PaddedLayout
from holdfast.data.layouts.prefix_shared import SharedLayout
from holdfast.reference.audit import Gap
from holdfast.scoring.frozen import frozen_logps
from holdfast.scoring.score import score
from policies import POLICIES, config, logged, rows, trainer

LN_2 = float(torch.tensor(2.0).log())
"""The loss where policy and reference are equal: -log sigma(0)."""

MODES = {"bf16 autocast": torch.bfloat16, "bf16 weights": None, "fp16 autocast": torch.float16}
LAYOUTS = ("padded", "packed", "prefix_shared")
LIVE: dict[str, dict[str, Any]] = {
    "model": {"reference": "model"},
    "adapter": {"reference": "adapter"},
    "snapshot": {"reference": "snapshot"},
    "host": {"reference": "snapshot", "snapshot_device": "cpu"},
    "disk": {"reference": "snapshot", "snapshot_device": "disk"},
    "window": {"reference": "snapshot", "reference_window": 2},
}
FAST = {
    ("bf16 autocast", "full", "prefix_shared", "model"), ("bf16 autocast", "lora_sft", "padded", "host"),
    ("bf16 weights", "full", "packed", "window"), ("bf16 weights", "lora_fresh", "prefix_shared", "adapter"),
    ("fp16 autocast", "full", "padded", "snapshot"),
}  # fmt: skip
FAST_STORED = {("bf16 autocast", "full", "padded"), ("bf16 autocast", "lora_fresh", "prefix_shared")}

TOKEN_NATS = {"bf16 autocast": 0.05, "bf16 weights": 0.05, "fp16 autocast": 0.01}
"""Largest gap of one token between stored and live log-probs."""
MARGIN = {"bf16 autocast": 0.01, "bf16 weights": 0.01, "fp16 autocast": 0.002}
"""Largest mean reward margin of the first batch then, with beta = 0.2."""


@pytest.fixture
def mode(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if MODES[request.param] is not None:
        monkeypatch.setattr(Accelerator, "autocast", lambda *_, **__: torch.autocast("cpu", MODES[request.param]))
    return request.param


def first_step(mode: str, policy: str, folder: Path, **options: Any) -> Any:
    """A trainer that has made one step."""
    model = POLICIES[policy]()
    model = model.bfloat16() if mode == "bf16 weights" else model
    ours = trainer(model, config(folder, max_steps=1, learning_rate=1e-3, **options))
    ours.train()
    return ours


def cells() -> list[Any]:
    each = [
        (mode, policy, layout, way)
        for mode in MODES
        for policy in ("full", "lora_fresh", "lora_sft")
        for layout in LAYOUTS
        for way in LIVE
        if not (way == "adapter" and policy == "full")
    ]
    return [pytest.param(*cell, marks=[] if cell in FAST else pytest.mark.nightly) for cell in each]


@pytest.mark.parametrize(("mode", "policy", "layout", "way"), cells(), indirect=["mode"])
def test_a_live_reference_equals_the_policy_exactly(
    mode: str, policy: str, layout: str, way: str, tmp_path: Path
) -> None:
    ours = first_step(mode, policy, tmp_path, layout=layout, **LIVE[way])
    assert ours._layout_name() == layout
    with ours.accelerator.autocast():
        assert torch.is_autocast_enabled("cpu") is (mode != "bf16 weights")
    assert logged(ours) == [LN_2]
    assert logged(ours, "rewards/margins") == logged(ours, "rewards/chosen") == [0.0]


@pytest.mark.parametrize(
    ("mode", "policy", "layout"),
    [
        pytest.param(*cell, marks=[] if cell in FAST_STORED else pytest.mark.nightly)
        for cell in [(m, p, y) for m in MODES for p in ("full", "lora_fresh", "lora_sft") for y in LAYOUTS]
    ],
    indirect=["mode"],
)
def test_stored_log_probs_differ_by_the_rounding_of_other_rows(
    mode: str, policy: str, layout: str, tmp_path: Path
) -> None:
    """They come from batches of another shape. Packed rows attend each sequence for itself, whatever is beside it."""
    model = POLICIES[policy]()
    model = model.bfloat16() if mode == "bf16 weights" else model
    options = {"precompute_ref_log_probs": True, "reference_store": str(tmp_path / "store")}
    ours = trainer(model, config(tmp_path, max_steps=1, learning_rate=1e-3, layout=layout, **options))
    batch = ours._collated(ours._first_rows())
    gap = Gap.between(frozen_logps(ours.model, batch, ours.accelerator.autocast), ours.reference.logps(batch))
    ours.train()
    margin = abs(logged(ours, "rewards/margins")[0])
    most_nats, most_margin = (0.0, 0.0) if layout == "packed" else (TOKEN_NATS[mode], MARGIN[mode])
    assert gap.largest <= most_nats
    assert margin <= most_margin
    assert abs(logged(ours)[0] - math.log(2)) <= most_margin / 2 + 1e-7


ORACLE_NATS = {"bf16 autocast": 0.02, "bf16 weights": 0.02, "fp16 autocast": 0.003}
"""Largest mean gap per token to the same model in fp32."""


@pytest.mark.parametrize("family", ["llama", pytest.param("qwen3", marks=pytest.mark.nightly), "gemma3"])
@pytest.mark.parametrize("dtype", MODES)
def test_every_layout_rounds_alike(dtype: str, family: str) -> None:
    """The gap to the naive fp32 oracle of the same weights has one size in all layouts."""
    model, data = tiny_model(family), rows(12).to_list()
    if dtype == "bf16 weights":
        model = model.bfloat16()
    exact = tiny_model(family)
    exact.load_state_dict({name: value.float() for name, value in model.state_dict().items()})
    completions = [(row["prompt_ids"], row[side]) for side in ("chosen_ids", "rejected_ids") for row in data]
    with torch.no_grad():
        expected = [oracle.sequence_logps(exact, *completion) for completion in completions]
    found = []
    for layout in (PaddedLayout(0), PackedLayout(0), SharedLayout(0)):
        batch = PairBatch.from_tensors(layout(data))
        with torch.no_grad(), torch.autocast("cpu", MODES[dtype], enabled=MODES[dtype] is not None):
            per_token = score(model, batch).logps.per_token
        indices = torch.cat([batch.chosen, batch.rejected]).tolist()
        parts = per_token.split(batch.lengths())
        gaps = torch.cat([(parts[index] - own).abs() for index, own in zip(indices, expected, strict=True)])
        found.append(float(gaps.mean()))
    assert max(found) <= ORACLE_NATS[dtype], found
    assert max(found) <= 2 * min(found), found


def test_a_scale_that_overflows_is_halved_and_training_goes_on() -> None:
    """What `GradScaler` does with the gradient of a sum of log-probs under autocast to fp16: the weights stay until
    the scale fits, then they get the gradient of fp32, to 2 %."""
    model, exact, batch = tiny_model(), tiny_model(), PairBatch.from_tensors(PaddedLayout(0)(rows().to_list()[:3]))
    (-score(exact, batch).logps.sums().sum()).backward()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**30)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    scales = [scaler.get_scale()]
    while all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters()):
        assert len(scales) < 40
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.float16):
            loss = -score(model, batch).logps.sums().sum()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        scales.append(scaler.get_scale())
    assert scales[1] == scales[0] / 2, "the first step was left out"
    assert scales[-1] == scales[-2], "the last one was not"
    for name, parameter in exact.named_parameters():
        gradient = before[name] - dict(model.named_parameters())[name].detach()
        assert float((gradient - parameter.grad).norm()) <= 0.02 * float(parameter.grad.norm()), name
