"""A run file (`run.yaml`) -> the arguments of one training run.

`KEYS` declares every key once: its type, and which fields of `DPOConfig` or arguments of `DPOTrainer` it becomes. The
sections `training` and `peft` have no keys of their own here. Their keys are the fields of `DPOConfig` and of peft's
config, so there is no second vocabulary to learn or to keep up to date. Every key and type is checked before anything
is loaded. Given up: `DPOConfig` fields at the top level. Each key has one section, and the error for a misplaced one
names it.

Reading a file imports neither torch nor transformers. They are imported when an object is made.
"""

import difflib
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, final

from holdfast.cli.adapter_ranges import check_adapter
from holdfast.cli.agreement import check_agreement, check_json_options
from holdfast.cli.other_keys import without_unknown
from holdfast.cli.paths import with_paths_expanded
from holdfast.cli.sources import (
    DATASET,
    WITH_WEIGHT,
    MixtureOfSources,
    Source,
    load_dataset,
    load_mixture,
    load_tokenizer,
    read_columns,
    read_mixture,
    read_source,
)
from holdfast.cli.text import never_print
from holdfast.cli.yaml_document import REFUSED, Document, field_hints, read_document
from holdfast.secrets import is_mask, is_secret, secrets_in

if TYPE_CHECKING:
    from peft import PeftConfig

    from holdfast.config import DPOConfig

# What a model, a tokenizer or a dataset may be loaded with, beside its path.
MODEL: dict[str, Any] = {
    "path": str,
    "revision": str | None,
    "subfolder": str,
    "dtype": str,
    "attn_implementation": str,
    "device_map": str | dict | None,
    "cache_dir": str | None,
    "local_files_only": bool,
    "use_safetensors": bool | None,
}
TOKENIZER: dict[str, Any] = {name: MODEL[name] for name in ("path", "revision", "subfolder")}

_WHICH_WEIGHTS = ("revision", "subfolder")
"""Options that say which weights a model has. A reference model does not take these over from the policy's."""

ELSEWHERE = {
    "reference": "Write it as the section `reference:`.",
    "columns": "Write it as `data.columns`, or beside the `path` of one dataset.",
    "ref_model_init_kwargs": "Write it as `reference.model`: {path: ..., revision: ...}.",
    "do_train": "`holdfast train` always trains; remove it.",
    "do_eval": "The run is evaluated when `data.eval` is given; remove it.",
    "do_predict": "There is no prediction pass; remove it.",
    "local_rank": "The launcher sets it; remove it.",
}
"""Fields of `DPOConfig` that would have no effect, or that have their own place: refused, never ignored."""


# How a key is declared ----------------------------------------------------------------------------------------------

Effect = Callable[["RunFile", Any, Mapping[str, Any]], Mapping[str, Any]]
"""Takes the run file, a key's value, and what the keys before it have become. Returns what the key adds or replaces."""


def _nothing(run: "RunFile", value: Any, so_far: Mapping[str, Any]) -> Mapping[str, Any]:
    return {}


def _as_written(document: Document, name: str, value: Any) -> Any:
    return value


def _no_default(values: Mapping[str, Any]) -> Any:
    return None


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Key:
    """A key of the run file.

    `name` is dotted, as in `data.train`, and `hint` the type of its value in the file. `read` turns the value in the
    file into that of the run. `default` makes the value of a key that the file lacks, from those of the keys before it.
    `example` shows how to write the key; it is set where the key is required. `fields` are the fields of `DPOConfig`
    that the value sets, `arguments` the arguments of `DPOTrainer`. A key whose value is None sets nothing.
    """

    name: str
    hint: Any = Any
    read: Callable[[Document, str, Any], Any] = _as_written
    default: Callable[[Mapping[str, Any]], Any] = _no_default
    example: str = ""
    fields: Effect = _nothing
    arguments: Effect = _nothing


# How values are read, and what they become ---------------------------------------------------------------------------


