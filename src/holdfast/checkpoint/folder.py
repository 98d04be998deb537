"""What a checkpoint remembers of the reference, in its folder `reference/`: which one it is, and where it has moved.

`manifest.json` says what the reference was made from, by digest; a fixed reference is rebuilt from that and compared,
a moved one is restored from `state.safetensors`, bit for bit. The manifest is written last, so it also marks a
checkpoint as complete: a kill inside a save leaves a folder that no resume will choose. Given up: resuming from
checkpoints that carry no manifest, whose reference nobody recorded.
"""

import copy
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from datasets import Dataset
from safetensors.torch import load_file, save_file
from transformers import Trainer
from transformers.trainer import TRAINING_ARGS_NAME

from holdfast.batch import PairBatch
from holdfast.data.formats import REFERENCE_COLUMNS
from holdfast.internals.transformers import attention_of
from holdfast.reference.digests import digest
from holdfast.reference.identity import Identity, numerics
from holdfast.reference.reference import Reference

FOLDER, MANIFEST, STATE = "reference", "manifest.json", "state.safetensors"
FORMAT = 2
_CHECKPOINT = re.compile(r"checkpoint-(\d+)")


@dataclass(frozen=True, slots=True, kw_only=True)
class Provenance:
    """What a run's reference depends on; two runs with equal provenance have the same reference at the same step.

    `weights` is the digest of the weights it was made from: the policy's when it was captured, or the chosen model's;
    `config` that of all settings that change its numbers, of which `settings` has those of the model's config by value;
    `numerics` says how forward passes are rounded (see `reference.identity`). `data` is the digest of the token ids of
    the training set, None for a stream; `inputs` of all that the model is given for the first pair, so that what a
    data collator adds (positions, pixels) counts too.
    """

    weights: str
    config: str | None
    settings: dict[str, Any]
    numerics: dict[str, Any]
    way: str
    adapters: list[str]
    mixup_alpha: float | None
    sync_steps: int | None
    data: str | None
    inputs: str
    max_length: int | None
    truncation_mode: str

    @classmethod
    def from_manifest(cls, manifest: Mapping[str, Any], checkpoint: Path) -> Self:
        """The provenance that the manifest of `checkpoint` records. ValueError for one of an earlier version."""
        missing = [name for name in cls.__slots__ if name not in manifest]
        if missing:
            raise ValueError(
                f"{checkpoint} was written by an earlier version of holdfast, which did not record {missing} of its "
                "reference, so nobody can tell whether this run's is the same. Resume it with that version, or start a "
                "new run from its weights with the reference named by `ref_model`."
            )
        return cls(**{name: manifest[name] for name in cls.__slots__})

    def differing_from(self, other: Self) -> dict[str, tuple[Any, Any]]:
        """By meaning, what differs: (ours, theirs). A setting of the config by its name, where it is one."""
        ours, theirs = asdict(self), asdict(other)
        if self.config == other.config:
            ours["settings"] = theirs["settings"] = None
        for group in ("settings", "numerics"):
            mine, others = ours.pop(group) or {}, theirs.pop(group) or {}
            ours |= {f"{group}.{name}": mine.get(name) for name in mine | others}
            theirs |= {f"{group}.{name}": others.get(name) for name in mine | others}
        if any(name.startswith("settings.") and ours[name] != theirs[name] for name in ours):
            ours["config"] = theirs["config"] = None
        return {_meaning(name): (ours[name], theirs[name]) for name in ours if ours[name] != theirs[name]}


def provenance(
    identity: Identity | None, layout: str, args: Any, policy: Any, dataset: Any, first: PairBatch
) -> Provenance:
    """The provenance of a run of `args` (a `DPOConfig`) over `policy`, whose reference has this identity: None where
    the weights are sharded over processes, so that nobody has read them. `first` is the first pair as a batch."""
    device, mixed_precision = next(policy.parameters()).device, "fp16" if args.fp16 else "bf16" if args.bf16 else "no"
    if identity is None:
        dtype, attention = str(next(policy.parameters()).dtype), str(attention_of(policy.config))
        known = Identity(tensors={}, settings={}, attention=attention, dtype=dtype)
    else:
        known = identity
    return Provenance(
        weights=identity.weights if identity is not None else "not recorded: sharded",
        config=identity.config if identity is not None else None,
        settings={name: value for name, value in known.settings.items() if ".config." in name},
        numerics=numerics(known, device=device, mixed_precision=mixed_precision, layout=layout),
        way=args.reference,
        adapters=[*sorted(getattr(policy, "peft_config", {})), *filter(None, [args.ref_adapter_name])],
        mixup_alpha=args.ref_model_mixup_alpha if args.sync_ref_model else None,
        sync_steps=args.ref_model_sync_steps if args.sync_ref_model else None,
        data=dataset_digest(dataset),
        inputs=hashlib.blake2b(repr(first.content_ids()).encode(), digest_size=16).hexdigest(),
        max_length=args.max_length,
        truncation_mode=args.truncation_mode,
    )


