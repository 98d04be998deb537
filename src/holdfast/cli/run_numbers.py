"""The numbers of every pair of a run file's datasets: those of its reference, and of the policy that a run has trained.

The trainer of the run file is made with a few options changed that move no number: its log-probs are stored, nothing is
trained, saved or reported. A run whose losses compare with no reference is looked at through the reference that it
would have, which is the one it names or the model as it starts. The trained policy is asked like a reference: loaded
from the run's folder as a model of its own, its log-probs are stored under its own identity.
"""

import copy
import gc
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from peft.utils import CONFIG_NAME as ADAPTER_CONFIG_NAME

from holdfast.checkpoint.folder import complete_checkpoints
from holdfast.cli.assembly import trainer_of
from holdfast.cli.runfile import RunFile
from holdfast.cli.trained_by import check_tokenizer
from holdfast.config import DPOConfig
from holdfast.data.completions import datasets_by_name
from holdfast.data.tokenize import TruncationMode
from holdfast.inspect.pair_numbers import PairNumbers
from holdfast.inspect.pairs import Cutting
from holdfast.inspect.run_numbers import RunNumbers, dataset_numbers, pair_numbers_of, prepared_datasets, streams_of
from holdfast.trainer import DPOTrainer

_WHICH_WEIGHTS = ("revision", "subfolder")
_MODEL_CONFIG_NAME = "config.json"


def run_numbers(run: RunFile, out: Path | None = None, *, only: str | None = None) -> RunNumbers:
    """The numbers of the pairs of a run's datasets, or of the dataset `only`; with `out`, the output folder of a run
    that was trained (or one of its checkpoints), those of its policy too. Scores what is not stored. ValueError,
    TypeError or OSError where a model or the data cannot be made, and ValueError where all of the data are streams."""
    trained = None if out is None else trained_model(out)
    arguments = run.training_arguments()
    notes = _changed(arguments)
    with _trainer(run, arguments) as (trainer, loaded):
        if trained is not None:
            check_tokenizer(loaded["processing_class"], trained, trust_remote_code=arguments.trust_remote_code)
        not_read = streams_of(loaded["train_dataset"], loaded.get("eval_dataset"))
        reference = pair_numbers_of(trainer, only=only)
        if not reference:
            raise ValueError(
                f"the pairs of the run {run.document.file} were to be looked at, but {_are_streams(not_read)}, whose "
                "rows cannot be listed. Read the data without `streaming`, or name an evaluation set that is no stream."
            )
        assert trainer.reference is not None  # `pair_numbers_of` has asked it
        datasets = prepared_datasets(trainer)
        of_run = RunNumbers(
            model=run["model"].path,
            reference=_which_reference(run, trainer.args),
            reference_digest=trainer.reference.fingerprint(),
            policy=None if trained is None else str(trained),
            beta=trainer.args.beta,
            datasets=dataset_numbers(trainer, reference, None, loaded_by_name(loaded)),
            not_read=not_read,
            notes=notes,
            cutting=Cutting(
                max_length=trainer.args.max_length,
                truncation_mode=cast(TruncationMode, trainer.args.truncation_mode),
            ),
            tokenizer=loaded["processing_class"],
        )
    del trainer
    gc.collect()  # before another model is loaded
    if trained is None:
        return of_run
    policy = _policy_numbers(arguments, trained, datasets, loaded, only)
    return replace(of_run, datasets=tuple(replace(each, policy=policy[each.name]) for each in of_run.datasets))


def _which_reference(run: RunFile, arguments: DPOConfig) -> str:
    """In words, which reference a run compares with."""
    model = run["model"].path
    if (other := run["reference.model"]) is not None:
        return str(other.path)
    if arguments.ref_adapter_name is not None:
        return f"the adapter {arguments.ref_adapter_name!r} of {model}"
    return f"{model}, as it starts to train"


