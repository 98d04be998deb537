"""Counts what a run does on the pretend device: operations by group, copies and reads by line."""

import sys
from collections import Counter
from typing import Any

import torch
from torch import Tensor

from groups import OTHER, group_of
from pretend.device import Event
from pretend.kernels import KERNELS
from pretend.places import NOWHERE, Place, place_of


class Watch:
    """The observer of a run. It counts while `is_on`."""

    def __init__(self) -> None:
        self.is_on = False
        self.num_operations = 0
        self.groups: Counter[str] = Counter()
        self.names: Counter[tuple[str, str]] = Counter()
        self.kernels: Counter[str] = Counter()
        self.copies: Counter[tuple[Place, str, bool]] = Counter()
        self.reads: Counter[tuple[Place, str]] = Counter()
        self._of_nodes: dict[int, tuple[str, Place]] = {}
        """By the number of a node of the graph: the group and place of the operation that made it."""

    def __call__(self, event: Event) -> None:
        """See `pretend.device.PretendDevice`."""
        frame = sys._getframe(1)
        if event.kind == "operation":
            if self.is_on:
                self.num_operations += 1
                if event.name in KERNELS:
                    self.kernels[KERNELS[event.name]] += 1
            group, _ = self._origin(event, frame)
            if self.is_on:
                self.groups[group] += 1
                self.names[group, event.name] += 1
            return
        if not self.is_on:
            return
        place = place_of(frame) or self._of_node()[1]
        if event.kind == "copy":
            self.copies[place, f"{event.detail} {event.name}", event.blocks] += 1
        else:
            self.reads[place, event.name] += 1

    def _origin(self, event: Event, frame: Any) -> tuple[str, Place]:
        group = _cast_of_weight(event) or group_of(frame, event.name)
        if group is None:  # a backward pass: it is asked for by what made the graph's node
            return self._of_node()
        found = group, place_of(frame) or NOWHERE
        self._of_nodes[torch._C._autograd._get_sequence_nr() - 1] = found
        return found

    def _of_node(self) -> tuple[str, Place]:
        node = torch._C._current_autograd_node()
        number = None if node is None else node._sequence_nr()
        if node is not None and "AccumulateGrad" in node.name():
            return "gradients added", NOWHERE
        return self._of_nodes.get(number, (OTHER, NOWHERE)) if number is not None else (OTHER, NOWHERE)


def _cast_of_weight(event: Event) -> str | None:
    first = event.args[0] if event.args else None
    if event.name == "aten::_to_copy" and isinstance(first, Tensor) and getattr(first, "_is_param", False):
        return "weight casts"
    return None
