"""Which earlier tokens a kind of layer sees, recognised in the mask function that its model passes.

A model says it as a function of positions, made anew in every forward pass. A kernel compiled for a function object
would be compiled anew for the next one. So the functions of transformers for causal attention, sliding windows and
chunks are recognised, by their code and the numbers in it, and become a rule with one number. Every other function is
handed to the kernel as it is.

Given up: other functions that mean the same.
"""

import enum
from collections.abc import Callable
from types import FunctionType
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers.masking_utils import (
    causal_mask_function,
    chunked_causal_mask_function,
    sliding_window_causal_mask_function,
)

FARTHEST = 2**30
"""A distance that no two tokens have."""


class Rule(enum.Enum):
    """How a query's position and a key's decide, with one number `reach`.

    `NEAR`: the key is not later, and less than `reach` positions away. `CHUNK`: it is not later, and both are in the
    same run of `reach` positions. `OTHER`: the model's own function decides.
    """

    NEAR = enum.auto()
    CHUNK = enum.auto()
    OTHER = enum.auto()


Allows = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Any], Tensor]
"""(row, head, query's position, key's position, reach, mask function) -> whether the query may see the key."""


def _near(row: Tensor, head: Tensor, query: Tensor, key: Tensor, reach: Tensor, visible: Any) -> Tensor:
    return (key <= query) & (query - key < reach)


def _chunk(row: Tensor, head: Tensor, query: Tensor, key: Tensor, reach: Tensor, visible: Any) -> Tensor:
    return (key <= query) & (query // reach == key // reach)


def _other(row: Tensor, head: Tensor, query: Tensor, key: Tensor, reach: Tensor, visible: Any) -> Tensor:
    return visible(row, head, query, key)


ALLOWS: dict[Rule, Allows] = {Rule.NEAR: _near, Rule.CHUNK: _chunk, Rule.OTHER: _other}
"""What each rule allows, as a kernel can compute it."""

Bounds = tuple[np.ndarray, np.ndarray]
"""The least and the largest position of some tokens that follow each other, [N] each."""


def allowed_of(rule: Rule, reach: int, queries: Bounds, keys: Bounds) -> tuple[np.ndarray, np.ndarray]:
    """Whether any of the queries may see any of the keys, and whether all may see all; [N] each. With `Rule.OTHER` any
    may, and never all."""
    (first_query, last_query), (first_key, last_key) = queries, keys
    if rule is Rule.NEAR:  # distances run through all whole numbers between the least and the largest
        least, largest = first_query - last_key, last_query - first_key
        return (largest >= 0) & (least < reach), (least >= 0) & (largest < reach)
    if rule is Rule.CHUNK:
        last = np.minimum(last_query, last_key) // reach  # the last run that has both, if any has
        has_both = last >= np.maximum(first_query, first_key) // reach
        may = np.minimum(last_query, (last + 1) * reach - 1) >= np.maximum(first_key, last * reach)
        is_one = np.minimum(first_query, first_key) // reach == np.maximum(last_query, last_key) // reach
        return has_both & may, is_one & (first_query >= last_key)
    return np.ones_like(first_query, dtype=bool), np.zeros_like(first_query, dtype=bool)


def recognised(visible: Callable[..., Any]) -> tuple[Rule, int]:
    """The rule that a mask function of transformers stands for, and its number (0 for `Rule.OTHER`)."""
    if _is_same(visible, causal_mask_function):
        return Rule.NEAR, FARTHEST
    for reach in {number for number in _numbers(visible) if number > 0}:
        if _is_same(visible, sliding_window_causal_mask_function(reach)):
            return Rule.NEAR, reach
        if _is_same(visible, chunked_causal_mask_function(reach, torch.zeros(1))):
            return Rule.CHUNK, reach
    return Rule.OTHER, 0


def _numbers(visible: Any) -> list[int]:
    """The whole numbers that a function has kept, and those that its functions have kept."""
    if type(visible) is int:
        return [visible]
    return [number for part in _kept(visible) for number in _numbers(part)]


def _is_same(one: Any, other: Any) -> bool:
    """Whether two functions have the same code and keep the same numbers. Tensors are not read: those of chunks count
    the padding on the left of each row, and rows of several sequences have none."""
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return True
    if type(one) is not type(other):
        return False
    if isinstance(one, FunctionType) and (one.__code__, one.__defaults__) != (other.__code__, other.__defaults__):
        return False
    if not isinstance(one, FunctionType | tuple):
        return one == other
    parts, others = _kept(one), _kept(other)
    return len(parts) == len(others) and all(map(_is_same, parts, others))


def _kept(value: Any) -> list[Any]:
    """What a function has kept of the call that made it, or what is in a tuple."""
    if isinstance(value, tuple):
        return list(value)
    if not isinstance(value, FunctionType):
        return []
    return [cell.cell_contents for cell in value.__closure__ or ()]
