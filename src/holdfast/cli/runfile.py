"""A run file (`run.yaml`) -> the objects of one training run: model and data sources, `DPOConfig`, PEFT config.

The keys of a section are the fields of the class it becomes (`training:` is `DPOConfig`, `peft:` is peft's own config),
so there is no second vocabulary to learn or to keep up to date, and every key and type is checked before anything is
loaded. Given up: `DPOConfig` fields at the top level; each key has one home, and the error for a stray one names it.

Reading a file imports neither torch nor transformers; those wait until an object is asked for.
"""

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from holdfast.cli.yaml_document import Document, field_hints, read_document

if TYPE_CHECKING:
    from peft import PeftConfig

    from holdfast.config import DPOConfig

SECTIONS = ("model", "tokenizer", "data", "peft", "reference", "training")
_MODEL: dict[str, Any] = {
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
_TOKENIZER: dict[str, Any] = {name: _MODEL[name] for name in ("path", "revision", "subfolder")}
_SOURCE: dict[str, Any] = {"path": str, "split": str | None, "name": str | None, "streaming": bool}
_DATA: dict[str, Any] = {"train": str | dict, "eval": str | dict | None}
_REFERENCE: dict[str, Any] = {"kind": str, "model": str | dict | None}
# What a reference model does not take over from the policy's options: which weights they are.
_WHICH_WEIGHTS = ("revision", "subfolder")
# Fields of the training arguments that would have no effect, or that have their own place: refused, never ignored.
_ELSEWHERE = {
    "reference": "Write it as the section `reference:`.",
    "ref_model_init_kwargs": "Write it as `reference.model`: {path: ..., revision: ...}.",
    "do_train": "`holdfast train` always trains; remove it.",
    "do_eval": "The run is evaluated when `data.eval` is given; remove it.",
    "do_predict": "There is no prediction pass; remove it.",
    "local_rank": "The launcher sets it; remove it.",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """Something to load: a local path or a hub name, and the options to load it with."""

    path: str
    options: dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class RunFile:
    """A checked run file. `training` and `peft` become objects on demand, because their classes are slow to import."""

    document: Document
    model: Source
    tokenizer: Source
    train: Source
    evaluation: Source | dict[str, Source] | None
    reference: str
    ref_model: Source | None

    def training_arguments(self) -> "DPOConfig":
        """`DPOConfig` from the sections `training`, `reference` and `model`; `RunFileError` if a value is refused."""
        from holdfast.config import DPOConfig

        hints = {name: hint for name, hint in field_hints(DPOConfig).items() if name not in _ELSEWHERE}
        hints["resume_from_checkpoint"] = bool | str | None  # `true` is the newest checkpoint in the output folder
        hints["model_init_kwargs"] = dict | None
        given = self.document.values.get("training") or {}
        for name in sorted(_ELSEWHERE.keys() & given):
            raise self.document.error(f"training.{name}", f"`training.{name}` was set. {_ELSEWHERE[name]}")
        values = self.document.typed("training", given, hints)
        more = values.pop("model_init_kwargs", None) or {}
        for name in sorted(more.keys() & self.model.options):
            raise self.document.error(
                "training.model_init_kwargs",
                f"`{name}` is set twice: `model.{name}` is {self.model.options[name]!r}, and "
                f"`training.model_init_kwargs.{name}` is {more[name]!r}. Keep one of them.",
            )
        values["reference"] = self.reference
        values["model_init_kwargs"] = model_options = {**self.model.options, **more}
        if self.ref_model is not None:
            shared = {name: value for name, value in model_options.items() if name not in _WHICH_WEIGHTS}
            values["ref_model_init_kwargs"] = {**shared, **self.ref_model.options}
        try:
            return DPOConfig(**values)
        except (ValueError, TypeError, ImportError) as error:
            raise self.document.error("training", f"the training arguments were refused: {error}") from error

    def peft_config(self) -> "PeftConfig | None":
        """peft's config of the kind `peft.peft_type` (LORA unless named), or None without a `peft` section."""
        given = self.document.values.get("peft")
        if given is None:
            return None
        from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

        kinds = {str(kind.value): config for kind, config in PEFT_TYPE_TO_CONFIG_MAPPING.items()}
        kind = given.get("peft_type", "LORA") if isinstance(given, dict) else "LORA"
        if kind not in kinds:
            near = difflib.get_close_matches(str(kind).upper(), kinds, n=1) or sorted(kinds)
            raise self.document.error(
                "peft.peft_type",
                f"`peft.peft_type` must name a kind of adapter; found {kind!r}. Try {', '.join(near)}.",
            )
        values = self.document.typed("peft", given, field_hints(kinds[kind]))
        values.pop("peft_type", None)
        try:
            return kinds[kind](**{"task_type": "CAUSAL_LM", **values})
        except (ValueError, TypeError, ImportError) as error:
            raise self.document.error("peft", f"the {kind} config was refused: {error}") from error


def read_run_file(path: str | Path, overrides: Sequence[str] = ()) -> RunFile:
    """The checked run file at `path`, after the `overrides` (`"training.beta=0.2"`: dotted key, YAML value).

    Errors: `RunFileError` for a file that is missing or not YAML (with the line), a key that does not exist (with the
    nearest one that does), a key given twice, or a value of the wrong type. The keys of `training` and `peft` are
    checked when their objects are asked for.
    """
    document = read_document(Path(path), overrides, sections_with=_sections_with)
    values = document.values
    for name in values:
        if name not in SECTIONS:
            raise document.unknown(str(name), SECTIONS)
    if values.get("model") is None:
        raise document.error("model", "a run needs a model; found no `model`. Write `model: <folder or hub name>`.")
    if values.get("data") is None:
        raise document.error("data", "a run needs data; found no `data`. Write `data: {train: <file or hub name>}`.")
    model = _source(document, "model", values["model"], _MODEL)
    data = document.typed("data", values["data"], _DATA)
    if "train" not in data:
        raise document.error("data", "`data` needs `train`. Write `data: {train: <file or hub name>}`.")
    same = {name: model.options[name] for name in _WHICH_WEIGHTS if name in model.options}
    tokenizer = values.get("tokenizer") or {"path": model.path, **same}
    reference = values.get("reference") or "auto"
    if not isinstance(reference, dict):
        reference = {"kind": reference}
    reference = document.typed("reference", reference, _REFERENCE)
    ref_model = reference.get("model")
    return RunFile(
        document=document,
        model=model,
        tokenizer=_source(document, "tokenizer", tokenizer, _TOKENIZER),
        train=_source(document, "data.train", data["train"], _SOURCE),
        evaluation=_evaluation(document, data.get("eval")),
        reference=reference.get("kind", "auto"),
        ref_model=None if ref_model is None else _source(document, "reference.model", ref_model, _MODEL),
    )


def _source(document: Document, where: str, value: Any, hints: Mapping[str, Any]) -> Source:
    if isinstance(value, str):
        return Source(path=value, options={})
    options = document.typed(where, value, hints)
    if "path" not in options:
        raise document.error(
            where, f"`{where}` needs `path`; found {', '.join(options) or 'nothing'}. Write `path: ...`."
        )
    return Source(path=options.pop("path"), options=options)


def _evaluation(document: Document, value: str | dict[str, Any] | None) -> Source | dict[str, Source] | None:
    if value is None:
        return None
    if isinstance(value, str) or value.keys() & _SOURCE:
        return _source(document, "data.eval", value, _SOURCE)
    return {name: _source(document, f"data.eval.{name}", source, _SOURCE) for name, source in value.items()}


def _sections_with(name: str) -> set[str]:
    """The sections that have a key of this name."""
    from peft import LoraConfig

    from holdfast.config import DPOConfig

    sections = {
        "": SECTIONS,
        "model": _MODEL,
        "data": _DATA,
        "reference": _REFERENCE,
        "peft": field_hints(LoraConfig),
        "training": field_hints(DPOConfig).keys() - _ELSEWHERE.keys(),
    }
    return {section for section, keys in sections.items() if name in keys}
