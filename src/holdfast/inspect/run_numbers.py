"""The numbers of every pair of a run's datasets, from the store, which is filled where it lacks one.

The run's own trainer makes the model, its reference and the data, so tokens, numerics and store are those of the run.
Each completion is then looked up by content id, all at once. What a store does not hold is scored as `holdfast
precompute` would, and so are pairs whose products of hidden states are missing. Given up: streams, which have no rows
that could be listed.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, final

import numpy as np
import pyarrow as pa
from datasets import Dataset
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from holdfast.data.columns import SOURCE
from holdfast.data.completions import Completions, datasets_by_name
from holdfast.data.files.places import Places, places_of
from holdfast.data.pair_content import PairContent
from holdfast.data.used_rows import used_rows
from holdfast.inspect.pair_numbers import PairNumbers
from holdfast.inspect.pairs import Cutting
from holdfast.policy.untouched import untouched
from holdfast.store.pair_table import PairTable
from holdfast.store.store import LogpStore
from holdfast.trainer import DPOTrainer


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class DatasetNumbers:
    """A dataset of a run: its `name` ("train", "eval", or that of one of several evaluation sets), the reference's
    numbers of its pairs, and the trained policy's where a trained run was asked about.

    `rows` are the used rows with their token ids, one for each pair and in the same order. `loaded` is the dataset as
    it was loaded, whose rows `PairNumbers.row` counts, and `places` says where a row of it comes from; None where that
    is not known.
    """

    name: str
    reference: PairNumbers
    policy: PairNumbers | None
    rows: Dataset
    loaded: Dataset
    places: Places | None


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class RunNumbers:
    """The numbers of a run's datasets. `reference` and `policy` say in words whose they are, and `reference_digest` is
    that of the reference's weights. `not_read` has the reason for each dataset that has none, by name, and `notes` what
    else is to be said of them. `beta` is the run's, `cutting` and `tokenizer` are those by which rows are shown."""

    model: str
    reference: str
    reference_digest: str
    policy: str | None
    beta: float
    datasets: tuple[DatasetNumbers, ...]
    not_read: Mapping[str, str]
    notes: tuple[str, ...]
    cutting: Cutting
    tokenizer: PreTrainedTokenizerBase


def pair_numbers_of(trainer: DPOTrainer, whose: str = "Reference", only: str | None = None) -> dict[str, PairNumbers]:
    """The reference's numbers of the pairs of each dataset of a trainer, by the dataset's name; streams are left out,
    and all but the dataset `only` where it is given. Messages say `whose` numbers they are.

    What the store lacks is scored and stored. The trainer must have been made with `precompute_ref_log_probs=True` and
    `reference_window=1`, so that its reference is held and nothing was scored yet. ValueError where a log-prob is not
    finite or the store cannot be written.
    """
    reference = trainer.reference
    assert reference is not None and reference.stored is not None  # noqa: PT018
    datasets = {name: data for name, data in prepared_datasets(trainer).items() if only in (None, name)}
    completions = trainer.completions_to_score(datasets)
    with untouched(trainer.model):
        reference.fill(completions, whose=whose)
    store = reference.stored.store
    table = PairTable.open(store)
    return {name: _numbers(data, datasets[name], store, table) for name, data in completions.items()}


def prepared_datasets(trainer: DPOTrainer) -> dict[str, Any]:
    """The datasets of a trainer with token ids, by name: "train", and "eval" or the names of several."""
    return {"train": trainer.train_dataset} | datasets_by_name(trainer.eval_dataset)


def _numbers(data: Any, prepared: Dataset, store: LogpStore, table: PairTable) -> PairNumbers:
    assert isinstance(data, Completions), "a run file names no data collator"
    content = data.content()
    chosen, rejected = (
        store.sums(content.content[:, side : side + 2], content.lengths[:, side // 2]) for side in (0, 2)
    )
    ches, normalised = ches_of(table.find(content.content, content.lengths), content)
    source, sources = sources_of(prepared)
    return PairNumbers(
        row=used_rows(prepared),
        chosen_logps=chosen,
        rejected_logps=rejected,
        chosen_tokens=content.lengths[:, 0],
        rejected_tokens=content.lengths[:, 1],
        prompt_tokens=content.prompts,
        source=source,
        sources=sources,
        ches=ches,
        normalised_ches=normalised,
    )


def ches_of(products: NDArray[np.float64], content: PairContent) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """CHES of each pair, and its length-normalised form (see `PairNumbers`), from the products `[P 3]` that
    `PairTable.find` returns."""
    cross, square, _ = products.T
    num_chosen, num_rejected = content.lengths.astype(np.float64).T
    return cross - square, cross / (num_chosen * num_rejected) - square / num_chosen**2


def sources_of(prepared: Dataset) -> tuple[NDArray[np.int64], tuple[str, ...]]:
    """For each row the place of its source among the names of all sources, in the order of their first rows; -1 for a
    row without one."""
    if SOURCE not in prepared.column_names:
        return np.full(len(prepared), -1, dtype=np.int64), ()
    table: Any = prepared.select_columns([SOURCE]).with_format("arrow")[:]
    values = [None if value in (None, "") else str(value) for value in table[SOURCE].to_pylist()]
    encoded: Any = pa.array(values, pa.string()).dictionary_encode()
    codes = encoded.indices.fill_null(-1).to_numpy(zero_copy_only=False).astype(np.int64)
    return codes, tuple(encoded.dictionary.to_pylist())


def dataset_numbers(
    trainer: DPOTrainer,
    reference: Mapping[str, PairNumbers],
    policy: Mapping[str, PairNumbers] | None,
    loaded: Mapping[str, Any],
) -> tuple[DatasetNumbers, ...]:
    """The numbers of a trainer's datasets; `loaded` are the datasets as they were loaded, by the same names."""
    prepared = prepared_datasets(trainer)
    return tuple(
        DatasetNumbers(
            name=name,
            reference=numbers,
            policy=None if policy is None else policy[name],
            rows=prepared[name],
            loaded=loaded[name],
            places=places_of(loaded[name]),
        )
        for name, numbers in reference.items()
    )


def streams_of(train_dataset: Any, eval_dataset: Any) -> dict[str, str]:
    """Why the numbers of a run's streams are not read, by the stream's name."""
    datasets = {"train": train_dataset} | datasets_by_name(eval_dataset)
    return {name: _STREAM for name, data in datasets.items() if not isinstance(data, Dataset)}


_STREAM = "it is a stream, whose rows cannot be listed; set `streaming: false` for it to have it looked at"
