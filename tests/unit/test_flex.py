"""The block mask of flex attention against one made another way; its kernel, where it runs, against plain products."""

import shutil

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import create_mask
from transformers.masking_utils import causal_mask_function, sliding_window_causal_mask_function

from holdfast.scoring.flex import block_mask, dense, flex_attention, is_usable

CPU = torch.device("cpu")
ROWS = [[(40, (30, 20)), (10, (25, 35))], [(70, (40,)), (0, (9, 3))], [(5, ())]]
NUM_COLUMNS = 170


def by_hand(rows: list[list[tuple[int, tuple[int, ...]]]], window: int | None) -> Tensor:
    """Sees: the same segment, its prompt or the same completion, not later, nearer than the window, in positions."""
    mask = torch.zeros(len(rows), NUM_COLUMNS, NUM_COLUMNS, dtype=torch.bool)
    for row, segments in enumerate(rows):
        tokens = [
            (number, which, place + (prompt if which else 0))
            for number, (prompt, completions) in enumerate(segments)
            for which, length in enumerate([prompt, *completions])
            for place in range(length)
        ]
        for q, (segment, completion, position) in enumerate(tokens):
            for k, (other_segment, other_completion, other_position) in enumerate(tokens):
                distance = position - other_position
                mask[row, q, k] = (
                    segment == other_segment
                    and other_completion in (0, completion)
                    and 0 <= distance < (window or NUM_COLUMNS)
                )
    return mask[:, None] | torch.eye(NUM_COLUMNS, dtype=torch.bool)


@pytest.mark.parametrize("window", [None, 7])
def test_who_sees_whom(window: int | None) -> None:
    visible = causal_mask_function if window is None else sliding_window_causal_mask_function(window)
    made = block_mask(ROWS, NUM_COLUMNS, visible, CPU)
    found = create_mask(made.mask_mod, len(ROWS), None, NUM_COLUMNS, NUM_COLUMNS, device="cpu")
    assert torch.equal(found, by_hand(ROWS, window))
    if window is None:
        assert torch.equal(found, dense(ROWS, NUM_COLUMNS, CPU))


def test_blocks_in_which_nobody_sees_anybody_are_skipped() -> None:
    """Eight segments of 128 tokens: of 64 blocks only those on the diagonal are computed."""
    made = block_mask([[(100, (28,))] * 8], 1024, causal_mask_function, CPU)
    assert made.kv_num_blocks.sum() + made.full_kv_num_blocks.sum() == 8


def test_it_is_not_used_on_a_cpu() -> None:
    assert not is_usable(CPU, torch.float32)


@pytest.mark.nightly
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.skipif(shutil.which("g++") is None, reason="the kernel is compiled")
def test_the_kernel_gives_what_plain_products_give() -> None:
    mask = block_mask(ROWS, NUM_COLUMNS, causal_mask_function, CPU)
    query, key, value = torch.randn(3, len(ROWS), 4, NUM_COLUMNS, 16, generator=torch.Generator().manual_seed(0))
    torch._dynamo.reset()  # another cap than in other tests would be an argument of the kernel
    with torch.no_grad():
        found = flex_attention(nn.Identity().eval(), query, key, value, mask, scaling=0.3, softcap=2.0)
    scores = 2.0 * torch.tanh(query @ key.transpose(-1, -2) * 0.3 / 2.0)
    expected = scores.masked_fill(~by_hand(ROWS, None), float("-inf")).softmax(-1) @ value
    torch.testing.assert_close(found, expected.transpose(1, 2), rtol=0, atol=1e-5)
