"""The trainer of a run file, and the completions that it would look up in the store.

It is a module of its own, since several commands need it and importing it takes seconds.
"""

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from datasets import Dataset
from transformers import PrinterCallback, ProgressCallback

from holdfast.batch import ContentId, PairBatch
from holdfast.cli.runfile import RunFile
from holdfast.config import DPOConfig
from holdfast.data.columns import REFERENCE_COLUMNS
from holdfast.data.completions import Completions, datasets_by_name
from holdfast.data.layouts.choose import layout_of
from holdfast.data.progress import bars
from holdfast.store.store import LogpStore
from holdfast.trainer import DPOTrainer


def trainer_of(
    run: RunFile,
    args: DPOConfig,
    *,
    uses_user_logps: bool = True,
    observe: Callable[[Mapping[str, Any]], None] = lambda arguments: None,
) -> DPOTrainer:
    """The trainer of a run file with these options. Without `uses_user_logps`, reference log-probs among the columns of
    the data are left out. `observe` is shown the trainer's arguments by name, with the data as they were loaded.
    ValueError, TypeError or OSError where it cannot be made."""
    with bars(are_shown=not args.disable_tqdm):
        arguments = run.trainer_arguments(args)
    observe(arguments)
    if not uses_user_logps:
        for name in ("train_dataset", "eval_dataset"):
            arguments[name] = _without_user_logps(arguments.get(name))
    trainer = DPOTrainer(**arguments)
    if not trainer.is_world_process_zero():  # transformers would print the logs of each host's first process
        for callback in (PrinterCallback, ProgressCallback):
            trainer.remove_callback(callback)
    return trainer


def _without_user_logps(dataset: Any) -> Any:
    if isinstance(dataset, dict):
        return {name: _without_user_logps(part) for name, part in dataset.items()}
    if dataset is None:
        return None
    names = [name for name in REFERENCE_COLUMNS if name in (dataset.column_names or ())]
    return dataset.remove_columns(names) if names else dataset


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreNeeds:
    """The store that a run reads its reference's log-probs from, and the completions that it looks up there."""

    store: LogpStore
    ids: frozenset[ContentId]


def store_needs(run: RunFile) -> StoreNeeds:
    """The store of a run, and what the run would look up there. Nothing is scored or written. ValueError where that
    cannot be listed: for a stream, a moving reference, or no reference."""
    arguments = run.training_arguments()
    has_ref_model = run["reference.model"] is not None
    if arguments.reference_options(is_stream=False, has_ref_model=has_ref_model).way != "none":
        arguments.precompute_ref_log_probs, arguments.reference_window = True, 1  # opens the store and fills nothing
    arguments.save_strategy, arguments.disable_tqdm = "no", True
    with tempfile.TemporaryDirectory(prefix="holdfast-") as folder:
        arguments.output_dir = folder
        trainer = trainer_of(run, arguments, uses_user_logps=False)
        datasets: dict[str, Any] = {"train": trainer.train_dataset} | datasets_by_name(trainer.eval_dataset)
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
        layout = layout_of(trainer.data_collator)
        assert layout is not None, "a run file names no data collator"
        ids: set[ContentId] = set()
        for data in datasets.values():
            ids.update(Completions(data, layout, PairBatch.from_tensors, 1).ids())
        assert trainer.reference.stored is not None
        return StoreNeeds(store=trainer.reference.stored.store, ids=frozenset(ids))
