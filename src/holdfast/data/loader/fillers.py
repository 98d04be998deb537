"""The pairs that fill up the last batches when several processes share a dataset, and how they are left out.

All processes must make the same number of steps with batches of one size, so accelerate completes the last batches with
earlier rows. Such a filler must count for nothing, in the loss as in the metrics. In a map-style dataset fillers are
known by their index. A stream has no length, so it is filled up here, with pairs whose two completions are equal;
`prepare_dataset` leaves no such pairs in.

Given up: a stream whose shards are read by one process each. Shards end at different times, so processes would wait
for each other for ever. Instead every process reads the whole stream and takes its own batches of it.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any, final

import torch
from accelerate import Accelerator
from accelerate.utils import recursively_apply
from datasets import IterableDataset
from jaxtyping import Bool, Float
from torch import Tensor

from holdfast.batch import PairBatch
from holdfast.data.columns import CHOSEN_IDS, CHOSEN_MASK, MASK_COLUMNS, REJECTED_IDS, REJECTED_MASK


@final
class StreamWithFillers(torch.utils.data.IterableDataset[dict[str, Any]]):
    """The rows of `stream`, then as many fillers as make their number a multiple of `multiple`."""

    def __init__(self, stream: IterableDataset, multiple: int) -> None:
        self._stream = stream
        self._multiple = multiple

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """The rows, then the fillers."""
        count, row = 0, {}
        for count, row in enumerate(self._stream, 1):  # noqa: B007
            yield row
        has_mask = any(name in row for name in MASK_COLUMNS)
        for _ in range(-count % self._multiple):
            yield {**row, REJECTED_IDS: row[CHOSEN_IDS], **({REJECTED_MASK: row.get(CHOSEN_MASK)} if has_mask else {})}

    def set_epoch(self, epoch: int) -> None:
        """Shuffles a shuffled stream for this epoch."""
        self._stream.set_epoch(epoch)


def with_fillers(dataset: Any, batch_size: int, accelerator: Accelerator) -> Any:
    """`dataset` for a data loader of several processes: a stream is filled up, anything else stays as it is."""
    if accelerator.num_processes == 1 or not isinstance(dataset, IterableDataset):
        return dataset
    return StreamWithFillers(dataset, batch_size * (1 if accelerator.split_batches else accelerator.num_processes))


def real_pairs(
    batch: PairBatch, accelerator: Accelerator, *, is_training: bool, drops_last: bool
) -> tuple[PairBatch, bool]:
    """The batch without its fillers, which may leave no pair; and whether it may have had fillers on any process.

    For the batch that came last from the active data loader. The rows of fillers stay among the inputs.
    """
    is_filled = _may_have_fillers(accelerator, is_training, drops_last)
    return (_without_fillers(batch, accelerator) if is_filled else batch), is_filled


def _may_have_fillers(accelerator: Accelerator, is_training: bool, drops_last: bool) -> bool:
    """Whether the last batch may have fillers; the same answer on all processes."""
    state = accelerator.gradient_state
    if accelerator.num_processes == 1 or not state.in_dataloader:
        return False
    if _is_stream(accelerator):
        return True
    # All micro-batches of a step are fetched before the first is used. The last one is where gradients are synced.
    is_last = state.end_of_dataloader and (state.sync_gradients or not is_training)
    return is_last and accelerator.even_batches and not drops_last


def _without_fillers(batch: PairBatch, accelerator: Accelerator) -> PairBatch:
    """The batch without fillers: the last one of a map-style dataset, or any one of a stream."""
    if _is_stream(accelerator):
        keep: Any = (batch.content[batch.chosen] != batch.content[batch.rejected]).any(-1)
    else:
        # Process r has the r-th part of the last global batch. accelerate's own `remainder` is lost on a resume.
        size = batch.num_pairs * accelerator.num_processes
        num_real = len(_loader(accelerator).dataset) % size or size
        keep = slice(0, max(0, num_real - accelerator.process_index * batch.num_pairs))
    return replace(batch, chosen=batch.chosen[keep], rejected=batch.rejected[keep])


def rows_of_pairs(batch: PairBatch) -> Bool[Tensor, "R"]:
    """True for the input rows that hold a completion of one of the batch's pairs."""
    num_rows, num_columns = batch.inputs["input_ids"].shape
    is_used = torch.zeros(batch.num_sequences, dtype=torch.int64, device=batch.sequence.device)
    is_used = is_used.index_fill(0, torch.cat([batch.chosen, batch.rejected]), 1)[batch.sequence]  # [N]
    rows = is_used.new_zeros(num_rows).scatter_reduce(0, batch.source // num_columns, is_used, "amax")
    return rows.bool()


def mean_over_processes(losses: Float[Tensor, "P"], accelerator: Accelerator) -> Float[Tensor, ""]:
    """The sum of this process's losses over the mean number of pairs of a process.

    Gradients are averaged over processes, so the result is the gradient of the mean loss over all pairs, even where
    processes have unlike numbers of pairs.
    """
    num_pairs: Any = accelerator.reduce(losses.new_full((), len(losses)), reduction="sum")
    return losses.sum() * accelerator.num_processes / num_pairs


def gather_rows(values: Any, is_real: Bool[Tensor, "R"] | None, accelerator: Accelerator) -> Any:
    """The batch's real rows from all processes, of a tensor [R ...] or a nest of such tensors.

    A tensor of another length (the loss, once per pair) is gathered by accelerate, which knows pairs only: it would cut
    the *rows* of a last batch to the number of its *pairs*.
    """
    if is_real is None or (isinstance(values, Tensor) and len(values) != len(is_real)):
        return accelerator.gather_for_metrics(values)
    if accelerator.num_processes == 1:
        return values
    keep: Any = accelerator.gather(is_real)
    return recursively_apply(lambda rows: rows[keep], accelerator.gather(values))


def _is_stream(accelerator: Accelerator) -> bool:
    return isinstance(_loader(accelerator).dataset, torch.utils.data.IterableDataset)


def _loader(accelerator: Accelerator) -> Any:
    return accelerator.gradient_state.active_dataloader
