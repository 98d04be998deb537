"""Whether a trained run was trained as a run file says: the values that `holdfast train` left in its folder, compared.

Only those are compared that change what is said of its pairs: models, training data, and what makes a loss and its
tokens. Checkpoints of a run that has not finished have no such file, and nothing is said of them. The tokenizer beside
the trained model is compared itself, since with another one every number would be of another text.
"""

from collections.abc import Iterator, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import yaml
from transformers import PreTrainedTokenizerBase

from holdfast.cli.runfile import RunFile
from holdfast.cli.text_file import UnreadableError, text_of
from holdfast.losses.modifiers import ModifierOptions
from holdfast.losses.objective import LossOptions
from holdfast.policy.tokenizer import read_tokenizer

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")
_SECTIONS = ("model", "tokenizer", "reference", "data.train")
_OPTIONS = {
    f"training.{name}"
    for name in (
        "loss_type", "loss_weights", "max_length", "truncation_mode",
        *(field.name for kind in (LossOptions, ModifierOptions) for field in fields(kind)),
    )
}  # fmt: skip


def other_values(run: RunFile, out: Path) -> tuple[str, ...]:
    """A sentence where the run in `out`, a run's folder or one of its checkpoints, was trained with other values."""
    trained = _values_of(out) or _values_of(out.parent)
    if trained is None:
        return ()
    before, now = dict(_flat(trained)), dict(_flat(run.document.values))
    names = [name for name in {**before, **now} if _matters(name) and before.get(name) != now.get(name)]
    if not names:
        return ()
    said = "; ".join(f"{name} was {_shown(before, name)} and is {_shown(now, name)} here" for name in names)
    return (f"The run in {out} was trained with other values: {said}.",)


def check_tokenizer(tokenizer: PreTrainedTokenizerBase, trained: Path, *, trust_remote_code: bool) -> None:
    """ValueError where the model in the folder `trained` has a tokenizer in which a token of the run's has another id
    or none, so that it would read other text than the run's. A folder without a tokenizer is not looked at."""
    if not any((trained / name).is_file() for name in _TOKENIZER_FILES):
        return
    theirs: Any = read_tokenizer(
        str(trained), trust_remote_code=trust_remote_code, advice="Mend it, or name another run."
    )
    ids = theirs.get_vocab()
    wrong = [(token, number) for token, number in tokenizer.get_vocab().items() if ids.get(token) != number]
    if wrong:
        token, number = min(wrong, key=lambda each: each[1])
        found = "none" if token not in ids else f"{ids[token]}"
        raise ValueError(
            f"the trained policy in {str(trained)!r} was to be asked about the run's pairs, but its tokenizer is "
            f"another one: {len(wrong):,} of the run's {len(tokenizer):,} tokens have another id there or none, "
            f"{token!r} first (id {number}, there {found}). Name the folder of a run with this tokenizer, or the run "
            "file that it was trained by."
        )


def _values_of(folder: Path) -> Mapping[str, Any] | None:
    """The values of the folder's `run.yaml`; None where there is none that can be read."""
    try:
        found = yaml.safe_load(text_of(folder / "run.yaml"))
    except (FileNotFoundError, UnreadableError, yaml.YAMLError):
        return None
    return found if isinstance(found, Mapping) else None


def _flat(values: Mapping[Any, Any], before: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted keys and their values. A path alone is the same as a mapping with nothing but `path`."""
    for key, value in values.items():
        name = f"{before}{key}"
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{name}.")
        else:
            yield name.removesuffix(".path"), value


def _matters(name: str) -> bool:
    return name in _OPTIONS or any(name == section or name.startswith(f"{section}.") for section in _SECTIONS)


def _shown(values: Mapping[str, Any], name: str) -> str:
    return repr(values[name]) if name in values else "not set"
