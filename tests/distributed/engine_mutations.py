"""Runs over an engine in which one step is left out or goes wrong: `<engine>/mutated/<mutation>`. Each must be found.

`RUN_OF` says of which run of `engine_scenarios` each is.
"""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import engine_scenarios
from torch import Tensor, nn

from holdfast.policy import placement, second_module
from holdfast.policy.sharding import cut_like, whole
from holdfast.reference.moving import effective
from holdfast.training import engine_trainer, startup

RUN_OF = {
    "reference_left_whole": "full/chosen/fixed",
    "copied_part_of_another": "full/model/soft",
    "synced_with_part_of_another": "full/model/soft",
    "optimizer_of_gathered_values": "full/model/soft",
}


def run(name: str, folder: Path) -> dict[str, Any]:
    """The numbers of a run that has gone wrong."""
    engine, _, mutation = name.split("/")
    with MUTATIONS[mutation]():
        return engine_scenarios.run(f"{engine}/{RUN_OF[mutation]}", folder, reference_audit=False)


def _left_whole(module: nn.Module, _: nn.Module) -> nn.Module:
    return module


def _part_of_another(value: Tensor, parameter: Tensor) -> Tensor:
    rows = cut_like(whole(value), parameter).shape[0]
    return cut_like(whole(value).roll(rows, 0), parameter)


@contextlib.contextmanager
def _left_gathered() -> Iterator[None]:
    with mock.patch.object(startup, "give_back"), mock.patch.object(engine_trainer, "give_back"):
        yield


MUTATIONS: dict[str, Callable[[], Any]] = {
    "reference_left_whole": lambda: mock.patch.object(placement, "shard_beside", _left_whole),
    "copied_part_of_another": lambda: mock.patch.object(second_module, "part_like", _part_of_another),
    "synced_with_part_of_another": lambda: mock.patch.object(effective, "part_like", _part_of_another),
    "optimizer_of_gathered_values": _left_gathered,
}
