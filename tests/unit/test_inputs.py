"""A content id covers every input of its completion; what it cannot cover is refused by name wherever numbers are kept.

The table's rows are kinds of input that a user's collator may add. `Named` says for each whether it enters the content
ids, is nothing (the model takes the same by itself), or is unknown.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from families import tiny_model
from holdfast.batch import PairBatch
from holdfast.data.inputs import UNIDENTIFIED, with_inputs_identified
from holdfast.data.layouts.padded import PaddedLayout
from holdfast.data.layouts.preference_collator import DataCollatorForPreference
from holdfast.store.maintenance import stores
from holdfast.store.store import default_root
from policies import config, logged, rows, trainer

TABLE = rows(3).to_list()


def batch_with(**extra: Any) -> dict[str, Any]:
    """Three pairs as `DataCollatorForPreference` gives them, and inputs beside."""
    batch: dict[str, Any] = dict(DataCollatorForPreference(pad_token_id=0)([dict(row) for row in TABLE]))
    made = {name: make(batch["input_ids"]) if callable(make) else make for name, make in extra.items()}
    return PaddedLayout(0)([dict(row) for row in TABLE]) | made


def ids_of(batch: dict[str, Any], takes_positions: bool = True) -> list[Any]:
    return PairBatch.from_tensors(with_inputs_identified(batch, takes_positions=takes_positions)).content_ids()


def per_row(change: int = 0, *shape: int) -> Callable[[Tensor], Tensor]:
    """A value of this shape for each row, other in row `change`."""

    def make(ids: Tensor) -> Tensor:
        values = torch.ones(len(ids), *(shape or (4, 4)))
        values[change] += 1
        return values

    return make


def positions(stride: int) -> Callable[[Tensor], Tensor]:
    return lambda ids: (stride * torch.arange(ids.shape[1])).expand(ids.shape).clone()


COUNTED: dict[str, dict[str, Any]] = {
    "an image a row": {"pixel_values": per_row(0, 3, 2, 2)},
    "a number a row": {"image_grid": per_row(0, 3)},
    "a value a token": {"token_type_ids": lambda ids: torch.ones_like(ids)},
    "positions": {"position_ids": positions(2)},
    "booleans": {"is_image": lambda ids: ids > 50},
    "half precision": {"pixel_values": lambda ids: torch.ones(len(ids), 2, dtype=torch.bfloat16)},
    "a setting": {"use_vision": True},
    "a word": {"mode": "left"},
    "a mask of weights": {"attention_mask": lambda ids: (ids != 0).float() * 0.5},
}


@pytest.mark.parametrize("kind", COUNTED)
def test_inputs_enter_the_content_ids(kind: str) -> None:
    found, plain = ids_of(batch_with(**COUNTED[kind])), ids_of(batch_with())
    assert all(ours != bare for ours, bare in zip(found, plain, strict=True))
    assert ids_of(batch_with(**COUNTED[kind])) == found


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"pixel_values": per_row(2)}, {"pixel_values": per_row(3)}),
        ({"a": per_row(2)}, {"a": per_row(3)}),
        ({"types": lambda ids: ids * (torch.arange(len(ids)) == 2)[:, None]}, {"types": torch.zeros_like}),
    ],
)  # fmt: skip
def test_only_the_row_that_differs(one: dict[str, Any], other: dict[str, Any]) -> None:
    """Row 2 is the third chosen completion, row 3 the first rejected one: each has its own content id."""
    ours, theirs = ids_of(batch_with(**one)), ids_of(batch_with(**other))
    assert ours[2] != theirs[2]
    assert ours[:2] == theirs[:2]
    assert ours[4:] == theirs[4:]


def test_names_dtypes_and_shapes_count() -> None:
    """The same bytes under another name, as another type, in another shape."""
    kinds = [
        {"a": lambda ids: torch.ones(len(ids), 4)},
        {"b": lambda ids: torch.ones(len(ids), 4)},
        {"a": lambda ids: torch.ones(len(ids), 4).view(torch.int32)},
        {"a": lambda ids: torch.ones(len(ids), 2, 2)},
        {"a": lambda ids: torch.ones(len(ids), 4), "b": lambda ids: torch.ones(len(ids), 4)},
    ]
    assert len({tuple(map(tuple, ids_of(batch_with(**kind)))) for kind in kinds}) == len(kinds)


NOTHING: dict[str, dict[str, Any]] = {
    "positions from 0": {"position_ids": positions(1)},
    "None": {"labels": None},
}


@pytest.mark.parametrize("kind", NOTHING)
def test_what_a_model_takes_by_itself_is_nothing(kind: str) -> None:
    assert ids_of(batch_with(**NOTHING[kind])) == ids_of(batch_with())


def test_padding_is_nothing() -> None:
    """Values at padded places, and more of these, leave the content ids as they are."""
    types = batch_with(token_type_ids=lambda ids: torch.ones_like(ids))
    other = dict(types) | {"token_type_ids": types["attention_mask"] + 7 * (1 - types["attention_mask"])}
    assert ids_of(other) == ids_of(types)


UNKNOWN: dict[str, Any] = {
    "patches of all images": {"pixel_values": lambda ids: torch.ones(4 * len(ids) + 1, 6)},
    "one for all": {"image_sizes": lambda ids: torch.ones(1, 2)},
    "a number": {"num_images": lambda ids: torch.tensor(3)},
    "a list": {"grids": [[1, 2], [3, 4]]},
}


@pytest.mark.parametrize("kind", UNKNOWN)
def test_what_belongs_to_no_row_is_named(kind: str) -> None:
    found = with_inputs_identified(batch_with(**UNKNOWN[kind]), takes_positions=True)
    assert found[UNIDENTIFIED] == tuple(UNKNOWN[kind])
    with pytest.raises(ValueError, match=rf"kept for later, but of the model inputs \['{next(iter(UNKNOWN[kind]))}'\]"):
        PairBatch.from_tensors(found).check_identified()


# --- in a run ---------------------------------------------------------------------------------------------------------


class _WithImages(nn.Module):
    """A language model's embeddings, moved by the mean of the row's image or by that of all patches."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.inner = model.model.embed_tokens
        self.pixels: Tensor | None = None

    def forward(self, input_ids: Tensor) -> Tensor:
        states = self.inner(input_ids)
        if self.pixels is None:
            return states
        image = self.pixels.float().flatten(1).mean(1)
        return states + (image[:, None, None] if len(image) == len(states) else image.mean())


