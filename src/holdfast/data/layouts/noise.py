"""What rounding alone does to a model's log-probs on one batch of padded rows, in half precision.

Two right layouts differ by rounding. How much that is depends on the model: on its depth, its dtype, its kernels, and
on how sharp its distribution is. A constant tolerance is too wide for a small model, where it hides a wrong position,
and too narrow for a sharp one. So the padded layout, which is right for every model, is compared with itself: with the
rows padded further and in another order, and with the embeddings of its tokens rounded once more. The second is needed
where padding is computed exactly, as plain attention does on a CPU: there only the first kernel that rounds otherwise
would show.

Where a router is close to a tie, rounding sends a token to another expert, and its log-prob jumps. So of models with
experts the largest tenth of the tokens' gaps is left out of the mean; a wrong layout shows in more tokens than that.

Given up: three more forward passes of the first batch in half precision, and a model whose log-probs depend on the
padding by as much as a wrong layout changes them.
"""

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from holdfast.batch import ContentId, PairBatch, SequenceLogps
from holdfast.scoring.tolerance import LEAST_NOISE_NATS, MOST_NOISE_NATS, TIMES_NOISE, TIMES_ROUNDED_INPUTS

_NUM_DRAWS = 2
_PRIME = 2_654_435_761

ByContent = dict[ContentId, Tensor]


def by_content(batch: PairBatch, logps: SequenceLogps) -> ByContent:
    """The log-probs of each of the batch's sequences, fp32, by content id."""
    per_sequence = logps.per_token.detach().float().split(batch.lengths())
    return dict(zip(batch.content_ids(), per_sequence, strict=True))


def gaps(ours: ByContent, theirs: ByContent) -> Tensor:
    """The distances of the log-probs of each token, nats [N]. Both are of the same sequences."""
    assert ours.keys() == theirs.keys(), "the same pairs"
    return torch.cat([(ours[content] - theirs[content]).abs() for content in theirs])


def typical_gap(causal_lm: PreTrainedModel, distances: Tensor) -> float:
    """The mean distance per token in half precision, nats; of a model with experts without the largest tenth. NaN where
    one is NaN."""
    has_experts = any("expert" in name for name in vars(causal_lm.config.get_text_config()))
    if not has_experts or bool(distances.isnan().any()):
        return float(distances.mean())
    return float(distances.sort().values[: -(-9 * len(distances) // 10)].mean())


def largest_rounding_gap(
    causal_lm: PreTrainedModel,
    logps: Callable[[PairBatch], SequenceLogps],
    padded_batch: PairBatch,
    other_padded_batch: PairBatch,
    *,
    rounding_unit: float,
) -> float:
    """The largest mean gap per token (nats) to the log-probs of `padded_batch` that rounding explains in half
    precision.

    `logps` scores a batch with the model. `other_padded_batch` has the same pairs in another order and padding, and
    `rounding_unit` is that of the dtype that the model computes in. It is `TIMES_NOISE` times the gap between the two
    batches or `TIMES_ROUNDED_INPUTS` times the gap that rounded embeddings make, whichever is more, and between
    `LEAST_NOISE_NATS` and `MOST_NOISE_NATS`.
    """
    expected = by_content(padded_batch, logps(padded_batch))

    def changed(batch: PairBatch) -> float:
        gap = typical_gap(causal_lm, gaps(by_content(batch, logps(batch)), expected))
        return 0.0 if math.isnan(gap) else gap  # NaN explains nothing

    padding = changed(other_padded_batch)
    inputs = 0.0
    for draw in range(_NUM_DRAWS):
        with _rounded_embeddings(causal_lm, rounding_unit, draw):
            inputs = max(inputs, changed(padded_batch))
    explained = max(LEAST_NOISE_NATS, TIMES_NOISE * padding, TIMES_ROUNDED_INPUTS * inputs)
    return min(explained, MOST_NOISE_NATS)


@contextlib.contextmanager
def _rounded_embeddings(causal_lm: PreTrainedModel, unit: float, draw: int) -> Iterator[None]:
    """Inside, each value of the embeddings is larger or smaller by the relative `unit`. `draw` decides which. Nothing
    happens to a model that does not say where its embeddings are."""

    def rounded(module: nn.Module, args: Any, output: Any) -> Any:
        if not isinstance(output, Tensor):
            return output
        numbers = torch.arange(output.numel(), device=output.device)
        signs = 1 - 2 * ((numbers * _PRIME + draw * _PRIME // 7 >> 13) & 1).view(output.shape)
        return (output.float() * (1 + unit * signs)).to(output.dtype)

    try:
        embeddings: Any = causal_lm.get_input_embeddings()
    except (AttributeError, NotImplementedError):
        embeddings = None
    handle = embeddings.register_forward_hook(rounded) if isinstance(embeddings, nn.Module) else None
    try:
        yield
    finally:
        if handle is not None:
            handle.remove()
