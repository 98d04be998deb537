"""How the log-probs of two models differ, token by token, on the completions of some pairs.

Both are scored in eval mode, on the same token ids, in padded rows. A gap is `log pi_MODEL - log pi_REF` of a scored
token, in nats. From the gaps follows what a run would begin with whose policy is the model and whose reference is the
other one: `r = beta * (log pi_MODEL - log pi_REF)` summed over each completion (Rafailov et al. 2023,
arXiv:2305.18290), which is zero, and the loss ln 2, where the reference is the policy.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import final

import numpy as np
import torch
from datasets.utils import tqdm
from transformers import PreTrainedTokenizerBase

from holdfast.batch import PairBatch
from holdfast.inspect.rows import Use, Writer
from holdfast.inspect.two_models.rows import CHOSEN, Completion, Rows
from holdfast.inspect.two_models.sides import Side
from holdfast.scoring.frozen import frozen_logps

QUANTILES = (0.5, 0.9, 0.99)
NUM_LARGEST = 5
_TOKENS_OF_A_BATCH = 8_192
_BEFORE, _AFTER = 24, 8

Logps = Sequence[np.ndarray]
"""The log-probs of each completion's scored tokens, in nats, float64."""


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class LargeGap:
    """One token with a large gap: its completion, its place among the completion's scored tokens (from 0), its id, its
    text with what stands before and after it, and the log-probs of both models."""

    row: int
    side: str
    place: int
    token: int
    before: str
    text: str
    after: str
    model: float
    reference: float

    @property
    def gap(self) -> float:
        """The model's log-prob minus the reference's."""
        return self.model - self.reference


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Gaps:
    """The gaps of all scored tokens. `mean`, `quantiles` and `largest` are of their absolute values, `signed_mean` is
    not; a quantile is the smallest gap that so large a share of all does not exceed, and `curve` are those of 0, 1, ...
    100 %. `share_above` is that of tokens
    whose gap is above `tolerance`. `nats_per_token` has, by side and model, the mean log-prob of a token.

    `log_ratio` is the mean gap of a completion, summed over its tokens, by side. `first_loss` and `first_accuracy` are
    those of DPO with this `beta` before the first step; equal margins count half.
    """

    num_pairs: int
    num_completions: int
    num_tokens: int
    mean: float
    signed_mean: float
    quantiles: Mapping[str, float]
    curve: tuple[float, ...]
    largest: float
    tolerance: float
    share_above: float
    nats_per_token: Mapping[str, Mapping[str, float]]
    log_ratio: Mapping[str, float]
    beta: float
    first_loss: float
    first_accuracy: float
    examples: tuple[LargeGap, ...]


def logps_of(side: Side, rows: Rows, device: torch.device) -> Logps:
    """The log-probs that a model gives the completions. ValueError where one is not a number."""
    found: dict[int, np.ndarray] = {}
    for numbers in tqdm(list(_batches(rows.completions)), desc=f"Log-probs by {side.label}"):
        sequences = [rows.completions[number].sequence for number in numbers]
        batch = PairBatch.from_tensors(on_device(rows.layout.of_completions(sequences), device))
        logps = frozen_logps(side.model, batch, nullcontext).per_token.double().cpu().numpy()
        ends = np.cumsum([sequence.num_targets for sequence in sequences])
        found |= dict(zip(numbers, np.split(logps, ends[:-1]), strict=True))
    for number, values in found.items():
        if not np.isfinite(values).all():
            completion = rows.completions[number]
            raise ValueError(
                f"{side.label} ({side.facts.path}) was asked for log-probs, and one in {completion.side} of row "
                f"{completion.row} is not a number. {_bad_weights(side)}Load it in another dtype (--dtype), or name "
                "another model."
            )
    return [found[number] for number in range(len(rows.completions))]


def on_device(tensors: Mapping[str, object], device: torch.device) -> dict[str, object]:
    """A batch whose tensors are on the device."""
    return {name: each.to(device) if isinstance(each, torch.Tensor) else each for name, each in tensors.items()}


