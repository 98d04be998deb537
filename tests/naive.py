"""DPO the naive way: a loop that keeps a second fp32 model and scores one unpadded row at a time.

It forms the loss by its equation and takes plain gradient steps. A trainer run on the same batches must follow it. The
second model moves by averaging parameters of the same name; under adapters both are merged into plain weights first, by
peft's own means.
"""

import copy
from collections.abc import Callable
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn

from holdfast.data.layouts.padded import PaddedLayout

BETA, LEARNING_RATE, NUM_STEPS = 0.2, 0.5, 4

Row = dict[str, list[int]]


class Recording:
    """A data collator that keeps the rows of every training batch."""

    def __init__(self) -> None:
        self.batches: list[list[Row]] = []

    def __call__(self, features: list[Row]) -> dict[str, Tensor]:
        self.batches.append(features)
        return PaddedLayout(pad_token_id=0)(features)


def logp(model: nn.Module, row: Row, side: str) -> Tensor:
    """log pi(y|x) of one completion, from one unpadded row; virtual tokens of a tuned prompt stand before it."""
    ids = row["prompt_ids"] + row[side]
    logits = model(torch.tensor([ids]), attention_mask=torch.ones(1, len(ids), dtype=torch.long)).logits[0]
    target = torch.tensor(row[side])
    return logits[-len(target) - 1 : -1].log_softmax(-1).gather(-1, target[:, None]).sum()


def naive_loss(policy: nn.Module, reference: nn.Module, batch: list[Row]) -> Tensor:
    """The mean over pairs of -log sigmoid(beta * (policy's margin - reference's margin))."""
    margins = []
    for row in batch:
        with torch.no_grad():
            ref_margin = logp(reference, row, "chosen_ids") - logp(reference, row, "rejected_ids")
        margins.append(logp(policy, row, "chosen_ids") - logp(policy, row, "rejected_ids") - ref_margin)
    return -nn.functional.logsigmoid(BETA * torch.stack(margins)).mean()


def merged(policy: nn.Module) -> nn.Module:
    """A copy of `policy` in plain weights: adapters merged, where they can be."""
    duplicate: Any = copy.deepcopy(policy)
    is_mergeable = isinstance(policy, PeftModel) and not policy.active_peft_config.is_prompt_learning
    return duplicate.merge_and_unload() if is_mergeable else duplicate


def naive_run(
    policy: nn.Module,
    batches: list[Any],
    alpha: float = 0.0,
    every: int = 1,
    accumulated: int = 1,
    merging: Callable[[Any], nn.Module] = merged,
) -> tuple[list[float], nn.Module]:
    """Losses per step and the reference at the end, of DPO with a second model that moves by `alpha`.

    A step's gradient is the mean of those of `accumulated` batches; `every` so many steps the second model moves, in
    the weights that `merging` gives.
    """
    policy.eval()
    reference = merging(policy) if alpha else copy.deepcopy(policy)
    trainable = [p for p in policy.parameters() if p.requires_grad]
    losses = []
    for first in range(0, len(batches), accumulated):
        parts = [naive_loss(policy, reference, batch) for batch in batches[first : first + accumulated]]
        loss = torch.stack(parts).mean()
        losses.append(loss.item())
        for p, gradient in zip(trainable, torch.autograd.grad(loss, trainable, allow_unused=True), strict=True):
            if gradient is not None:
                p.data -= LEARNING_RATE * gradient
        if alpha and len(losses) % every == 0:
            towards = dict(merging(policy).named_parameters())
            for name, parameter in reference.named_parameters():
                parameter.data = alpha * towards[name].data + (1 - alpha) * parameter.data
    return losses, reference
