"""The load-balancing loss of experts, by hand, as a sum over parts of a batch, and as the models' own functions."""

import sys

import pytest
import torch

import families
from holdfast.batch import PairBatch
from holdfast.data.layouts.padded import PaddedLayout
from holdfast.scoring import router
from holdfast.scoring.router import adds_up, balance_loss, router_sums
from holdfast.scoring.score import score
from policies import rows

EXPERTS = ["mixtral", "qwen3_moe", "gpt_oss"]


def test_balance_by_hand() -> None:
    """Three tokens, two experts, the best one is taken. Router probabilities (3/4, 1/4), (3/4, 1/4), (1/4, 3/4): two
    tokens go to the first expert and one to the second, mean probabilities are 7/12 and 5/12, so the loss is
    2 * (2/3 * 7/12 + 1/3 * 5/12) = 19/18. Without the second token it is 2 * (1/2 * 1/2 + 1/2 * 1/2) = 1."""
    logits = (torch.tensor([[0.75, 0.25], [0.75, 0.25], [0.25, 0.75]]).log(),)
    sums = router_sums(logits, 2, 1, None)
    assert sums.tolist() == pytest.approx([2, 1, 1.75, 1.25, 3])
    assert float(balance_loss(sums)) == pytest.approx(19 / 18)
    assert float(balance_loss(router_sums(logits, 2, 1, torch.tensor([[1, 0, 1]])))) == pytest.approx(1.0)


def test_sums_of_parts_are_those_of_the_whole() -> None:
    """In value and gradient, also with weights; the mean of the parts' losses is another number."""
    logits = torch.randn(6, 4, generator=torch.Generator().manual_seed(1), requires_grad=True)
    weights = torch.tensor([1, 3, 0, 2, 1, 1])
    whole = balance_loss(router_sums((logits,), 4, 2, weights))
    parts = [router_sums((logits[part],), 4, 2, weights[part]) for part in (slice(0, 2), slice(2, 6))]
    found = balance_loss(torch.stack(parts).sum(0))
    torch.testing.assert_close(found, whole)
    gradients = [torch.autograd.grad(loss, logits)[0] for loss in (found, whole)]
    torch.testing.assert_close(*gradients)
    mean = torch.stack([balance_loss(part) for part in parts]).mean()
    assert abs(mean - whole).item() > 1e-3


@pytest.mark.parametrize("family", EXPERTS)
def test_a_model_returns_the_sums_of_its_own_loss(family: str) -> None:
    """Its own loss of a batch is that of the sums; afterwards its module has its own function again."""
    model = families.tiny_model(family)
    batch = PairBatch.from_tensors(PaddedLayout(0)(rows(4).to_list()))
    namespace = vars(sys.modules[type(model).__module__])
    before = namespace["load_balancing_loss_func"]
    assert adds_up(model)
    own = score(model, batch, router_logits=True)
    summed = score(model, batch, router_logits=True, router_weights=batch.inputs["attention_mask"])
    assert namespace["load_balancing_loss_func"] is before
    assert own.router_sums is None
    assert summed.aux_loss is None
    assert summed.router_sums is not None
    torch.testing.assert_close(balance_loss(summed.router_sums), own.aux_loss)
    assert torch.equal(own.logps.per_token, summed.logps.per_token)


def test_virtual_tokens_count_where_their_row_does() -> None:
    """A mask of two columns more than the weights: two virtual tokens before each row."""
    weights = torch.tensor([[1, 1, 0], [0, 0, 0]])
    found = router._with_virtual_tokens(weights, torch.ones(2, 5))
    assert found.tolist() == [[1, 1, 1, 1, 0], [0, 0, 0, 0, 0]]


def test_another_loss_is_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """One of another value, one with other parameters, and a model whose forward pass calls none."""
    model = families.tiny_model("mixtral")
    module = sys.modules[type(model).__module__]
    own = module.load_balancing_loss_func

    def doubled(gate_logits, num_experts=None, top_k=2, attention_mask=None):
        return 2 * own(gate_logits, num_experts, top_k, attention_mask)

    def with_keys(gate_logits, num_experts=None, num_keys=None, top_k=2, attention_mask=None):
        return own(gate_logits, num_experts, top_k, attention_mask)

    for other in (doubled, with_keys):
        monkeypatch.setattr(module, "load_balancing_loss_func", other)
        assert not adds_up(model)
    monkeypatch.undo()
    assert adds_up(model)
    assert not adds_up(families.tiny_model("llama"))
