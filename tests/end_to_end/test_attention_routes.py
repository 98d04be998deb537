"""Runs whose attention takes a route of GPUs: the line about it, the numbers, and the key of stored log-probs.

The kernel of `varlen` is played by what it is defined as.
"""

import math
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import holdfast.scoring.routes.choice as choice
import holdfast.scoring.routes.probes as probes
import holdfast.scoring.routes.varlen as varlen
import holdfast.training.attention_routes as attention_routes
from families import tiny_model
from holdfast.scoring.routes.base import Route
from holdfast.training.attention_routes import agreed_routes, line_about
from played_varlen import played_varlen_attn
from policies import POLICIES, config, logged, trainer
from shared_rows import logps_of, shared_batch

CPU = torch.device("cpu")


@pytest.fixture
def _as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The routes of GPUs on a CPU, but for FlexAttention."""
    monkeypatch.setattr(varlen, "varlen_attn", played_varlen_attn)
    monkeypatch.setattr(
        choice, "candidates", lambda device, dtype: [choice.VARLEN, choice.WIDE_VARLEN, choice.DENSE, choice.PIECES]
    )
    monkeypatch.setattr(probes, "_REFUSED", set())
    probes._tried.cache_clear()
    yield
    probes._tried.cache_clear()


def lines(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.getMessage().startswith("attention: ")]


WAYS: dict[str, tuple[str, dict[str, Any]]] = {
    "model": ("full", {"reference": "model"}),
    "adapter": ("lora_fresh", {"reference": "adapter"}),
    "snapshot": ("full", {"reference": "snapshot"}),
    "parts": ("full", {"reference": "model", "tokens_per_batch": 24}),
    "precomputed": ("full", {"reference": "precomputed"}),
    "packed": ("full", {"reference": "model", "layout": "packed"}),
    "checkpointing": ("full", {"reference": "model", "activation_checkpointing": True}),
    "bf16": ("full", {"reference": "model", "bf16": True}),
}


@pytest.mark.usefixtures("_as_on_a_gpu")
@pytest.mark.parametrize("way", WAYS)
def test_a_run_says_its_route_and_gives_the_numbers_of_pieces(
    way: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    kind, options = WAYS[way]
    options = {"max_steps": 3, "layout": "prefix_shared"} | options
    found = trainer(POLICIES[kind](), config(tmp_path / "varlen", **options))
    found.train()
    assert lines(caplog) == ["attention: varlen"]
    assert logged(found)[0] == pytest.approx(math.log(2), abs=1e-7)
    monkeypatch.setattr(choice, "candidates", lambda device, dtype: [choice.PIECES])
    expected = trainer(POLICIES[kind](), config(tmp_path / "pieces", **options))
    expected.train()
    assert logged(found) == pytest.approx(logged(expected), abs=2e-2 if way == "bf16" else 1e-5)


def test_a_cpu_says_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """There is nothing to choose from."""
    trainer(POLICIES["full"](), config(tmp_path, layout="prefix_shared"))
    assert lines(caplog) == []


@pytest.mark.usefixtures("_as_on_a_gpu")
def test_padded_rows_need_no_route(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    trainer(POLICIES["full"](), config(tmp_path, layout="padded"))
    assert lines(caplog) == []


@pytest.mark.usefixtures("_as_on_a_gpu")
def test_log_probs_of_another_route_are_not_found_in_the_store(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """They differ by rounding, as those of another layout do."""

    def num_found() -> str:
        caplog.clear()
        trainer(POLICIES["full"](), config(tmp_path, layout="prefix_shared", reference="precomputed"))
        (line,) = [record.getMessage() for record in caplog.records if "found in the store" in record.getMessage()]
        return line.split(" completions")[0].split()[-3]

    assert num_found() == "0"
    assert num_found() != "0"
    monkeypatch.setattr(choice, "candidates", lambda device, dtype: [choice.DENSE, choice.PIECES])
    assert num_found() == "0"
    assert num_found() != "0"


# --- several processes ------------------------------------------------------------------------------------------------

ALONE: Any = SimpleNamespace(device=CPU, autocast=torch.enable_grad)


@pytest.mark.usefixtures("_as_on_a_gpu")
def test_a_route_that_fails_on_one_process_is_taken_by_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """The other process chose `dense`, since `varlen` does not work there."""
    model = tiny_model("mistral")
    logps_of(model, shared_batch())
    assert agreed_routes([model], ALONE) == {"MistralForCausalLM": [choice.VARLEN] * 2}
    taken = {(choice.ROUTES.index(choice.DENSE), torch.float32)}
    others: list[Any] = [taken, [False, True], taken, [True]]
    monkeypatch.setattr(attention_routes, "of_all", lambda own: [own, others.pop(0)])
    assert agreed_routes([model], ALONE) == {"MistralForCausalLM": [choice.DENSE] * 2}
    assert others == []
    logps_of(model, shared_batch())
    assert choice.choose(choice._ASKED[model.model.layers[0].self_attn][0], *_mask(model)) is choice.DENSE


def _mask(model: nn.Module) -> tuple[Any, torch.device, torch.dtype]:
    layers: Any = model.model
    return choice._ASKED[layers.layers[0].self_attn][1], CPU, torch.float32


@pytest.mark.parametrize(
    ("routes", "line"),
    [
        ({"A": [choice.VARLEN] * 3}, "attention: varlen"),
        ({"A": [choice.VARLEN] * 3, "B": [choice.VARLEN] * 2}, "attention: varlen"),
        (
            {"A": [choice.FLEX, choice.VARLEN, choice.FLEX]},
            "attention: A flex in 2 layers, varlen in 1 layers",
        ),
        (
            {"A": [choice.VARLEN] * 3, "B": [choice.FLEX] * 2},
            "attention: A varlen in 3 layers; B flex in 2 layers",
        ),
    ],
)
def test_the_line(routes: dict[str, list[Route]], line: str) -> None:
    assert line_about(routes) == line