def trained_model(out: Path) -> Path:
    """The folder of the trained model in the output folder of a run: the folder itself, or its last complete
    checkpoint. ValueError where there is neither."""
    if any((out / name).is_file() for name in (_MODEL_CONFIG_NAME, ADAPTER_CONFIG_NAME)):
        return out
    checkpoints = complete_checkpoints(out) if out.is_dir() else []
    if not checkpoints:
        found = "is no complete checkpoint and no model" if out.is_dir() else "is no folder of that name"
        raise ValueError(
            f"the trained policy was to be read from {str(out)!r}, where there {found}. Name the output folder of a "
            "run that has finished or saved a checkpoint."
        )
    return checkpoints[-1]


def loaded_by_name(loaded: dict[str, Any]) -> dict[str, Any]:
    """The datasets as a run file loads them, by the names that a trainer gives them."""
    return {"train": loaded["train_dataset"]} | datasets_by_name(loaded.get("eval_dataset"))


def _are_streams(not_read: dict[str, str]) -> str:
    names = sorted(not_read)
    return f"its {names[0]} dataset is a stream" if len(names) == 1 else f"all of them are streams ({', '.join(names)})"


def _policy_numbers(
    arguments: DPOConfig, trained: Path, datasets: dict[str, Any], loaded: dict[str, Any], only: str | None
) -> dict[str, PairNumbers]:
    """The numbers of the model in the folder `trained`, as its own reference, on prepared datasets, or on `only`."""
    arguments = copy.copy(arguments)
    init_kwargs = arguments.model_init_kwargs
    if isinstance(init_kwargs, dict):
        arguments.model_init_kwargs = {key: value for key, value in init_kwargs.items() if key not in _WHICH_WEIGHTS}
    arguments.reference, arguments.snapshot_device = "auto", "device"
    arguments.ref_adapter_name = arguments.model_adapter_name = arguments.ref_model_weights = None
    arguments.ref_model_init_kwargs = None
    train_dataset = datasets.pop("train")
    evaluation: Any = datasets or None
    if evaluation is not None and not isinstance(loaded.get("eval_dataset"), dict):
        evaluation = datasets["eval"]
    with tempfile.TemporaryDirectory(prefix="holdfast-") as folder:
        arguments.output_dir = folder
        trainer = DPOTrainer(
            model=str(trained),
            args=arguments,
            train_dataset=train_dataset,
            eval_dataset=evaluation,
            processing_class=loaded["processing_class"],
        )
        return pair_numbers_of(trainer, "Policy", only)


@contextmanager
def _trainer(run: RunFile, arguments: DPOConfig) -> Iterator[tuple[DPOTrainer, dict[str, Any]]]:
    """The trainer of a run, whose files go into a folder that is removed, and the arguments that it was made of."""
    with tempfile.TemporaryDirectory(prefix="holdfast-") as folder:
        arguments.output_dir = folder
        loaded: dict[str, Any] = {}
        yield trainer_of(run, arguments, uses_user_logps=False, observe=loaded.update), loaded


def _changed(arguments: DPOConfig) -> tuple[str, ...]:
    """Changes the options to those by which a reference is only asked, and returns what is to be said of it."""
    notes: list[str] = []
    if not arguments.needs_reference:
        losses = ", ".join(arguments.loss_types)
        notes.append(
            f"The losses ({losses}) compare with no reference: the numbers are those of the reference that the run "
            "names, else of the model as it starts to train."
        )
        arguments.loss_type, arguments.loss_weights = ["sigmoid"], None
        arguments.reference = "auto" if arguments.reference == "none" else arguments.reference
    if arguments.sync_ref_model:
        notes.append(
            "The run moves its reference (sync_ref_model): the numbers are those of the reference before its first "
            "sync."
        )
        arguments.sync_ref_model = arguments.reference_store_versions = False
    arguments.precompute_ref_log_probs, arguments.reference_window = True, 1  # opens the store and fills nothing yet
    arguments.save_strategy, arguments.load_best_model_at_end = "no", False
    arguments.report_to, arguments.push_to_hub = [], False
    return tuple(notes)
