"""Metrics of a run: `{name: (sum, count)}` on the device, reduced over processes once per log.

Every metric is a mean over examples (pairs, sequences or tokens), whichever batches and processes they came in. So the
sum and the count are kept apart until the log. Nothing here waits for the device before `Tally.reset` or `Tally.total`.
Names and meanings are those of the common DPO trainer, plus `reference/*`. Given up: the value of a metric at a single
step.
"""

from collections.abc import Callable, Mapping
from typing import Any, final

import torch
from jaxtyping import Float
from torch import Tensor

from holdfast.batch import PairBatch
from holdfast.data.loader.fillers import rows_of_pairs
from holdfast.losses import PairLogps
from holdfast.reference.reference import Reference
from holdfast.scoring.score import Scores, TokenStatistics
from holdfast.scoring.segments import SEGMENTS

SumAndCount = tuple[Tensor, Tensor]

EVAL_METRICS = (
    "loss", "rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins", "logps/chosen",
    "logps/rejected", "entropy", "logits/chosen", "logits/rejected", "mean_token_accuracy", "reference/kl_chosen",
    "reference/kl_rejected", "aux_loss", "num_tokens", "runtime", "samples_per_second", "steps_per_second",
)  # fmt: skip
"""What an evaluation gives, after the prefix `eval_`. `aux_loss` is a router's; `reference/*` need a reference."""


def batch_metrics(
    batch: PairBatch,
    losses: Float[Tensor, "P"],
    chosen_rewards: Float[Tensor, "P"],
    rejected_rewards: Float[Tensor, "P"],
    policy: PairLogps,
    reference: PairLogps | None,
    scores: Scores,
    *,
    is_training: bool,
) -> dict[str, SumAndCount]:
    """The metrics of one batch, each as (sum, count).

    Over pairs: `loss`; `rewards/chosen|rejected|margins` (beta * nats); `rewards/accuracies`, the share of pairs whose
    chosen reward is higher; `logps/chosen|rejected`, log pi_theta(y|x) in nats; `aux_loss` where the model has one;
    with a reference, `reference/kl_chosen|rejected`.

    Over completion tokens, where there are statistics: `entropy` (nats); `logits/chosen|rejected`, means over the
    vocabulary too; `mean_token_accuracy`, the share of chosen tokens that are the most likely ones. A token counts once
    for each pair that has its sequence. In training also `num_tokens`.
    """
    metrics = {
        "loss": _over_pairs(losses),
        "rewards/chosen": _over_pairs(chosen_rewards),
        "rewards/rejected": _over_pairs(rejected_rewards),
        "rewards/accuracies": _over_pairs((chosen_rewards > rejected_rewards).to(losses.dtype)),
        "rewards/margins": _over_pairs(chosen_rewards - rejected_rewards),
        "logps/chosen": _over_pairs(policy.chosen),
        "logps/rejected": _over_pairs(policy.rejected),
    }
    if scores.aux_loss is not None:
        metrics["aux_loss"] = _over_pairs(scores.aux_loss.expand_as(losses))
    if scores.statistics is not None:
        metrics |= _token_metrics(batch, scores.statistics)
    if reference is not None:
        metrics |= _reference_metrics(policy, reference)
    return metrics | _token_count(batch) if is_training else metrics


def _over_pairs(values: Float[Tensor, "P"]) -> SumAndCount:
    return values.detach().sum(), values.new_full((), len(values))  # `new_tensor` would wait for the device


def _token_metrics(batch: PairBatch, statistics: TokenStatistics) -> dict[str, SumAndCount]:
    def over_tokens(values: Tensor, sequences: Tensor) -> SumAndCount:
        num_pairs = values.new_zeros(batch.num_sequences).index_add(0, sequences, values.new_ones(len(sequences)))
        count = num_pairs[batch.sequence]  # [N]
        return (values * count).sum(), count.sum()

    return {
        "entropy": over_tokens(statistics.entropy, torch.cat([batch.chosen, batch.rejected])),
        "logits/chosen": over_tokens(statistics.mean_logit, batch.chosen),
        "logits/rejected": over_tokens(statistics.mean_logit, batch.rejected),
        "mean_token_accuracy": over_tokens(statistics.is_top1, batch.chosen),
    }


