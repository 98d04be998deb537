"""RMS norms by few operations.

A norm in a model's own code is six operations forward and about fourteen backward. On a GPU one kernel of torch does
each; on a CPU there are three passes forward and six backward.

A norm is known by what it computes. Its own code is called with made-up values, on a copy of the module that has a
made-up weight, so no weight of the model is read, wherever it is. The answer must be that of one `Kind`: a plain weight
or one that is added to 1 (Gemma), and an output in the input's dtype or in the wider one of input and weight. All is
computed in fp32 and rounded once, where some models round twice.

Given up: norms without a weight or with a bias, those that take more than one tensor, and modules of torch itself.
"""

from collections.abc import Callable
from types import FunctionType
from typing import Any, NamedTuple, cast, final

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.distributed.tensor import DTensor

from holdfast.internals.deepspeed import is_partitioned, whole_shape
from holdfast.internals.torch import class_of, own_parameters

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_PROBE_SCALES = (1e-3, 1.0, 30.0)
"""Sizes of the made-up values. At the smallest one a usual epsilon counts."""
_EPSILON_MAX = 0.1


class Kind(NamedTuple):
    """What a norm computes: (offset + weight) * x * rsqrt(mean(x^2) + epsilon), in the dtype of x where it
    `keeps_dtype`, else in the wider one of x and weight."""

    epsilon: float
    offset: float
    keeps_dtype: bool

    def dtype(self, states: Tensor, weight: Tensor) -> torch.dtype:
        """The dtype of the output."""
        return states.dtype if self.keeps_dtype else torch.promote_types(states.dtype, weight.dtype)


_KINDS: dict[tuple[Any, ...], Kind | None] = {}
"""What is known, by class and what else a module holds."""
_PLAIN = (bool, int, float, str, torch.dtype, FunctionType, type(None))


def kind_of(module: nn.Module) -> Kind | None:
    """What the norm computes; None where `module` is no such norm. Remembered."""
    parameters = own_parameters(module)  # asked first, since it rules out most modules
    if len(parameters) != 1 or (weight := parameters[0]) is not getattr(module, "weight", None):
        return None
    # What ZeRO-3 has spread is whole only now and then, and each pass must answer alike.
    shape = whole_shape(weight) if is_partitioned(weight) else weight.shape
    if len(shape) != 1 or shape[0] == 0 or next(module.children(), None) is not None:
        return None
    if class_of(module).__module__.startswith("torch."):
        return None
    attributes = {name: value for name, value in vars(module).items() if isinstance(value, _PLAIN)}
    key = (class_of(module), frozenset(attributes.items() - {("training", module.training)}))
    if key not in _KINDS:
        _KINDS[key] = _read(module, shape[0])
    return _KINDS[key]


def fused_forward(module: nn.Module, kind: Kind) -> Callable[..., Any]:
    """A forward pass for the norm. It leaves to the module's own what it does not know: other arguments, weights that
    are sharded or elsewhere, other dtypes."""
    own = module.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        states, weight = args[0] if len(args) == 1 else None, module.weight
        if kwargs or not isinstance(states, Tensor) or not _is_usable(states, cast(Tensor, weight)):
            return own(*args, **kwargs)
        return rms_norm(states, cast(Tensor, weight), kind)

    return forward


def rms_norm(states: Float[Tensor, "*n h"], weight: Float[Tensor, "h"], kind: Kind) -> Float[Tensor, "*n h"]:
    """The norm of the last dimension, computed in fp32. Gradients reach `states` and `weight`."""
    dtype = kind.dtype(states, weight)
    if states.device.type == "cpu":
        return cast(Tensor, _RMSNorm.apply(states, weight, kind, dtype))
    return _by_one_kernel(states, weight, kind).to(dtype)


def _by_one_kernel(states: Tensor, weight: Tensor, kind: Kind) -> Tensor:
    """torch's own norm. On a GPU it is one kernel where input and weight have one dtype."""
    if states.dtype != weight.dtype or kind.offset:
        states, weight = states.float(), weight.float()
    scale = weight + kind.offset if kind.offset else weight
    return nn.functional.rms_norm(states, weight.shape, scale, kind.epsilon)


