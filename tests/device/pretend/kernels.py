"""Kernels for attention and RMS norms as single operations on the pretend device, as they are on a GPU.

`scaled_dot_product_attention`, FlexAttention and `rms_norm` would otherwise be taken apart into the operations of their
definition. Each becomes one operation forward and one backward there; in host memory they stay what they are. Autocast
casts their inputs, as it does on CUDA. A norm whose input and weight differ in dtype is taken apart on a GPU too.
"""

from typing import Any

import torch
import torch.nn.attention.flex_attention as flex
import torch.nn.attention.varlen
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

KERNELS = {"pretend::sdpa": "sdpa", "pretend::flex": "flex", "torch_attn::_varlen_attn": "varlen"}
"""The attention operations, by name, and the route that each stands for."""


@torch.library.custom_op("pretend::sdpa", mutates_args=())
def _sdpa(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    raise NotImplementedError


@torch.library.custom_op("pretend::sdpa_backward", mutates_args=())
def _sdpa_backward(upstream: Tensor, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    raise NotImplementedError


@torch.library.custom_op("pretend::flex", mutates_args=())
def _flex(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    raise NotImplementedError


@torch.library.custom_op("pretend::flex_backward", mutates_args=())
def _flex_backward(upstream: Tensor, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    raise NotImplementedError


@torch.library.custom_op("pretend::rms_norm", mutates_args=())
def _rms_norm(states: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    raise NotImplementedError


@torch.library.custom_op("pretend::rms_norm_backward", mutates_args=())
def _rms_norm_backward(upstream: Tensor, states: Tensor, inverse: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    raise NotImplementedError


def _output_like(query: Tensor, value: Tensor) -> Tensor:
    """As the kernels lay it out: heads beside tokens, so that the transpose back is dense."""
    *batch, heads, tokens, _ = query.shape
    return query.new_empty((*batch, tokens, heads, value.shape[-1])).transpose(-2, -3)


@_sdpa.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    return _output_like(query, value)


@_flex.register_fake
def _(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    return _output_like(query, value), query.new_empty(query.shape[:-1], dtype=torch.float32)


@_sdpa_backward.register_fake
@_flex_backward.register_fake
def _(upstream: Tensor, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


@_rms_norm.register_fake
def _(states: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(states), states.new_empty((*states.shape[:-1], 1), dtype=torch.float32)


@_rms_norm_backward.register_fake
def _(upstream: Tensor, states: Tensor, inverse: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(states), torch.empty_like(weight)


def _keep(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.save_for_backward(*inputs[:3])


_sdpa.register_autograd(
    lambda ctx, upstream: (*_sdpa_backward(upstream, *ctx.saved_tensors), None), setup_context=_keep
)
_flex.register_autograd(lambda ctx, upstream, _: _flex_backward(upstream, *ctx.saved_tensors), setup_context=_keep)


def _keep_norm(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.set_materialize_grads(False)  # nothing reads the second output's gradient
    ctx.save_for_backward(inputs[0], output[1], inputs[1])


_rms_norm.register_autograd(
    lambda ctx, upstream, _: _rms_norm_backward(upstream, *ctx.saved_tensors), setup_context=_keep_norm
)


def _cast(*tensors: Tensor | None) -> list[Any]:
    if not torch.is_autocast_enabled("cuda"):
        return list(tensors)
    dtype = torch.get_autocast_dtype("cuda")
    return [t.to(dtype) if t is not None and t.is_floating_point() else t for t in tensors]


def use_single_kernels() -> None:
    """Puts the operations in the place of torch's functions. Before anything imports those by name."""
    plain_sdpa, plain_flex = torch.nn.functional.scaled_dot_product_attention, flex.flex_attention

    def scaled_dot_product_attention(
        query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, *args: Any, **kwargs: Any
    ) -> Tensor:
        if not isinstance(query, FakeTensor):
            return plain_sdpa(query, key, value, attn_mask, *args, **kwargs)
        devices = {t.device for t in (query, key, value, attn_mask) if t is not None}
        if len(devices) > 1:
            raise RuntimeError(f"scaled_dot_product_attention: tensors on {sorted(map(str, devices))}")
        query, key, value, attn_mask = _cast(query, key, value, attn_mask)
        if len({query.dtype, key.dtype, value.dtype}) > 1:
            raise RuntimeError(f"scaled_dot_product_attention: {query.dtype}, {key.dtype}, {value.dtype}")
        return _sdpa(query, key, value, attn_mask)

    def flex_attention(query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(query, FakeTensor):
            return plain_flex(query, key, value, *args, **kwargs)
        output, sums = _flex(*_cast(query, key, value))
        if kwargs.get("return_aux") is not None:
            return output, flex.AuxOutput(lse=sums)
        return (output, sums) if kwargs.get("return_lse") else output

    plain_norm = torch.nn.functional.rms_norm

    def rms_norm(
        input: Tensor, normalized_shape: Any, weight: Tensor | None = None, eps: float | None = None
    ) -> Tensor:
        if not isinstance(input, FakeTensor) or weight is None:
            return plain_norm(input, normalized_shape, weight, eps)
        if torch.is_autocast_enabled("cuda"):
            input, weight = input.float(), weight.float()
        if input.dtype != weight.dtype:
            return plain_norm(input, normalized_shape, weight, eps)
        return _rms_norm(input, weight)[0]

    torch.nn.functional.rms_norm = rms_norm
    torch.nn.functional.scaled_dot_product_attention = scaled_dot_product_attention
    torch._C._nn.scaled_dot_product_attention = scaled_dot_product_attention
    flex.flex_attention = flex_attention
    torch.nn.attention.varlen._should_use_cudnn = lambda index: False
    _never_compile_flex()


def _never_compile_flex() -> None:
    from holdfast.scoring.routes import flex_kernel

    flex_kernel.compiled = lambda function: function
    flex_kernel._mark = lambda *_: None
