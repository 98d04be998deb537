"""What a run's reference was made from, as a record that two runs can compare.

A resumed run rebuilds a fixed reference instead of loading it. So it must know that it starts from the same weights,
settings and data as the run that wrote the checkpoint. A `Provenance` holds all of these, mostly as digests: two
records can be compared in no time, and the difference is named. Given up: saying by how much two weights differ.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
from datasets import Dataset
from torch import nn

from holdfast.batch import PairBatch
from holdfast.config import DPOConfig
from holdfast.data.columns import MASK_COLUMNS, REFERENCE_COLUMNS, TOKENIZED_COLUMNS
from holdfast.data.mixing.mixture import mixture_of
from holdfast.data.pair_values import pair_value_columns
from holdfast.data.ragged import scored_in
from holdfast.internals.transformers import attention_of
from holdfast.reference.identity.identity import Identity, numerics


@dataclass(frozen=True, slots=True, kw_only=True)
class Provenance:
    """What a run's reference depends on. Two runs with equal provenance have the same reference at the same step.

    The fields have the names that a checkpoint's manifest gives them:

    - `weights`: the digest of the reference's weights, which are the captured policy's or those of the chosen model.
    - `config`: the digest of all settings that change its log-probs. `settings` lists the settings that stand in the
      model's config, by value.
    - `numerics`: how forward passes are rounded (see `reference.identity`).
    - `way`, `adapters`, `mixup_alpha`, `sync_steps`, `max_length`, `truncation_mode`: options of the run.
    - `data`: the digest of the training set's token ids; for a stream that of the mixture it is, or None.
    - `inputs`: the digest of all model inputs of the first pair. It covers what a data collator adds, such as positions
      or pixels.
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
    def of_run(
        cls,
        *,
        args: DPOConfig,
        policy: nn.Module,
        reference_identity: Identity | None,
        train_dataset: Any,
        first_pair: PairBatch,
        layout: str,
    ) -> Self:
        """The provenance of a run. `reference_identity` is None where the weights are sharded over processes, since no
        process has read them all. `first_pair` is the first pair of the training set as a batch."""
        mixed_precision = "fp16" if args.fp16 else "bf16" if args.bf16 else "no"
        parameter = next(policy.parameters())
        identity = reference_identity
        if identity is None:
            config: Any = policy.config
            identity = Identity(
                tensors={}, settings={}, attention=str(attention_of(config)), dtype=str(parameter.dtype)
            )
        return cls(
            weights=identity.weights_digest if reference_identity is not None else "not recorded: sharded",
            config=identity.config_digest if reference_identity is not None else None,
            settings={name: value for name, value in identity.settings.items() if ".config." in name},
            numerics=numerics(identity, device=parameter.device, mixed_precision=mixed_precision, layout=layout),
            way=args.reference,
            adapters=[*sorted(getattr(policy, "peft_config", {})), *filter(None, [args.ref_adapter_name])],
            mixup_alpha=args.ref_model_mixup_alpha if args.sync_ref_model else None,
            sync_steps=args.ref_model_sync_steps if args.sync_ref_model else None,
            data=dataset_digest(train_dataset, pair_value_columns(args)),
            inputs=hashlib.blake2b(repr(first_pair.content_ids()).encode(), digest_size=16).hexdigest(),
            max_length=args.max_length,
            truncation_mode=args.truncation_mode,
        )

    @classmethod
    def from_manifest(cls, manifest: Mapping[str, Any], checkpoint: Path) -> Self:
        """The provenance that the manifest of `checkpoint` records. ValueError for one of an earlier version."""
        missing = [name for name in cls.__slots__ if name not in manifest]
        if missing:
            raise ValueError(
                f"{checkpoint} was written by an earlier version of holdfast, which did not record {missing} of its "
                "reference, so nobody can tell whether this run's is the same. Resume it with that version, or start a "
                "new run from its weights with the reference named by `ref_model`. With `model` and `ref_model` as "
                "that run began, adopt_checkpoint=True takes it over, unless its reference had moved."
            )
        return cls(**{name: manifest[name] for name in cls.__slots__})

    @classmethod
    def is_in(cls, manifest: Mapping[str, Any]) -> bool:
        """Whether a manifest records all of a provenance."""
        return all(name in manifest for name in cls.__slots__)

    def differing_from(self, other: Self) -> dict[str, tuple[Any, Any]]:
        """What differs, as (ours, theirs) by its meaning. A setting of the model's config goes by its own name."""
        ours, theirs = asdict(self), asdict(other)
        if self.config == other.config:
            ours["settings"] = theirs["settings"] = None
        for group in ("settings", "numerics"):
            mine, others = ours.pop(group) or {}, theirs.pop(group) or {}
            ours |= {f"{group}.{name}": mine.get(name) for name in mine | others}
            theirs |= {f"{group}.{name}": others.get(name) for name in mine | others}
        if any(name.startswith("settings.") and ours[name] != theirs[name] for name in ours):
            ours["config"] = theirs["config"] = None  # the setting says more than the digest
        return {_meaning(name): (ours[name], theirs[name]) for name in ours if ours[name] != theirs[name]}


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


def dataset_digest(dataset: Any, value_columns: Sequence[str] = ()) -> str | None:
    """The digest of the token ids of all pairs, in order, of which are scored where not all are, and of the reference
    log-probs that the data may contain; also of the numbers of the pairs in the columns `value_columns`. A stream is
    not read: of a mixture it is the digest of how that was made, None of any other."""
    if not isinstance(dataset, Dataset):
        mixture = mixture_of(dataset)
        return mixture.digest if mixture is not None else None
    state = hashlib.blake2b(digest_size=16)
    id_columns = list(TOKENIZED_COLUMNS)
    logp_columns = [name for name in REFERENCE_COLUMNS if name in dataset.column_names]
    mask_columns = [name for name in MASK_COLUMNS if name in dataset.column_names]
    number_columns = [*logp_columns, *value_columns]
    columns = list(dict.fromkeys([*id_columns, *mask_columns, *number_columns]))
    tables: Any = dataset.select_columns(columns).with_format("arrow").iter(1_000)
    for number, table in enumerate(tables):
        for name in id_columns:
            column = table[name].combine_chunks()
            state.update(np.asarray(column.value_lengths(), dtype=np.int64).data)
            state.update(np.asarray(column.flatten(), dtype=np.int64).data)
        for name in mask_columns:
            scored = scored_in(table, name)
            if scored is not None:
                state.update(f"{name} {number}".encode() + np.packbits(scored).data)
        for name in number_columns:
            state.update(np.asarray(table[name].combine_chunks(), dtype=np.float64).data)
    return state.hexdigest()
