"""What divides a run among processes: what was asked for, and whether it is there.

accelerate passes over some of what it is asked for. On a CPU it makes plain DDP of FSDP, and N separate runs of N
processes without `use_cpu`; a version of FSDP that nobody named is 1. Each of these trains, in other memory or towards
other numbers than was asked for, so each is refused: before anything is loaded where the options say it, else when
accelerate has made its engine. All processes see the same options, so all raise.
"""

import os
from typing import Any

import torch.distributed
from transformers.training_args import ParallelMode

from holdfast.losses.options import shown
from holdfast.options.deepspeed_config import check_deepspeed, check_deepspeed_optimizer
from holdfast.options.parallelism import check_parallelism, divisions, is_set

_LAUNCHERS = ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE")
"""Variables by which `srun` and MPI say how many processes they started."""


def check_engine_options(args: Any) -> None:
    """ValueError where the options, or the variables that a launcher set, ask for what would silently be something
    else: separate runs, FSDP of version 1, a row divided among processes, a DeepSpeed config that contradicts them."""
    _check_separate_runs(args)
    _check_fsdp(args)
    check_parallelism(args)
    if getattr(args, "deepspeed_plugin", None) is not None:
        check_deepspeed(args, args.deepspeed_plugin.deepspeed_config)


def check_engine(args: Any, accelerator: Any, optimizers: tuple[Any, Any] = (None, None)) -> None:
    """ValueError where accelerate made another engine than the one that was asked for.

    `optimizers`: the user's optimizer and schedule, of which DeepSpeed may take its own instead.
    """
    state, found = accelerator.state, accelerator.distributed_type.value
    fsdp, deepspeed = (getattr(state, f"{name}_plugin", None) for name in ("fsdp", "deepspeed"))
    for name, asked, plugin in (("FSDP", _asked_fsdp(args), fsdp), ("DeepSpeed", _asked_deepspeed(args), deepspeed)):
        if asked is not None and plugin is None:
            why = ", since it runs on a CPU" if accelerator.device.type == "cpu" else ""
            raise ValueError(
                f"{asked} was asked for, but accelerate made {found} of it{why}: each process would hold the whole "
                f"model and nothing would be divided. {name} needs an accelerator: leave use_cpu (`accelerate launch "
                f"--cpu`) out where there is one, or leave {name} out to train with plain data parallelism."
            )
    if fsdp is not None and fsdp.fsdp_version == 1:
        raise ValueError(_fsdp1(_asked_fsdp(args) or "FSDP"))
    config = getattr(accelerator, "parallelism_config", None)
    if config is not None:
        _check_sizes(config, is_sharded=fsdp is not None or deepspeed is not None, found=found)
    if deepspeed is not None:
        check_deepspeed(args, deepspeed.deepspeed_config)
        check_deepspeed_optimizer(deepspeed.deepspeed_config, optimizers)


# --- separate runs ----------------------------------------------------------------------------------------------------