def _model(document: Document, name: str, value: Any) -> Source:
    return read_source(document, name, value, MODEL)


def _tokenizer(document: Document, name: str, value: Any) -> Source:
    return read_source(document, name, value, TOKENIZER)


def _same_as_model(values: Mapping[str, Any]) -> Source:
    """The tokenizer beside the model's weights."""
    model: Source = values["model"]
    options = {name: model.options[name] for name in _WHICH_WEIGHTS if name in model.options}
    return Source(path=model.path, options=options)


def _dataset(document: Document, name: str, value: Any) -> Source:
    return read_source(document, name, value, DATASET)


def _training_data(document: Document, name: str, value: Any) -> Source | MixtureOfSources:
    """One dataset, or several by name that are mixed."""
    if isinstance(value, str) or value.keys() & DATASET:
        if "weight" in value and isinstance(value, dict):
            raise document.error(
                f"{name}.weight",
                f"`{name}.weight` is the share of one of several datasets, and this is the only one. Remove it, or "
                "name the datasets: `train: {first: {path: ..., weight: ...}, second: ...}`.",
            )
        return _dataset(document, name, value)
    if value and all(difflib.get_close_matches(str(part), DATASET) for part in value):  # one dataset, misspelled
        raise document.unknown(name, next(iter(value)), DATASET)
    return read_mixture(document, name, value, WITH_WEIGHT)


def _datasets(document: Document, name: str, value: Any) -> Source | dict[str, Source]:
    """One dataset, or several by name."""
    if isinstance(value, str) or value.keys() & DATASET:
        return _dataset(document, name, value)
    if not value:
        raise document.error(name, f"`{name}` is a mapping without datasets. Name one, or leave it out.")
    return {part: _dataset(document, f"{name}.{part}", source) for part, source in value.items()}


def _loaded_training_data(run: "RunFile", args: "DPOConfig") -> Any:
    data = run["data.train"]
    if isinstance(data, Source):
        return load_dataset(run.document, "data.train", data)
    seed = args.seed if args.data_seed is None else args.data_seed
    return load_mixture(run.document, "data.train", data, seed=seed, stopping=run["data.stopping"])


def _loaded_datasets(run: "RunFile", name: str) -> Any:
    value = run[name]
    if isinstance(value, dict):
        return {part: load_dataset(run.document, f"{name}.{part}", source) for part, source in value.items()}
    return load_dataset(run.document, name, value)


def _training_fields(run: "RunFile", section: Any, fields: Mapping[str, Any]) -> Mapping[str, Any]:
    """The fields that the section `training` sets. RunFileError for one that has another place, or is set twice."""
    from holdfast.config import DPOConfig

    hints = {name: hint for name, hint in field_hints(DPOConfig).items() if name not in ELSEWHERE}
    hints["resume_from_checkpoint"] = bool | str | None  # `true` is the newest checkpoint in the output folder
    hints["fsdp"] = bool | str | None
    hints["model_init_kwargs"] = dict | None
    for name in sorted(ELSEWHERE.keys() & section if isinstance(section, dict) else ()):
        raise run.document.error(f"training.{name}", f"`training.{name}` was set. {ELSEWHERE[name]}")
    values = run.document.check("training", without_unknown(run.document, "training", section, hints), hints)
    check_json_options(run.document, values, DPOConfig._VALID_DICT_FIELDS)
    of_model, more = fields["model_init_kwargs"], values.get("model_init_kwargs") or {}
    for name in sorted(more.keys() & of_model):
        raise run.document.error(
            "training.model_init_kwargs",
            f"`{name}` is set twice: `model.{name}` is {of_model[name]!r}, and "
            f"`training.model_init_kwargs.{name}` is {more[name]!r}. Keep one of them.",
        )
    return values | {"model_init_kwargs": {**of_model, **more}}


def _ref_model_options(run: "RunFile", source: Source, fields: Mapping[str, Any]) -> Mapping[str, Any]:
    """How a reference model is loaded: with the policy's options, except for those that say which weights it has."""
    shared = {name: value for name, value in fields["model_init_kwargs"].items() if name not in _WHICH_WEIGHTS}
    return {"ref_model_init_kwargs": {**shared, **source.options}}


