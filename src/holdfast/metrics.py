"""Metrics of a run: `{name: (sum, count)}` on the device, reduced over processes once per log.

Every metric is a mean over examples (pairs, sequences or tokens), whichever batches and processes they came in. So the
sum and the count are kept apart until the log. Nothing here waits for the device before `Tally.reset` or `Tally.total`.
Names and meanings are those of the common DPO trainer, plus `reference/*`. Given up: running values between logs.
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
<<<<<<< HEAD
    """The metrics of one batch, each as (sum, count).

    Over pairs: `loss`; `rewards/chosen|rejected|margins` (beta * nats); `rewards/accuracies`, the share of pairs whose
    chosen reward is higher; `logps/chosen|rejected`, log pi_theta(y|x) in nats; `aux_loss` where the model has one;
    with a reference, `reference/kl_chosen|rejected`.

    Over completion tokens, where there are statistics: `entropy` (nats); `logits/chosen|rejected`, means over the
    vocabulary too; `mean_token_accuracy`, the share of chosen tokens that are the most likely ones. A token counts once
    for each pair that has its sequence. In training also `num_tokens`.
=======
    """The metrics of one batch, each as (sum, count); means over pairs unless said otherwise.

    `loss`; `rewards/chosen|rejected|margins` (beta * nats) and `rewards/accuracies` (share of pairs whose chosen reward
    is the higher); `logps/*` log pi_theta(y|x), nats; with statistics also, over completion tokens, `entropy` (nats),
    `logits/*` (mean over tokens and vocabulary) and `mean_token_accuracy` (share of chosen tokens that are top-1).
    A sequence counts once for each pair that it belongs to. With a reference also `reference/kl_*`; in training also
    `num_tokens`.
>>>>>>> 67d59d4cfaa50a04dd96cc58253c6a97e8c2bae7
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
<<<<<<< HEAD
    """`num_tokens`, a sum and no mean: tokens of prompt and completion of both sides of each pair, without padding.

    It does not depend on the layout: a prompt that several sequences share counts once for each of them.
    """
    ids = batch.inputs["input_ids"]
    if SEGMENTS in batch.inputs:
        ends = batch.inputs["position_ids"].flatten()[batch.source] + 2  # tokens of the sequence up to token n
=======
    """`num_tokens`, a sum and no mean: the tokens of prompt and completion of both sequences of each pair, without
    padding. A prompt counts once per sequence, even where a layout computes it once, so no layout changes the number.
    """
    ids = batch.inputs["input_ids"]
    if SEGMENTS in batch.inputs:
        # The source of a token stands one before it, and positions count from 0.
        ends = batch.inputs["position_ids"].flatten()[batch.source] + 2  # [N] tokens of the sequence up to this one
>>>>>>> 67d59d4cfaa50a04dd96cc58253c6a97e8c2bae7
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
<<<<<<< HEAD
        """Adds the metrics of one batch, on the device."""
=======
        """Counts one batch. The sums stay on the device."""
>>>>>>> 67d59d4cfaa50a04dd96cc58253c6a97e8c2bae7
        for name, (total, count) in metrics.items():
            pair = torch.stack([total.detach().float(), count.detach().float().to(total.device)])
            self._totals[name] = self._totals[name] + pair if name in self._totals else pair

    def reset(self, reduce_sum: Callable[[Tensor], Tensor]) -> dict[str, tuple[float, float]]:
<<<<<<< HEAD
        """(sum, count) of each metric over all processes; then the tally is empty. Waits for the device.

        `reduce_sum` adds a tensor up over the processes.
        """
=======
        """(sum, count) of each metric over all processes; counting then begins anew. `reduce_sum` gives the sum of a
        tensor over all processes. This is the one synchronisation with the device."""
>>>>>>> 67d59d4cfaa50a04dd96cc58253c6a97e8c2bae7
        if not self._totals:
            return {}
        totals = reduce_sum(torch.stack(list(self._totals.values()))).tolist()
        reduced = {name: (total, count) for name, (total, count) in zip(self._totals, totals, strict=True)}
        self._totals = {}
        return reduced

    def total(self, name: str, reduce_sum: Callable[[Tensor], Tensor]) -> float:
<<<<<<< HEAD
        """The sum of one metric since the last log, over all processes; 0 where there is none. Nothing is removed."""
=======
        """The sum of one metric since the last log, over all processes; 0 where there is none. Nothing is reset."""
>>>>>>> 67d59d4cfaa50a04dd96cc58253c6a97e8c2bae7
        return float(reduce_sum(self._totals.get(name, torch.zeros(2)))[0])


def means(totals: Mapping[str, tuple[float, float]]) -> dict[str, float]:
    """Sum over count of each metric; 0 where the count is 0."""
    return {name: total / count if count else 0.0 for name, (total, count) in totals.items()}


def motion(reference: Reference, step: int, sync_steps: int) -> dict[str, float]:
<<<<<<< HEAD
    """The metrics of a moving reference.

    `reference/version` is the number of syncs so far, `reference/drift` the L2 norm of the last one's move in weight
    space, `reference/age` the number of optimizer steps since.
    """
=======
    """The metrics of a moving reference: `reference/version` (syncs so far), `reference/drift` (L2 norm of the last
    move in weight space) and `reference/age` (optimizer steps since that move)."""
>>>>>>> 67d59d4cfaa50a04dd96cc58253c6a97e8c2bae7
    age = step % sync_steps
    return {"reference/version": reference.version, "reference/drift": reference.drift, "reference/age": age}


def tokens_logged(log_history: list[dict[str, Any]]) -> float:
<<<<<<< HEAD
    """Training tokens up to the last log, also those before a run was resumed."""
=======
    """Training tokens up to the last log, including those before a resume."""
>>>>>>> 67d59d4cfaa50a04dd96cc58253c6a97e8c2bae7
    counts = (entry["num_tokens"] for entry in reversed(log_history) if "num_tokens" in entry)
    return next(counts, 0.0)
