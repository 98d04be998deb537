"""DPO the naive way: a loop that keeps a second fp32 model and scores one unpadded row at a time.

It forms the loss by its equation and takes plain gradient steps. A trainer run on the same batches must follow it.
"""

import copy
from typing import Any

import torch
from torch import Tensor, nn

from holdfast.data.layouts import PaddedLayout

BETA, LEARNING_RATE, NUM_STEPS = 0.2, 0.5, 4


class Recording:
    """A data collator that keeps the rows of every training batch."""

    def __init__(self) -> None:
        self.batches: list[list[dict[str, list[int]]]] = []

    def __call__(self, features: list[dict[str, list[int]]]) -> dict[str, Tensor]:
        self.batches.append(features)
        return PaddedLayout(pad_token_id=0)(features)


def logp(model: nn.Module, row: dict[str, list[int]], side: str) -> Tensor:
    """log pi(y|x) of one completion, from one unpadded row; virtual tokens of a tuned prompt stand before it."""
    ids = row["prompt_ids"] + row[side]
    logits = model(torch.tensor([ids]), attention_mask=torch.ones(1, len(ids), dtype=torch.long)).logits[0]
    target = torch.tensor(row[side])
    return logits[-len(target) - 1 : -1].log_softmax(-1).gather(-1, target[:, None]).sum()


def naive_run(
    policy: nn.Module, batches: list[Any], alpha: float = 0.0, every: int = 1
) -> tuple[list[float], nn.Module]:
    """Losses per step and the reference at the end, of DPO with a second model that moves by `alpha`."""
    policy.eval()
    reference = copy.deepcopy(policy)
    losses = []
    for step, batch in enumerate(batches, start=1):
        margins = []
        for row in batch:
            with torch.no_grad():
                ref_margin = logp(reference, row, "chosen_ids") - logp(reference, row, "rejected_ids")
            margins.append(logp(policy, row, "chosen_ids") - logp(policy, row, "rejected_ids") - ref_margin)
        loss = -nn.functional.logsigmoid(BETA * torch.stack(margins)).mean()
        losses.append(loss.item())
        trainable = [p for p in policy.parameters() if p.requires_grad]
        for p, gradient in zip(trainable, torch.autograd.grad(loss, trainable, allow_unused=True), strict=True):
            if gradient is not None:
                p.data -= LEARNING_RATE * gradient
        if alpha and step % every == 0:
            for ours, theirs in zip(reference.parameters(), policy.parameters(), strict=True):
                ours.data = alpha * theirs.data + (1 - alpha) * ours.data
    return losses, reference
