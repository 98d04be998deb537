"""The pairs that fill up the last batches of several processes: how they are made and what they leave untouched."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import IterableDataset

from families import tiny_model
from holdfast.batch import PairBatch
from holdfast.data.layouts.padded import PaddedLayout
from holdfast.data.loader.fillers import StreamWithFillers, rows_of_pairs
from policies import config, rows, trainer


def stream(num_rows: int) -> IterableDataset:
    return rows(max(num_rows, 2), seed=5).select(range(num_rows)).to_iterable_dataset()


@pytest.mark.parametrize(("num_rows", "num_fillers"), [(5, 3), (7, 1), (8, 0), (1, 3)])
def test_a_stream_is_filled_to_a_multiple(num_rows: int, num_fillers: int) -> None:
    """The rows in their order, then pairs of equal completions, every time it is read."""
    filled, table = StreamWithFillers(stream(num_rows), 4), list(stream(num_rows))
    for _ in range(2):
        found = list(filled)
        assert found[:num_rows] == table
        assert len(found) == num_rows + num_fillers
        assert all(row["chosen_ids"] == row["rejected_ids"] for row in found[num_rows:])
    assert all(row["chosen_ids"] != row["rejected_ids"] for row in table)


def test_rows_of_pairs() -> None:
    """Of 4 pairs, chosen in rows 0-3 and rejected in rows 4-7, the middle two."""
    batch = PairBatch.from_tensors(PaddedLayout(0)(rows(4).to_list()))
    assert rows_of_pairs(batch).all()
    middle = replace(batch, chosen=batch.chosen[1:3], rejected=batch.rejected[1:3])
    assert rows_of_pairs(middle).nonzero().flatten().tolist() == [1, 2, 5, 6]
    none = replace(batch, chosen=batch.chosen[:0], rejected=batch.rejected[:0])
    assert not rows_of_pairs(none).any()


def test_a_stream_is_evaluated_as_its_rows(tmp_path: Path) -> None:
    ours = trainer(tiny_model(), config(tmp_path, per_device_eval_batch_size=2), ref_model=tiny_model(seed=3))
    streamed, by_rows = ours.evaluate(stream(5)), ours.evaluate(rows(5, seed=5))
    for name in ("loss", "rewards/chosen", "rewards/rejected", "rewards/accuracies", "logps/rejected", "entropy"):
        assert streamed[f"eval_{name}"] == pytest.approx(by_rows[f"eval_{name}"], abs=1e-6), name


def test_compute_metrics_sees_the_last_batch_whole(tmp_path: Path) -> None:
    """5 pairs in batches of 2: the last one has two rows, of which none is cut."""
    seen: dict[str, Any] = {}

    def compute_metrics(prediction: Any) -> dict[str, float]:
        seen.update(ids=torch.tensor(prediction.label_ids), logits=prediction.predictions)
        return {}

    ours = trainer(tiny_model(), config(tmp_path, per_device_eval_batch_size=2), compute_metrics=compute_metrics)
    ours.evaluate(rows(5, seed=5))
    last = rows(5, seed=5)[4]
    expected = [last["prompt_ids"] + last[side] for side in ("chosen_ids", "rejected_ids")]
    assert [[token for token in row if token > 0] for row in seen["ids"][-2:].tolist()] == expected
    assert len(seen["ids"]) == len(seen["logits"]) == 10


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"accelerator_config": {"dispatch_batches": True}},
            r"dispatch_batches=True.*unlike lengths.*Leave dispatch_ba",
        ),
        ({"eval_use_gather_object": True}, r"eval_use_gather_object=True.*gathered as tensors.*Leave eval_use_gather_"),
    ],
)
def test_options_that_would_mix_up_pairs_are_refused(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        config(tmp_path, **options)
