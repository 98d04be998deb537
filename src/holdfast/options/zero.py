"""Options of ZeRO under which a reference cannot be held, or would compute otherwise than the policy.

A reference inside the policy exchanges the part of each weight that a process holds, wherever forward passes gather it
from, and it runs through the policy's module without DeepSpeed's engine around it. So the parts must be in memory, once
and as they are, and the engine must not change what a forward pass computes. Offloading weights or the optimizer to
host memory changes no number and is allowed, as is any threshold at which values stay gathered.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, final


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class _Refusal:
    """An entry of a DeepSpeed config, by its dotted name, that is refused where `is_asked(value)` is true."""

    name: str
    reason: str
    is_asked: Callable[[Any], bool] = bool


_REFUSALS = (
    _Refusal(
        name="zero_optimization.offload_param.device",
        reason='weights would wait in files, where a reference cannot take their place. Use "cpu"',
        is_asked=lambda device: device == "nvme",
    ),
    _Refusal(
        name="zero_optimization.zero_hpz_partition_size",
        reason="forward passes would gather second copies of the weights, in which no reference is put. Remove it",
        is_asked=lambda size: size > 1,
    ),
    _Refusal(
        name="zero_optimization.mics_shard_size",
        reason="weights would be spread over groups of processes, for which holdfast was not made. Remove it",
        is_asked=lambda size: size > 0,
    ),
    _Refusal(
        name="zero_optimization.zero_quantized_weights",
        reason="forward passes would compute with rounded weights, and other ones in each process. Remove it",
    ),
    _Refusal(
        name="zero_optimization.zero_quantized_nontrainable_weights",
        reason="forward passes would compute with rounded weights. Remove it",
    ),
    _Refusal(
        name="zero_optimization.zenflow",
        reason="steps would change weights while a reference is in their place. Remove it",
        is_asked=lambda block: block is not None,
    ),
    _Refusal(
        name="compile.deepcompile",
        reason="compiled passes gather weights ahead, whatever has taken their place. Remove it",
    ),
    _Refusal(
        name="torch_autocast.enabled",
        reason="the engine would cast in the policy's forward pass and not in the reference's. Use bf16 or fp16",
    ),
    _Refusal(
        name="hybrid_engine.enabled",
        reason="it has an engine of its own for each of training and scoring. Remove it",
    ),
)


def zero_faults(config: Mapping[str, Any]) -> Iterator[str]:
    """A sentence for each entry of a DeepSpeed config under which a reference would be wrong."""
    for refusal in _REFUSALS:
        value: Any = config
        for key in refusal.name.split("."):
            value = value.get(key) if isinstance(value, Mapping) else None
        if value is not None and refusal.is_asked(value):
            yield f"{refusal.name} is {value!r}: {refusal.reason}."
