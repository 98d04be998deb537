"""What would silently be another run than was asked for: separate runs, DDP for FSDP, an engine's own options."""

from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import DistributedType, ParallelismConfig
from torch import nn
from transformers.distributed import DistributedConfig

from families import tiny_model
from holdfast import DPOConfig
from holdfast.options.deepspeed_config import check_deepspeed, check_deepspeed_optimizer
from holdfast.options.engines import check_engine
from holdfast.policy.divided import check_undivided
from policies import config

FSDP_FLAG = {"ACCELERATE_USE_FSDP": "true"}
SIZES_FLAG = {"ACCELERATE_USE_PARALLELISM_CONFIG": "true"}


@pytest.fixture(autouse=True)
def _no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (
        "WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "SLURM_STEP_NUM_TASKS", "PMI_SIZE",
        "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE", "ACCELERATE_USE_FSDP", "FSDP_VERSION",
        "ACCELERATE_USE_DEEPSPEED", "ACCELERATE_MIXED_PRECISION",
    ):  # fmt: skip
        monkeypatch.delenv(name, raising=False)


# --- what options and variables say -----------------------------------------------------------------------------------

ASKED: list[tuple[dict[str, str], dict[str, Any], str]] = [
    # N processes, and each a run of its own
    ({"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1"}, {"use_cpu": False},
     r"(?s)2 processes were launched \(WORLD_SIZE=2\).*one run of one process.*output_dir=.*set use_cpu=True"),
    ({"WORLD_SIZE": "4", "ACCELERATE_USE_CPU": "false"}, {"use_cpu": False}, r"4 processes were launched"),
    ({"SLURM_STEP_NUM_TASKS": "4"}, {"use_cpu": True},
     r"4 processes were launched \(SLURM_STEP_NUM_TASKS=4\).*one task per host.*export RANK.*set WORLD_SIZE=1"),
    ({"OMPI_COMM_WORLD_SIZE": "2"}, {"use_cpu": False}, r"2 processes were launched \(OMPI_COMM_WORLD_SIZE=2\)"),
    ({"PMI_SIZE": "2"}, {"use_cpu": False}, r"2 processes were launched \(PMI_SIZE=2\)"),
    ({"MV2_COMM_WORLD_SIZE": "2"}, {"use_cpu": False}, r"2 processes were launched \(MV2_COMM_WORLD_SIZE=2\)"),
    ({"ACCELERATE_MIXED_PRECISION": "no", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}, {},
     r"several processes were asked of `accelerate launch`.*started one.*`torchrun "),
    # FSDP
    ({}, {"fsdp": True}, r"fsdp=.* was asked for in a single process"),
    ({}, {"fsdp_config": {"version": 2}}, r"fsdp_config=\{'version': 2\} was asked for without fsdp=True"),
    (FSDP_FLAG, {}, r"ACCELERATE_USE_FSDP.*no FSDP_VERSION, which means 1,.*FSDP of version 1.*fsdp_version: 2"),
    (FSDP_FLAG | {"FSDP_VERSION": "1"}, {}, r"FSDP_VERSION=1.*FSDP of version 1.*fsdp2\.yaml"),
    # a row divided among processes
    ({"ACCELERATE_USE_MEGATRON_LM": "true"}, {}, r"Megatron-LM .*was asked for.*whole rows.*FSDP2 or ZeRO"),
    *[
        (SIZES_FLAG | {f"PARALLELISM_CONFIG_{kind}_SIZE": "2"}, {},
         rf"PARALLELISM_CONFIG_{kind}_SIZE=2 .*was asked for.*whole rows.*FSDP2 or ZeRO")
        for kind in ("TP", "CP", "SP")
    ],
    ({}, {"model_init_kwargs": {"tp_plan": "auto"}}, r"model_init_kwargs\.tp_plan='auto' was asked for"),
    ({}, {"model_init_kwargs": {"tp_size": 2}}, r"model_init_kwargs\.tp_size=2 was asked for"),
    ({}, {"ref_model_init_kwargs": {"tp_plan": "auto"}}, r"ref_model_init_kwargs\.tp_plan='auto' was asked for"),
    *[
        ({}, {"model_init_kwargs": {"distributed_config": {f"{kind}_size": 2}}},
         rf"model_init_kwargs\.distributed_config with {kind}_size=2 was asked for")
        for kind in ("tp", "pp", "ep")
    ],
    ({}, {"model_init_kwargs": {"distributed_config": {"tp_plan": "auto"}}}, r"distributed_config with tp_plan='auto'"),
]  # fmt: skip


