"""Metrics of a run: `{name: (sum, count)}` on the device, reduced over processes once per log.

Every metric is a mean over examples (pairs, sequences or tokens), whichever batches and processes they came in. So the
sum and the count are kept apart until the log. Nothing here waits for the device before `Tally.reset` or `Tally.total`.
Names and meanings are those of the common DPO trainer, plus `reference/*`. All metrics of a batch are summed together,
since on a GPU each operation costs a launch however small it is. Given up: the value of a metric at a single step.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, final

import torch
from accelerate.utils import gather_object
from jaxtyping import Float
from torch import Tensor

from holdfast.batch import PairBatch
from holdfast.data.loader.fillers import rows_of_pairs
from holdfast.data.mixing.source_column import MAX_SOURCES
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
    loss_terms: Mapping[str, Float[Tensor, "P"]] | None = None,
) -> dict[str, SumAndCount]:
    """The metrics of one batch, each as (sum, count).

    Over pairs: `loss`, and its `loss_terms` by name; `rewards/chosen|rejected|margins` (beta * nats);
    `rewards/accuracies`, the share of pairs whose chosen reward is higher; `logps/chosen|rejected`, log pi_theta(y|x)
    in nats; `aux_loss` where the model has one; with a reference, `reference/kl_chosen|rejected`.

    Over completion tokens, where there are statistics: `entropy` (nats); `logits/chosen|rejected`, means over the
    vocabulary too; `mean_token_accuracy`, the share of chosen tokens that are the most likely ones. A token counts once
    for each pair that has its sequence. In training also `num_tokens`.
    """
    values = _values_of_pairs(losses, chosen_rewards, rejected_rewards, policy, reference, scores)
    values |= loss_terms or {}
    totals = torch.stack([*values.values()]).detach().sum(1)
    num_pairs = totals.new_full((), len(losses))  # `new_tensor` would wait for the device
    metrics = {name: (total, num_pairs) for name, total in zip(values, totals.unbind(), strict=True)}
    if scores.statistics is not None:
        metrics |= _token_metrics(batch, scores.statistics)
    return metrics | _token_count(batch) if is_training else metrics


def metrics_by_source(
    batch: PairBatch,
    losses: Float[Tensor, "P"],
    chosen_rewards: Float[Tensor, "P"],
    rejected_rewards: Float[Tensor, "P"],
    policy: PairLogps,
    reference: PairLogps | None,
    scores: Scores,
) -> dict[str, SumAndCount]:
    """The metrics of one batch, as `batch_metrics` has them in evaluation, each as (sums, counts) [K] over the pairs of
    each of the batch's K sources, or over their tokens. `batch` must have sources.

    `losses` are those of its pairs, computed for each source alone where they compare pairs with each other, or average
    over the tokens of several.
    """
    assert batch.host_sources is not None
    assert batch.pair_sources is not None
    sources, num_sources = batch.pair_sources, len(batch.host_sources.names)

    def summed(values: Float[Tensor, "P"]) -> Float[Tensor, "K"]:
        return values.detach().new_zeros(num_sources).index_add(0, sources, values.detach())

    num_pairs = summed(torch.ones_like(losses))
    values = _values_of_pairs(losses, chosen_rewards, rejected_rewards, policy, reference, scores)
    metrics = {name: (summed(of_pairs), num_pairs) for name, of_pairs in values.items()}
    if (statistics := scores.statistics) is None:
        return metrics
    lengths = scores.logps.lengths().to(losses.dtype)
    for name, (of_tokens, sequences) in _statistics_by_name(batch, statistics).items():
        of_sequences = scores.logps.segment_sum(of_tokens)
        totals = [(summed(of_sequences[side]), summed(lengths[side])) for side in sequences]
        metrics[name] = torch.stack([total for total, _ in totals]).sum(0), torch.stack([n for _, n in totals]).sum(0)
    return metrics


def _values_of_pairs(
    losses: Float[Tensor, "P"],
    chosen_rewards: Float[Tensor, "P"],
    rejected_rewards: Float[Tensor, "P"],
    policy: PairLogps,
    reference: PairLogps | None,
    scores: Scores,
) -> dict[str, Float[Tensor, "P"]]:
    """The metrics that are means over pairs, with their values.

    `reference/kl_chosen|rejected` are means of log pi_theta(y|x) - log pi_ref(y|x) per sequence, nats. On completions
    that the policy itself draws, its expectation is KL(pi_theta || pi_ref).
    """
    values = {
        "loss": losses,
        "rewards/chosen": chosen_rewards,
        "rewards/rejected": rejected_rewards,
        "rewards/accuracies": (chosen_rewards > rejected_rewards).to(losses.dtype),
        "rewards/margins": chosen_rewards - rejected_rewards,
        "logps/chosen": policy.chosen,
        "logps/rejected": policy.rejected,
    }
    if scores.aux_loss is not None:
        values["aux_loss"] = scores.aux_loss.expand_as(losses)
    if reference is not None:
        values["reference/kl_chosen"] = policy.chosen - reference.chosen
        values["reference/kl_rejected"] = policy.rejected - reference.rejected
    return values


def _token_metrics(batch: PairBatch, statistics: TokenStatistics) -> dict[str, SumAndCount]:
    size, sides = batch.num_sequences, torch.cat([batch.chosen, batch.rejected + batch.num_sequences])
    num_pairs = statistics.entropy.new_zeros(2 * size).index_add(0, sides, statistics.entropy.new_ones(len(sides)))
    counts = num_pairs.view(2, size)[:, batch.sequence]  # [2 N]: how often each token counts, on either side
    columns = torch.stack([statistics.entropy, statistics.mean_logit, statistics.is_top1])  # [3 N]
    totals, num_tokens = (counts[:, None] * columns).sum(-1), counts.sum(-1)  # [2 3], [2]
    of_both, num_of_both = totals[:, 0].sum(), num_tokens.sum()
    return {
        "entropy": (of_both, num_of_both),
        "logits/chosen": (totals[0, 1], num_tokens[0]),
        "logits/rejected": (totals[1, 1], num_tokens[1]),
        "mean_token_accuracy": (totals[0, 2], num_tokens[0]),
    }


def _statistics_by_name(
    batch: PairBatch, statistics: TokenStatistics
) -> dict[str, tuple[Float[Tensor, "N"], list[Tensor]]]:
    """The metrics that are means over completion tokens, with the tokens' values and the sequences that are meant."""
    return {
        "entropy": (statistics.entropy, [batch.chosen, batch.rejected]),
        "logits/chosen": (statistics.mean_logit, [batch.chosen]),
        "logits/rejected": (statistics.mean_logit, [batch.rejected]),
        "mean_token_accuracy": (statistics.is_top1, [batch.chosen]),
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
    """Sums and counts since the last log, in one table of a row for each metric."""

    def __init__(self) -> None:
        self._names: tuple[str, ...] = ()
        self._table: Tensor | None = None  # [M 2]

    @property
    def _totals(self) -> dict[str, Tensor]:
        """The rows of the table by name."""
        return {} if self._table is None else dict(zip(self._names, self._table.unbind(), strict=True))

    def add(self, metrics: Mapping[str, SumAndCount]) -> None:
        """Adds the metrics of one batch, on the device."""
        numbers = [number.detach() for pair in metrics.values() for number in pair]
        table = torch.stack([number.to(numbers[0].device, torch.float32) for number in numbers]).view(-1, 2)
        names = tuple(metrics)
        if self._table is None:
            self._names, self._table = names, table
        elif names == self._names:
            self._table = self._table + table
        else:
            totals = self._totals
            for name, pair in zip(names, table.unbind(), strict=True):
                totals[name] = totals[name] + pair if name in totals else pair
            self._names, self._table = tuple(totals), torch.stack([*totals.values()])

    def reset(self, reduce_sum: Callable[[Tensor], Tensor]) -> dict[str, tuple[float, float]]:
        """(sum, count) of each metric over all processes; then the tally is empty. Waits for the device.

        `reduce_sum` adds a tensor up over the processes.
        """
        if self._table is None:
            return {}
        totals = reduce_sum(self._table).tolist()
        reduced = {name: (total, count) for name, (total, count) in zip(self._names, totals, strict=True)}
        self._names, self._table = (), None
        return reduced

    def record(self) -> dict[str, list[float]]:
        """[sum, count] of each metric on this process. Waits for the device."""
        totals: list[list[float]] = [] if self._table is None else self._table.tolist()
        return dict(zip(self._names, totals, strict=True))

    def restore(self, record: Mapping[str, list[float]], device: torch.device) -> None:
        """Makes `record` what is tallied."""
        self._names = tuple(record)
        self._table = torch.tensor([*record.values()], device=device) if record else None

    def total(self, name: str, reduce_sum: Callable[[Tensor], Tensor]) -> float:
        """The sum of one metric since the last log, over all processes; 0 where there is none. Nothing is removed."""
        return float(reduce_sum(self._totals.get(name, torch.zeros(2)))[0])


@final
class SourceTally:
    """Sums and counts of an evaluation, by the name of the source and of the metric."""

    def __init__(self) -> None:
        self._metrics: tuple[str, ...] = ()
        self._totals: dict[str, Tensor] = {}  # by source, [M 2]

    def add(self, names: Sequence[str], metrics: Mapping[str, SumAndCount]) -> None:
        """Adds the metrics of one batch, whose k-th entries are those of the source `names[k]`, on the device."""
        self._metrics = tuple(metrics)
        table = torch.stack([torch.stack([total.float(), count.float()]) for total, count in metrics.values()])
        for name, totals in zip(names, table.unbind(-1), strict=True):
            if name in self._totals:
                self._totals[name] = self._totals[name] + totals
            elif len(self._totals) <= MAX_SOURCES:  # one more than are reported
                self._totals[name] = totals

    def over_processes(self, reduce_sum: Callable[[Tensor], Tensor]) -> dict[str, dict[str, tuple[float, float]]]:
        """(sum, count) by source and metric over all processes, all of which must call this. Waits for the device.

        `reduce_sum` adds a tensor up over the processes.
        """
        seen: list[Any] = gather_object([(self._metrics, tuple(self._totals))])
        metrics = next((metrics for metrics, _ in seen if metrics), ())
        names = sorted({name for _, of_process in seen for name in of_process})
        if not names:
            return {}
        none = torch.zeros(len(metrics), 2)
        table = torch.stack([self._totals.get(name, none).cpu() for name in names])  # [K M 2]
        totals = reduce_sum(table).tolist()
        pairs = metrics.index("logps/chosen")  # a filler's source may have none
        return {
            name: {metric: (total, count) for metric, (total, count) in zip(metrics, of_source, strict=True)}
            for name, of_source in zip(names, totals, strict=True)
            if of_source[pairs][1]
        }


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
