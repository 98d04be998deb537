"""A batch scored in parts of so many tokens, where it has more: the same numbers and gradients in less memory.

Lengths vary, and the rare batch of long pairs decides what a machine can train. Such a batch's rows are given to the
model a few at a time; of each part only the log-probs are kept, and its activations are made again in the backward
pass. Batches that fit are scored at once, and cost nothing more.

Given up: the forward pass that a batch in parts pays a second time, instead of a backward pass after each part. The
loss stays a function of the whole batch that way, whatever it compares.
"""

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from itertools import accumulate
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from holdfast.batch import PairBatch, SequenceLogps
from holdfast.scoring.score import Scores, TokenStatistics, score
from holdfast.scoring.segments import PIECES

_COLUMNS = ("entropy", "mean_logit", "is_top1", "log_sum_sq_probs")


def score_in_parts(
    model: nn.Module, batch: PairBatch, num_tokens: int | None, *, router_logits: bool = False
) -> Scores:
    """`score(model, batch)` with statistics, and with at most `num_tokens` tokens (or one row) in the model at a time;
    None for no limit. A load-balancing loss, a mean over all tokens of a batch, must not be asked for with a limit."""
    num_rows, num_columns = batch.inputs["input_ids"].shape
    if num_tokens is None or num_rows == 1 or num_rows * num_columns <= num_tokens:
        return score(model, batch, statistics=True, router_logits=router_logits)
    assert not router_logits
    found: list[tuple[Tensor, ...]] = []
    places: list[Tensor] = []
    for part, chosen in _parts(batch, max(1, num_tokens // num_columns)):
        columns = partial(_columns, model, part)
        found.append(checkpoint(columns, use_reentrant=False) if torch.is_grad_enabled() else columns())
        places.append(chosen)
    order = torch.cat(places).argsort()
    logps, *statistics = (torch.cat(column)[order] for column in zip(*found, strict=True))
    return Scores(
        logps=SequenceLogps(per_token=logps, sequence=batch.sequence, num_sequences=batch.num_sequences),
        statistics=TokenStatistics(**dict(zip(_COLUMNS, statistics, strict=True))),
    )


def _columns(model: nn.Module, part: PairBatch) -> tuple[Tensor, ...]:
    scores = score(model, part, statistics=True)
    return scores.logps.per_token, *(getattr(scores.statistics, name) for name in _COLUMNS)


def _parts(batch: PairBatch, num_rows: int) -> Iterator[tuple[PairBatch, Int[Tensor, "n"]]]:
    """The batch `num_rows` rows at a time, with which of its completion tokens are in them, none left out."""
    ids = batch.inputs["input_ids"]
    num_columns = ids.shape[1]
    by_row = (batch.source // num_columns).argsort(stable=True)  # [N]
    ends = [0, *accumulate(batch.tokens_of_rows())]
    for first in range(0, len(ids), num_rows):
        last = min(first + num_rows, len(ids))
        here = by_row[ends[first] : ends[last]].sort().values
        yield _rows(batch, first, last, here), here


def _rows(batch: PairBatch, first: int, last: int, here: Int[Tensor, "n"]) -> PairBatch:
    """Some rows as a batch; sequences keep their numbers, and pairs are none. ValueError where it cannot be told which
    rows an input belongs to."""
    if batch.unidentified:
        raise ValueError(
            f"tokens_per_batch was asked for, but of the model inputs {list(batch.unidentified)} that the data "
            "collator adds nobody can tell which rows they belong to, so a batch cannot be cut. Give them one row per "
            "completion, or drop tokens_per_batch and lower per_device_train_batch_size."
        )
    num_rows, num_columns = batch.inputs["input_ids"].shape
    inputs: dict[str, Any] = {
        name: value[first:last] if isinstance(value, Tensor) and len(value) == num_rows else value
        for name, value in batch.inputs.items()
        if name != PIECES
    }
    pieces: Any = batch.inputs.get(PIECES)
    if pieces is not None:
        inputs[PIECES] = replace(pieces, rows=pieces.rows[first:last])
    return replace(
        batch,
        inputs=inputs,
        source=batch.source[here] - first * num_columns,
        target=batch.target[here],
        sequence=batch.sequence[here],
        chosen=batch.chosen[:0],
        rejected=batch.rejected[:0],
        reference=None,
        sequences=None,
    )
