"""Runs under `torch.compile`: the numbers of the run without it, and no more compilations once shapes have varied."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters

from families import tiny_model
from flex_on_cpu import flex_on_cpu
from holdfast import DPOTrainer
from holdfast.batch import PairBatch
from holdfast.data.layouts.prefix_shared import SharedLayout
from holdfast.scoring.score import score
from policies import POLICIES, config, logged, rows, trainer

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:torch", "ignore::UserWarning:torch")

RUNS: dict[str, tuple[str, dict[str, Any]]] = {
    "shared": ("full", {}),
    "padded": ("full", {"layout": "padded"}),
    "packed": ("full", {"layout": "packed"}),
    "multiple": ("full", {"pad_to_multiple_of": 8}),
    "checkpointing": ("full", {"activation_checkpointing": True}),
    "lora": ("lora_sft", {}),
    "sync": ("full", {"sync_ref_model": True, "ref_model_sync_steps": 2}),
}


@pytest.fixture(autouse=True)
def _nothing_compiled() -> None:
    torch._dynamo.reset()
    counters.clear()


def trained(policy: str | nn.Module, folder: Path, **options: Any) -> tuple[DPOTrainer, list[int]]:
    """The trainer after ten batches (or `max_steps`) of different shapes, and how many graphs there were after each."""
    num_graphs: list[int] = []
    args = config(folder, **{"max_steps": 10} | options)
    model = POLICIES[policy]() if isinstance(policy, str) else policy
    ours = trainer(model, args, train_dataset=rows(36))
    compute_loss = ours.compute_loss

    def counted(*args: Any, **kwargs: Any) -> Any:
        loss = compute_loss(*args, **kwargs)
        num_graphs.append(counters["stats"]["unique_graphs"])
        return loss

    ours.compute_loss = counted
    ours.train()
    return ours, num_graphs


def assert_same_run(found: DPOTrainer, expected: DPOTrainer) -> None:
    for name in ("loss", "grad_norm", "rewards/margins", "logps/chosen", "entropy", "num_tokens"):
        assert logged(found, name) == pytest.approx(logged(expected, name), rel=1e-5, abs=1e-5), name
    for ours, theirs in zip(found.model.parameters(), expected.model.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("run", [pytest.param(run, marks=[] if run == "lora" else pytest.mark.nightly) for run in RUNS])
def test_compiled_runs_train_alike(run: str, tmp_path: Path) -> None:
    """Graphs are made for the first batch, and no more for nine of other lengths."""
    policy, options = RUNS[run]
    found, num_graphs = trained(policy, tmp_path, torch_compile=True, torch_compile_backend="eager", **options)
    assert num_graphs == num_graphs[:1] * 10, num_graphs
    assert 0 < num_graphs[0] <= 11
    assert not counters["recompile_limit"]
    expected, none = trained(policy, tmp_path, **options)
    assert none[-1] == num_graphs[-1], "nothing is compiled that was not asked for"
    assert_same_run(found, expected)
    assert found.evaluate(rows(8))["eval_loss"] == pytest.approx(expected.evaluate(rows(8))["eval_loss"], abs=1e-5)


@pytest.mark.nightly
@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "gemma2", "gemma3", "qwen3", "gpt2", "phi3"])
def test_graphs_of_fifty_unlike_batches(family: str, tmp_path: Path) -> None:
    """However many layers there are, all share their graphs. One row is another graph than several, so there are at
    most twice as many as after the first batch."""
    num_layers = {"gpt2": {"n_layer": 10}}.get(family, {"num_hidden_layers": 10})
    options = {"torch_compile": True, "torch_compile_backend": "eager", "tokens_per_batch": 40, "max_steps": 50}
    policy = tiny_model(family, **num_layers)
    _, num_graphs = trained(policy, tmp_path, **options)
    assert len(num_graphs) == 50
    assert len(set(num_graphs)) <= 3, num_graphs
    assert num_graphs[-1] <= 2 * num_graphs[0] <= 24, num_graphs
    assert not counters["recompile_limit"]


@pytest.mark.nightly
@pytest.mark.slow
@pytest.mark.parametrize("family", ["gemma2", "llama"])
def test_a_compiled_body_around_compiled_attention(family: str, tmp_path: Path) -> None:
    """Numbers are not constant to the body's compiler, and are to that of the attention."""
    with flex_on_cpu():
        options = {"torch_compile": True, "torch_compile_backend": "eager", "max_steps": 4}
        found, num_graphs = trained(tiny_model(family), tmp_path, **options)
        assert num_graphs == num_graphs[:1] * 4, num_graphs
    assert_same_run(found, trained(tiny_model(family), tmp_path, max_steps=4)[0])


@pytest.mark.nightly
@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
def test_inductor(tmp_path: Path) -> None:
    found, num_graphs = trained("full", tmp_path, torch_compile=True, max_steps=3)
    assert num_graphs[-1] > 0
    assert_same_run(found, trained("full", tmp_path, max_steps=3)[0])


def test_a_model_without_a_body_is_refused() -> None:
    model = tiny_model()
    model.base_model_prefix = "body"
    compiled: nn.Module = torch.compile(model, backend="eager")
    batch = PairBatch.from_tensors(SharedLayout(0)(rows().to_list()[:2]))
    with pytest.raises(ValueError, match=r"LlamaForCausalLM was to be.*found none at 'body'.*torch_compile=False"):
        score(compiled, batch)