@pytest.mark.parametrize(("variables", "options", "message"), ASKED, ids=[f"{v}{o}" for v, o, _ in ASKED])
def test_refused_before_anything_is_loaded(
    variables: dict[str, str], options: dict[str, Any], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = DPOConfig(output_dir=str(tmp_path), use_cpu=True)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    for name, value in options.items():
        setattr(made, name, value)
    with pytest.raises(ValueError, match=message):
        made.check()


def test_deepspeed_that_is_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if find_spec("deepspeed") is not None:
        pytest.skip("DeepSpeed is installed")
    with pytest.raises(ValueError, match=r"deepspeed.* Install it: pip install 'holdfast\[deepspeed\]'\."):
        DPOConfig(output_dir=str(tmp_path), use_cpu=True, deepspeed={"zero_optimization": {"stage": 2}})
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(ValueError, match=r"deepspeed.* Install it: pip install 'holdfast\[deepspeed\]'\."):
        DPOConfig(output_dir=str(tmp_path), use_cpu=True)


FINE: list[tuple[dict[str, str], dict[str, Any]]] = [
    ({"WORLD_SIZE": "1", "RANK": "0", "LOCAL_RANK": "0"}, {}),
    ({"SLURM_NTASKS": "4", "SLURM_PROCID": "0"}, {}),  # a batch script that starts one process itself
    ({"SLURM_STEP_NUM_TASKS": "1"}, {}),
    ({"SLURM_STEP_NUM_TASKS": "4", "WORLD_SIZE": "1"}, {}),  # separate runs, on purpose
    ({"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}, {}),
    ({"ACCELERATE_USE_FSDP": "false", "FSDP_VERSION": "1"}, {}),
    ({"PARALLELISM_CONFIG_TP_SIZE": "2"}, {}),  # read by nobody without its flag
    (SIZES_FLAG | {"PARALLELISM_CONFIG_DP_SHARD_SIZE": "2", "PARALLELISM_CONFIG_TP_SIZE": "1"}, {}),
    ({}, {"model_init_kwargs": {"distributed_config": {"fsdp_size": 2}}}),
]  # fmt: skip


@pytest.mark.parametrize(("variables", "options"), FINE, ids=[f"{v}{o}" for v, o in FINE])
def test_not_refused(
    variables: dict[str, str], options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = DPOConfig(output_dir=str(tmp_path), use_cpu=True)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    for name, value in options.items():
        setattr(made, name, value)
    made.check()


# --- what accelerate made of it ---------------------------------------------------------------------------------------


def made_by_accelerate(kind: str = "MULTI_CPU", *, device: str = "cpu", **plugins: Any) -> Any:
    """An accelerator as `check_engine` reads it, with these plugins in its state."""
    sizes = plugins.pop("parallelism_config", None)
    return SimpleNamespace(
        state=SimpleNamespace(**{f"{name}_plugin": plugin for name, plugin in plugins.items()}),
        distributed_type=DistributedType(kind),
        device=torch.device(device),
        parallelism_config=sizes,
    )


FSDP1, FSDP2 = SimpleNamespace(fsdp_version=1), SimpleNamespace(fsdp_version=2)
NEITHER: list[tuple[dict[str, str], dict[str, Any], Any, str]] = [
    ({}, {"fsdp": True}, made_by_accelerate(), r"fsdp=True was asked for, but accelerate made MULTI_CPU.*on a CPU"),
    (FSDP_FLAG, {}, made_by_accelerate(), r"FSDP \(ACCELERATE_USE_FSDP.*but accelerate made MULTI_CPU.*leave use_cpu"),
    ({}, {"deepspeed": {}}, made_by_accelerate(), None),
    ({}, {"deepspeed": {"a": 1}}, made_by_accelerate(), r"deepspeed=.* was asked for, but accelerate made MULTI_CPU"),
    ({"ACCELERATE_USE_DEEPSPEED": "true"}, {}, made_by_accelerate("MULTI_GPU", device="meta"),
     r"DeepSpeed \(ACCELERATE_USE_DEEPSPEED.*accelerate made MULTI_GPU"),
    ({}, {"fsdp": True}, made_by_accelerate("FSDP", fsdp=FSDP1), r"FSDP of version 1"),
    ({}, {"fsdp": True}, made_by_accelerate("FSDP", fsdp=FSDP2), None),
    ({}, {}, made_by_accelerate(parallelism_config=ParallelismConfig(dp_shard_size=2)),
     r"dp_shard_size=2 was asked for, but accelerate made MULTI_CPU of it, which shards nothing"),
    ({}, {}, made_by_accelerate("FSDP", fsdp=FSDP2, parallelism_config=ParallelismConfig(dp_shard_size=2)), None),
    ({}, {}, made_by_accelerate("FSDP", fsdp=FSDP2, parallelism_config=ParallelismConfig(cp_size=2)), r"cp_size=2 was"),
]  # fmt: skip


@pytest.mark.parametrize(("variables", "options", "accelerator", "message"), NEITHER)
def test_another_engine_than_was_asked_for(
    variables: dict[str, str], options: dict[str, Any], accelerator: Any, message: str | None, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    made = DPOConfig(output_dir=str(tmp_path), use_cpu=True)
    for name, value in options.items():
        setattr(made, name, value)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    if message is None:
        check_engine(made, accelerator)
        return
    with pytest.raises(ValueError, match=message):
        check_engine(made, accelerator)


# --- DeepSpeed configs ------------------------------------------------------------------------------------------------

AUTO = {
    "gradient_clipping": "auto", "train_batch_size": "auto", "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto", "zero_optimization": {"stage": 2},
}  # fmt: skip
ADAM = {"lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto"}


def optimizer(kind: str = "AdamW", **params: Any) -> dict[str, Any]:
    """A block of a config; a parameter of None is left out."""
    return {"optimizer": {"type": kind, "params": {k: v for k, v in (ADAM | params).items() if v is not None}}}


OFFLOADED = {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}
CONTRADICTIONS: list[tuple[dict[str, Any], dict[str, Any], str | None]] = [
    ({}, {}, None),
    ({"gradient_clipping": 1.0}, {"max_grad_norm": 1.0}, None),
    ({"gradient_clipping": 0.5}, {"max_grad_norm": 1.0}, r'is 0\.5, and max_grad_norm=1\. Write .*"auto"'),
    ({"gradient_clipping": 0.0}, {"max_grad_norm": 1.0}, r"gradient_clipping is 0\.0"),
    ({"gradient_clipping": None}, {"max_grad_norm": 5.0}, r"gradient_clipping is not written.*max_grad_norm=5"),
    ({"train_micro_batch_size_per_gpu": 4}, {}, r"micro_batch_size_per_gpu is 4, and per_device_train_batch_size=2"),
    ({"train_micro_batch_size_per_gpu": 2}, {}, None),
    ({"train_batch_size": 16}, {}, r"train_batch_size is 16, and 1 processes make batches of 2"),
    ({"train_batch_size": 4}, {"gradient_accumulation_steps": 2}, None),
    ({"gradient_accumulation_steps": 4}, {}, r"gradient_accumulation_steps is 4, and gradient_accumulation_steps=1"),
    ({"gradient_accumulation_steps": None}, {"gradient_accumulation_steps": 2},
     r"gradient_accumulation_steps is 1 where it is not written, and gradient_accumulation_steps=2"),
    ({"fp16": {"enabled": True}}, {}, r"fp16\.enabled is true, and the run is in fp32"),
    ({"bf16": {"enabled": True}}, {}, r"bf16\.enabled is true, and the run is in fp32"),
    ({"bf16": {"enabled": False}}, {"bf16": True}, r"bf16\.enabled is false, and the run is in bf16"),
    ({"bf16": {"enabled": "auto"}, "fp16": {"enabled": "auto"}}, {"bf16": True}, None),
    (optimizer(), {}, None),
    (optimizer(lr=1e-3), {}, r'optimizer\.params\.lr is 0\.001, and learning_rate=1e-06\. Write "lr": "auto"'),
    (optimizer(lr=None), {}, r"optimizer\.params\.lr is not written, and learning_rate=1e-06"),
    (optimizer(betas=None), {"adam_beta2": 0.95}, r"optimizer\.params\.betas is not written, and .*adam_beta2=0\.95"),
    (optimizer(betas=[0.9, 0.95]), {"adam_beta2": 0.95}, None),
    (optimizer(betas=None, eps=None, weight_decay=None), {}, None),
    (optimizer(), {"weight_decay": 0.1}, r"block optimizer, and weight_decay=0\.1.*biases and norms"),
    (optimizer(), {"optim": "sgd"}, r"optimizer\.type is 'AdamW', and optim='sgd'.*Remove the block"),
    (optimizer("SGD", betas=None, eps=None), {"optim": "sgd"}, None),
    (optimizer(), {"optim_args": "amsgrad=True"}, r"block optimizer, and optim_args='amsgrad=True'"),
    ({"scheduler": {"type": "WarmupLR", "params": {"warmup_max_lr": "auto"}}}, {"lr_scheduler_type": "cosine"},
     r"scheduler\.type is 'WarmupLR', and lr_scheduler_type='cosine'.*Remove the block"),
    ({"scheduler": {"type": "WarmupDecayLR", "params": {"warmup_max_lr": "auto"}}}, {}, None),
    ({"scheduler": {"type": "WarmupDecayLR", "params": {}}}, {}, r"warmup_max_lr is not written"),
    (OFFLOADED, {}, None),
    (OFFLOADED, {"optim": "adagrad"}, None),
    (OFFLOADED, {"optim": "sgd"}, r"offload_optimizer is on, and optim='sgd': DeepSpeed would take its own Adam"),
    (OFFLOADED | {"zero_force_ds_cpu_optimizer": False}, {"optim": "sgd"}, None),
    *[
        ({name: {"enabled": True}}, {}, rf"{name} changes what the policy computes")
        for name in ("amp", "data_efficiency", "curriculum_learning", "progressive_layer_drop", "compression_training")
    ],
    ({"data_efficiency": {"enabled": False}}, {}, None),
    ({"tensor_parallel": {"autotp_size": 2}}, {}, r"tensor_parallel\.autotp_size is 2.*ZeRO-3"),
    ({"sequence_parallel_size": 2}, {}, r"sequence_parallel_size is 2.*ZeRO-3"),
    ({"pipeline": {"stages": 2}}, {}, r"pipeline\.stages is 2.*ZeRO-3"),
    *[
        ({"zero_optimization": {"stage": 3} | entry}, {}, rf"zero_optimization\.{next(iter(entry))}.* is .*: {reason}")
        for entry, reason in (
            ({"offload_param": {"device": "nvme"}}, "weights would wait in files"),
            ({"zero_hpz_partition_size": 2}, "forward passes would gather second copies"),
            ({"mics_shard_size": 2}, "weights would be spread over groups"),
            ({"zero_quantized_weights": True}, "forward passes would compute with rounded weights"),
            ({"zero_quantized_nontrainable_weights": True}, "forward passes would compute with rounded weights"),
            ({"zenflow": {}}, "steps would change weights while a reference is in their place"),
        )
    ],
    *[
        ({"zero_optimization": {"stage": 3} | entry}, {}, None)
        for entry in (
            {"offload_param": {"device": "cpu"}}, {"zero_hpz_partition_size": 1}, {"mics_shard_size": -1},
            {"zero_quantized_weights": False}, {"stage3_param_persistence_threshold": 0},
        )
    ],
    ({"compile": {"deepcompile": True}}, {}, r"compile\.deepcompile is True: compiled passes gather weights ahead"),
    ({"torch_autocast": {"enabled": True}}, {}, r"torch_autocast\.enabled is True: the engine would cast"),
    ({"hybrid_engine": {"enabled": True}}, {}, r"hybrid_engine\.enabled is True: it has an engine of its own"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("entries", "options", "message"), CONTRADICTIONS, ids=[f"{e}{o}" for e, o, _ in CONTRADICTIONS]
)
def test_a_deepspeed_config_that_contradicts_the_options(
    entries: dict[str, Any], options: dict[str, Any], message: str | None, tmp_path: Path
) -> None:
    plain = {
        "learning_rate": 1e-6,
        "optim": "adamw_torch",
        "lr_scheduler_type": "linear",
        "per_device_train_batch_size": 2,
    }
    made = config(tmp_path, **plain | {name: value for name, value in options.items() if name != "optim_args"})
    made.optim_args = options.get("optim_args")  # no optimizer of torch reads any, which is refused elsewhere
    entries = {name: value for name, value in (AUTO | entries).items() if value is not None}
    if message is None:
        check_deepspeed(made, entries)
        return
    with pytest.raises(ValueError, match=message):
        check_deepspeed(made, entries)


def test_all_contradictions_are_said_at_once(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"(?s)DeepSpeed config.*\n- gradient_clipping is 3.*\n- train_batch_size is 99"
    ):
        check_deepspeed(config(tmp_path), AUTO | {"gradient_clipping": 3, "train_batch_size": 99})


def test_the_users_optimizer_is_not_exchanged_for_deepspeeds() -> None:
    own = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1)
    schedule = torch.optim.lr_scheduler.ConstantLR(own)
    with pytest.raises(ValueError, match=r"`optimizers` has a SGD, but .* a block 'optimizer'"):
        check_deepspeed_optimizer(AUTO | optimizer(), (own, None))
    with pytest.raises(ValueError, match=r"`optimizers` has a ConstantLR, but .* a block 'scheduler'"):
        check_deepspeed_optimizer(AUTO | {"scheduler": {}}, (own, schedule))
    with pytest.raises(ValueError, match=r"`optimizers` has a SGD, but .*its own Adam.*zero_force_ds_cpu_optimizer"):
        check_deepspeed_optimizer(AUTO | OFFLOADED, (own, None))
    check_deepspeed_optimizer(AUTO | OFFLOADED, (torch.optim.AdamW(own.param_groups[0]["params"]), None))
    check_deepspeed_optimizer(AUTO, (own, schedule))


# --- models -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", ["tp_size", "pp_size", "ep_size"])
def test_a_model_that_was_divided_when_it_was_loaded(size: str) -> None:
    model = tiny_model()
    model.config.distributed_config = SimpleNamespace(**{size: 2})
    with pytest.raises(ValueError, match=rf"`ref_model` was handed over divided among processes: {size}=2\."):
        check_undivided(model, "ref_model")
    model.config.distributed_config = DistributedConfig(fsdp_size=2)
    check_undivided(model, "ref_model")
