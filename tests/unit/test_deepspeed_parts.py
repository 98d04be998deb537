"""What `internals.deepspeed` reads of a parameter that ZeRO-3 has spread, on parameters made by hand.

Seven values over three processes: parts of three, so the last has one value and two of padding.
"""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from holdfast.internals import deepspeed
from holdfast.internals.moved import MovedError
from holdfast.policy.sharding import cut_like, is_part, is_sharded, own_part, shape_of, total, whole

VALUES = torch.arange(7.0).reshape(7, 1)


def spread(rank: int, *, without: str | None = None) -> nn.Parameter:
    """The parameter as process `rank` of three has it, between forward passes."""
    padded = torch.cat([VALUES.flatten(), torch.full((2,), torch.nan)])[3 * rank : 3 * rank + 3].clone()
    part: Any = padded
    part.ds_numel = 3
    attributes = {
        "ds_id": 0, "ds_tensor": part, "ds_numel": 7, "ds_shape": VALUES.shape, "ds_process_group": None,
        "ds_zero_partition_rank": rank, "ds_zero_partition_world_size": 3,
    }  # fmt: skip
    parameter = nn.Parameter(torch.empty(0))
    for name, value in attributes.items():
        if name != without:
            setattr(parameter, name, value)
    return parameter


@pytest.mark.parametrize(("rank", "part"), [(0, [0.0, 1.0, 2.0]), (1, [3.0, 4.0, 5.0]), (2, [6.0])])
def test_own_part_has_no_padding(rank: int, part: list[float]) -> None:
    parameter = spread(rank)
    assert is_part(parameter)
    assert shape_of(parameter) == (7, 1)
    assert own_part(parameter).tolist() == part
    assert cut_like(VALUES, parameter).tolist() == part
    own_part(parameter).add_(1)
    assert own_part(parameter).tolist() == [value + 1 for value in part]  # it shares memory


def test_whole_values_are_put_together(monkeypatch: pytest.MonkeyPatch) -> None:
    def all_gather(parts: list[Tensor], own: Tensor, group: Any) -> None:
        for rank, part in enumerate(parts):
            part.copy_(own if rank == 2 else vars(spread(rank))["ds_tensor"])

    monkeypatch.setattr(deepspeed.dist, "all_gather", all_gather)
    assert torch.equal(whole(spread(2)), VALUES)


def test_a_module_is_sharded_where_a_parameter_is_spread() -> None:
    module = nn.Linear(1, 7, bias=False)
    assert not is_sharded(module)
    assert total([(module.weight, 2.0)]) == 2.0
    module.weight = spread(0)
    assert is_sharded(module)


@pytest.mark.parametrize("name", ["ds_tensor", "ds_numel", "ds_zero_partition_rank"])
def test_a_name_that_moved(name: str) -> None:
    with pytest.raises(MovedError, match=rf"deepspeed\.Parameter\.{name} moved in version"):
        own_part(spread(0, without=name))


def test_engine_leaves_nothing_behind() -> None:
    module = nn.Linear(1, 1)
    vars(module).update(pre_bwd_fn=3, ds_id=3)
    assert deepspeed.without_engine(nn.Sequential(module))
    assert not vars(module).keys() & deepspeed.ENGINE_ATTRIBUTES
