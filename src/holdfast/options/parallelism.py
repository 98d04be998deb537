"""Ways to divide one row, or the layers that compute it, among processes: refused, by whatever way they are asked for.

Log-probs are sums over whole rows, and all that is computed for several processes counts on each of them having rows of
its own: the store, the tallies of metrics, the mean over a batch. Under tensor, context, sequence, pipeline or expert
parallelism several processes have the same rows, or parts of one. `accelerate.ParallelismConfig` as an option is
refused by `training_arguments`; here are the other ways in.
"""

import os
from collections.abc import Iterator, Mapping
from typing import Any

from holdfast.losses.options import shown

_INSTEAD = (
    "Use data parallelism (DDP) where the model fits on each device, FSDP2 or ZeRO where it does not: both divide the "
    "weights, and each process keeps rows of its own."
)
_SIZES = ("tp_size", "cp_size", "sp_size", "pp_size", "ep_size")
_OF_ACCELERATE = "ACCELERATE_USE_PARALLELISM_CONFIG"


def is_set(variable: str) -> bool:
    """Whether a flag of the environment is on, as launchers write it."""
    return os.environ.get(variable, "").strip().lower() in ("1", "true", "yes", "y", "on", "t")


def check_parallelism(args: Any) -> None:
    """ValueError where the options or the launcher divide a row or its model among processes."""
    found = next(_asked(args), None)
    if found is not None:
        raise ValueError(
            f"{found} was asked for, which divides a row or its model among processes, and log-probs are summed over "
            f"whole rows, of which each process has its own. {_INSTEAD}"
        )


def _asked(args: Any) -> Iterator[str]:
    if is_set("ACCELERATE_USE_MEGATRON_LM"):
        yield "Megatron-LM (ACCELERATE_USE_MEGATRON_LM, by `accelerate launch --use_megatron_lm`)"
    if is_set(_OF_ACCELERATE):
        for kind in ("TP", "CP", "SP"):
            name = f"PARALLELISM_CONFIG_{kind}_SIZE"
            if _number(os.environ.get(name)) > 1:
                yield f"{name}={os.environ[name]} (by `accelerate launch --use_parallelism_config`)"
    for option in ("model_init_kwargs", "ref_model_init_kwargs"):
        kwargs = getattr(args, option, None)
        if isinstance(kwargs, Mapping):
            yield from _asked_of_loading(option, kwargs)


def _asked_of_loading(option: str, kwargs: Mapping[str, Any]) -> Iterator[str]:
    if kwargs.get("tp_plan") is not None:
        yield f"{option}.tp_plan={shown(kwargs['tp_plan'])}"
    if _number(kwargs.get("tp_size")) > 1:
        yield f"{option}.tp_size={kwargs['tp_size']}"
    config = kwargs.get("distributed_config")
    if config is not None:
        for size in divisions(config):
            yield f"{option}.distributed_config with {size}"
        if isinstance(config, Mapping) and config.get("tp_plan") and config.get("tp_size") is None:
            yield f"{option}.distributed_config with tp_plan={shown(config['tp_plan'])}"


def divisions(config: Any) -> list[str]:
    """Which sizes of a `ParallelismConfig` or `DistributedConfig` (or of a mapping like one) divide a row or its model:
    `tp_size=2`, ..."""
    values = {name: config.get(name) if isinstance(config, Mapping) else getattr(config, name, None) for name in _SIZES}
    return [f"{name}={value}" for name, value in values.items() if _number(value) > 1]


def _number(value: Any) -> int:
    """The size that an option or a variable of the environment gives; 1 where it gives none."""
    try:
        return int(value)
    except (TypeError, ValueError):
        return 1
