"""A comparison as JSON: the verdict, and all that it rests on."""

import json
import math
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from holdfast.inspect.two_models.compare import Comparison
from holdfast.store.files import write_durably

FORMAT = 1


def as_json(comparison: Comparison) -> dict[str, Any]:
    """Every field of a comparison as plain values. What is infinite or not a number is None."""
    values = {"format": FORMAT, **asdict(comparison)}
    if comparison.gaps is not None:
        examples = [asdict(each) | {"gap": each.gap} for each in comparison.gaps.examples]
        values["gaps"]["examples"] = examples
    return _plain(values)


def as_text(comparison: Comparison) -> str:
    """The JSON as text, in ASCII."""
    return json.dumps(as_json(comparison), indent=2, allow_nan=False) + "\n"


def write_json(comparison: Comparison, path: Path) -> None:
    """Writes the comparison as a JSON file."""
    write_durably(path, as_text(comparison).encode())


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
