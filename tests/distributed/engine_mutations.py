"""Runs over an engine in which one step is left out or goes wrong: `<engine>/mutated/<mutation>`. Each must be found.

`RUN_OF` says of which run of `engine_scenarios` each is.
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import engine_scenarios
from scenarios import RANK
from torch import Tensor, nn

from holdfast.policy import placement, second_module, sharding
from holdfast.policy.sharding import cut_like, own_part, whole
from holdfast.reference.moving import effective, hard_snapshot, product_shares, soft_snapshot
from holdfast.reference.scorers import exchange
from holdfast.training import engine_trainer, startup

OF_SECOND_MODULES = {
    "reference_left_whole": "full/chosen/fixed",
    "copied_part_of_another": "full/model/soft",
    "synced_with_part_of_another": "full/model/soft",
    "optimizer_of_gathered_values": "full/model/soft",
}
INSIDE_POLICY = {
    "exchange_left_out": "full/device/fixed",
    "exchanged_by_the_first_alone": "full/device/fixed",
    "adapter_exchanged_by_the_first_alone": "lora_sft/adapter/fixed",
    "drift_of_own_part": "full/device/hard",
    "products_left_out": "lora_sft/device/soft",
    "share_of_another": "lora_sft/device/soft",
}
RUN_OF = OF_SECOND_MODULES | INSIDE_POLICY


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


def _put_nothing(parameter: nn.Parameter, _: Tensor) -> Tensor:
    return own_part(parameter).clone()


def _put_by_the_first(parameter: nn.Parameter, part: Tensor) -> Tensor:
    return sharding.put(parameter, part) if RANK == 0 else _put_nothing(parameter, part)


def _total_of_own(terms: Iterable[tuple[Tensor, float]]) -> float:
    return sum(value for _, value in terms)


def _share_of_another(value: Tensor) -> Tensor:
    return sharding.cut_evenly(value.roll(1))


MUTATIONS: dict[str, Callable[[], Any]] = {
    "reference_left_whole": lambda: mock.patch.object(placement, "shard_beside", _left_whole),
    "copied_part_of_another": lambda: mock.patch.object(second_module, "part_like", _part_of_another),
    "synced_with_part_of_another": lambda: mock.patch.object(effective, "part_like", _part_of_another),
    "optimizer_of_gathered_values": _left_gathered,
    "exchange_left_out": lambda: mock.patch.object(exchange, "put", _put_nothing),
    "exchanged_by_the_first_alone": lambda: mock.patch.object(exchange, "put", _put_by_the_first),
    "adapter_exchanged_by_the_first_alone": lambda: mock.patch.object(exchange, "put", _put_by_the_first),
    "drift_of_own_part": lambda: mock.patch.object(hard_snapshot, "total", _total_of_own),
    "products_left_out": lambda: mock.patch.object(soft_snapshot, "adding_products", contextlib.nullcontext),
    "share_of_another": lambda: mock.patch.object(product_shares, "cut_evenly", _share_of_another),
}