# The keys ------------------------------------------------------------------------------------------------------------

KEYS = (
    Key(
        name="model",
        example="model: <folder or hub name>",
        read=_model,
        fields=lambda run, source, fields: {"model_init_kwargs": source.options},
        arguments=lambda run, source, arguments: {"model": source.path},
    ),
    Key(
        name="peft",
        arguments=lambda run, section, arguments: {"peft_config": run.peft_config()},
    ),
    Key(
        name="tokenizer",
        read=_tokenizer,
        default=_same_as_model,
        arguments=lambda run, source, arguments: {
            "processing_class": load_tokenizer(source, trust_remote_code=arguments["args"].trust_remote_code)
        },
    ),
    Key(
        name="data.train",
        hint=str | dict,
        example="data: {train: <file or hub name>}",
        read=_training_data,
        arguments=lambda run, source, arguments: {"train_dataset": _loaded_training_data(run, arguments["args"])},
    ),
    Key(name="data.stopping", hint=Literal["first_exhausted", "all_exhausted"] | None),
    Key(
        name="data.eval",
        hint=str | dict | None,
        read=_datasets,
        arguments=lambda run, sources, arguments: {"eval_dataset": _loaded_datasets(run, "data.eval")},
    ),
    Key(name="data.columns", hint=str | dict | None, read=read_columns),  # for each dataset that has none of its own
    Key(name="training", fields=_training_fields),
    Key(
        name="reference.kind",
        hint=str,
        default=lambda values: "auto",
        fields=lambda run, kind, fields: {"reference": kind},
    ),
    Key(
        name="reference.model",
        hint=str | dict | None,
        read=_model,
        fields=_ref_model_options,
        arguments=lambda run, source, arguments: {"ref_model": source.path},
    ),
)
"""Every key of a run file, in the order in which they take effect: a later one may change what an earlier one made."""

SECTIONS = tuple(dict.fromkeys(key.name.partition(".")[0] for key in KEYS))
"""The keys at the top level of a run file."""


# Reading a file ------------------------------------------------------------------------------------------------------


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class RunFile:
    """A checked run file: `run["data.train"]` is the value of a key, None where neither the file nor a default has one.

    The trainer's arguments are made on demand, because their classes are slow to import.
    """

    document: Document
    values: Mapping[str, Any]

    def __getitem__(self, key: str) -> Any:
        return self.values[key]

    def training_arguments(self) -> "DPOConfig":
        """The run's `DPOConfig`. Every key has been checked by then, those of other sections too, also against each
        other. `RunFileError` if a value is refused."""
        from holdfast.config import DPOConfig

        fields: dict[str, Any] = {}
        for key in KEYS:
            if self[key.name] is not None:
                fields |= key.fields(self, self[key.name], fields)
        try:
            args = DPOConfig(**fields)
        except REFUSED as error:
            raise self.document.refusal("training", "the training arguments were refused", error) from error
        self.peft_config()
        check_agreement(self, args)
        return args

    def trainer_arguments(self, args: "DPOConfig") -> dict[str, Any]:
        """The arguments of `DPOTrainer` by name, `args` among them; tokenizer and datasets are loaded for it.
        ValueError, TypeError or OSError where one cannot be made."""
        arguments: dict[str, Any] = {"args": args}
        for key in KEYS:
            if self[key.name] is not None:
                arguments |= key.arguments(self, self[key.name], arguments)
        return arguments

    def peft_config(self) -> "PeftConfig | None":
        """peft's config of the kind `peft.peft_type` (LORA unless named), or None without a `peft` section."""
        section = self["peft"]
        if section is None:
            return None
        from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

        kinds = {str(kind.value): config for kind, config in PEFT_TYPE_TO_CONFIG_MAPPING.items()}
        kind = section.get("peft_type", "LORA") if isinstance(section, dict) else "LORA"
        if not isinstance(kind, str) or kind not in kinds:
            near = difflib.get_close_matches(str(kind).upper(), kinds, n=1) or sorted(kinds)
            raise self.document.error(
                "peft.peft_type",
                f"`peft.peft_type` must name a kind of adapter; found {kind!r}. Try {', '.join(near)}.",
            )
        values = self.document.check("peft", section, field_hints(kinds[kind]))
        values.pop("peft_type", None)
        check_adapter(self.document, kinds[kind], values)
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("error", message=".*ignored")
                return kinds[kind](**{"task_type": "CAUSAL_LM", **values})
        except (*REFUSED, UserWarning) as error:
            raise self.document.refusal("peft", f"the {kind} config was refused", error) from error