class _Seeing(LlamaForCausalLM):
    """Takes `pixel_values`, as vision-language models do."""

    def forward(self, *args: Any, pixel_values: Tensor | None = None, **kwargs: Any) -> Any:
        self.model.embed_tokens.pixels = pixel_values
        return super().forward(*args, **kwargs)


def seeing() -> Any:
    model = tiny_model()
    model.model.embed_tokens = _WithImages(model)
    model.__class__ = _Seeing
    return model


def collating(pixels: Callable[[list[dict[str, Any]]], Tensor]) -> Callable[[list[dict[str, Any]]], dict[str, Any]]:
    def collate(features: list[dict[str, Any]]) -> dict[str, Any]:
        table = [{name: row[name] for name in ("prompt_ids", "chosen_ids", "rejected_ids")} for row in features]
        return PaddedLayout(0)(table) | {"pixel_values": pixels(features)}

    return collate


def image_of(value: float) -> Callable[[list[dict[str, Any]]], Tensor]:
    """Each row's image is its prompt's length times `value`."""
    return lambda features: torch.tensor([[value * len(row["prompt_ids"])] * 4 for _ in range(2) for row in features])


def run(folder: Path, value: float, **options: Any) -> Any:
    args = config(folder, **{"learning_rate": 0.0, "remove_unused_columns": False, "reference_audit": False} | options)
    return trainer(seeing(), args, data_collator=collating(image_of(value)))


