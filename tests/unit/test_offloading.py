"""Activation offloading: which tensors move, and that gradients stay the same bit for bit."""

import contextlib
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from families import tiny_model
from holdfast.internals.torch import storage_number
from holdfast.scoring.score import score
from holdfast.training.offloading import NUM_AHEAD, Offloading, OnItsWay, offloaded
from policies import POLICIES
from recomputation import recompute
from shared_rows import padded_batch

CASES = {
    "full": ("full", None, None),
    "full, bf16 autocast": ("full", torch.bfloat16, None),
    "lora": ("lora_sft", None, None),
    "lora, bf16 autocast": ("lora_sft", torch.bfloat16, None),
    "partly frozen, autocast": ("partly_frozen", torch.bfloat16, None),
    "checkpointing": ("full", None, False),
    "reentrant checkpointing": ("full", None, True),
    "lora, checkpointing, autocast": ("lora_sft", torch.bfloat16, False),
    "modules to save": ("lora_modules_to_save", torch.bfloat16, None),
}
"""By name: a policy, the dtype of autocast, and whether checkpointing is reentrant (None: there is none)."""


class Copies:
    """Copies that are clones. What comes back is wrong until it has arrived."""

    def __init__(self) -> None:
        self.order: list[str] = []
        self.moved: list[Tensor] = []

    def to_host(self, tensor: Tensor) -> Tensor:
        self.order.append("out")
        self.moved.append(tensor)
        return tensor.detach().clone()

    def to_device(self, host: Tensor, device: torch.device) -> OnItsWay:
        self.order.append("back")
        return OnItsWay(torch.full_like(host, float("nan")), host)

    def arrived(self, copy: OnItsWay) -> Tensor:
        self.order.append("read")
        return copy.tensor.copy_(copy.event)

    def end(self) -> None:
        pass


def gradients(model: nn.Module, context: Any, autocast: torch.dtype | None) -> dict[str, Tensor]:
    model.zero_grad()
    with context:
        with torch.autocast("cpu", autocast) if autocast else contextlib.nullcontext():
            loss = score(model, padded_batch(), statistics=False).logps.sums().sum()
        loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def made(case: str) -> tuple[nn.Module, torch.dtype | None]:
    policy, autocast, reentrant = CASES[case]
    model = POLICIES[policy]()
    if reentrant is not None:
        recompute(model, reentrant)
        model.enable_input_require_grads()
        model.train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model, autocast


def is_weight(tensor: Tensor, model: nn.Module) -> bool:
    """Whether the tensor holds the values of a weight, as they are, in bf16, or transposed."""
    wide = tensor.detach()
    for parameter in model.parameters():
        for values in (parameter.detach(), parameter.detach().bfloat16()):
            for own in (values, values.t()) if values.ndim == 2 else (values,):
                if own.shape == wide.shape and own.dtype == wide.dtype and torch.equal(own, wide):
                    return True
    return False


@pytest.mark.parametrize("case", CASES)
def test_activations_move_and_weights_stay(case: str) -> None:
    model, autocast = made(case)
    expected = gradients(model, contextlib.nullcontext(), autocast)
    seen: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        seen.append(tensor)
        return tensor

    gradients(model, torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), autocast)
    copies = Copies()
    offloading = Offloading(model, copies, least_bytes=64)
    hooks = torch.autograd.graph.saved_tensors_hooks(offloading.pack, offloading.unpack)
    found = gradients(model, hooks, autocast)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    if "checkpointing" not in case:
        assert any(is_weight(tensor, model) for tensor in seen), "autograd saves weights"
    assert copies.moved
    assert not any(is_weight(tensor, model) for tensor in copies.moved)
    own = {storage_number(tensor) for tensor in (*model.parameters(), *model.buffers())}
    assert not own & {storage_number(tensor) for tensor in copies.moved}
    large = [tensor for tensor in seen if tensor.is_floating_point() and tensor.nbytes >= 64 and tensor.ndim > 1]
    activations = [tensor for tensor in large if not is_weight(tensor, model)]
    moved = sum(tensor.nbytes for tensor in copies.moved)
    assert moved >= 0.8 * sum(tensor.nbytes for tensor in activations) or "checkpointing" in case


def test_copies_back_begin_ahead() -> None:
    model, copies = tiny_model(), Copies()
    offloading = Offloading(model, copies, least_bytes=64)
    gradients(model, torch.autograd.graph.saved_tensors_hooks(offloading.pack, offloading.unpack), None)
    assert copies.order.count("out") == copies.order.count("back") == copies.order.count("read") > 10
    first = copies.order.index("read")
    assert copies.order[:first].count("back") == 1 + NUM_AHEAD
    waiting = [copies.order[:place].count("back") - copies.order[:place].count("read")
               for place, event in enumerate(copies.order) if event == "read"]  # fmt: skip
    assert max(waiting) <= 2 + NUM_AHEAD


def test_small_tensors_and_recomputed_ones_stay() -> None:
    model, copies = tiny_model(), Copies()
    offloading = Offloading(model, copies)
    gradients(model, torch.autograd.graph.saved_tensors_hooks(offloading.pack, offloading.unpack), None)
    assert copies.order == []
    model, _ = made("reentrant checkpointing")
    offloading = Offloading(model, copies, least_bytes=64)
    gradients(model, torch.autograd.graph.saved_tensors_hooks(offloading.pack, offloading.unpack), None)
    layers = model.config.num_hidden_layers
    first_read = copies.order.index("read")
    assert "out" not in copies.order[first_read:], "what a recomputed layer saves is asked for at once"
    assert copies.order.count("out") >= layers


def test_on_a_cpu_nothing_is_copied() -> None:
    model = tiny_model()
    expected = gradients(model, contextlib.nullcontext(), None)
    found = gradients(model, offloaded(model), None)
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_a_graph_may_be_read_twice() -> None:
    model, copies = tiny_model(), Copies()
    offloading = Offloading(model, copies, least_bytes=64)
    with torch.autograd.graph.saved_tensors_hooks(offloading.pack, offloading.unpack):
        loss = score(model, padded_batch()).logps.sums().sum()
    loss.backward(retain_graph=True)
    first = {name: p.grad.clone() for name, p in model.named_parameters()}
    loss.backward()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter.grad, first[name] + first[name])
