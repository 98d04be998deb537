"""Rotary position embeddings by few operations, for queries and keys at once.

In a model's own code each of them is five operations, and about as many more backward as there are slices. Here both
are laid side by side, multiplied by the cosines, and the two halves get each other's share, x1 cos - x2 sin and
x2 cos + x1 sin: four operations forward and four backward. The backward pass is the rotation back, so nothing but
cosines and sines is kept.

Models of transformers call a function of their module for it. It is known by what it computes, on made-up values.
Given up: partial rotations, interleaved ones, and functions with other arguments; they keep the model's own code.
"""

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple, final

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from holdfast.internals.torch import modules_of

FUNCTION = "apply_rotary_pos_emb"
"""The name under which a model's module has the function."""
_ARGUMENTS = ["q", "k", "cos", "sin"]


class Kind(NamedTuple):
    """What a model's function gives back: queries and keys in their own dtype where it `keeps_dtype`, else in the wider
    one of them and the cosines."""

    keeps_dtype: bool


_KINDS: dict[Callable[..., Any], Kind | None] = {}


def namespaces(causal_lm: nn.Module) -> list[dict[str, Any]]:
    """The namespaces in which modules of the model look the function up, each once."""
    found: dict[int, dict[str, Any]] = {}
    for kind in {type(module) for module in modules_of(causal_lm)}:
        function: Any = inspect.unwrap(kind.forward)
        if FUNCTION in getattr(getattr(function, "__code__", None), "co_names", ()):
            namespace = function.__globals__
            if FUNCTION in namespace:
                found[id(namespace)] = namespace
    return list(found.values())


def kind_of(own: Callable[..., Any]) -> Kind | None:
    """What the function computes; None where it is no rotation of whole heads by halves. Remembered."""
    if own not in _KINDS:
        _KINDS[own] = _read(own)
    return _KINDS[own]


def fused_function(own: Callable[..., Any], kind: Kind) -> Callable[..., Any]:
    """A function in place of the model's own, to which it leaves what it does not know: other arguments, other shapes,
    cosines that require gradients."""

    def apply_rotary_pos_emb(
        q: Any, k: Any, cos: Any, sin: Any, *args: Any, unsqueeze_dim: int = 1, **kwargs: Any
    ) -> Any:
        if args or kwargs or unsqueeze_dim not in (1, 2) or not _is_usable(q, k, cos, sin):
            return own(q, k, cos, sin, *args, **kwargs | {"unsqueeze_dim": unsqueeze_dim})
        return rotated(q, k, cos, sin, head_dim=unsqueeze_dim, kind=kind)

    return apply_rotary_pos_emb


def rotated(
    query: Float[Tensor, "R a b d"],
    key: Float[Tensor, "R c e d"],
    cos: Float[Tensor, "#R T d"],
    sin: Float[Tensor, "#R T d"],
    *,
    head_dim: int,
    kind: Kind,
) -> tuple[Tensor, Tensor]:
    """Queries and keys (heads in dimension `head_dim`, 1 or 2), rotated by the angles of their positions.

    On an accelerator under autocast they leave in the autocast dtype if they came in it, since attention would cast
    them to it next.
    """
    both = torch.cat([query, key], head_dim)
    device, dtype = query.device.type, query.dtype
    is_cast = device != "cpu" and torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) == dtype
    if not kind.keeps_dtype and not is_cast:
        dtype = torch.promote_types(dtype, cos.dtype)
    turned: Any = _Rotation.apply(both, cos.unsqueeze(head_dim), sin.unsqueeze(head_dim), dtype)
    return turned.split([query.shape[head_dim], key.shape[head_dim]], head_dim)


