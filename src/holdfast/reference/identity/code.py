"""Digests of the code that a module runs, where the code is not a library's: a user's class, a new `forward`, hooks.

A user may write part of a model's computation: remote code of a model, a layer class in a script, a patched `forward`,
a hook that adds a vector. Weights and settings do not say what such code computes. So it counts by its source, and by
the plain values and tensors that it closes over.

Given up: globals that the code reads. Code typed into a console has no source and counts by its name alone. A hook that
only reads outputs counts too, since nothing tells it from one that changes them.
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
"""Packages whose code is not read: their versions say which code it is."""
_REMOTE = "transformers_modules"
"""The package into which transformers loads a model's remote code."""


def code_of(module: nn.Module) -> dict[str, str]:
    """Digests of the module's code that is not a library's, by kind (`code`, `forward`, `hooks`). Empty for most."""
    hooks = (*hooks_before(module), *hooks_after(module))
    digests = {
        "code": _class_digest(type(module)),
        "forward": _forward_digest(module),
        "hooks": " ".join(filter(None, map(_function_digest, hooks))),
    }
    return {kind: digest for kind, digest in digests.items() if digest}


def _class_digest(kind: type) -> str:
    """Digest of the methods and plain values of a class and its base classes; those of libraries are left out."""
    own = [base for base in kind.__mro__ if not _is_of_a_library(base.__module__)]
    values = [
        f"{name} {_value_text(value)}" for base in own for name, value in vars(base).items() if _is_code(name, value)
    ]
    # The whole file of remote code counts. The file of a script does not: it holds options of the run.
    files = [_source(sys.modules[base.__module__]) for base in own if base.__module__.startswith(_REMOTE)]
    return _digest(values + files) if own else ""


def _is_code(name: str, value: Any) -> bool:
    """False for the texts and numbers that Python itself puts into a class."""
    return not (name.startswith("__") and isinstance(value, int | str | type(None)))


def _forward_digest(module: nn.Module) -> str:
    """Digest of the `forward` that runs, where a user replaced that of the module or of its library's class."""
    if "forward" in vars(module):
        return _function_digest(vars(module)["forward"])
    owner = next((base for base in type(module).__mro__ if "forward" in vars(base)), None)
    return _function_digest(vars(owner)["forward"]) if owner is not None and _is_of_a_library(owner.__module__) else ""


def _function_digest(function: Any) -> str:
    """Digest of a function's source and of the values it closes over; empty for a library's function."""
    if isinstance(function, functools.partial):
        inner = _function_digest(function.func)
        return inner and _digest([inner, *map(_value_text, (*function.args, *function.keywords.values()))])
    if isinstance(function, MethodType):
        function = function.__func__
    if _is_of_a_library(_module_name(function)):
        return _function_digest(function.__wrapped__) if hasattr(function, "__wrapped__") else ""
    cells = [cell.cell_contents for cell in getattr(function, "__closure__", None) or () if not _is_empty(cell)]
    defaults = getattr(function, "__defaults__", None) or ()
    texts = [_source(function), *map(_value_text, cells), *map(_value_text, defaults)]
    if not hasattr(function, "__code__"):  # an object that can be called
        texts += [f"{name} {_value_text(value)}" for name, value in sorted(vars(function).items())]
    return _digest(texts)


def _value_text(value: Any) -> str:
    """A value that code closes over, as text: plain values in full, tensors and functions by digest, others empty."""
    if isinstance(value, Tensor):
        return tensor_digest(value)
    if isinstance(value, bool | int | float | str | torch.dtype | type(None)):
        return repr(value)
    if isinstance(value, functools.partial | MethodType) or inspect.isfunction(value):
        return _function_digest(value)
    if isinstance(value, staticmethod | classmethod):
        return _function_digest(value.__func__)
    if isinstance(value, property):
        return _value_text(value.fget)
    return ""


def _source(thing: Any) -> str:
    """The source of a function or module, or of the class of any other object; a dotted name where there is none."""
    is_function_or_module = hasattr(thing, "__code__") or inspect.ismodule(thing)
    owner = thing if is_function_or_module else type(thing)
    # `inspect` would follow `__wrapped__` of a function, so it gets the function's code object.
    source = _source_or_none(getattr(owner, "__code__", owner))
    return source if source is not None else f"{owner.__module__}.{owner.__qualname__}"


@functools.cache
def _source_or_none(thing: Any) -> str | None:
    try:
        return inspect.getsource(thing)
    except (OSError, TypeError):
        return None


def _module_name(function: Any) -> str:
    """The module that a function was written in, even where `functools.wraps` gave it the name of another."""
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


def _digest(texts: list[str]) -> str:
    return hashlib.blake2b("\n".join(texts).encode(), digest_size=8).hexdigest()


def names_of_functions(module: nn.Module) -> Iterator[tuple[str, str]]:
    """The functions among a module's attributes, such as an activation, each with a text that tells it from others: a
    library's dotted name and options, or the digest of any other function."""
    for name, value in vars(module).items():
        is_function = inspect.isroutine(value) or isinstance(value, functools.partial)
        if is_function and name != "forward" and not name.startswith("_"):
            inner = value.func if isinstance(value, functools.partial) else value
            dotted_name = f"{getattr(inner, '__module__', '')}.{getattr(inner, '__qualname__', '')}"
            options = [*value.args, *sorted(value.keywords.items())] if isinstance(value, functools.partial) else []
            yield name, _function_digest(value) or " ".join([dotted_name, *map(str, options)])
