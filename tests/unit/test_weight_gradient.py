"""The gradient of a head's weight, added up over chunks: against fp64, with and without products in fp32."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from holdfast.scoring import weight_gradient
from holdfast.scoring.head import linear_logps
from holdfast.scoring.transform import LogitTransform
from holdfast.scoring.weight_gradient import add_product, has_wide_products

CHUNK, VOCABULARY, WIDTH = 8, 20, 12


@pytest.fixture
def _wide_products(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Products of half-precision matrices in fp32, which torch has on GPUs, under their own names on the CPU."""

    def mm(one: Tensor, other: Tensor, out_dtype: torch.dtype, *, out: Tensor) -> Tensor:
        assert one.dtype == other.dtype
        assert out.dtype == out_dtype == torch.float32
        return out.copy_(one.float() @ other.float())

    def addmm(
        total: Tensor, one: Tensor, other: Tensor, out_dtype: torch.dtype, *, beta: int = 1, alpha: int = 1, out: Tensor
    ) -> Tensor:  # fmt: skip
        assert one.dtype == other.dtype
        assert total.dtype == out.dtype == out_dtype == torch.float32
        assert beta == alpha == 1
        return out.copy_(total + one.float() @ other.float())

    library = torch.library.Library("aten", "IMPL")
    library.impl("mm.dtype_out", mm, "CPU")
    library.impl("addmm.dtype_out", addmm, "CPU")
    monkeypatch.setattr(weight_gradient, "has_wide_products", lambda device, dtype: dtype != torch.float32)
    yield
    library._destroy()


def chunks(num_chunks: int, dtype: torch.dtype) -> list[tuple[Tensor, Tensor]]:
    draw = torch.Generator().manual_seed(0)
    return [
        (torch.randn(CHUNK, VOCABULARY, generator=draw).to(dtype), torch.randn(CHUNK, WIDTH, generator=draw).to(dtype))
        for _ in range(num_chunks)
    ]


def error(num_chunks: int, dtype: torch.dtype) -> float:
    """Largest error of the sum, for products of about 3."""
    total, exact = torch.full((VOCABULARY, WIDTH), float("nan")), torch.zeros(VOCABULARY, WIDTH, dtype=torch.float64)
    for number, (errors, states) in enumerate(chunks(num_chunks, dtype)):
        add_product(total, errors, states, is_first=number == 0)
        exact += errors.double().T @ states.double()
    return float((total.double() - exact).abs().max())


@pytest.mark.usefixtures("_wide_products")
@pytest.mark.parametrize("num_chunks", [1, 4, 64, 256])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_products_in_fp32_are_rounded_as_fp32(num_chunks: int, dtype: torch.dtype) -> None:
    assert error(num_chunks, dtype) < 3e-7 * 16 * num_chunks**0.5


@pytest.mark.parametrize("num_chunks", [1, 4, 64, 256])
def test_fp32(num_chunks: int) -> None:
    assert error(num_chunks, torch.float32) < 3e-7 * 16 * num_chunks**0.5


@pytest.mark.parametrize("num_chunks", [1, 4, 64, 256])
@pytest.mark.parametrize("part", [None, 5 * WIDTH])
def test_products_in_half_precision_are_rounded_once_each(
    num_chunks: int, part: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By 2^-9 of a product of up to 16, as errors of random sign; in parts of the weight too."""
    if part is not None:
        monkeypatch.setattr(weight_gradient, "_PRODUCT", part)
    assert 1e-3 < error(num_chunks, torch.bfloat16) < 16 * 2**-9 * num_chunks**0.5


class Products(TorchDispatchMode):
    """Notes matrix products, and the operations that make or change something of the weight's shape."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """See `TorchDispatchMode`."""
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and tuple(result.shape) == (VOCABULARY, WIDTH) and not result._is_view():
            self.names.append(str(func))
        return result


@pytest.mark.usefixtures("_wide_products")
def test_a_chunk_is_one_operation() -> None:
    """The first product overwrites the sum, which is not set to zero before."""
    seen, total = Products(), torch.empty(VOCABULARY, WIDTH)
    pairs = chunks(3, torch.bfloat16)
    with seen:
        for number, (errors, states) in enumerate(pairs):
            add_product(total, errors, states, is_first=number == 0)
    assert seen.names == ["aten.mm.dtype_out", "aten.addmm.dtype_out", "aten.addmm.dtype_out"]


@pytest.mark.usefixtures("_wide_products")
@pytest.mark.parametrize("is_autocast", [False, True])
def test_the_error_of_a_head_does_not_grow_with_the_number_of_chunks(is_autocast: bool) -> None:
    """Its gradient for 64 chunks, under autocast, is as near to that for one chunk as fp32 sums are: both have the same
    errors and states in bf16. bf16 weights round it once more in the end."""
    gradients = []
    for chunk_tokens in (4, 256):
        draw = torch.Generator().manual_seed(0)
        dtype = torch.float32 if is_autocast else torch.bfloat16
        states = torch.randn(256, WIDTH, generator=draw).to(dtype).requires_grad_()
        weight = torch.randn(VOCABULARY, WIDTH, generator=draw).to(dtype).requires_grad_()
        target = torch.randint(VOCABULARY, (256,), generator=draw)
        with torch.autocast("cpu", torch.bfloat16, enabled=is_autocast):
            (logps,) = linear_logps(states, weight, None, target, LogitTransform(), chunk_tokens=chunk_tokens)
        logps.sum().backward()
        gradients.append(weight.grad)
    many, one = gradients
    gap = (many.float() - one.float()).abs().max() / one.float().abs().max()
    assert gap < (1e-6 if is_autocast else 2**-8)


def test_cpus_have_no_such_products() -> None:
    assert not has_wide_products(torch.device("cpu"), torch.bfloat16)


@pytest.mark.parametrize(("dtype", "has"), [(torch.bfloat16, True), (torch.float16, True), (torch.float32, False)])
def test_a_device_is_asked(dtype: torch.dtype, has: bool) -> None:
    """The meta device takes them, for half precision alone."""
    assert has_wide_products(torch.device("meta"), dtype) == has


def test_a_device_that_refuses_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(*_: Any, **__: Any) -> Tensor:
        raise NotImplementedError("Could not run 'aten::mm.dtype_out'")

    monkeypatch.setattr(torch, "mm", refuses)
    has_wide_products.cache_clear()
    assert not has_wide_products(torch.device("meta"), torch.bfloat16)
    has_wide_products.cache_clear()
