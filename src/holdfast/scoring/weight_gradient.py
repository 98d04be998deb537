"""The gradient of a trained head's weight, added up over chunks in fp32.

A chunk's product of errors and hidden states is a matrix of the weight's size. On a GPU it is added to the sum as the
product is made, from half-precision factors and in fp32, so no number of it is rounded to half precision. CPUs have no
such product: there it is made in half precision, a part of the weight at a time, and then added in fp32. Given up
there: each chunk adds one rounding of its own product, which in bf16 is up to 2^-9 of it.
"""

import functools

import torch
from jaxtyping import Float
from torch import Tensor

_PRODUCT = 2**24
"""Elements of the gradient that are alive in half precision before they are added up in fp32."""


def add_product(
    total: Float[Tensor, "V h"], errors: Float[Tensor, "n V"], states: Float[Tensor, "n h"], *, is_first: bool
) -> None:
    """Adds `errors.T @ states` to `total`, in fp32 or wider. The first product overwrites `total`, which is empty."""
    if errors.dtype == total.dtype:
        torch.mm(errors.T, states, out=total) if is_first else total.addmm_(errors.T, states)
    elif has_wide_products(total.device, errors.dtype):
        if is_first:
            torch.mm(errors.T, states, out_dtype=total.dtype, out=total)
        else:
            torch.addmm(total, errors.T, states, out_dtype=total.dtype, out=total)
    else:
        if is_first:
            total.zero_()
        num_rows = max(1, _PRODUCT // max(1, total.shape[1]))
        for part, columns in zip(total.split(num_rows), errors.split(num_rows, dim=1), strict=True):
            part.add_(columns.T @ states)


@functools.cache
def has_wide_products(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether `device` multiplies matrices of `dtype` into fp32 ones. Tried once."""
    if device.type == "cpu" or dtype not in (torch.bfloat16, torch.float16):
        return False
    factor = torch.ones(8, 8, device=device, dtype=dtype)
    total = torch.ones(8, 8, device=device)
    try:
        torch.mm(factor, factor, out_dtype=torch.float32, out=total)
        torch.addmm(total, factor, factor, out_dtype=torch.float32, out=total)
    except (RuntimeError, NotImplementedError):
        return False
    return True