def _check_separate_runs(args: Any) -> None:
    num_launched, source = _launched()
    if args.world_size > 1 or num_launched == 1:
        return
    if num_launched == 0 and {"ACCELERATE_MIXED_PRECISION", "MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys():
        raise ValueError(
            "several processes were asked of `accelerate launch` (it set MASTER_ADDR and no WORLD_SIZE), but with "
            "--cpu, or a config for CPUs without MPI, it started one, whose batches would be a part of those meant. "
            "Launch with `torchrun --nproc_per_node=N` and set use_cpu=True, or ask `accelerate launch` for one."
        )
    if num_launched == 0:
        return
    if source in _LAUNCHERS:
        how = (
            "Launch with `torchrun` or `accelerate launch`, in one task per host, or export RANK, LOCAL_RANK, "
            "WORLD_SIZE, MASTER_ADDR and MASTER_PORT for each process"
        )
    elif args.device.type == "cpu" and not args.use_cpu and not is_set("ACCELERATE_USE_CPU"):
        how = "No accelerator was found; to train on CPUs, set use_cpu=True (in a run file `training.use_cpu: true`)"
    else:
        missing = [name for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
        how = "Launch with `torchrun` or `accelerate launch`"
        how += f", or export {', '.join(missing)} as well" if missing else ""
    raise ValueError(
        f"{num_launched} processes were launched ({source}={num_launched}), but accelerate made one run of one process "
        f"in each of them: all would train on the same data and write into output_dir={args.output_dir!r}. {how}. For "
        "separate runs that are meant to be that, each with an output_dir of its own, set WORLD_SIZE=1."
    )


def _launched() -> tuple[int, str]:
    """How many processes were launched together, and what says so; 0 where nothing does."""
    said = {name: int(text) for name in ("WORLD_SIZE", *_LAUNCHERS) if (text := os.environ.get(name, "")).isdecimal()}
    is_grouped = torch.distributed.is_available() and torch.distributed.is_initialized()
    if said.get("WORLD_SIZE", 1) == 1 and is_grouped and (size := torch.distributed.get_world_size()) > 1:
        return size, "the size of the process group"
    name = next(iter(said), "")
    return said.get(name, 0), name  # WORLD_SIZE wins: who sets it to 1 means one process


# --- FSDP and DeepSpeed -----------------------------------------------------------------------------------------------


def _asked_fsdp(args: Any) -> str | None:
    """How FSDP was asked for; None where it was not."""
    if args.fsdp:
        return f"fsdp={shown(args.fsdp)}"
    return (
        "FSDP (ACCELERATE_USE_FSDP, which `accelerate launch` or an earlier run in this process set)"
        if is_set("ACCELERATE_USE_FSDP")
        else None
    )


def _asked_deepspeed(args: Any) -> str | None:
    """How DeepSpeed was asked for; None where it was not."""
    if args.deepspeed:
        return f"deepspeed={shown(args.deepspeed)}"
    is_launched = is_set("ACCELERATE_USE_DEEPSPEED")
    return (
        "DeepSpeed (ACCELERATE_USE_DEEPSPEED, which `accelerate launch` or an earlier run in this process set)"
        if is_launched
        else None
    )


def _check_fsdp(args: Any) -> None:
    config = args.fsdp_config if isinstance(args.fsdp_config, dict) else {}
    if args.fsdp_config and not args.fsdp:
        raise ValueError(
            f"fsdp_config={shown(args.fsdp_config)} was asked for without fsdp=True, so nothing would read it. Set "
            "fsdp=True, or leave fsdp_config out (`accelerate launch` has FSDP's options in its own config file)."
        )
    if args.fsdp and args.parallel_mode != ParallelMode.DISTRIBUTED:
        raise ValueError(
            f"fsdp={shown(args.fsdp)} was asked for in a single process, and FSDP shards a model over several. Launch "
            "with `accelerate launch` or `torchrun`, or drop it."
        )
    if args.fsdp and config.get("xla"):
        raise ValueError(
            "fsdp_config.xla was asked for, which is FSDP of PyTorch/XLA; here FSDP is PyTorch's own, of version 2. "
            "Leave xla out."
        )
    if args.fsdp and int(config.get("version", 2)) == 1:
        raise ValueError(_fsdp1('fsdp_config={"version": 1}'))
    if not args.fsdp and is_set("ACCELERATE_USE_FSDP") and (version := os.environ.get("FSDP_VERSION", "1")) != "2":
        named = f"FSDP_VERSION={version}" if "FSDP_VERSION" in os.environ else "no FSDP_VERSION, which means 1"
        raise ValueError(_fsdp1(f"{_asked_fsdp(args)}, with {named},"))


def _fsdp1(asked: str) -> str:
    return (
        f"{asked} was asked for, which is FSDP of version 1: it flattens and replaces the parameters that a reference "
        "is captured from, and PyTorch and transformers have given it up. Use FSDP2: fsdp=True with "
        'fsdp_config={"version": 2}, or `fsdp_version: 2` in the config file of `accelerate launch` (`--fsdp_version '
        "2`); examples/accelerate/fsdp2.yaml is one."
    )


def _check_sizes(config: Any, *, is_sharded: bool, found: str) -> None:
    """What `accelerate.ParallelismConfig` came to, from whatever source."""
    if sizes := divisions(config):
        raise ValueError(
            f"{', '.join(sizes)} was asked for, which divides a row or its model among processes, and log-probs are "
            "summed over whole rows. Use data parallelism or FSDP2."
        )
    if getattr(config, "dp_shard_size", 1) > 1 and not is_sharded:
        raise ValueError(
            f"dp_shard_size={config.dp_shard_size} was asked for, but accelerate made {found} of it, which shards "
            "nothing. Set fsdp=True as well, or leave it out."
        )
