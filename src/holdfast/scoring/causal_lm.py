"""The language model inside its wrappers, its head, and whether that head is a plain matrix.

Scoring replaces the head of a model for one forward pass, so it must find the head whatever wraps the model. A plain
matrix goes through `scoring.head`, which is fast and small; a head that computes more goes through its own forward. A
head with an adapter, a hook, a replaced forward or a quantised weight counts as more than a matrix. A head that FSDP2
shards has a whole weight within its own forward pass, so there it is a plain matrix too. Given up: speed for other
heads, and under DeepSpeed ZeRO-3, where they compute no more than a matrix.
"""

from typing import Any, cast

import torch
from accelerate.utils import extract_model_from_parallel
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import ModulesToSaveWrapper
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from holdfast.internals.deepspeed import is_partitioned, whole_shape
from holdfast.internals.torch import class_of, has_hooks, modules_of, own_parameters

_WEIGHT_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def unwrap(model: nn.Module) -> PreTrainedModel:
    """The transformers model inside `model`: without DDP, FSDP, DeepSpeed, `torch.compile` and PEFT around it."""
    inner: Any = extract_model_from_parallel(model, keep_torch_compile=False)
    return cast(PreTrainedModel, inner.get_base_model() if isinstance(inner, PeftModel) else inner)


def is_sharded(model: nn.Module) -> bool:
    """Whether FSDP or DeepSpeed shards parameters of `model`. They gather their values for a module's forward pass and
    free them."""
    modules = modules_of(model)
    if any(isinstance(module, FSDPModule | FullyShardedDataParallel) for module in modules):
        return True
    return any(is_partitioned(parameter) for module in modules for parameter in own_parameters(module))


def output_embeddings(causal_lm: PreTrainedModel) -> nn.Module:
    """The language-model head. Raises ValueError when the model has none."""
    head = causal_lm.get_output_embeddings() if hasattr(causal_lm, "get_output_embeddings") else None
    if head is None:
        raise ValueError(
            f"{type(causal_lm).__name__} was asked for log-probs, but it has no output embeddings (language-model "
            "head). Pass a causal language model, for example from `AutoModelForCausalLM`."
        )
    return head


def vocabulary_size(causal_lm: PreTrainedModel) -> int:
    """Number of logits per token, after any resizing of the embeddings."""
    head = output_embeddings(causal_lm)
    size = getattr(head, "out_features", None)
    weight = cast(Tensor, head.weight)
    return size if isinstance(size, int) else (whole_shape(weight) if is_partitioned(weight) else weight.shape)[0]


def is_plain_linear(head: nn.Module) -> bool:
    """Whether `head` is an `nn.Linear` and nothing else, sharded by FSDP2 or whole: no adapter, no hook of others, no
    replaced forward, no quantised weight."""
    if class_of(head) is not nn.Linear or "forward" in vars(head) or has_hooks(head):
        return False
    weight: Any = head.weight
    local = weight.to_local() if isinstance(weight, DTensor) else weight
    # Quantised weights are subclasses of Tensor with products of their own.
    return type(local) in (nn.Parameter, Tensor) and local.dtype in _WEIGHT_DTYPES and not is_partitioned(weight)


def matrix_of(head: object) -> nn.Linear | None:
    """The plain linear map that `head` computes, or None where it computes more.

    That is the head itself, the copy of it that an adapter trains while that adapter is active, or the layer below an
    adapter that is off. So a bare base gives the same numbers to the bit whatever adapter is around it.
    """
    if isinstance(head, ModulesToSaveWrapper):
        names = [] if head.disable_adapters else list(head.active_adapters)
        is_saved = bool(names) and all(name in head.modules_to_save for name in names)
        return matrix_of(head.modules_to_save[names[0]] if is_saved else head.original_module)
    if isinstance(head, BaseTunerLayer):
        return matrix_of(head.get_base_layer()) if head.disable_adapters and not head.merged else None
    return head if isinstance(head, nn.Linear) and is_plain_linear(head) else None
