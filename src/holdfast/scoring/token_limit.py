"""`tokens_per_batch`: a batch with more tokens than the limit is scored a few rows at a time.

The log-probs and gradients are those of the whole batch; the memory is that of a few rows. Without a limit, the rare
batch of long pairs would decide what a machine can train. Only the log-probs of each group of rows are saved, and its
activations are computed again in the backward pass. A batch within the limit is scored at once, at no extra cost.

Where weights are sharded, a part is a forward pass of all processes. So all compute as many parts as the one that has
the most, and what a process adds counts nothing.

Given up: the second forward pass that a larger batch pays. A backward pass after each group would save it, but then the
loss would be no function of the whole batch, as some losses must be.
"""

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from itertools import accumulate
from math import ceil
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from holdfast.agreement import largest_of_all, raised_together
from holdfast.batch import PairBatch, SequenceLogps
from holdfast.scoring.causal_lm import is_sharded
from holdfast.scoring.score import Scores, TokenStatistics, score
from holdfast.scoring.segments import SEGMENTS


def score_within_limit(
    model: nn.Module,
    batch: PairBatch,
    num_tokens: int | None,
    *,
    router_logits: bool = False,
    router_weights: Tensor | None = None,
) -> Scores:
    """`score(model, batch)` with statistics, and with at most `num_tokens` tokens (or one row) in the model at a time.

    None is no limit. `router_logits` and `router_weights` are those of `score`. A load-balancing loss is a mean over
    all tokens of a batch, so it must not be asked for with a limit. ValueError where a batch over the limit has inputs
    that cannot be cut into rows.
    """
    num_rows, num_columns = batch.inputs["input_ids"].shape
    is_over = num_tokens is not None and num_rows > 1 and num_rows * num_columns > num_tokens
    rows_at_a_time = max(1, (num_tokens or 0) // num_columns) if is_over else num_rows
    num_parts = own_num_parts = ceil(num_rows / rows_at_a_time)
    if num_tokens is not None and is_sharded(model):
        num_parts = int(largest_of_all([own_num_parts])[0])
    if num_parts == 1:
        return score(model, batch, statistics=True, router_logits=router_logits, router_weights=router_weights)
    assert not router_logits
    results: list[tuple[Tensor, ...]] = []
    indices: list[Tensor] = []
    with raised_together(where=is_sharded(model)):
        groups = list(_row_groups(batch, rows_at_a_time))
    for rows, tokens in groups + groups[:1] * (num_parts - own_num_parts):
        of_rows = partial(_logps_and_statistics, model, rows)
        results.append(checkpoint(of_rows, use_reentrant=False) if torch.is_grad_enabled() else of_rows())
        indices.append(tokens)
    added, indices = results[own_num_parts:], indices[:own_num_parts]
    for logps, *_ in added:  # without a number, but with a graph: it passes backward as those of other processes
        results[0] = (results[0][0] + 0.0 * logps, *results[0][1:])
    results = results[:own_num_parts]
    order = torch.cat(indices).argsort()
    logps, *columns = (torch.cat(values)[order] for values in zip(*results, strict=True))
    return Scores(
        logps=SequenceLogps(per_token=logps, sequence=batch.sequence, num_sequences=batch.num_sequences),
        statistics=TokenStatistics.of_columns(columns),
    )


def _logps_and_statistics(model: nn.Module, rows: PairBatch) -> tuple[Tensor, ...]:
    scores = score(model, rows, statistics=True)
    assert scores.statistics is not None
    return scores.logps.per_token, *scores.statistics.columns()


def _row_groups(batch: PairBatch, num_rows: int) -> Iterator[tuple[PairBatch, Int[Tensor, "n"]]]:
    """The batch `num_rows` rows at a time, each with the indices of the completion tokens that are in it."""
    ids = batch.inputs["input_ids"]
    num_columns = ids.shape[1]
    by_row = (batch.source // num_columns).argsort(stable=True)  # [N]
    ends = [0, *accumulate(batch.tokens_of_rows())]
    for first in range(0, len(ids), num_rows):
        last = min(first + num_rows, len(ids))
        tokens = by_row[ends[first] : ends[last]].sort().values
        yield _rows(batch, first, last, tokens), tokens


def _rows(batch: PairBatch, first: int, last: int, tokens: Int[Tensor, "n"]) -> PairBatch:
    """The rows from `first` to before `last`, with their completion `tokens`, as a batch without pairs.

    Sequences keep their numbers. ValueError where an input cannot be assigned to rows.
    """
    if batch.unidentified_inputs:
        raise ValueError(
            f"tokens_per_batch was asked for, but of the model inputs {list(batch.unidentified_inputs)} that the data "
            "collator adds nobody can tell which rows they belong to, so a batch cannot be cut. Give them one row per "
            "completion, or drop tokens_per_batch and lower per_device_train_batch_size."
        )
    num_rows, num_columns = batch.inputs["input_ids"].shape
    inputs: dict[str, Any] = {
        name: value[first:last] if isinstance(value, Tensor) and len(value) == num_rows else value
        for name, value in batch.inputs.items()
        if name != SEGMENTS
    }
    segments: Any = batch.inputs.get(SEGMENTS)
    if segments is not None:
        inputs[SEGMENTS] = segments.of_rows(first, last).to(batch.source.device)
    return replace(
        batch,
        inputs=inputs,
        source=batch.source[tokens] - first * num_columns,
        target=batch.target[tokens],
        sequence=batch.sequence[tokens],
        chosen=batch.chosen[:0],
        rejected=batch.rejected[:0],
        reference_logps=None,
        host_sequences=None,
        host_sources=None,
        pair_sources=None,
        pair_weights=None,
        pair_margins=None,
    )
