"""Modules beside a sharded policy, sharded as the policy is: copies of it, and reference models.

A copy is made of parts: its modules are copied without values, sharded, and each process copies the values of its own
part. So nothing is gathered, and no process ever holds a second model. A model that every process has loaded whole is
sharded in place, on the policy's devices, and the whole values are freed.

The parts are cut as the policy's are, by the same processes. Which modules are gathered together may differ from the
policy's: it changes no number. A second module gives its values back after each forward pass, since no backward pass
follows. Given up: quantised modules and those with a `device_map`, of which each process keeps a replica.
"""

import copy
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from holdfast.internals.deepspeed import is_partitioned, num_partitions, without_engine
from holdfast.internals.fully_shard import as_plain_modules, meshes, sharding_options
from holdfast.internals.transformers import layer_classes
from holdfast.policy.quantised import is_quantised
from holdfast.policy.scoring_engine import filled_by_zero, is_spread_by_zero, spread_by_own_engine
from holdfast.policy.sharding import cut_like, give_back, own_part, shape_of, whole
from holdfast.scoring.causal_lm import unwrap


def shard_beside(module: nn.Module, policy: nn.Module) -> nn.Module:
    """`module`, sharded in place as the sharded `policy` is; its values may be on the meta device."""
    if is_spread_by_zero(policy):
        return spread_by_own_engine(module)
    options = sharding_options(policy)._asdict()
    for part in _parts_gathered_apart(module):
        fully_shard(part, reshard_after_forward=True, **options)
    fully_shard(module, reshard_after_forward=True, **options)
    return module


def _parts_gathered_apart(module: nn.Module) -> Iterator[nn.Module]:
    """The modules whose values are gathered by themselves: layers, and embeddings and head where they are not tied.
    Those inside another come first."""
    causal_lm = unwrap(module)
    names = layer_classes(causal_lm)
    embeddings, head = causal_lm.get_input_embeddings(), causal_lm.get_output_embeddings()
    ends = {id(part) for part in (embeddings, head) if part is not None}
    parameters = [{id(p) for p in part.parameters()} for part in (embeddings, head) if part is not None]
    if len(parameters) == 2 and parameters[0] & parameters[1]:
        ends = set()
    for part in reversed([*module.modules()]):
        if part is not module and (type(part).__name__ in names or id(part) in ends):
            yield part


def sharded_copy(policy: nn.Module) -> nn.Module:
    """A copy of the sharded `policy` as it is now, sharded likewise. ValueError where the policy is quantised."""
    return filled(blank_copy(policy), policy, policy.named_parameters())


def blank_copy(policy: nn.Module) -> nn.Module:
    """A copy of the modules of the sharded `policy`, as they were before it was sharded: with its buffers, and with
    frozen parameters of the same shapes on the meta device. ValueError where the policy is quantised."""
    if is_quantised(policy):
        raise ValueError(
            "A copy of the policy was to be the reference, but the policy is quantised and sharded: its scales cannot "
            "be copied part by part. Leave `reference` at 'auto', which holds the reference inside the policy."
        )
    give_back(policy)
    blank = {
        id(parameter): nn.Parameter(
            torch.empty(shape_of(parameter), dtype=parameter.dtype, device="meta"), requires_grad=False
        )
        for parameter in policy.parameters()
    }
    with as_plain_modules(policy):
        return without_engine(copy.deepcopy(policy, {**meshes(policy), **blank}))


def whole_copy(module: nn.Module) -> nn.Module:
    """A copy of `module`, a part of a sharded policy, with whole values. Collective."""
    whole_values = {
        id(parameter): nn.Parameter(whole(parameter).clone(), requires_grad=False) for parameter in module.parameters()
    }
    with as_plain_modules(module):
        return without_engine(copy.deepcopy(module, {**meshes(module), **whole_values}))


@torch.no_grad()
def filled(blank: nn.Module, policy: nn.Module, values: Iterable[tuple[str, Tensor]]) -> nn.Module:
    """The module `blank`, whose parameters have no values, sharded as `policy` is and with `values` on its device: by
    name whole ones, or parts cut as the policy's are. Of a tensor with several names the last one counts."""
    if is_spread_by_zero(policy):
        return filled_by_zero(blank, policy, ((name, whole(value)) for name, value in values))
    module = shard_beside(blank, policy)
    buffers = {name: buffer.clone() for name, buffer in module.named_buffers()}
    module.to_empty(device=own_part(next(policy.parameters())).device)
    for name, buffer in module.named_buffers():
        buffer.copy_(buffers[name])
    lacking = {id(parameter): name for name, parameter in module.named_parameters()}
    for name, value in values:
        parameter = module.get_parameter(name)
        own_part(parameter).copy_(part_like(value, parameter))
        lacking.pop(id(parameter), None)
    assert not lacking, lacking
    return module


def part_like(value: Tensor, parameter: Tensor) -> Tensor:
    """This process's part of `value`, cut as `parameter` is. Collective where `value` is spread in another way."""
    return own_part(value) if _cut(value) == _cut(parameter) else cut_like(whole(value), parameter)


def _cut(tensor: Tensor) -> object:
    """Over which processes a tensor is cut, and how; None where it is whole."""
    if is_partitioned(tensor):
        return num_partitions(tensor)
    return (tensor.device_mesh, tensor.placements) if isinstance(tensor, DTensor) else None
