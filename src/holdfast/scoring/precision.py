"""How exactly a model computes: which products are rounded below fp32, and by how much.

torch has two sets of names for the precision of fp32 products. Once a script has used the newer one
(`torch.backends.fp32_precision`, which transformers' `tf32` sets), the functions of the older one raise an error. The
newer names know what either set has said, so they alone are read here. Autocast counts as well: a model with fp32
weights is a model in half precision while autocast is on.

Given up: products that a library rounds without telling torch.
"""

from typing import Any

import torch
from torch import nn

from holdfast.scoring.frozen import Autocast

HALF = (torch.bfloat16, torch.float16)

_WIDE = (torch.float32, torch.float64)
_TF32_UNIT = 2.0**-11


def fp32_products(device: torch.device) -> str:
    """How the products of two fp32 matrices are rounded on `device`: "ieee" (not below fp32), "tf32" or "bf16"."""
    backend: Any = torch.backends.mkldnn if device.type == "cpu" else torch.backends.cuda
    said = str(backend.matmul.fp32_precision)
    return said if said in ("tf32", "bf16") else "ieee"


def is_half_precision(model: nn.Module, autocast: Autocast) -> bool:
    """Whether `model` computes below fp32 under `autocast`: by its weights, by autocast, or by the precision of fp32
    products."""
    return rounding_unit(model, autocast) > 0


def rounding_unit(model: nn.Module, autocast: Autocast) -> float:
    """The largest relative error of a value that is rounded once where `model` computes under `autocast`: 2^-8 in bf16,
    2^-11 in fp16 and tf32. 0 where everything is computed in fp32."""
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    device = torch.device("cpu") if device.type == "meta" else device
    dtypes = {parameter.dtype for parameter in model.parameters() if parameter.is_floating_point()}
    with autocast():
        for kind in {"cpu", "cuda", device.type}:
            if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
                dtypes.add(torch.get_autocast_dtype(kind))
    products = fp32_products(device)
    if torch.bfloat16 in dtypes or products == "bf16" or dtypes - {*_WIDE, *HALF}:  # fp8 weights, computed in bf16
        return torch.finfo(torch.bfloat16).eps / 2
    if torch.float16 in dtypes:
        return torch.finfo(torch.float16).eps / 2
    return _TF32_UNIT if products == "tf32" else 0.0
