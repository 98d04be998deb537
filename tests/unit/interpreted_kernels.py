"""The head's kernels, run by Triton's interpreter on a CPU: against fp64, and against plain torch.

`test_softmax_kernels.py` runs this file in a process of its own, because Triton reads TRITON_INTERPRET when it is
imported. The interpreter shows arithmetic, masks, tails and dtypes; it shows no race, and no speed. It cuts a number
off where a GPU rounds it to bf16, so there an error is one unit in the last place and not half of it.
"""

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

from holdfast.scoring import head, softmax_kernels
from holdfast.scoring.head import linear_logps
from holdfast.scoring.softmax import NUM_COLUMNS, TorchSoftmax
from holdfast.scoring.softmax_choice import difference
from holdfast.scoring.softmax_kernels import KernelSoftmax
from holdfast.scoring.transform import LogitTransform

pytestmark = pytest.mark.filterwarnings("ignore:(invalid value|overflow|divide by zero):RuntimeWarning")

BLOCK = softmax_kernels.BLOCK
TRANSFORMS = [LogitTransform(), LogitTransform(scale=0.25), LogitTransform(cap=6.0), LogitTransform(-0.5, 4.0)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
transforms = pytest.mark.parametrize("transform", TRANSFORMS, ids=str)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
POISON = float("nan")
NAMES = ("log-prob", "entropy", "mean logit", "is_top1", "log_sum_sq")


def unit(dtype: torch.dtype) -> float:
    """Largest relative difference of a number that was rounded to `dtype` once."""
    return {torch.bfloat16: 2**-7, torch.float16: 2**-11, torch.float32: 4e-6}[dtype]


def poisoned(logits: Tensor, gap: int = 32) -> Tensor:
    """The same logits as rows of a wider buffer, with NaN before, between and behind them: what is read there shows."""
    buffer = torch.full((len(logits) + 2, logits.shape[1] + gap), POISON, dtype=logits.dtype)
    inner = buffer[1:-1, : logits.shape[1]]
    inner.copy_(logits)
    return inner


def drawn(num_tokens: int, vocabulary: int, dtype: torch.dtype) -> Tensor:
    return (3 * torch.randn(num_tokens, vocabulary, generator=torch.Generator().manual_seed(0))).to(dtype)


def answers(
    kind: Any, logits: Tensor, target: Tensor, transform: LogitTransform, factor: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The columns [5 n] and the errors [n V] of logits that are the last tokens of a longer batch."""
    before = 3
    target = torch.cat([torch.zeros(before, dtype=target.dtype), target])
    here = slice(before, len(target))
    softmax = kind(target, transform, logits.shape[1], len(logits), logits.dtype)
    columns = [column.fill_(7.0) for column in softmax.empty_columns(True)]
    chunk = poisoned(logits.to(softmax.logits_dtype))
    softmax.write(chunk, here, columns, with_errors=factor is None)
    assert all((column[:before] == 7.0).all() for column in columns), "columns of other tokens are written"
    if factor is not None:
        chunk = poisoned(logits.to(softmax.logits_dtype))
        factor = torch.cat([torch.full((before,), POISON), factor])
        chunk, rest = softmax.scaled_errors(chunk, here, factor, columns[NUM_COLUMNS:], is_saved=False)
        chunk = chunk if rest is None else chunk * rest[:, None]
    return torch.stack(columns[:NUM_COLUMNS])[:, before:], chunk


def exact(logits: Tensor, target: Tensor, transform: LogitTransform) -> tuple[Tensor, Tensor]:
    """Both by their definitions, in fp64; the errors by autograd."""
    leaf = logits.double().requires_grad_()
    final = transform(leaf)
    log_probs = final.log_softmax(-1)
    of_target = log_probs.gather(-1, target[:, None]).squeeze(-1)
    (gradient,) = torch.autograd.grad(of_target.sum(), leaf)
    p, final = log_probs.detach().exp(), final.detach()
    is_top1 = (final.argmax(-1) == target).double()
    columns = (of_target.detach(), torch.special.entr(p).sum(-1), final.mean(-1), is_top1, (p * p).sum(-1).log())
    return torch.stack(columns), -gradient


@pytest.mark.covering(2)
@pytest.mark.parametrize("vocabulary", [1, 7, BLOCK - 1, BLOCK, BLOCK + 1])
@transforms
@dtypes
def test_columns_and_errors(vocabulary: int, transform: LogitTransform, dtype: torch.dtype) -> None:
    num_tokens = 3
    logits = drawn(num_tokens, vocabulary, dtype)
    target = torch.tensor([0, vocabulary // 2, vocabulary - 1])
    factor = torch.tensor([-1.5, 0.25, 2.0])
    columns, errors = answers(KernelSoftmax, logits, target, transform)
    expected, expected_errors = exact(logits, target, transform)
    for name, found, column in zip(NAMES, columns, expected, strict=True):
        assert_close(found.double(), column, rtol=1e-5, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}")
    assert errors.dtype == dtype
    assert_close(errors.double(), expected_errors, rtol=unit(dtype), atol=2e-6)
    columns_again, scaled = answers(KernelSoftmax, logits, target, transform, factor)
    assert torch.equal(columns_again, columns)
    assert scaled.dtype == dtype
    assert_close(scaled.double(), expected_errors * factor[:, None], rtol=unit(dtype), atol=4e-6)


@pytest.mark.parametrize("vocabulary", [32_000, 50_257])
def test_a_real_vocabulary(vocabulary: int) -> None:
    logits, target = drawn(2, vocabulary, torch.bfloat16), torch.tensor([vocabulary - 1, 11])
    columns, errors = answers(KernelSoftmax, logits, target, LogitTransform())
    expected, expected_errors = exact(logits, target, LogitTransform())
    assert_close(columns.double(), expected, rtol=1e-5, atol=1e-5)
    assert_close(errors.double(), expected_errors, rtol=unit(torch.bfloat16), atol=2e-6)


INF = float("inf")
EDGES: dict[str, list[float]] = {
    "one is certain": [0.0, 200.0, 0.0],
    "far from zero": [10_000.0, 10_001.0, 9_999.0],
    "far below zero": [-60_000.0, -60_032.0, -60_064.0],
    "all alike": [2.0, 2.0, 2.0],
    "one never said": [1.0, 2.0, -INF],
    "the target never said": [-INF, 1.0, 2.0],
    "only the target is said": [3.0, -INF, -INF],
    "the first ones never said": [-INF, -INF, 1.0, 2.0],
    "none is said": [-INF, -INF, -INF],
    "NaN": [1.0, POISON, 2.0],
    "the target is NaN": [POISON, 1.0, 2.0],
    "infinite": [1.0, INF, 2.0],
    "the target is infinite": [INF, 1.0, 2.0],
}


@pytest.mark.parametrize("edge", EDGES)
@pytest.mark.parametrize(("cap", "block"), [(None, 16), (None, 2), (30.0, 2)])
def test_edges(edge: str, cap: float | None, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Infinite and NaN logits give what plain torch gives; the target is token 0. A tail of -inf changes nothing."""
    monkeypatch.setattr(softmax_kernels, "BLOCK", block)
    transform = LogitTransform(cap=cap)
    values = EDGES[edge] + ([] if transform.cap else [-INF] * 2)
    logits, target = torch.tensor([values, [1.0, 2.0, 3.0, *values[3:]]]), torch.tensor([0, 0])
    found, errors = answers(KernelSoftmax, logits, target, transform)
    expected, expected_errors = answers(TorchSoftmax, logits, target, transform)
    assert_close(found[0], expected[0], rtol=1e-6, atol=1e-6, equal_nan=True)
    assert_close(errors, expected_errors, rtol=1e-5, atol=1e-6, equal_nan=True)
    if not found[0, 0].isnan():
        final = transform(logits.double())
        p = final.softmax(-1)
        assert_close(found[1].double(), torch.special.entr(p).sum(-1), rtol=1e-5, atol=1e-6)
        assert_close(found[2].double(), final.mean(-1), rtol=1e-6, atol=1e-6)
        assert torch.equal(found[3], expected[3])
        assert_close(found[4].double(), (p * p).sum(-1).log(), rtol=1e-5, atol=1e-6)
    else:
        assert found[1, 0].isnan()
        assert found[4, 0].isnan()


@pytest.mark.parametrize("largest", [1e4, 3e38])
@pytest.mark.parametrize("place", [0, 40], ids=["first block", "later block"])
def test_the_largest_numbers(largest: float, place: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(softmax_kernels, "BLOCK", 16)
    logits = torch.zeros(2, 50)
    logits[:, place] = largest
    columns, errors = answers(KernelSoftmax, logits, torch.tensor([place, 3]), LogitTransform())
    assert columns[0].tolist() == [0.0, pytest.approx(-largest)]
    assert columns[[1, 4]].abs().max() == 0
    assert columns[3].tolist() == [1.0, 0.0]
    assert errors[0].abs().max() == 0
    assert errors[1, [3, place]].tolist() == [-1.0, 1.0]


TIES = {  # logits, target, in half precision, in fp32
    "alone": ([1.0, 5.0, 2.0, 0.0], 1, 1.0, 1.0),
    "first of two": ([1.0, 5.0, 2.0, 5.0], 1, 1.0, 1.0),
    "second of two": ([1.0, 5.0, 2.0, 5.0], 3, 0.0, 1.0),
    "second of two, side by side": ([1.0, 5.0, 5.0, 0.0], 2, 0.0, 1.0),
    "below a tie": ([5.0, 5.0, 2.0, 5.0], 2, 0.0, 0.0),
    "an earlier one is larger": ([6.0, 5.0, 2.0, 0.0], 1, 0.0, 0.0),
    "a later one is larger": ([1.0, 5.0, 2.0, 6.0], 1, 0.0, 0.0),
    "an equal one comes before a larger one": ([5.0, 5.0, 6.0, 0.0], 1, 0.0, 0.0),
}


@pytest.mark.covering(2)
@pytest.mark.parametrize("case", TIES)
@pytest.mark.parametrize("block", [1, 2, 16])
@dtypes
def test_ties(case: str, block: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in plain torch: in half precision the first of the largest logits is the most likely token, in fp32 each."""
    monkeypatch.setattr(softmax_kernels, "BLOCK", block)
    values, target, in_half, in_full = TIES[case]
    logits, of_target = torch.tensor([values], dtype=dtype), torch.tensor([target])
    found = [answers(kind, logits, of_target, LogitTransform())[0][3].item() for kind in (KernelSoftmax, TorchSoftmax)]
    assert found == [in_full if dtype == torch.float32 else in_half] * 2


@pytest.mark.parametrize("outside", [-1, -100, 7, 40, 2**40])
def test_a_target_outside_the_vocabulary_has_no_log_prob(outside: int) -> None:
    logits = drawn(3, 7, torch.bfloat16)
    columns, _ = answers(KernelSoftmax, logits, torch.tensor([2, outside, 3]), LogitTransform())
    assert columns[0].isnan().tolist() == [False, True, False]
    assert columns[3, 1] == 0


def test_rows_beyond_the_reach_of_32_bits() -> None:
    """The third row begins 2^31 logits behind the first; of the memory in between nothing is touched."""
    stride = 2**30 + 16
    logits = torch.empty_strided((3, 5), (stride, 1), dtype=torch.bfloat16)
    values = drawn(3, 5, torch.bfloat16)
    logits.copy_(values)
    target, here = torch.tensor([0, 1, 2]), slice(0, 3)
    softmax = KernelSoftmax(target, LogitTransform(), 5, 3, torch.bfloat16)
    columns = softmax.empty_columns(True)
    softmax.write(logits, here, columns, with_errors=True)
    expected, expected_errors = exact(values, target, LogitTransform())
    assert_close(torch.stack(columns[:NUM_COLUMNS]).double(), expected, rtol=1e-5, atol=1e-5)
    assert_close(logits.double(), expected_errors, rtol=unit(torch.bfloat16), atol=2e-6)


@pytest.mark.covering(1)
@transforms
@dtypes
def test_the_trial_passes(transform: LogitTransform, dtype: torch.dtype) -> None:
    assert difference(KernelSoftmax, torch.device("cpu"), dtype, transform) is None


WIDTH, TOKENS = 6, 7


class Leaves(dict[str, Tensor]):
    """Hidden states, weight and bias."""

    def __init__(self, vocabulary: int, is_trained: bool, has_bias: bool, dtype: torch.dtype) -> None:
        draw = torch.Generator().manual_seed(0)
        shapes = {"states": (TOKENS, WIDTH), "weight": (vocabulary, WIDTH)} | (
            {"bias": (vocabulary,)} if has_bias else {}
        )
        for name, shape in shapes.items():
            leaf = torch.randn(shape, generator=draw).to(dtype)
            self[name] = leaf.requires_grad_(is_trained or name == "states")

    def logps(self, transform: LogitTransform = TRANSFORMS[0], **options: Any) -> tuple[Tensor, ...]:
        options = {"chunk_tokens": 4} | options
        target = torch.arange(TOKENS) * 5 % len(self["weight"])
        return linear_logps(self["states"], self["weight"], self.get("bias"), target, transform, **options)

    def gradients(self, logps: Tensor) -> dict[str, Tensor]:
        direction = torch.randn(TOKENS, generator=torch.Generator().manual_seed(1))
        (logps @ direction).backward()
        return {name: leaf.grad for name, leaf in self.items() if leaf.grad is not None}


def use(monkeypatch: pytest.MonkeyPatch, kind: Any) -> None:
    monkeypatch.setattr(head, "softmax_class", lambda *_: kind)
    monkeypatch.setattr(softmax_kernels, "BLOCK", 32)


trained = pytest.mark.parametrize("is_trained", [False, True], ids=["frozen", "trained"])


@pytest.mark.covering(2)
@trained
@transforms
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("chunk_tokens", [4, 100])
@pytest.mark.parametrize(
    ("dtype", "is_autocast"),
    [(torch.float32, False), (torch.bfloat16, False), (torch.float16, False), (torch.float32, True)], ids=str,
)  # fmt: skip
def test_gradients(
    is_trained: bool, transform: LogitTransform, has_bias: bool, chunk_tokens: int, dtype: torch.dtype,
    is_autocast: bool, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Against plain torch: the columns are the same to rounding in fp32, gradients to that of the products."""
    results = []
    for kind in (KernelSoftmax, TorchSoftmax):
        use(monkeypatch, kind)
        leaves = Leaves(45, is_trained, has_bias, dtype)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=is_autocast):
            columns = leaves.logps(transform, chunk_tokens=chunk_tokens, with_statistics=True)
        assert not any(column.requires_grad for column in columns[1:])
        results.append((columns, leaves.gradients(columns[0])))
    (columns, gradients), (expected, expected_gradients) = results
    for name, column, other in zip(NAMES, columns, expected, strict=True):
        assert column.dtype == torch.float32
        assert_close(column, other, rtol=1e-5, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}")
    eps = torch.finfo(torch.bfloat16 if is_autocast else dtype).eps
    assert gradients.keys() == expected_gradients.keys()
    for name, gradient in expected_gradients.items():
        assert gradients[name].dtype == gradient.dtype
        gap = (gradients[name].float() - gradient.float()).norm() / gradient.float().norm()
        assert gap < max(2 * eps, 1e-5), (name, gap)


@trained
@transforms
def test_gradients_against_fp64(is_trained: bool, transform: LogitTransform, monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, KernelSoftmax)
    leaves = Leaves(45, is_trained, True, torch.float32)
    wide = Leaves(45, is_trained, True, torch.float32)
    for name, leaf in wide.items():
        wide[name] = leaf.detach().double().requires_grad_(leaf.requires_grad)
    found = leaves.gradients(leaves.logps(transform)[0])
    logits = transform(torch.nn.functional.linear(wide["states"], wide["weight"], wide["bias"]))
    logps = logits.log_softmax(-1)[torch.arange(TOKENS), torch.arange(TOKENS) * 5 % 45]
    direction = torch.randn(TOKENS, generator=torch.Generator().manual_seed(1))
    (logps @ direction.double()).backward()
    for name, gradient in found.items():
        assert_close(gradient.double(), wide[name].grad, rtol=1e-5, atol=1e-5)


@pytest.mark.covering(1)
@dtypes
@transforms
def test_log_probs_are_the_same_whatever_else_is_computed(
    dtype: torch.dtype, transform: LogitTransform, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the last bit: without gradients, with statistics, with a frozen and with a trained head."""
    use(monkeypatch, KernelSoftmax)
    with torch.no_grad():
        (alone,) = Leaves(45, False, False, dtype).logps(transform)
        with_statistics = Leaves(45, False, False, dtype).logps(transform, with_statistics=True)
        (in_any_order,) = Leaves(45, False, False, dtype).logps(transform, any_order=True)
    assert torch.equal(alone, with_statistics[0])
    assert_close(in_any_order, alone, rtol=1e-5, atol=1e-5)
    for is_trained in (False, True):
        for statistics in (False, True):
            columns = Leaves(45, is_trained, False, dtype).logps(transform, with_statistics=statistics)
            assert torch.equal(columns[0], alone)
            for one, other in zip(columns, with_statistics, strict=False):
                assert torch.equal(one, other)


@trained
@pytest.mark.parametrize("chunk_tokens", [4, 100])
def test_a_second_backward_adds_the_same_again(
    chunk_tokens: int, is_trained: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(monkeypatch, KernelSoftmax)
    leaves = Leaves(45, is_trained, True, torch.bfloat16)
    value = leaves.logps(TRANSFORMS[3], chunk_tokens=chunk_tokens)[0].sum()  # its gradient is expanded, not in memory
    value.backward(retain_graph=True)
    once = {name: leaf.grad.clone() for name, leaf in leaves.items() if leaf.grad is not None}
    value.backward()
    for name, gradient in once.items():
        assert torch.equal(leaves[name].grad, 2 * gradient)


@trained
@pytest.mark.parametrize("case", ["checkpointed", "strided states", "strided targets", "32-bit targets", "no tokens"])
def test_ways_to_be_used(case: str, is_trained: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each with the numbers of plain torch."""

    def value(leaves: Leaves) -> Tensor:
        states, target = leaves["states"], torch.arange(TOKENS)
        match case:
            case "checkpointed":
                function = lambda s: linear_logps(s, leaves["weight"], None, target, TRANSFORMS[0], chunk_tokens=4)[0]  # noqa: E731
                return checkpoint(lambda s: function(s).square().sum(), states.sin(), use_reentrant=False)
            case "strided states":
                states = states.repeat(1, 2)[:, ::2]
            case "strided targets":
                target = torch.arange(2 * TOKENS)[::2]
            case "32-bit targets" if head.softmax_class() is KernelSoftmax:
                target = target.int()
            case "no tokens":
                states, target = states[:0], target[:0]
        return linear_logps(states, leaves["weight"], None, target, TRANSFORMS[0], chunk_tokens=4)[0].square().sum()

    found = {}
    for kind in (KernelSoftmax, TorchSoftmax):
        use(monkeypatch, kind)
        leaves = Leaves(45, is_trained, False, torch.float32)
        value(leaves).backward()
        found[kind] = {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}
    assert found[KernelSoftmax].keys() == found[TorchSoftmax].keys()
    for name, gradient in found[TorchSoftmax].items():
        assert_close(found[KernelSoftmax][name], gradient, rtol=1e-5, atol=1e-5)


def test_launches() -> None:
    """Of a frozen head two kernels a chunk; of a trained one a kernel a chunk in each pass; without gradients one."""
    counts = {"_fold_kernel": 0, "_errors_kernel": 0}

    class Counted:
        def __init__(self, name: str) -> None:
            self.name, self.kernel = name, getattr(softmax_kernels, name)

        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            counts[self.name] += 1
            return self.kernel[grid]

    def launches(is_trained: bool, has_gradients: bool) -> tuple[int, int]:
        counts.update(dict.fromkeys(counts, 0))
        with pytest.MonkeyPatch.context() as patch:
            use(patch, KernelSoftmax)
            for name in counts:
                patch.setattr(softmax_kernels, name, Counted(name))
            leaves = Leaves(45, is_trained, False, torch.bfloat16)
            with torch.set_grad_enabled(has_gradients):
                logps = leaves.logps(with_statistics=True)[0]
            if has_gradients:
                logps.sum().backward()
        return counts["_fold_kernel"], counts["_errors_kernel"]

    num_chunks = math.ceil(TOKENS / 4)
    assert launches(False, False) == (num_chunks, 0)
    assert launches(False, True) == (num_chunks, num_chunks)
    assert launches(True, True) == (num_chunks, num_chunks)
