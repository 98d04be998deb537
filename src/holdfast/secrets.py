"""Which options are secrets, and what is written in their place: tokens and passwords never get into a file or a log.

An option is a secret by its name (`hub_token`, `api_key`, `password`), wherever it stands, also in mappings such as
`model_init_kwargs`. Given up: secrets in options of other names, such as a password inside a URL.
"""

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

MASK = "<secret, not written>"
"""What stands for a secret in a file."""

_SECRET = re.compile(
    r"(?:^|.*_)(?:token|pass(?:word|wd|phrase)|secrets?|(?:api|access|private|secret)_?key|credentials?|auth|bearer)"
)
_OF_TEXT = {"pad", "eos", "bos", "unk", "sep", "cls", "mask", "image", "audio", "video", "special", "start", "end"}
"""What a token of text is called; `pad_token` is no secret."""
_IS_FOR_DISK = "_holdfast_is_for_disk"


def is_secret(name: Any) -> bool:
    """Whether an option of this name holds a secret."""
    words = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", str(name)).lower().replace("-", "_")
    prefix, _, last = words.rpartition("_")
    return _SECRET.fullmatch(words) is not None and not (last == "token" and prefix.split("_")[-1] in _OF_TEXT)


def is_mask(value: Any) -> bool:
    """Whether a value stands for a secret that was not written: by this module, or by transformers (`<HUB_TOKEN>`)."""
    return isinstance(value, str) and (value == MASK or re.fullmatch("<[A-Z_]+>", value) is not None)


def masked(value: Any, name: Any = "") -> Any:
    """A copy of a value of the option `name` in which every secret is `MASK`; mappings and lists are gone through."""
    if isinstance(value, Mapping):
        return {key: masked(item, key if not is_secret(name) else name) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(masked(item, name) for item in value)
    if is_secret(name):
        return value if value is None or isinstance(value, bool) or value == "" else MASK
    if isinstance(inside := _from_json(value), dict):
        without = masked(inside)
        return value if without == inside else json.dumps(without)
    return value


def secrets_in(value: Any, name: Any = "") -> Iterator[str]:
    """The secrets in a value of the option `name`, as text."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from secrets_in(item, key if not is_secret(name) else name)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from secrets_in(item, name)
    elif is_secret(name):
        if value is not None and not isinstance(value, bool) and value != "" and not is_mask(value):
            yield str(value)
    elif isinstance(inside := _from_json(value), dict):
        yield from secrets_in(inside)


def _from_json(value: Any) -> Any:
    """What an option that is JSON text says; None for any other value."""
    if not isinstance(value, str) or not value.startswith("{"):
        return None
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        return None


@contextmanager
def without_secrets_on_disk(args: Any) -> Iterator[None]:
    """Within it, what is pickled of `args` (`training_args.bin`) has no secrets. Elsewhere a pickled config keeps them:
    it may be on its way to another machine, to train there."""
    vars(args)[_IS_FOR_DISK] = True
    try:
        yield
    finally:
        vars(args).pop(_IS_FOR_DISK, None)


def pickled_state(state: Mapping[str, Any]) -> dict[str, Any]:
    """The attributes to pickle of an object that has these. See `without_secrets_on_disk`."""
    if _IS_FOR_DISK not in state:
        return dict(state)
    rest = {name: value for name, value in state.items() if name != _IS_FOR_DISK}
    return {
        name: None if any(secrets_in(value, name)) and is_secret(name) else masked_inside(value)
        for name, value in rest.items()
    }


def masked_inside(value: Any) -> Any:
    """`masked` for a plain mapping that holds a secret; every other value as it is."""
    return masked(value) if isinstance(value, dict) and any(secrets_in(value)) else value
