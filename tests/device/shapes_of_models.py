"""The policy and the rows of a cell: tiny ones, or a small model that takes a larger one's shape on the device."""

import random
import statistics
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import nn

import families
import policies
from cells import Cell


class Shaped:
    """What a cell's trainer is made of."""

    def __init__(self, cell: Cell) -> None:
        self._cell = cell

    def policy(self) -> nn.Module:
        """The cell's policy."""
        kind = self._cell.policy
        if self._cell.shape == "tiny":
            family = self._cell.family
            if family == "llama":
                return policies.POLICIES[kind]()
            if kind == "full":
                return families.tiny_model(family)
            raise ValueError(f"{kind!r} is a policy of another family than {family!r}")
        raise ValueError(self._cell.shape)

    def rows(self, num_pairs: int) -> Dataset:
        """Tokenized pairs."""
        return policies.rows(num_pairs)

    def larger(self, module: nn.Module) -> nn.Module | None:
        """A module without memory, of the shape that `module` takes; None where it keeps its own."""
        return None