def _reference_metrics(policy: PairLogps, reference: PairLogps) -> dict[str, SumAndCount]:
    """`reference/kl_chosen|rejected`: the mean of log pi_theta(y|x) - log pi_ref(y|x) per sequence, nats.

    On completions that the policy itself draws, its expectation is KL(pi_theta || pi_ref).
    """
    return {
        "reference/kl_chosen": _over_pairs(policy.chosen - reference.chosen),
        "reference/kl_rejected": _over_pairs(policy.rejected - reference.rejected),
    }


def _token_count(batch: PairBatch) -> dict[str, SumAndCount]:
    """`num_tokens`, a sum and no mean: tokens of prompt and completion of both sides of each pair, without padding and
    up to the last scored one.

    It does not depend on the layout: a prompt that several sequences share counts once for each of them.
    """
    ids = batch.inputs["input_ids"]
    if SEGMENTS in batch.inputs:
        ends = batch.inputs["position_ids"].flatten()[batch.source] + 2  # tokens of the sequence up to token n
        lengths = ends.new_zeros(batch.num_sequences).scatter_reduce(0, batch.sequence, ends, "amax")
        num_tokens = lengths[torch.cat([batch.chosen, batch.rejected])].sum()
    else:
        lengths = batch.inputs.get("attention_mask", torch.ones_like(ids)).sum(1)
        num_tokens = (lengths * rows_of_pairs(batch)).sum()
    return {"num_tokens": (num_tokens, torch.zeros_like(num_tokens))}


@final
class Tally:
    """Sums and counts since the last log."""

    def __init__(self) -> None:
        self._totals: dict[str, Tensor] = {}

    def add(self, metrics: Mapping[str, SumAndCount]) -> None:
        """Adds the metrics of one batch, on the device."""
        for name, (total, count) in metrics.items():
            pair = torch.stack([total.detach().float(), count.detach().float().to(total.device)])
            self._totals[name] = self._totals[name] + pair if name in self._totals else pair

    def reset(self, reduce_sum: Callable[[Tensor], Tensor]) -> dict[str, tuple[float, float]]:
        """(sum, count) of each metric over all processes; then the tally is empty. Waits for the device.

        `reduce_sum` adds a tensor up over the processes.
        """
        if not self._totals:
            return {}
        totals = reduce_sum(torch.stack(list(self._totals.values()))).tolist()
        reduced = {name: (total, count) for name, (total, count) in zip(self._totals, totals, strict=True)}
        self._totals = {}
        return reduced

    def record(self) -> dict[str, list[float]]:
        """[sum, count] of each metric on this process. Waits for the device."""
        totals = torch.stack(list(self._totals.values())).tolist() if self._totals else []
        return dict(zip(self._totals, totals, strict=True))

    def restore(self, record: Mapping[str, list[float]], device: torch.device) -> None:
        """Makes `record` what is tallied."""
        self._totals = {name: torch.tensor(pair, device=device) for name, pair in record.items()}

    def total(self, name: str, reduce_sum: Callable[[Tensor], Tensor]) -> float:
        """The sum of one metric since the last log, over all processes; 0 where there is none. Nothing is removed."""
        return float(reduce_sum(self._totals.get(name, torch.zeros(2)))[0])


def means(totals: Mapping[str, tuple[float, float]]) -> dict[str, float]:
    """Sum over count of each metric; 0 where the count is 0."""
    return {name: total / count if count else 0.0 for name, (total, count) in totals.items()}


def motion(reference: Reference, step: int, sync_steps: int) -> dict[str, float]:
    """The metrics of a moving reference.

    `reference/version` is the number of syncs so far, `reference/drift` the L2 norm of the last one's move in weight
    space, `reference/age` the number of optimizer steps since.
    """
    age = step % sync_steps
    return {"reference/version": reference.version, "reference/drift": reference.drift, "reference/age": age}


def tokens_logged(log_history: list[dict[str, Any]]) -> float:
    """Training tokens up to the last log, also those before a run was resumed."""
    counts = (entry["num_tokens"] for entry in reversed(log_history) if "num_tokens" in entry)
    return next(counts, 0.0)
