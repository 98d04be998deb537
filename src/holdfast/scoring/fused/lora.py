"""LoRA layers with fewer operations: y = x W^T + b + s (x A^T) B^T, and its gradients, each sum inside a product.

peft computes the product of the factors as a tensor of its own, scales it, and adds it; autograd then adds two
gradients for x. Here both sums happen inside a matrix product (`addmm`), and the scaling too. Nothing is computed for a
frozen W. Under autocast all factors are cast at once, and an input that several layers share is cast once.

The rounding is that of peft's own forward or less: in half precision, peft rounds the scaled product before it adds it.
Where the product is zero, y is bitwise what the bare layer gives.

Only plain LoRA is computed so (`internals.peft.plain_lora` says what that is). The question is asked in each call, so a
layer whose adapters are switched off, merged or sharded in the meantime runs its own forward.

Given up: gradients of gradients.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, final

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear

from holdfast.internals.peft import PlainLora, lora_linears, plain_lora
from holdfast.internals.torch import cast_at_once, has_global_hooks, version_of


def fused_forwards(model: nn.Module) -> list[tuple[nn.Module, Callable[..., Tensor]]]:
    """The LoRA layers of `model`, each with the forward pass that it gets. For one pass and its recomputations: casts
    are shared by all layers and kept."""
    layers = [] if has_global_hooks() else lora_linears(model)
    casts = _Casts(layers)
    return [(layer, _fused_forward(layer, casts)) for layer in layers]


def _fused_forward(layer: Any, casts: "_Casts") -> Callable[..., Tensor]:
    own_forward = layer.forward

    def forward(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        lora = None if args or kwargs else plain_lora(layer)
        if lora is None or not _is_computable(x, lora):
            return own_forward(x, *args, **kwargs)
        with torch.no_grad():
            operands = casts.operands(x, lora)
        if not torch.is_grad_enabled():
            return _output(operands)[0]
        output: Any = _LoraLinear.apply(x, lora.weight, lora.bias, lora.down, lora.up, operands)
        return output

    return forward


class _Operands(NamedTuple):
    """What the products of a layer are computed of, in their dtypes."""

    x: Float[Tensor, "... in"]
    weight: Float[Tensor, "out in"]
    bias: Float[Tensor, "out"] | None
    down: Float[Tensor, "r in"]
    up: Float[Tensor, "out r"]
    scaling: float


@final
class _Casts:
    """Tensors in the dtype of autocast: factors of all layers, and the input of the last layer that was called."""

    def __init__(self, layers: list[Any]) -> None:
        self._layers = layers
        self._factors: dict[tuple[int, torch.dtype], Tensor] = {}
        self._input: tuple[Tensor, int, Tensor] | None = None

    def operands(self, x: Tensor, lora: PlainLora) -> _Operands:
        """x, W, b, A and B as they are, or in the dtype of autocast."""
        down, up, weight, bias = lora.down, lora.up, lora.weight, lora.bias
        if torch.is_autocast_enabled(x.device.type):
            dtype = torch.get_autocast_dtype(x.device.type)
            x, weight, bias = self._of_input(x, dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
            down, up = self._of_factor(down, dtype), self._of_factor(up, dtype)
        return _Operands(x, weight, bias, down, up, lora.scaling)

    def _of_input(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """`x` in `dtype`; the same tensor as before where the layer before had the same input."""
        version = version_of(x)
        if x.dtype == dtype or version is None:
            return x.to(dtype)
        before = self._input
        if before is None or before[0] is not x or before[1] != version or before[2].dtype != dtype:
            self._input = before = x, version, x.to(dtype)
        return before[2]

    def _of_factor(self, factor: Tensor, dtype: torch.dtype) -> Tensor:
        """The factor in `dtype`. The first call casts those of all layers."""
        if factor.dtype == dtype:
            return factor
        if (id(factor), dtype) not in self._factors:
            loras = [lora for lora in map(plain_lora, self._layers) if lora is not None]
            alike = [
                each
                for lora in loras
                for each in (lora.down, lora.up)
                if each.device == factor.device and each.dtype == factor.dtype
            ]
            for each, cast in zip(alike, cast_at_once(alike, dtype), strict=True):
                self._factors[id(each), dtype] = cast
        return self._factors[id(factor), dtype]


# --- one layer --------------------------------------------------------------------------------------------------------

_DTYPES = {torch.float32, torch.bfloat16, torch.float16}


def _is_computable(x: Tensor, lora: PlainLora) -> bool:
    """Whether the products are defined for these dtypes and places; if not, peft's own forward says what is wrong."""
    tensors = (x, lora.weight, lora.down, lora.up)
    if x.dim() < 2 or len({tensor.device for tensor in tensors}) > 1 or lora.down.dtype != lora.up.dtype:
        return False
    if torch.is_autocast_enabled(x.device.type):
        return {tensor.dtype for tensor in tensors} <= _DTYPES
    return x.dtype == lora.weight.dtype and {x.dtype, lora.down.dtype} <= _DTYPES | {torch.float64}