def compare_gaps(
    rows: Rows, model: Logps, reference: Logps, *, tokenizer: PreTrainedTokenizerBase, tolerance: float, beta: float
) -> Gaps:
    """The gaps between the log-probs of two models."""
    ours, theirs = np.concatenate(model), np.concatenate(reference)
    gaps = ours - theirs
    sizes = np.abs(gaps)
    names = [each.side for each in rows.completions]
    ratios = np.array([a.sum() - b.sum() for a, b in zip(model, reference, strict=True)])
    chosen, rejected = np.split(ratios, 2)
    margins = beta * (chosen - rejected)
    of_token = np.repeat(np.array(names), [len(each) for each in model])
    return Gaps(
        num_pairs=len(rows.numbers),
        num_completions=len(names),
        num_tokens=len(gaps),
        mean=float(sizes.mean()),
        signed_mean=float(gaps.mean()),
        quantiles={f"{share:.0%}": float(np.quantile(sizes, share, method="inverted_cdf")) for share in QUANTILES},
        curve=tuple(np.quantile(sizes, np.linspace(0, 1, 101), method="inverted_cdf").tolist()),
        largest=float(sizes.max()),
        tolerance=tolerance,
        share_above=float((sizes > tolerance).mean()),
        nats_per_token={
            name: {"model": float(ours[of_token == name].mean()), "reference": float(theirs[of_token == name].mean())}
            for name in dict.fromkeys(names)
        },
        log_ratio={CHOSEN: float(chosen.mean()), "rejected": float(rejected.mean())},
        beta=beta,
        first_loss=float(np.logaddexp(0, -margins).mean()),
        first_accuracy=float(((margins > 0) + 0.5 * (margins == 0)).mean()),
        examples=_examples(rows, model, reference, Writer(tokenizer)) if sizes.max() > 0 else (),
    )


def worst_completion(rows: Rows, model: Logps, reference: Logps) -> tuple[Completion, int]:
    """The completion with the largest gap of a token, and that token's place among its ids."""
    largest = [float(np.abs(a - b).max()) for a, b in zip(model, reference, strict=True)]
    number = int(np.argmax(largest))
    place = int(np.abs(model[number] - reference[number]).argmax())
    completion = rows.completions[number]
    return completion, int(completion.scored_positions()[place])


def _bad_weights(side: Side) -> str:
    for name, parameter in side.model.named_parameters():
        if parameter.is_floating_point() and not bool(parameter.isfinite().all()):
            return f"Its `{name}` has NaN or infinite values. "
    return ""


def _batches(completions: Sequence[Completion]) -> Iterator[list[int]]:
    """The numbers of the completions in batches of about as many tokens, those of about the same length together."""
    lengths = [len(each.sequence.ids) for each in completions]
    batch: list[int] = []
    for number in sorted(range(len(lengths)), key=lambda each: lengths[each]):
        if batch and (len(batch) + 1) * lengths[number] > _TOKENS_OF_A_BATCH:
            yield batch
            batch = []
        batch.append(number)
    yield batch


def _examples(rows: Rows, model: Logps, reference: Logps, writer: Writer) -> tuple[LargeGap, ...]:
    """The tokens with the largest gaps, at most one of each completion, so that they show more than one text."""
    found = []
    for completion, ours, theirs in zip(rows.completions, model, reference, strict=True):
        place = int(np.abs(ours - theirs).argmax())
        found.append((float(abs(ours[place] - theirs[place])), completion, place, ours[place], theirs[place]))
    found.sort(key=lambda each: -each[0])
    return tuple(
        _large_gap(completion, place, float(ours), float(theirs), writer)
        for _, completion, place, ours, theirs in found[:NUM_LARGEST]
    )


def _large_gap(completion: Completion, place: int, model: float, reference: float, writer: Writer) -> LargeGap:
    ids = completion.sequence.ids.tolist()
    position = int(completion.scored_positions()[place])
    start, stop = max(0, position - _BEFORE), min(len(ids), position + 1 + _AFTER)
    window = ids[start:stop]
    uses = [Use.SCORED if start + number == position else Use.UNSCORED for number in range(len(window))]
    pieces = writer.pieces(window, uses, boundary=position + 1 - start)
    middle = next(number for number, piece in enumerate(pieces) if piece.use is Use.SCORED)
    texts = [piece.text for piece in pieces]
    return LargeGap(
        row=completion.row,
        side=completion.side,
        place=place,
        token=ids[position],
        before=("..." if start else "") + "".join(texts[:middle]),
        text=texts[middle],
        after="".join(texts[middle + 1 :]) + ("..." if stop < len(ids) else ""),
        model=model,
        reference=reference,
    )
