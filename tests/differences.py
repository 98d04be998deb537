"""Where the numbers of two runs differ by more than rounding."""

import math
from collections.abc import Iterator
from typing import Any


def differences(one: Any, two: Any, path: str = "") -> Iterator[str]:
    """Where two results differ by more than rounding; entries that end in `each_process` differ by nature. At margins
    of zero rounding decides which reward is the higher."""
    if isinstance(one, dict) and isinstance(two, dict):
        for name in sorted(one.keys() | two.keys()):
            margins = name.replace("accuracies", "margins")
            if margins != name and all(abs(entry.get(margins, 1.0)) < 1e-5 for entry in (one, two)):
                continue
            if name not in one or name not in two:
                yield f"{path}/{name}: only with {'one process' if name in one else 'two processes'}"
            elif not name.endswith("each_process"):
                yield from differences(one[name], two[name], f"{path}/{name}")
    elif isinstance(one, list) and isinstance(two, list) and len(one) == len(two):
        for index, pair in enumerate(zip(one, two, strict=True)):
            yield from differences(*pair, f"{path}/{index}")
    elif isinstance(one, float | int) and isinstance(two, float | int):
        if not math.isclose(one, two, rel_tol=1e-5, abs_tol=1e-5):
            yield f"{path}: {one} with one process, {two} with two"
    elif one != two:
        yield f"{path}: {one!r} with one process, {two!r} with two"
