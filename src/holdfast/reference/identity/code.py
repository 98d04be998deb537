"""Which code a module runs, where it is not a library's own: a user's class, a replaced `forward`, hooks.

Weights and settings alone do not say what a module computes where its user wrote the computation: remote code of a
model, a layer class of a script, a `forward` that was patched, a hook that adds a vector. Such code is known by its
source and by the plain values and tensors that it closes over. Given up: what it reads from elsewhere, and code that
was typed in, which has no source and is known by name. A hook that only looks counts as well; nobody can tell.
"""

import functools
import hashlib
import inspect
import sys
from collections.abc import Iterator
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from holdfast.internals.torch import hooks_after, hooks_before
from holdfast.reference.identity.digests import tensor_digest

_LIBRARIES = {
    "torch", "transformers", "peft", "accelerate", "holdfast", "bitsandbytes", "torchao", "deepspeed", "optimum",
    "kernels", "builtins", "functools", "contextlib",
}  # fmt: skip
"""Packages whose code is known by their versions."""
_REMOTE = "transformers_modules"
"""Where transformers puts the code that a model brings along."""


def code_of(module: nn.Module) -> dict[str, str]:
    """By kind (`code`, `forward`, `hooks`), what of the module's own computation is no library's. Empty for most."""
    found = {"code": _of_class(type(module)), "forward": _of_forward(module)}
    found["hooks"] = " ".join(filter(None, map(_of_function, (*hooks_before(module), *hooks_after(module)))))
    return {kind: text for kind, text in found.items() if text}


def _of_class(kind: type) -> str:
    """The methods and plain values of the class and of those that it stands on, as far as they are no library's."""
    own = [base for base in kind.__mro__ if not _is_of_a_library(base.__module__)]
    found = [f"{name} {_value(value)}" for base in own for name, value in vars(base).items() if _is_meant(name, value)]
    # Remote code is read with all that stands beside it in its file; a script is not, since a run's options are there.
    files = [_source(sys.modules[base.__module__]) for base in own if base.__module__.startswith(_REMOTE)]
    return _short(found + files) if own else ""


def _is_meant(name: str, value: Any) -> bool:
    """Whether it is not one of the texts and numbers that Python itself puts into a class."""
    return not (name.startswith("__") and isinstance(value, int | str | type(None)))


def _of_forward(module: nn.Module) -> str:
    """The `forward` that runs, where it was put in the place of the class's own."""
    if "forward" in vars(module):
        return _of_function(vars(module)["forward"])
    owner = next((base for base in type(module).__mro__ if "forward" in vars(base)), None)
    return _of_function(vars(owner)["forward"]) if owner is not None and _is_of_a_library(owner.__module__) else ""


def _of_function(function: Any) -> str:
    """Source and values of a function; empty for a library's."""
    if isinstance(function, functools.partial):
        inner = _of_function(function.func)
        return inner and _short([inner, *map(_value, (*function.args, *function.keywords.values()))])
    if isinstance(function, MethodType):
        function = function.__func__
    if _is_of_a_library(_home(function)):
        return _of_function(function.__wrapped__) if hasattr(function, "__wrapped__") else ""
    cells = [cell.cell_contents for cell in getattr(function, "__closure__", None) or () if not _is_empty(cell)]
    defaults = getattr(function, "__defaults__", None) or ()
    known = [_source(function), *map(_value, cells), *map(_value, defaults)]
    if not hasattr(function, "__code__"):  # an object that can be called
        known += [f"{name} {_value(value)}" for name, value in sorted(vars(function).items())]
    return _short(known)


def _value(value: Any) -> str:
    """A value that code closes over, where it is plain, a tensor or a function."""
    if isinstance(value, Tensor):
        return tensor_digest(value)
    if isinstance(value, bool | int | float | str | torch.dtype | type(None)):
        return repr(value)
    if isinstance(value, functools.partial | MethodType) or inspect.isfunction(value):
        return _of_function(value)
    if isinstance(value, staticmethod | classmethod):
        return _of_function(value.__func__)
    if isinstance(value, property):
        return _value(value.fget)
    return ""


def _source(part: Any) -> str:
    """The source of a function, a file, or of the class of another object; its name where there is none."""
    is_named = hasattr(part, "__code__") or inspect.ismodule(part)
    readable = part if is_named else type(part)
    found = _text(getattr(readable, "__code__", readable))  # of a function itself, not of what it wraps
    return found if found is not None else f"{readable.__module__}.{readable.__qualname__}"


@functools.cache
def _text(part: Any) -> str | None:
    try:
        return inspect.getsource(part)
    except (OSError, TypeError):
        return None


def _home(function: Any) -> str:
    """The module that a function was written in, whatever it was made to look like."""
    if hasattr(function, "__globals__"):
        return str(function.__globals__.get("__name__", ""))
    return getattr(function, "__module__", None) or type(function).__module__


def _is_of_a_library(module: str) -> bool:
    return module.split(".")[0] in _LIBRARIES


def _is_empty(cell: Any) -> bool:
    try:
        cell.cell_contents  # noqa: B018
    except ValueError:
        return True
    return False


def _short(texts: list[str]) -> str:
    return hashlib.blake2b("\n".join(texts).encode(), digest_size=8).hexdigest()


def names_of_functions(module: nn.Module) -> Iterator[tuple[str, str]]:
    """The functions among a module's attributes, an activation for instance, each by its name or its source."""
    for name, value in vars(module).items():
        is_function = inspect.isroutine(value) or isinstance(value, functools.partial)
        if is_function and name != "forward" and not name.startswith("_"):
            inner = value.func if isinstance(value, functools.partial) else value
            said = f"{getattr(inner, '__module__', '')}.{getattr(inner, '__qualname__', '')}"
            options = [*value.args, *sorted(value.keywords.items())] if isinstance(value, functools.partial) else []
            yield name, _of_function(value) or " ".join([said, *map(str, options)])
