"""Keys that a run file does not have: all of them in one error, each with what to write where that is known.

They are the options of `options.renamed`, under the sentences that a script gets. One that asks for nothing is left out
in silence.
"""

from collections.abc import Collection, Mapping
from types import MappingProxyType
from typing import Any

from holdfast.cli.yaml_document import Document
from holdfast.options.renamed import ARGUMENTS, RENAMED

_KEYS: Mapping[str, str] = MappingProxyType(
    {
        "model": "`model`",
        "ref_model": "`reference.model`",
        "processing_class": "`tokenizer`",
        "train_dataset": "`data.train`",
        "eval_dataset": "`data.eval`",
        "peft_config": "the section `peft`",
    }
)
"""Which key of a run file becomes an argument of the trainer."""


def without_unknown(document: Document, section: str, values: Any, names: Collection[str]) -> Any:
    """The values of a section ("" for the file itself) without keys that are none of its `names` and ask for nothing.
    RunFileError where there are others; it names all."""
    if not isinstance(values, dict):
        return values
    unknown = {name: value for name, value in values.items() if name not in names}
    asked = {name: value for name, value in unknown.items() if name not in RENAMED or RENAMED[name].is_asked(value)}
    if not asked:
        return {name: value for name, value in values.items() if name not in unknown}
    errors = [document.unknown(section, name, names, _instead(name, value, values)) for name, value in asked.items()]
    raise errors[0] if len(errors) == 1 else document.unknown_keys(errors)


def _instead(name: Any, value: Any, others: Mapping[Any, Any]) -> str | None:
    """What to write instead, as a sentence; None where it is not known."""
    if name in _KEYS:
        return f"Write it as {_KEYS[name]}."
    if name in ARGUMENTS or name not in RENAMED:
        return None
    entry = RENAMED[name]
    if entry.owner == "DPOTrainer":
        keys = [_KEYS[argument] for argument in entry.instead(value, others) if argument in _KEYS]
        return f"Write it as {keys[0]}." if keys else None
    advice = entry.advice(value, others)
    return f"{advice[0].upper()}{advice[1:]}."
