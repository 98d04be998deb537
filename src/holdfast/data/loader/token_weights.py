"""How many of a batch's completions each token of its rows stands for, where some of its pairs are fillers.

A layout counts that in the attention mask, over all pairs of the batch. A mean over tokens that is to leave fillers out
needs the same over its real pairs. A token that a filler shares with a real pair, such as the prompt of both, still
counts for the real one. It reads sequences from the device, for last batches only.
"""

from itertools import accumulate

import torch
from jaxtyping import Int
from torch import Tensor

from holdfast.batch import PairBatch
from holdfast.data.loader.fillers import rows_of_pairs
from holdfast.scoring.segments import SEGMENTS, Segments


def token_weights(batch: PairBatch, real: PairBatch) -> Int[Tensor, "R T"]:
    """For each token of `batch` the number of completions, of the pairs of `real`, that it belongs to or is the prompt
    of; in rows of one sequence each 1 where a real pair has the row. 0 for padding."""
    ids = batch.inputs["input_ids"]
    mask = batch.inputs.get("attention_mask", torch.ones_like(ids))
    if real.num_pairs == batch.num_pairs:
        return mask
    segments = batch.inputs.get(SEGMENTS)
    if not isinstance(segments, Segments):
        return mask * rows_of_pairs(real)[:, None]
    ones = torch.ones_like(real.chosen)
    counts = ones.new_zeros(batch.num_sequences).index_add(0, real.chosen, ones).index_add(0, real.rejected, ones)
    weights = [n for row in _weights_of_rows(segments, _first_sources(batch), counts.tolist()) for n in row]
    return torch.tensor(weights, device=ids.device).view(ids.shape)


def _first_sources(batch: PairBatch) -> list[int]:
    """Of each sequence, the flat position that predicts its first scored token."""
    starts = [0, *accumulate(batch.lengths())][:-1]
    return batch.source[torch.tensor(starts, device=batch.source.device)].tolist()


def _weights_of_rows(segments: Segments, sources: list[int], counts: list[int]) -> list[list[int]]:
    """The weight of each token of each row, where `counts` says how often each sequence counts. The completions of a
    segment stand in the order of their sequences."""
    order = sorted(range(len(sources)), key=lambda sequence: sources[sequence])
    rows: list[list[int]] = []
    for index, row in enumerate(segments.rows):
        weights: list[int] = []
        for segment in row:
            completions = [length for group in segment.groups for length in group]
            num_sequences = max(1, len(completions))
            members, order = sorted(order[:num_sequences]), order[num_sequences:]
            weights += [sum(counts[sequence] for sequence in members)] * segment.prompt
            for sequence, length in zip(members, completions, strict=False):
                weights += [counts[sequence]] * length
        rows.append(weights + [0] * (segments.num_columns - len(weights)))
        assert not order or sources[order[0]] >= (index + 1) * segments.num_columns
    return rows
