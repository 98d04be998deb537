"""The load-balancing loss of a Mixture-of-Experts model as sums over tokens, which add up over processes.

The loss is E * sum_e f_e p_e over E experts (Fedus et al. 2021, Eqs. 4-6, arXiv:2101.03961). f_e is the mean number of
times that a token goes to expert e, and p_e its mean router probability. A product of two means is no mean over
tokens, so the losses of several processes do not average to that of their common batch. The sums behind both means do
add up. Models of transformers compute the loss in a function of their module, which is replaced for the length of one
forward pass: it is called with the model's own router logits, and its result leaves as the model's own output.

Given up: models whose loss is another one. `adds_up` finds them, by asking their function.
"""

import contextlib
import inspect
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel

_FUNCTION = "load_balancing_loss_func"
_PARAMETERS = ["gate_logits", "num_experts", "top_k", "attention_mask"]


def router_sums(
    gate_logits: Sequence[Float[Tensor, "T E"]], num_experts: int, top_k: int, weights: Tensor | None
) -> Float[Tensor, "K"]:
    """K = 2 E + 1 sums over the tokens of all layers: for each expert how many tokens go to it, for each expert its
    router probability, and the number of tokens. A token counts `weights` times (None: once); [R T] or flat."""
    device = gate_logits[0].device
    chosen = torch.zeros(num_experts, device=device)
    probability, num_tokens = torch.zeros_like(chosen), torch.zeros(1, device=device)
    for logits in gate_logits:
        probabilities = logits.to(device).softmax(-1)  # [T E]
        experts = probabilities.topk(top_k, dim=-1).indices  # [T top_k]
        counts = torch.ones(len(probabilities), device=device) if weights is None else weights.flatten().to(chosen)
        chosen = chosen.scatter_add(0, experts.flatten(), counts.repeat_interleave(top_k))
        probability = probability + (probabilities.float() * counts[:, None]).sum(0)
        num_tokens = num_tokens + counts.sum()
    return torch.cat([chosen, probability, num_tokens])


def balance_loss(sums: Float[Tensor, "K"]) -> Float[Tensor, ""]:
    """The load-balancing loss of the tokens that `router_sums` has added up, of one process or of several."""
    num_experts = len(sums) // 2
    chosen, probability = (sums[:-1] / sums[-1]).split(num_experts)
    return num_experts * (chosen * probability).sum()


def adds_up(causal_lm: PreTrainedModel) -> bool:
    """Whether the model's load-balancing loss is that of `balance_loss`. Its own function is asked, with made-up router
    logits, so nothing is scored."""
    namespace = _namespace(causal_lm)
    if namespace is None or [*inspect.signature(namespace[_FUNCTION]).parameters] != _PARAMETERS:
        return False
    draw = torch.Generator().manual_seed(0)
    gate_logits = tuple(torch.randn(6, 3, generator=draw) for _ in range(2))
    for mask in (None, torch.tensor([[1, 2, 0], [3, 1, 1]])):
        own = namespace[_FUNCTION](gate_logits, 3, 2, mask)
        ours = balance_loss(router_sums(gate_logits, 3, 2, mask))
        if not isinstance(own, Tensor) or own.shape != ours.shape or not torch.allclose(own, ours):
            return False
    return True


@contextlib.contextmanager
def returning_sums(causal_lm: PreTrainedModel, weights: Tensor | None) -> Iterator[None]:
    """Inside, the model returns the `router_sums` of a batch as its `aux_loss`, if `weights` [R T] says how often each
    token counts; with None nothing changes. Only for a model that `adds_up`."""
    if weights is None:
        yield
        return
    namespace = _namespace(causal_lm)
    assert namespace is not None
    own = namespace[_FUNCTION]

    def sums(gate_logits: Any, num_experts: Any = None, top_k: int = 2, attention_mask: Any = None) -> Tensor:
        return router_sums(gate_logits, num_experts, top_k, _with_virtual_tokens(weights, attention_mask))

    namespace[_FUNCTION] = sums
    try:
        yield
    finally:
        namespace[_FUNCTION] = own


def _with_virtual_tokens(weights: Tensor, mask: Tensor | None) -> Tensor:
    """Prompt-learning adapters put virtual tokens before each row, which count if the row does."""
    num_virtual = 0 if mask is None else mask.shape[-1] - weights.shape[-1]
    return torch.cat([weights.amax(1, keepdim=True).expand(-1, num_virtual), weights], 1) if num_virtual else weights


def _namespace(causal_lm: PreTrainedModel) -> dict[str, Any] | None:
    """The names that the model's forward pass looks the function up in; None where it calls none of that name."""
    for kind in type(causal_lm).__mro__:
        function: Any = inspect.unwrap(vars(kind)["forward"]) if "forward" in vars(kind) else None
        if _FUNCTION in getattr(getattr(function, "__code__", None), "co_names", ()):
            return function.__globals__ if _FUNCTION in function.__globals__ else None
    return None
