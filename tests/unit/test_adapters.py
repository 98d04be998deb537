"""Whether the LoRA of a layer adds nothing: seen from its factors, beside what it adds to an output."""

from typing import Any

import pytest
import torch
from peft import AdaLoraConfig, LoraConfig, get_peft_model
from torch import nn

from holdfast.policy.adapters import lora_adds_nothing, lora_factors


class Bare(nn.Module):
    """An embedding and a linear map, which get the factors."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(5, 4)
        self.body = nn.Linear(4, 3)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.body(self.words(ids))


def adapted(**options: Any) -> Any:
    """A model with the adapter `ours`, drawn from a fixed seed."""
    torch.manual_seed(0)
    config = LoraConfig(**{"r": 2, "target_modules": ["words", "body"]} | options)
    return get_peft_model(Bare(), config, adapter_name="ours")  # type: ignore[arg-type]


def layers(model: Any) -> list[Any]:
    return [model.base_model.model.words, model.base_model.model.body]


@pytest.mark.parametrize("trained", [(), ("words",), ("body",), ("words", "body")])
def test_factors_of_which_one_is_zero_add_nothing(trained: tuple[str, ...]) -> None:
    """Layer by layer as its output says, adapter on against off; a fresh LoRA has a factor of zeros."""
    model = adapted().eval()
    words, body = layers(model)
    with torch.no_grad():
        if "words" in trained:
            words.lora_embedding_A["ours"] += 1.0  # zeros at first, unlike those of a linear map
        if "body" in trained:
            body.lora_B["ours"].weight += 1.0
    for name, layer, inputs in (("words", words, torch.arange(5)), ("body", body, torch.randn(6, 4))):
        adds = not torch.equal(layer(inputs), layer.base_layer(inputs))
        assert adds == (name in trained)
        assert lora_adds_nothing(layer, "ours") == (not adds)


@pytest.mark.parametrize(("value", "adds_nothing"), [(0.0, True), (0.5, False)])
def test_a_bias_of_the_second_factor_counts(value: float, adds_nothing: bool) -> None:
    body = layers(adapted(lora_bias=True, target_modules=["body"]))[1]
    with torch.no_grad():
        body.lora_B["ours"].bias.fill_(value)
    assert lora_adds_nothing(body, "ours") == adds_nothing


def test_kinds_that_compute_more_than_a_product_are_not_judged() -> None:
    """A fresh DoRA or AdaLoRA adds nothing either, to rounding; only plain factors do so to the bit."""
    assert not lora_adds_nothing(layers(adapted(use_dora=True, target_modules=["body"]))[1], "ours")
    config = AdaLoraConfig(target_modules=["body"], total_step=10)
    adaptive: Any = get_peft_model(Bare(), config, adapter_name="ours")  # type: ignore[arg-type]
    with torch.no_grad():
        adaptive.base_model.model.body.lora_B["ours"].zero_()
    assert not lora_adds_nothing(adaptive.base_model.model.body, "ours")


def test_the_factors_are_the_layer_s_own_parameters_of_that_adapter() -> None:
    model = adapted()
    model.add_adapter("other", LoraConfig(r=2, target_modules=["body"]))
    words, body = layers(model)
    ((down, up),) = lora_factors(body, "ours")
    assert down is body.lora_A["ours"].weight
    assert up is body.lora_B["ours"].weight
    ((down, up),) = lora_factors(words, "ours")
    assert down is words.lora_embedding_A["ours"]
    assert lora_factors(words, "other") == []
    assert lora_adds_nothing(words, "other")