def read_run_file(path: str | Path, overrides: Sequence[str] = ()) -> RunFile:
    """The checked run file at `path`, after the `overrides` (`"training.beta=0.2"`: dotted key, YAML value).

    Errors: `RunFileError` for a file that is missing or not YAML (with the line), a key that does not exist (with the
    nearest one that does), a key given twice, or a value of the wrong type. The keys of `training` and `peft` are
    checked when their objects are asked for.
    """
    document = read_document(Path(path), overrides, sections_with=_sections_with)
    never_print(secrets_in(document.values))
    without_unknown(document, "", document.values, SECTIONS)
    _check_secrets(document, document.values)
    by_key = _values_by_key(document, with_paths_expanded(document, DATASET))
    values: dict[str, Any] = {}
    for key in KEYS:
        value = by_key.get(key.name)
        if value is None and key.example:
            raise _missing(document, key)
        values[key.name] = key.default(values) if value is None else key.read(document, key.name, value)
    return RunFile(document=document, values=values)


def _values_by_key(document: Document, sections: Mapping[Any, Any]) -> dict[str, Any]:
    """The values of the sections by dotted key, of the types that `KEYS` declares. A section of several keys may be
    written as the value of its `kind` alone."""
    by_key: dict[str, Any] = {}
    for section in SECTIONS:
        value = sections.get(section)
        hints = {key.name.partition(".")[2]: key.hint for key in KEYS if key.name.startswith(f"{section}.")}
        if not hints or value is None:
            by_key[section] = value
            continue
        if "kind" in hints and not isinstance(value, dict):
            value = {"kind": value}
        by_key |= {f"{section}.{name}": item for name, item in document.check(section, value, hints).items()}
    return by_key


def _check_secrets(document: Document, value: Any, key: str = "") -> None:
    """RunFileError for a secret that was left out when the run file was written."""
    if isinstance(value, dict):
        for name, item in value.items():
            _check_secrets(document, item, f"{key}.{name}" if key else str(name))
    elif is_secret(key.rpartition(".")[2]) and is_mask(value):
        raise document.error(
            key,
            f"`{key}` is {value!r}: a run writes its run file without secrets. Write it again, or remove the key (a "
            "token of the hub may also come from HF_TOKEN).",
        )


def _missing(document: Document, key: Key) -> Exception:
    section, _, name = key.name.partition(".")
    if document.values.get(section) is None:
        noun = section if name else f"a {section}"
        return document.error(section, f"a run needs {noun}; found no `{section}`. Write `{key.example}`.")
    return document.error(section, f"`{section}` needs `{name}`. Write `{key.example}`.")


def _sections_with(name: str) -> set[str]:
    """The sections that have a key of this name."""
    from peft import LoraConfig

    from holdfast.config import DPOConfig

    sections = {section for section in SECTIONS if f"{section}.{name}" in {key.name for key in KEYS}}
    sections |= {"model"} if name in MODEL else set()
    sections |= {""} if name in SECTIONS else set()
    sections |= {"peft"} if name in field_hints(LoraConfig) else set()
    return sections | ({"training"} if name in field_hints(DPOConfig).keys() - ELSEWHERE.keys() else set())