_MEANINGS = {
    "weights": "the weights of the reference (pass the model, adapter and `ref_model` that the run began with, "
    "not the checkpoint)",
    "config": "the settings of the reference's model or adapters",
    "way": "the option `reference`",
    "adapters": "the policy's adapters",
    "mixup_alpha": "ref_model_mixup_alpha",
    "sync_steps": "ref_model_sync_steps",
    "data": "the training data",
    "inputs": "the model inputs that the data collator makes",
    "max_length": "max_length",
    "truncation_mode": "truncation_mode",
    "numerics.autocast": "the autocast dtype",
    "numerics.dtype": "the dtype of the weights",
    "numerics.attention": "the attention implementation",
    "numerics.layout": "the layout of the rows",
    "numerics.device": "the kind of device",
    "numerics.tf32": "the precision of matrix products",
}


def _meaning(name: str) -> str:
    setting = name.removeprefix("settings.").removeprefix(".config.")
    return _MEANINGS.get(name, f"the model's setting `{setting}`")


def dataset_digest(dataset: Any) -> str | None:
    """Digest of the token ids of all pairs, in order, and of the reference's log-probs where the data bring them along;
    None for a stream, which is not read."""
    if not isinstance(dataset, Dataset):
        return None
    state = hashlib.blake2b(digest_size=16)
    columns = ["prompt_ids", "chosen_ids", "rejected_ids"]
    given = [name for name in REFERENCE_COLUMNS if name in dataset.column_names]
    tables: Any = dataset.select_columns(columns + given).with_format("arrow").iter(1_000)
    for table in tables:
        for name in columns:
            column = table[name].combine_chunks()
            state.update(np.asarray(column.value_lengths(), dtype=np.int64).data)
            state.update(np.asarray(column.flatten(), dtype=np.int64).data)
        for name in given:
            state.update(np.asarray(table[name].combine_chunks(), dtype=np.float64).data)
    return state.hexdigest()