def _is_usable(states: Tensor, weight: Tensor) -> bool:
    is_whole = not isinstance(weight, DTensor) and not isinstance(states, DTensor) and weight.device == states.device
    return is_whole and states.shape[-1:] == weight.shape and {states.dtype, weight.dtype} <= {*_DTYPES}


def _read(module: nn.Module, width: int) -> Kind | None:
    with torch.no_grad(), torch.autocast("cpu", enabled=False):
        draw = torch.Generator().manual_seed(0)
        states = torch.randn(len(_PROBE_SCALES), 2, width, generator=draw, device="cpu", dtype=torch.float32)
        states *= torch.tensor(_PROBE_SCALES, device="cpu")[:, None, None]
        weight = torch.randn(width, generator=draw, device="cpu", dtype=torch.float32)
        answer = _answer(module, states, weight)
        narrow = _answer(module, states.bfloat16(), weight)
        epsilons = {value for value in vars(module).values() if type(value) is float and 0 < value <= _EPSILON_MAX}
        for kind in (Kind(epsilon, offset, False) for epsilon in sorted(epsilons) for offset in (0.0, 1.0)):
            if not _agree(answer, rms_norm(states, weight, kind), 1e-5):
                continue
            if narrow is None or narrow.dtype not in (torch.bfloat16, torch.float32):
                return None
            kind = kind._replace(keeps_dtype=narrow.dtype == torch.bfloat16)
            return kind if _agree(narrow, rms_norm(states.bfloat16(), weight, kind), 2**-6) else None
    return None


def _answer(module: nn.Module, states: Tensor, weight: Tensor) -> Tensor | None:
    """What the module's own code makes of the states, with another weight; None where it fails."""
    kind = class_of(module)
    copy = kind.__new__(kind)
    vars(copy).update(vars(module) | {"_parameters": {"weight": nn.Parameter(weight)}})
    try:
        answer = kind.forward(copy, states.clone())
    except Exception:  # whatever the code of others raises: it is no norm that is known here
        return None
    return answer if isinstance(answer, Tensor) else None


def _agree(answer: Tensor | None, ours: Tensor, tolerance: float) -> bool:
    if answer is None or answer.shape != ours.shape or answer.dtype != ours.dtype:
        return False
    return torch.allclose(answer.float(), ours.float(), rtol=tolerance, atol=tolerance)


@final
class _RMSNorm(torch.autograd.Function):
    """`rms_norm` on a CPU, with gradients."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, weight: Tensor, kind: Kind, dtype: torch.dtype) -> Tensor:
        """See `torch.autograd.Function`."""
        norm = torch.linalg.vector_norm(states, dim=-1, keepdim=True, dtype=torch.float32)
        inverse = norm.square_().div_(len(weight)).add_(kind.epsilon).rsqrt_()  # [n 1], 1 / RMS
        scale = weight.float() + kind.offset if kind.offset else weight
        ctx.offset = kind.offset
        ctx.save_for_backward(states, weight, inverse)
        return torch.mul(states, inverse).mul_(scale).to(dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        """See `torch.autograd.Function`."""
        states, weight, inverse = ctx.saved_tensors
        width = len(weight)
        scale = weight.float() + ctx.offset if ctx.offset else weight.float()
        with torch.autocast("cpu", enabled=False):
            upstream, states_2d = upstream.float().reshape(-1, width), states.reshape(-1, width)
            inverse = inverse.view(-1, 1)
            product = upstream * states_2d
            for_states = for_weight = None
            if ctx.needs_input_grad[1]:
                for_weight = torch.mv(product.T, inverse.view(-1)).to(weight.dtype)
            if ctx.needs_input_grad[0]:
                # d/dx_i of g.(s x r) with r = 1 / RMS: r (g_i s_i) - x_i r^3 / h * sum_j g_j s_j x_j
                along = torch.mv(product, scale).view(-1, 1).mul_(inverse.pow(3)).div_(width)
                for_states = torch.mul(upstream, scale).mul_(inverse).addcmul_(states_2d, along, value=-1)
                for_states = for_states.to(states.dtype).view(states.shape)
        return for_states, for_weight, None, None
