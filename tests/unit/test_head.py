"""The head's columns and gradients, against plain autograd over all logits at once."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from holdfast.scoring import head
from holdfast.scoring.causal_lm import is_plain_linear, is_sharded
from holdfast.scoring.head import linear_logps
from holdfast.scoring.transform import LogitTransform

TOKENS, WIDTH, VOCABULARY = 11, 6, 17
TRANSFORMS = [LogitTransform(), LogitTransform(scale=0.25), LogitTransform(cap=2.0), LogitTransform(3.0, 1.5)]
transforms = pytest.mark.parametrize("transform", TRANSFORMS, ids=str)
trained = pytest.mark.parametrize("is_trained", [False, True], ids=["frozen", "trained"])

Leaves = dict[str, Tensor]


def leaves(is_trained: bool = True, has_bias: bool = False, dtype: torch.dtype = torch.float32) -> Leaves:
    draw = torch.Generator().manual_seed(0)
    shapes = {"states": (TOKENS, WIDTH), "weight": (VOCABULARY, WIDTH)} | ({"bias": (VOCABULARY,)} if has_bias else {})
    return {
        name: torch.randn(shape, generator=draw, dtype=dtype).requires_grad_(is_trained or name == "states")
        for name, shape in shapes.items()
    }


def targets() -> Tensor:
    return torch.arange(TOKENS) * 5 % VOCABULARY


def direction() -> Tensor:
    return torch.randn(TOKENS, generator=torch.Generator().manual_seed(1))


def ours(given: Leaves, transform: LogitTransform = TRANSFORMS[0], **options: Any) -> tuple[Tensor, ...]:
    options = {"chunk_tokens": 4} | options
    return linear_logps(given["states"], given["weight"], given.get("bias"), targets(), transform, **options)


def plain(given: Leaves, transform: LogitTransform = TRANSFORMS[0]) -> Tensor:
    """The formula: log softmax of cap * tanh(scale * (h W' + b) / cap), at the target."""
    logits = nn.functional.linear(given["states"], given["weight"], given.get("bias")) * transform.scale
    if logits.dtype != torch.float64:
        logits = logits.float()
    if transform.cap is not None:
        logits = transform.cap * torch.tanh(logits / transform.cap)
    return logits.log_softmax(-1)[torch.arange(TOKENS), targets()]


def gradients(logps: Tensor, given: Leaves) -> Leaves:
    (logps @ direction().to(logps.dtype)).backward()
    return {name: leaf.grad for name, leaf in given.items() if leaf.grad is not None}


@transforms
@trained
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("chunk_tokens", [1, 4, 100])
def test_values_and_gradients(transform: LogitTransform, is_trained: bool, has_bias: bool, chunk_tokens: int) -> None:
    mine, theirs = leaves(is_trained, has_bias), leaves(is_trained, has_bias)
    (found,), expected = ours(mine, transform, chunk_tokens=chunk_tokens), plain(theirs, transform)
    assert_close(found, expected, rtol=0, atol=1e-6 * (1 + float(expected.detach().abs().max())))
    found_gradients, expected_gradients = gradients(found, mine), gradients(expected, theirs)
    assert found_gradients.keys() == expected_gradients.keys()
    assert ("weight" in found_gradients) == is_trained
    for name, gradient in expected_gradients.items():
        assert_close(found_gradients[name], gradient, rtol=1e-5, atol=1e-5)


@transforms
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("chunk_tokens", [1, 4, 100])
@pytest.mark.parametrize("vocabulary", [1, 5, VOCABULARY, 100])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_log_probs_alone_from_parts_of_the_vocabulary(
    transform: LogitTransform, has_bias: bool, chunk_tokens: int, vocabulary: int, dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(head, "_CPU_VOCABULARY", vocabulary)
    given = leaves(has_bias=has_bias, dtype=dtype)
    with torch.no_grad():
        (logps,) = ours(given, transform, chunk_tokens=chunk_tokens, any_order=True)
    assert logps.dtype == dtype
    assert_close(logps, plain(given, transform).detach())


def test_tokens_that_a_model_never_says_may_fill_a_part_of_the_vocabulary(monkeypatch: pytest.MonkeyPatch) -> None:
    """Log-probs are those of the other tokens; of one that is never said it is minus infinity, not NaN."""
    monkeypatch.setattr(head, "_CPU_VOCABULARY", 3)
    given = leaves(has_bias=True)
    with torch.no_grad():
        given["bias"][:7] = float("-inf")
        (logps,) = ours(given, any_order=True)
    is_said = targets() >= 7
    assert_close(logps[is_said], plain(given).detach()[is_said])
    assert (logps[~is_said] == float("-inf")).all()


def test_a_token_beyond_the_vocabulary_has_no_log_prob(monkeypatch: pytest.MonkeyPatch) -> None:
    """NaN, which no store takes, and not whatever was in memory."""
    monkeypatch.setattr(head, "_CPU_VOCABULARY", 3)
    given = leaves(is_trained=False)
    target = targets()
    target[4] = VOCABULARY
    with torch.no_grad():
        (logps,) = linear_logps(
            given["states"], given["weight"], None, target, LogitTransform(), chunk_tokens=4, any_order=True
        )
    assert logps.isnan().tolist() == [row == 4 for row in range(TOKENS)]


def test_log_probs_of_nan_are_nan(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head, "_CPU_VOCABULARY", 3)
    given = leaves()
    with torch.no_grad():
        given["states"][2, 1] = float("nan")
        (logps,) = ours(given, any_order=True)
    assert logps.isnan().tolist() == [row == 2 for row in range(TOKENS)]


@transforms
@pytest.mark.parametrize("moving", [["states"], ["weight"], ["bias"], ["states", "weight", "bias"]], ids="+".join)
def test_gradients_against_finite_differences(transform: LogitTransform, moving: list[str]) -> None:
    """In fp64, whichever of the three is trained."""
    given = {name: leaf.detach() for name, leaf in leaves(has_bias=True, dtype=torch.float64).items()}
    for name in moving:
        given[name].requires_grad_()

    def function(*values: Tensor) -> Tensor:
        return ours(given | dict(zip(moving, values, strict=True)), transform, with_statistics=True)[0]

    assert torch.autograd.gradcheck(function, tuple(given[name] for name in moving))


@transforms
@pytest.mark.parametrize("has_gradients", [False, True])
def test_statistics(transform: LogitTransform, has_gradients: bool) -> None:
    """Each by its definition, in fp64; asking for them moves no log-prob and no gradient."""
    given, alone = leaves(), leaves()
    with torch.set_grad_enabled(has_gradients):
        columns, (without,) = ours(given, transform, with_statistics=True), ours(alone, transform)
    assert torch.equal(columns[0], without)
    logits = transform(given["states"].detach().double() @ given["weight"].detach().double().T)
    p = logits.softmax(-1)
    expected = (
        -(p * p.log()).sum(-1), logits.mean(-1), (logits.argmax(-1) == targets()).double(), (p * p).sum(-1).log()
    )  # fmt: skip
    for found, value in zip(columns[1:], expected, strict=True):
        assert_close(found.double(), value, rtol=1e-5, atol=1e-5)
        assert not found.requires_grad
    assert columns[0].requires_grad == has_gradients
    if has_gradients:
        found_gradients, expected_gradients = gradients(columns[0], given), gradients(without, alone)
        assert all(torch.equal(found_gradients[name], expected_gradients[name]) for name in expected_gradients)


@trained
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("is_autocast", [True, False])
def test_half_precision(is_trained: bool, dtype: torch.dtype, is_autocast: bool) -> None:
    """Products in half precision, the rest in fp32: values exact from the rounded logits, gradients to rounding."""
    mine, exact = leaves(is_trained), leaves(is_trained)
    if not is_autocast:
        mine = {name: leaf.detach().to(dtype).requires_grad_(leaf.requires_grad) for name, leaf in mine.items()}
    with torch.autocast("cpu", dtype=dtype, enabled=is_autocast):
        (found,), expected = ours(mine), plain(mine).detach()
    assert found.dtype == torch.float32
    assert_close(found.detach(), expected, rtol=0, atol=2e-6)
    found_gradients, exact_gradients = gradients(found, mine), gradients(plain(exact), exact)
    for name, gradient in exact_gradients.items():
        assert found_gradients[name].dtype == (torch.float32 if is_autocast else dtype)
        difference = (found_gradients[name].float() - gradient).norm() / gradient.norm()
        assert difference < 8 * torch.finfo(dtype).eps


def test_autocast_keeps_the_graph_of_a_later_use_of_the_weight() -> None:
    """Autocast remembers its casts: one made without a graph would cut the second use off from the weight."""
    given = leaves()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        (found,) = ours(given)
        later = nn.functional.linear(given["states"], given["weight"]).sum()
    later.backward()
    assert_close(given["weight"].grad, given["states"].detach().sum(0).expand(VOCABULARY, -1), rtol=0.05, atol=0.05)
    assert found.requires_grad


@trained
@transforms
@pytest.mark.parametrize("chunk_tokens", [4, 100])
def test_a_second_backward_adds_the_same_again(chunk_tokens: int, transform: LogitTransform, is_trained: bool) -> None:
    """Also where the first one used what was kept of the only chunk."""
    given = leaves(is_trained)
    value = ours(given, transform, chunk_tokens=chunk_tokens)[0] @ direction()
    value.backward(retain_graph=True)
    once = {name: leaf.grad.clone() for name, leaf in given.items() if leaf.grad is not None}
    value.backward()
    for name, gradient in once.items():
        assert torch.equal(given[name].grad, 2 * gradient)


@trained
@pytest.mark.parametrize("case", ["expanded upstream", "checkpointed", "strided states", "weight used twice"])
def test_ways_to_be_used(case: str, is_trained: bool) -> None:
    """Each against plain autograd over the same graph."""

    def value(given: Leaves, logps: Callable[[Leaves], Tensor]) -> Tensor:
        match case:
            case "expanded upstream":
                return logps(given).sum()
            case "checkpointed":
                body = given["states"] * 1.0
                return checkpoint(lambda s: logps(given | {"states": s}).sum(), body.sin(), use_reentrant=False)
            case "strided states":
                return logps(given | {"states": given["states"].repeat(1, 2)[:, ::2]}).square().sum()
            case _:  # tied embeddings: the states themselves are made of the weight
                return logps(given | {"states": given["states"] + given["weight"][targets()]}).square().sum()

    mine, theirs = leaves(is_trained), leaves(is_trained)
    value(mine, lambda given: ours(given)[0]).backward()
    value(theirs, plain).backward()
    for name, leaf in theirs.items():
        if leaf.grad is None:
            assert mine[name].grad is None
        else:
            assert_close(mine[name].grad, leaf.grad, rtol=1e-5, atol=1e-5)


def test_a_gradient_of_a_gradient_is_refused() -> None:
    given = leaves()
    (gradient,) = torch.autograd.grad(ours(given)[0].square().sum(), given["states"], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


@trained
def test_no_tokens(is_trained: bool) -> None:
    given = leaves(is_trained)
    states = given["states"][:0]
    columns = linear_logps(
        states, given["weight"], None, targets()[:0], LogitTransform(), chunk_tokens=4, with_statistics=True
    )
    assert [column.shape for column in columns] == [(0,)] * 5
    columns[0].sum().backward()
    for name in ("states", "weight") if is_trained else ("states",):
        assert torch.equal(given[name].grad, torch.zeros_like(given[name]))


class Watch(TorchDispatchMode):
    """Notes the shape of everything that is made, and the operation that made it."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, tuple[int, ...], bool]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """See `TorchDispatchMode`."""
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self.seen.append((func.__name__, tuple(tensor.shape), tensor._is_view()))
        return result

    def num_products(self) -> int:
        return sum(name.startswith(("mm", "addmm")) for name, _, _ in self.seen)


@trained
def test_no_tensor_of_all_tokens_by_vocabulary_is_made(is_trained: bool) -> None:
    """The largest thing made is a chunk of logits; a frozen head takes half the products and no weight gradient."""
    num_tokens, chunk, vocabulary = 40, 8, 1_009
    states = torch.randn(num_tokens, WIDTH, requires_grad=True)
    weight = torch.randn(vocabulary, WIDTH, requires_grad=is_trained)
    target = torch.arange(num_tokens)
    watch = Watch()
    with watch:
        columns = linear_logps(
            states, weight, None, target, LogitTransform(cap=3.0), chunk_tokens=chunk, with_statistics=True
        )
        columns[0].sum().backward()
    sizes = [torch.Size(shape).numel() for _, shape, _ in watch.seen]
    assert max(sizes) == chunk * vocabulary
    # Frozen: logits and the gradient of the states. Trained: logits, logits again but the last, and a gradient each.
    num_chunks = num_tokens // chunk
    assert watch.num_products() == (4 * num_chunks - 1 if is_trained else 2 * num_chunks)
    made_like_weight = [name for name, shape, is_view in watch.seen if shape == (vocabulary, WIDTH) and not is_view]
    assert bool(made_like_weight) == is_trained


def test_a_trained_head_of_one_chunk_makes_its_logits_once() -> None:
    """Logits, and the gradients of states and weight: three products, where four are needed chunk by chunk."""
    given, watch = leaves(is_trained=True), Watch()
    with watch:
        linear_logps(
            given["states"], given["weight"], None, targets(), LogitTransform(), chunk_tokens=100
        )[0].sum().backward()  # fmt: skip
    assert watch.num_products() == 3


def test_nothing_is_kept_without_gradients() -> None:
    """One product a chunk, and a result without a graph."""
    given, watch = leaves(), Watch()
    with torch.no_grad(), watch:
        (found,) = ours(given)
    assert found.grad_fn is None
    assert watch.num_products() == 3  # 11 tokens, 4 at a time


def test_frozen_states_need_no_product_of_theirs() -> None:
    given, watch = leaves(), Watch()
    given["states"].requires_grad_(False)
    (found,), expected_leaves = ours(given), leaves()
    with watch:
        (found @ direction()).backward()
    assert watch.num_products() - 1 <= 2 * 3  # logits and the weight's gradient; and the product with the direction
    assert_close(given["weight"].grad, gradients(plain(expected_leaves), expected_leaves)["weight"])


class TunedLinear(nn.Linear):
    """A subclass may compute anything."""


def with_hook() -> nn.Module:
    head = nn.Linear(2, 3)
    head.register_forward_hook(lambda module, args, output: output)
    return head


def with_own_forward() -> nn.Module:
    head = nn.Linear(2, 3)
    head.forward = lambda x: x
    return head


@pytest.mark.parametrize(
    ("head", "is_plain"),
    [
        (nn.Linear(2, 3), True),
        (nn.Linear(2, 3, bias=False).bfloat16(), True),
        (TunedLinear(2, 3), False),
        (nn.Sequential(nn.Linear(2, 3)), False),
        (nn.utils.parametrizations.weight_norm(nn.Linear(2, 3)), False),
        (with_hook(), False),
        (with_own_forward(), False),
        (nn.Linear(2, 3).to(torch.float8_e4m3fn), False),
    ],
)
def test_what_is_a_plain_head(head: nn.Module, is_plain: bool) -> None:
    assert is_plain_linear(head) == is_plain


def test_what_is_sharded() -> None:
    model = nn.Sequential(nn.Linear(2, 3))
    assert not is_sharded(model)
    model[0].__class__ = type("FSDPLinear", (FSDPModule, nn.Linear), {})
    assert is_sharded(model)