def _output(operands: _Operands) -> tuple[Float[Tensor, "... out"], Float[Tensor, "M r"]]:
    """y and s x A^T. Factors of another dtype than W are multiplied in their own, as peft does."""
    x, weight, bias, down, up, scaling = operands
    output = linear(x, weight, bias)
    scaled = torch.addmm(up[0], x.flatten(0, -2).to(down.dtype), down.T, beta=0, alpha=scaling)
    flat = output.view(-1, output.shape[-1])
    if flat.dtype == up.dtype:
        flat.addmm_(scaled, up.T)
        return output, scaled
    return torch.addmm(flat.to(up.dtype), scaled, up.T).to(output.dtype).view_as(output), scaled


class _LoraLinear(torch.autograd.Function):
    """y from x, W, b, A and B, given once as what gradients are wanted for, and once as operands of the products."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        down: Tensor,
        up: Tensor,
        operands: _Operands,
    ) -> Tensor:
        output, scaled = _output(operands)
        for_x, for_weight, _, for_down, for_up, _ = ctx.needs_input_grad
        ctx.save_for_backward(
            operands.x if for_weight or for_down else None,
            operands.weight if for_x else None,
            operands.down if for_x else None,
            operands.up if for_x or for_down else None,
            scaled if for_up else None,
        )
        ctx.shape, ctx.scaling, ctx.product_dtype = x.shape, operands.scaling, scaled.dtype
        ctx.factor_dtypes = down.dtype, up.dtype
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        """With G the gradient of y: dB = G^T (s x A^T), dA = (s G B)^T x, dx = G W + (s G B) A."""
        x, weight, down, up, scaled = ctx.saved_tensors
        for_x, for_weight, for_bias, for_down, for_up, _ = ctx.needs_input_grad
        grad = grad_output.flatten(0, -2)
        grad_of_product = grad.to(ctx.product_dtype)
        rows = None if x is None else x.flatten(0, -2)
        d_x = d_weight = d_bias = d_down = d_up = None
        if for_up:
            d_up = _product(grad_of_product.T, scaled, ctx.factor_dtypes[1])
        if for_x or for_down:
            inner = torch.addmm(up[0], grad_of_product, up, beta=0, alpha=ctx.scaling)  # [M r]
            if for_down:
                assert rows is not None
                d_down = _product(inner.T, rows.to(inner.dtype), ctx.factor_dtypes[0])
            if for_x:
                d_x = grad.mm(weight)
                has_dtype = d_x.dtype == down.dtype
                d_x = d_x.addmm_(inner, down) if has_dtype else torch.addmm(d_x.to(down.dtype), inner, down)
                d_x = d_x.view(ctx.shape)
        if for_weight:
            assert rows is not None
            d_weight = grad.T.mm(rows)
        if for_bias:
            d_bias = grad.sum(0)
        return d_x, d_weight, d_bias, d_down, d_up, None


def _product(left: Float[Tensor, "m k"], right: Float[Tensor, "k n"], dtype: torch.dtype) -> Float[Tensor, "m n"]:
    """The product, in `dtype` where the device sums in it anyway; elsewhere autograd casts it."""
    if left.is_cuda and dtype == torch.float32 and left.dtype in {torch.bfloat16, torch.float16}:
        return torch.mm(left, right, out_dtype=dtype)
    return left.mm(right)