def _is_usable(query: Any, key: Any, cos: Any, sin: Any) -> bool:
    tensors = (query, key, cos, sin)
    if not all(isinstance(tensor, Tensor) and tensor.is_floating_point() for tensor in tensors):
        return False
    is_whole = query.dim() == key.dim() == 4 and cos.dim() == sin.dim() == 3 and cos.shape == sin.shape
    widths, dtypes = {tensor.shape[-1] for tensor in tensors}, {query.dtype, key.dtype}
    is_constant = not (cos.requires_grad or sin.requires_grad)
    return is_whole and len(widths) == len(dtypes) == 1 and query.shape[-1] % 2 == 0 and is_constant


def _read(own: Callable[..., Any]) -> Kind | None:
    try:
        parameters = list(inspect.signature(own).parameters)
    except (TypeError, ValueError):
        return None
    if parameters[:4] != _ARGUMENTS or "unsqueeze_dim" not in parameters:
        return None
    with torch.no_grad(), torch.autocast("cpu", enabled=False):
        draw = torch.Generator().manual_seed(0)
        shapes = ((2, 3, 5, 8), (2, 1, 5, 8), (2, 5, 8), (2, 5, 8))
        made = [torch.randn(shape, generator=draw, device="cpu", dtype=torch.float32) for shape in shapes]
        query, key, cos, sin = made
        for head_dim in (1, 2):
            asked = (query, key) if head_dim == 1 else (query.transpose(1, 2), key.transpose(1, 2))
            kind = Kind(keeps_dtype=False)
            if not _agree(own, asked, cos, sin, head_dim, kind, 1e-5):
                return None
        narrow = query.bfloat16(), key.bfloat16()
        kinds = (Kind(keeps_dtype=False), Kind(keeps_dtype=True))
        return next((kind for kind in kinds if _agree(own, narrow, cos, sin, 1, kind, 2**-5)), None)


def _agree(
    own: Callable[..., Any],
    states: tuple[Tensor, Tensor],
    cos: Tensor,
    sin: Tensor,
    head_dim: int,
    kind: Kind,
    tolerance: float,
) -> bool:
    try:
        answer = own(*states, cos, sin, unsqueeze_dim=head_dim)
    except Exception:  # whatever the code of others raises: it is no rotation that is known here
        return False
    ours = rotated(*states, cos, sin, head_dim=head_dim, kind=kind)
    if not isinstance(answer, tuple) or len(answer) != len(ours):
        return False
    return all(
        a.shape == b.shape
        and a.dtype == b.dtype
        and torch.allclose(a.float(), b.float(), rtol=tolerance, atol=tolerance)
        for a, b in zip(answer, ours, strict=True)
    )


@final
class _Rotation(torch.autograd.Function):
    """(x1 cos1 - x2 sin1, x2 cos2 + x1 sin2) of the halves x1, x2 of each head, in `dtype`."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, cos: Tensor, sin: Tensor, dtype: torch.dtype) -> Tensor:
        """See `torch.autograd.Function`."""
        ctx.save_for_backward(cos, sin)
        ctx.dtype = states.dtype
        first, second = sin.chunk(2, -1)
        return _turned(states, cos, (first, -1), (second, 1), dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        """See `torch.autograd.Function`."""
        cos, sin = ctx.saved_tensors
        first, second = sin.chunk(2, -1)
        return _turned(upstream, cos, (second, 1), (first, -1), ctx.dtype), None, None, None


def _turned(
    states: Tensor, cos: Tensor, to_first: tuple[Tensor, int], to_second: tuple[Tensor, int], dtype: torch.dtype
) -> Tensor:
    """cos * states, and to each half (factor, sign) times the other half; rounded to `dtype` once."""
    wide = states * cos
    turned = wide if wide.dtype == dtype else torch.empty_like(wide, dtype=dtype)
    halves = zip(
        wide.chunk(2, -1), reversed(states.chunk(2, -1)), (to_first, to_second), turned.chunk(2, -1), strict=True
    )
    for half, other, (factor, sign), out in halves:
        torch.addcmul(half, other, factor, value=sign, out=out)
    return turned
