"""accelerate's engines on a machine without accelerator: the real FSDP2 path, models sharded as they load, DeepSpeed.

accelerate makes plain DDP of its FSDP settings on a CPU, and gives up on DeepSpeed there. `shard_on_cpu` has it take
its own FSDP2 path over gloo, and `deepspeed_on_cpu` its DeepSpeed path. Both replace private names of accelerate, and
fail where these are gone.
"""

import copy
import gc
import importlib.util
import os
from pathlib import Path
from typing import Any

import accelerate.state
import torch.distributed as dist
from accelerate.utils import DistributedType
from peft import PeftModel
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

ENGINES = ("ddp", "fsdp2", "native", "zero1", "zero2", "zero3", "zero3born", "zero3kept", "zero3host")
"""The engines by name. `native` is a model that transformers has sharded as it was loaded. With `zero3born` the models
are made when the arguments exist, so transformers has spread them already when the trainer gets them. With `zero3kept`
values stay gathered after a pass, as DeepSpeed's defaults have it for small models. With `zero3host` weights and
optimizer are in host memory."""

HAS_DEEPSPEED = importlib.util.find_spec("deepspeed") is not None

_ENVIRONMENT = ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED", "FSDP_", "ACCELERATE_DEEPSPEED")


FSDP2_VARIANTS: dict[str, dict[str, Any]] = {
    "fsdp2_parts": {"state_dict_type": "SHARDED_STATE_DICT"},
    "fsdp2_kept": {"reshard_after_forward": False},
    "fsdp2_each": {"cpu_ram_efficient_loading": False},
    "fsdp2_unwrapped": {"auto_wrap_policy": "NO_WRAP"},
    "fsdp2_recomputed": {"activation_checkpointing": True},
    "fsdp2_offloaded": {"offload_params": True},
}
"""FSDP2 with other options of accelerate's."""


def options_of(engine: str, **fsdp_config: Any) -> dict[str, Any]:
    """The options of `DPOConfig` with which a run uses this engine; the next run of this process may use another.
    `fsdp2_parts` is FSDP2 whose checkpoints are in parts, one of each process; `FSDP2_VARIANTS` has others."""
    for name in [name for name in os.environ if name.startswith(_ENVIRONMENT)]:
        del os.environ[name]
    forget_deepspeed()
    fsdp_config = FSDP2_VARIANTS.get(engine, {}) | fsdp_config
    if engine.startswith("fsdp2"):
        shard_on_cpu()
        return {"fsdp": True, "fsdp_config": {"version": 2, "auto_wrap_policy": "TRANSFORMER_BASED_WRAP"} | fsdp_config}
    if engine.startswith("zero"):
        deepspeed_on_cpu()
        return {"deepspeed": deepspeed_config(int(engine[4]), engine[5:]), "use_cpu": False}
    return {}


def deepspeed_config(stage: int, variant: str = "") -> dict[str, Any]:
    """A configuration that shards tiny models as well: nothing stays gathered because it is small."""
    zero: dict[str, Any] = {"stage": stage}
    if stage == 3 and variant != "kept":
        zero |= dict.fromkeys(
            ("stage3_param_persistence_threshold", "stage3_max_live_parameters", "stage3_prefetch_bucket_size"), 0
        )
    if stage == 3:
        zero["stage3_gather_16bit_weights_on_model_save"] = True
    if variant == "host":
        zero |= {"offload_param": {"device": "cpu"}, "offload_optimizer": {"device": "cpu"}}
    return {
        "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": zero,
    }


def loaded_in_shards(model: nn.Module, folder: Path) -> nn.Module:
    """`model` as transformers loads it from a folder when it shards it over all processes, and peft its adapter."""
    from transformers.distributed import DistributedConfig

    adapters = folder / "adapters"
    if dist.get_rank() == 0:
        base: Any = model
        if isinstance(model, PeftModel):
            model.save_pretrained(str(adapters))
            base = copy.deepcopy(model).unload()
        base.save_pretrained(folder)
    dist.barrier()
    config = DistributedConfig(fsdp_size=dist.get_world_size())
    loaded = AutoModelForCausalLM.from_pretrained(folder, distributed_config=config, dtype="float32")
    return PeftModel.from_pretrained(loaded, str(adapters), is_trainable=True) if adapters.exists() else loaded


def shard_on_cpu() -> None:
    """From now on accelerate's state is FSDP where an FSDP plugin meets several processes on a CPU."""
    kind: Any = accelerate.state.AcceleratorState
    plain = getattr(kind.__init__, "plain", kind.__init__)

    def init(self: Any, *args: Any, fsdp_plugin: Any = None, **kwargs: Any) -> None:
        plain(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None and self.distributed_type == DistributedType.MULTI_CPU:
            if self._mixed_precision != "no":
                fsdp_plugin.set_mixed_precision(self._mixed_precision)
            self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, fsdp_plugin
            accelerate.state.PartialState._shared_state["distributed_type"] = DistributedType.FSDP

    untyped: Any = init
    untyped.plain = plain
    kind.__init__ = init


def deepspeed_on_cpu() -> None:
    """From now on accelerate keeps its process group where it finds no accelerator."""
    os.environ["DS_ACCELERATOR"] = "cpu"
    kind: Any = accelerate.state.PartialState
    assert hasattr(kind, "_prepare_backend")
    kind._prepare_backend = lambda self, *args, **kwargs: ("gloo", DistributedType.MULTI_CPU)


def forget_deepspeed() -> None:
    """A config that transformers remembers would have the next model born in parts."""
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    unset_hf_deepspeed_config()


def alive_bytes() -> int:
    """The bytes of all floating-point tensors that this process has in memory, wherever they are held.

    They are read from storages: a part of a larger memory counts as all of it, and what tensors share counts once.
    """
    gc.collect()
    storages: dict[int, int] = {}
    for found in gc.get_objects():
        if isinstance(found, Tensor) and found.is_floating_point() and not found.is_meta:
            held: Any = found
            storage = (held.to_local() if hasattr(held, "to_local") else held).untyped_storage()
            if storage.nbytes():
                storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def own_numel(tensor: Tensor) -> int:
    """How many of a parameter's numbers this process holds."""
    if hasattr(tensor, "ds_tensor"):
        untyped: Any = tensor
        return untyped.ds_tensor.numel()
    return tensor.to_local().numel() if hasattr(tensor, "to_local") else tensor.numel()


def whole(tensor: Tensor) -> Tensor:
    """A parameter's value, gathered from all processes; all of them must ask."""
    if hasattr(tensor, "ds_tensor"):
        import deepspeed

        with deepspeed.zero.GatheredParameters([tensor]):
            return tensor.detach().clone()
    return tensor.full_tensor().detach() if hasattr(tensor, "full_tensor") else tensor.detach().clone()