def save_reference(
    checkpoint: Path, reference: Reference | None, provenance: Provenance | None, record: Mapping[str, Any]
) -> None:
    """Writes the checkpoint's `reference/` folder, its manifest last: from then on the checkpoint is complete. `record`
    is what the manifest says of the run besides: where in the data it is, and the digest of the policy."""
    folder = checkpoint / FOLDER
    staged = checkpoint / f"{FOLDER}.partial"
    shutil.rmtree(staged, ignore_errors=True)
    staged.mkdir(parents=True)
    manifest: dict[str, Any] = {"format": FORMAT, "kind": "none", **record}
    if reference is not None and provenance is not None:
        state = {name: tensor.detach().contiguous().cpu() for name, tensor in reference.state_dict().items()}
        if state:
            save_file(state, staged / STATE)
        manifest = {
            **manifest,
            "kind": reference.kind,
            "description": reference.describe(),
            "version": reference.version,
            "drift": reference.drift,
            "state": digest(state.items()) if state else None,
            **asdict(provenance),
        }
    (staged / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")
    for path in (*staged.iterdir(), staged):
        _flush(path)
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(staged, folder)
    _flush(checkpoint)


def load_reference(checkpoint: Path, reference: Reference | None, provenance: Provenance | None) -> None:
    """Brings `reference` to where it was at the checkpoint. ValueError when this run's reference is made from anything
    else than that of the run that wrote it, naming what differs, or when the state does not have its digest."""
    manifest = read_manifest(checkpoint)
    if reference is None or provenance is None or manifest["kind"] == "none":
        if (reference is None) != (manifest["kind"] == "none"):
            raise ValueError(
                f"{checkpoint} was written by a run whose reference was of kind {manifest['kind']!r}; this run has "
                f"{'none' if reference is None else reference.kind}. Resume with the losses and `reference` "
                "of that run."
            )
        return
    differing = provenance.differing_from(Provenance.from_manifest(manifest, checkpoint))
    if differing:
        (name, (found, recorded)), *others = differing.items()
        raise ValueError(
            f"{checkpoint} was written by a run that differs in {name}: recorded {recorded!r}, found {found!r}"
            f"{f' (and in {[other for other, _ in others]})' if others else ''}. Resume with what that run had, or "
            "start a new run in another output_dir."
        )
    state = load_file(checkpoint / FOLDER / STATE) if manifest["state"] else {}
    if state and digest(state.items()) != manifest["state"]:
        raise ValueError(
            f"{checkpoint / FOLDER / STATE} does not have the digest that its manifest records: it was changed or "
            "damaged. Resume from an earlier checkpoint."
        )
    if not state and manifest["version"] == 0 < reference.version:
        raise ValueError(
            f"The reference was to go back to where it was at {checkpoint}, before its first move, but it has moved "
            f"{reference.version} times and that checkpoint does not hold it. Make the trainer again to load it."
        )
    reference.load_state_dict(state, manifest["version"], manifest["drift"])


def read_manifest(checkpoint: Path) -> dict[str, Any]:
    """The manifest of a complete checkpoint. ValueError when there is none, or one of a newer format."""
    path = checkpoint / FOLDER / MANIFEST
    if not path.is_file():
        raise ValueError(
            f"Resuming from {checkpoint} was asked for, but it has no {FOLDER}/{MANIFEST}: it was never finished, or "
            "written by something else, so which reference it trained against is not recorded. Use an earlier "
            "checkpoint (resume_from_checkpoint=True takes the last complete one)."
        )
    manifest = json.loads(path.read_text())
    if manifest["format"] > FORMAT:
        raise ValueError(
            f"{path} has format {manifest['format']}; this version of holdfast reads up to {FORMAT}. Update holdfast."
        )
    return manifest


def recorded_date(args: Any) -> str | None:
    """The date that chat templates print in the checkpoint that the option `resume_from_checkpoint` of `args` (a
    `DPOConfig`) names, so that nothing is tokenized and scored for another; None where there is none."""
    asked = args.resume_from_checkpoint
    folder = Path(asked) if isinstance(asked, str) else None
    if asked is True:
        folder = next(reversed(complete_checkpoints(Path(args.output_dir))), None)
    if folder is None or not (folder / FOLDER / MANIFEST).is_file():
        return None
    return read_manifest(folder).get("template_date")


def date_to_print(checkpoint: Path, current: str | None, asked: str | None) -> str | None:
    """The date that chat templates are to print in a run that goes on from `checkpoint` and prints `current` so far.
    ValueError where another one was asked for."""
    recorded = read_manifest(checkpoint).get("template_date")
    if recorded is None or current is None:
        return current
    if asked is not None and asked != recorded:
        raise ValueError(
            f"template_date={asked!r} was asked for, but chat templates printed {recorded} in the run that wrote "
            f"{checkpoint}, so its rows have other token ids. Drop template_date, or set it to {recorded!r}."
        )
    return recorded


def save_complete(
    trainer: Trainer,
    checkpoint: Path,
    save: Callable[[], None],
    reference: Reference | None,
    provenance: Provenance | None,
    record: Callable[[], Mapping[str, Any]],
    uploading: Collection[str] = (),
) -> None:
    """What `save()` of the trainer writes and `save_reference` after it; older checkpoints go only when this one is
    complete. `record()` says what else the manifest records."""
    args: Any = trainer.args
    if args.should_save:
        reopen(checkpoint)
    trainer.args = copy.copy(args)  # the user's own stay as they are
    trainer.args.save_total_limit = None
    try:
        save()
    finally:
        trainer.args = args
    trainer.accelerator.wait_for_everyone()  # the manifest also speaks for what the other processes write
    if args.should_save:
        if (checkpoint / TRAINING_ARGS_NAME).is_file():
            torch.save(args, checkpoint / TRAINING_ARGS_NAME)
        save_reference(checkpoint, reference, provenance, record())
        rotate(checkpoint.parent, args.save_total_limit, trainer.state.best_model_checkpoint, uploading)


def reopen(checkpoint: Path) -> None:
    """Marks a checkpoint folder as unfinished, before anything in it is written over."""
    (checkpoint / FOLDER / MANIFEST).unlink(missing_ok=True)


def checkpoint_to_resume(asked: str | os.PathLike[str] | bool | None, output_dir: Any) -> Path | None:
    """The complete checkpoint that `resume_from_checkpoint` names, or the last complete one where it is True; None
    where nothing is to be resumed. ValueError when there is none."""
    if not asked:
        return None
    if asked is not True:
        read_manifest(Path(asked))
        return Path(asked)
    found = complete_checkpoints(Path(output_dir))
    if not found:
        raise ValueError(
            f"Resuming was asked for, but {output_dir} holds no complete checkpoint. Start without "
            "resume_from_checkpoint, or name the checkpoint's folder."
        )
    return found[-1]


def complete_checkpoints(run_folder: Path) -> list[Path]:
    """The complete checkpoints of a run, by step."""
    found = [path for path in run_folder.glob("checkpoint-*") if (path / FOLDER / MANIFEST).is_file()]
    numbered = {int(match[1]): path for path in found if (match := _CHECKPOINT.fullmatch(path.name))}
    return [numbered[step] for step in sorted(numbered)]


def rotate(run_folder: Path, limit: int | None, best: str | None, uploading: Collection[str] = ()) -> None:
    """Deletes the oldest complete checkpoints beyond `limit`; never the last one, nor the best, nor those of these
    names, which are on their way to the hub."""
    found = complete_checkpoints(run_folder)
    if not limit or limit < 1:
        return
    names = {*uploading, *([Path(best).name] if best is not None else [])}
    kept = {found[-1]} | {path for path in found if path.name in names}
    for checkpoint in [path for path in found if path not in kept][: max(0, len(found) - max(limit, len(kept)))]:
        reopen(checkpoint)  # a kill while it is deleted leaves no half of it to resume from
        shutil.rmtree(checkpoint, ignore_errors=True)


def _flush(path: Path) -> None:
    """The file or folder on the disk, not only in its cache."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
