"""What a run file names, put together: its model, tokenizer and data in a trainer; and what it would have stored.

Apart from the commands, since several of them need it and importing it takes seconds.
"""

import tempfile
from dataclasses import dataclass
from typing import Any

from datasets import Dataset, IterableDataset
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from holdfast.batch import ContentId, PairBatch
from holdfast.cli.runfile import RunFile, Source
from holdfast.config import DPOConfig
from holdfast.data.completions import Completions, by_name
from holdfast.data.formats import REFERENCE_COLUMNS
from holdfast.data.layouts.padded import PaddedLayout
from holdfast.data.layouts.prefix_shared import SharedLayout
from holdfast.data.load import load_preferences
from holdfast.store.store import LogpStore
from holdfast.trainer import DPOTrainer


def trainer_of(run: RunFile, arguments: DPOConfig, *, takes_given: bool = True) -> DPOTrainer:
    """The trainer of a run file, with these arguments; without `takes_given`, log-probs that the data bring along are
    left out. ValueError, TypeError or OSError where it cannot be made."""
    peft_config = run.peft_config()
    tokenizer = _tokenizer(run.tokenizer, arguments.trust_remote_code)
    return DPOTrainer(
        model=run.model.path,
        ref_model=None if run.ref_model is None else run.ref_model.path,
        args=arguments,
        train_dataset=_dataset(run, "data.train", run.train, takes_given),
        eval_dataset=_evaluation_datasets(run, takes_given),
        processing_class=tokenizer,
        peft_config=peft_config,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Needed:
    """The store that a run reads its reference's log-probs from, and the completions that it looks up there."""

    store: LogpStore
    ids: frozenset[ContentId]


def needed(run: RunFile) -> Needed:
    """What a run would find in the store, or put there; nothing is scored or written. ValueError where the run stores
    no log-probs of data with an end."""
    arguments = run.training_arguments()
    arguments.precompute_ref_log_probs, arguments.reference_window = True, 1  # opens the store and fills nothing
    arguments.save_strategy, arguments.disable_tqdm = "no", True
    with tempfile.TemporaryDirectory(prefix="holdfast-") as folder:
        arguments.output_dir = folder
        trainer = trainer_of(run, arguments, takes_given=False)
        datasets: dict[str, Any] = {"train": trainer.train_dataset} | by_name(trainer.eval_dataset)
        streams = [name for name, data in datasets.items() if not isinstance(data, Dataset)]
        if streams or arguments.sync_ref_model or trainer.reference is None:
            obstacle = (
                f"the {streams[0]} dataset is a stream" if streams
                else "its reference moves (sync_ref_model)" if arguments.sync_ref_model
                else "its losses compare with no reference"
            )  # fmt: skip
            raise ValueError(
                f"the log-probs of the run {run.document.file} were to be looked for, but what it needs cannot be "
                f"listed: {obstacle}. Name a run over data with an end and a reference that stays."
            )
        layout = trainer.data_collator
        assert isinstance(layout, PaddedLayout | SharedLayout)
        ids: set[ContentId] = set()
        for data in datasets.values():
            ids.update(Completions(data, layout, PairBatch.from_tensors, 1).ids())
        assert trainer.reference.stored is not None
        return Needed(store=trainer.reference.stored.store, ids=frozenset(ids))


def _tokenizer(source: Source, trust_remote_code: bool) -> PreTrainedTokenizerBase:
    try:
        return AutoTokenizer.from_pretrained(source.path, trust_remote_code=trust_remote_code, **source.options)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"the tokenizer was to be loaded from {source.path!r}, which failed: {error}\n"
            "Give the folder or hub name that has it as `tokenizer:` (default: the model's)."
        ) from error


def _dataset(run: RunFile, where: str, source: Source, takes_given: bool) -> Dataset | IterableDataset:
    dataset = load_preferences(source.path, **source.options)
    if isinstance(dataset, dict):
        raise run.document.error(
            where,
            f"`{where}` must be one dataset; found the splits {', '.join(map(str, dataset))} in {source.path!r}. "
            f"Choose one of them: {{path: {source.path}, split: {next(iter(dataset))}}}.",
        )
    return dataset if takes_given else _without_given(dataset)


def _without_given(dataset: Dataset | IterableDataset) -> Dataset | IterableDataset:
    return dataset.remove_columns([name for name in REFERENCE_COLUMNS if name in (dataset.column_names or ())])


def _evaluation_datasets(run: RunFile, takes_given: bool) -> Any:
    if isinstance(run.evaluation, dict):
        return {
            name: _dataset(run, f"data.eval.{name}", source, takes_given) for name, source in run.evaluation.items()
        }
    return None if run.evaluation is None else _dataset(run, "data.eval", run.evaluation, takes_given)
