"""Copies in host memory: what shares a buffer, and how many bytes pinned memory takes for it."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from holdfast.reference.host_copies import SMALL_BYTES, buffers_of, host_copies
from holdfast.reference.tensor_file import TensorMemory

MIB = 2**20


def llama(hidden: int, width: int, key_width: int, vocabulary: int, layers: int) -> list[int]:
    """The bytes of the tensors of a Llama in bf16."""
    layer = [hidden * hidden, hidden * key_width, hidden * key_width, hidden * hidden, *[hidden * width] * 3]
    return [2 * n for n in [vocabulary * hidden, *layer * layers, *[hidden] * (2 * layers + 1), vocabulary * hidden]]


def rounded(num_bytes: int) -> int:
    """What torch's allocator of pinned memory takes for a request."""
    power = 1
    while power < num_bytes:
        power *= 2
    return power


SHAPES = {
    "8b": llama(4096, 14336, 1024, 128_256, 32),
    "8b lora": [2 * 16 * 4096] * (32 * 14),
    "0.5b": llama(896, 4864, 128, 151_936, 24),
    "1.7b": llama(2048, 6144, 1024, 151_936, 28),
    "one embedding": [2_100_000_000],
    "two unlike": [2_100_000_000, 1_500_000_000],
}


@pytest.mark.parametrize("shape", SHAPES)
def test_pinned_memory_takes_few_bytes_more(shape: str) -> None:
    """At most 3 % more than the tensors; less than each alone and than one buffer for all. One huge tensor is rounded
    however it is kept."""
    sizes = SHAPES[shape]
    buffers = buffers_of(sizes)
    taken = sum(rounded(sum(sizes[number] for number in buffer)) for buffer in buffers)
    assert sorted(number for buffer in buffers for number in buffer) == list(range(len(sizes)))
    assert taken <= min(sum(map(rounded, sizes)), rounded(sum(sizes)))
    if shape not in ("one embedding", "two unlike"):
        assert taken <= 1.03 * sum(sizes)


@given(st.lists(st.integers(0, 40 * MIB), max_size=60))
def test_every_tensor_is_in_one_buffer(sizes: list[int]) -> None:
    """Nothing takes more than twice its bytes, beside one small buffer; as many buffers as a number has bits."""
    buffers = buffers_of(sizes)
    assert sorted(number for buffer in buffers for number in buffer) == list(range(len(sizes)))
    taken = sum(rounded(sum(sizes[number] for number in buffer)) for buffer in buffers)
    assert taken <= 2 * sum(sizes) + SMALL_BYTES


def test_copies_are_the_values_in_one_buffer_of_each_dtype() -> None:
    draw = torch.Generator().manual_seed(0)
    values: dict[str, Tensor] = {
        "a": torch.randn(3, 4, generator=draw), "b": torch.randn(5, generator=draw).bfloat16(),
        "c": torch.randn(4, 6, generator=draw).t(), "d": torch.tensor(2.5), "e": torch.randn(0, 3),
        "f": torch.randn(2, 3, generator=draw).bfloat16(),
    }  # fmt: skip
    copies = host_copies(values)
    assert list(copies) == list(values)
    for name, value in values.items():
        assert copies[name].dtype == value.dtype
        assert torch.equal(copies[name], value)
    storages = {copies[name].dtype: {copies[n].untyped_storage().data_ptr() for n in values
                                     if copies[n].dtype == copies[name].dtype} for name in values}  # fmt: skip
    assert {len(addresses) for addresses in storages.values()} == {1}
    own_bytes = {dtype: sum(v.nbytes for v in values.values() if v.dtype == dtype) for dtype in storages}
    for name, value in copies.items():
        assert value.untyped_storage().nbytes() == own_bytes[value.dtype], name
    values["a"].zero_()
    assert copies["a"].abs().sum() > 0


def test_a_holder_in_host_memory_changes_its_own_values() -> None:
    memory = TensorMemory(in_host_memory=True)
    memory.write({"a": torch.ones(2, 3), "b": torch.ones(4)})
    memory.change(lambda name, value: value.mul_(2 if name == "a" else 3))
    assert [float(value.sum()) for _, value in memory.items()] == [12, 12]