def test_stored_log_probs_are_those_of_the_images(tmp_path: Path) -> None:
    """Another image beside the same token ids: stored numbers of the first are not found, and losses are those of a
    reference that is asked live. The same images again: all is found."""
    for value, num_stored in ((0.1, 23), (0.2, 46), (0.1, 46)):
        ours, live = run(tmp_path, value, reference="precomputed"), run(tmp_path, value, reference="model")
        ours.train()
        live.train()
        assert logged(ours) == pytest.approx(logged(live), abs=1e-6)
        assert ours.reference.stored.store.num_completions == num_stored


KEPT: dict[str, dict[str, Any]] = {
    "precomputed": {"reference": "precomputed"},
    "moving, ahead": {"precompute_ref_log_probs": True, "sync_ref_model": True, "ref_model_sync_steps": 2},
    "in windows": {"precompute_ref_log_probs": True, "reference_window": 2},
}


@pytest.mark.parametrize("way", KEPT)
def test_patches_of_all_images_are_refused_where_numbers_are_kept(way: str, tmp_path: Path) -> None:
    def patches(features: list[dict[str, Any]]) -> Tensor:
        return torch.ones(3 * len(features) + 1, 4)

    args = config(tmp_path, remove_unused_columns=False, **KEPT[way])
    with pytest.raises(ValueError, match=r"kept for later, but of the model inputs \['pixel_values'\]"):
        trainer(seeing(), args, data_collator=collating(patches)).train()


def test_patches_of_all_images_are_refused_in_parts(tmp_path: Path) -> None:
    def patches(features: list[dict[str, Any]]) -> Tensor:
        return torch.ones(3 * len(features) + 1, 4)

    args = config(tmp_path, remove_unused_columns=False, tokens_per_batch=20, reference="model")
    with pytest.raises(ValueError, match="pixel_values"):
        trainer(seeing(), args, data_collator=collating(patches)).train()


def left_padded(features: list[dict[str, Any]]) -> dict[str, Any]:
    """As older collators pad."""
    batch: dict[str, Any] = dict(PaddedLayout(0)(features))
    num_columns = batch["input_ids"].shape[1]
    lengths = batch["attention_mask"].sum(1)
    ids, mask = torch.zeros_like(batch["input_ids"]), torch.zeros_like(batch["attention_mask"])
    source = batch["source"].clone()
    for row, length in enumerate(lengths.tolist()):
        ids[row, num_columns - length :] = batch["input_ids"][row, :length]
        mask[row, num_columns - length :] = 1
        source[batch["source"] // num_columns == row] += num_columns - length
    return {name: batch[name] for name in ("target", "sequence", "chosen", "rejected", "content")} | {
        "input_ids": ids, "attention_mask": mask, "source": source,
    }  # fmt: skip


@pytest.mark.parametrize("family", ["gpt2", "llama", "opt"])
def test_left_padding_is_right_padding(family: str, tmp_path: Path) -> None:
    """Rows have their own positions, from 0, wherever they are padded: with learned positions it would show."""
    losses = []
    for collator in (PaddedLayout(0), left_padded):
        ours = trainer(tiny_model(family), config(tmp_path, learning_rate=1e-2), data_collator=collator)
        ours.train()
        losses.append(logged(ours))
    assert losses[1] == pytest.approx(losses[0], abs=1e-5)


def test_left_padded_completions_are_found_again(tmp_path: Path) -> None:
    """One completion, padded on either side, is one content id."""
    folders = set()
    for collator in (PaddedLayout(0), left_padded):
        trainer(tiny_model(), config(tmp_path, reference="precomputed"), data_collator=collator).train()
        folders.add(frozenset(facts.name for facts in stores(default_root())))
    assert len(folders) == 1
