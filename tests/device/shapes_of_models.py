"""The policy and the rows of a cell: tiny ones, or a small model that takes a larger one's shape on the device.

A large model is never allocated. The trainer is made of a model with as many layers and heads but narrow ones, and a
model of the wanted shape on device "meta" gives the shapes of the twins.
"""

import math
import random
from typing import Any

import torch
import workload
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import LlamaForCausalLM

import families
import policies
from cells import Cell

LORA_RANK = 16


class Shaped:
    """What a cell's trainer is made of."""

    def __init__(self, cell: Cell) -> None:
        self._cell = cell

    def policy(self) -> nn.Module:
        """The cell's policy."""
        kind, family = self._cell.policy, self._cell.family
        if self._cell.shape != "tiny":
            torch.manual_seed(0)
            return self._adapted(LlamaForCausalLM(self._narrow_config()).eval())
        if family == "llama":
            return policies.POLICIES[kind]()
        if kind != "full":
            raise ValueError(f"{kind!r} is a policy of another family than {family!r}")
        return families.tiny_model(family)

    def larger(self, module: nn.Module) -> nn.Module | None:
        """A module without memory, of the shape that `module` takes; None where it keeps its own."""
        if self._cell.shape == "tiny":
            return None
        with torch.device("meta"):
            model = LlamaForCausalLM(workload.SIZES[self._cell.shape].config())
            return model if isinstance(module, LlamaForCausalLM) else self._adapted(model)

    def rows(self, num_pairs: int, seed: int = 0) -> Dataset:
        """Tokenized pairs: a few tokens each, or as long as those of a dialogue."""
        if self._cell.shape == "tiny":
            return policies.rows(num_pairs, seed)
        draw = random.Random(seed)
        means, spread = workload.DIALOGUE_MEANS, workload.DIALOGUE_SPREAD

        def ids(mean: int) -> list[int]:
            length = draw.lognormvariate(math.log(mean) - spread**2 / 2, spread)
            return [draw.randrange(3, families.VOCABULARY) for _ in range(max(2, round(length)))]

        return Dataset.from_list([{f"{side}_ids": ids(mean) for side, mean in means.items()} for _ in range(num_pairs)])

    def _narrow_config(self) -> Any:
        size = workload.SIZES[self._cell.shape]
        config = size.config()
        config.hidden_size, config.intermediate_size, config.vocab_size = 2 * size.heads, 8, families.VOCABULARY
        config.head_dim = 2
        return config

    def _adapted(self, model: nn.Module) -> nn.Module:
        if self._cell.policy == "full":
            return model
        if self._cell.policy != "lora_fresh":
            raise ValueError(f"{self._cell.policy!r} is made for tiny models only; {self._cell.shape} has a fresh LoRA")
        return get_peft_model(model, LoraConfig(r=LORA_RANK, target_modules="all-linear"))  # pyright: ignore
