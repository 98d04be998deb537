"""Pairs that share prompts, as batches of shared and of padded rows, and how a model's numbers on them are compared."""

import random
from collections.abc import Sequence
from functools import partial

import torch
import transformers as tf
from torch import Tensor, nn

import holdfast.data.layouts.trial as trial
import oracle
from families import VOCABULARY
from holdfast.batch import PairBatch, SequenceLogps
from holdfast.data.layouts.padded import PaddedLayout
from holdfast.data.layouts.prefix_shared import SharedLayout
from holdfast.scoring.score import score


def made_rows() -> list[dict[str, list[int]]]:
    """Four prompts; the first one has three pairs with four completions, the last one is longer than the windows."""
    draw = random.Random(0)

    def ids(low: int, high: int) -> list[int]:
        return [draw.randrange(3, VOCABULARY) for _ in range(draw.randint(low, high))]

    rows = [{"prompt_ids": ids(3, 9), "chosen_ids": ids(2, 8), "rejected_ids": ids(1, 8)} for _ in range(3)]
    more = {**rows[0], "rejected_ids": ids(3, 6)}
    last = {**rows[0], "chosen_ids": more["rejected_ids"], "rejected_ids": ids(4, 7)}
    return [*rows, more, last, {"prompt_ids": ids(14, 14), "chosen_ids": ids(9, 9), "rejected_ids": ids(7, 7)}]


ROWS = made_rows()


def shared_batch(rows: Sequence[dict] = ROWS, row_tokens: int = 40) -> PairBatch:
    return PairBatch.from_tensors(SharedLayout(0, row_tokens=row_tokens)(rows))


def padded_batch(rows: Sequence[dict] = ROWS) -> PairBatch:
    return PairBatch.from_tensors(PaddedLayout(0)(rows))


def logps_of(model: nn.Module, batch: PairBatch) -> SequenceLogps:
    return score(model, batch).logps


def oracle_logps(model: nn.Module, rows: Sequence[dict] = ROWS) -> Tensor:
    """Of each distinct sequence, in the order of a batch: the chosen ones, then the rejected ones."""
    completions = [
        (tuple(row["prompt_ids"]), tuple(row[side])) for side in ("chosen_ids", "rejected_ids") for row in rows
    ]
    return torch.cat([oracle.sequence_logps(model, *completion) for completion in dict.fromkeys(completions)])


def gradients(value: Tensor, model: nn.Module) -> dict[str, Tensor]:
    model.zero_grad()
    value.backward()  # not `autograd.grad`, which reentrant checkpointing refuses
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_equal_logps(found: Tensor, expected: Tensor, model: nn.Module, oracle_model: nn.Module) -> None:
    """Log-probs to 1e-5, and the gradient of a random combination of them to 1e-5 of its size."""
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    direction = torch.randn(len(expected), generator=torch.Generator().manual_seed(1))
    expected_gradients = gradients(expected @ direction, oracle_model)
    found_gradients = gradients(found @ direction, model)
    assert found_gradients.keys() == expected_gradients.keys()
    for name, gradient in expected_gradients.items():
        torch.testing.assert_close(
            found_gradients[name], gradient, rtol=1e-4, atol=1e-5 * (1 + float(gradient.abs().max()))
        )


def assert_same(model: nn.Module, oracle_model: nn.Module | None = None, row_tokens: int = 40) -> None:
    """A batch in shared rows against the oracle."""
    expected = oracle_logps(oracle_model or model)
    batch = shared_batch(row_tokens=row_tokens)
    assert_equal_logps(logps_of(model, batch).per_token, expected, model, oracle_model or model)


def problem(model: tf.PreTrainedModel, rows: Sequence[dict] = ROWS) -> str | None:
    with torch.no_grad():
        return trial.known_problem(model) or trial.measured_problem(
            model, partial(logps_of, model), shared_batch(rows), padded_batch(rows)
        )
