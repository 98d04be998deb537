"""Reading what lies at a path or hub id that a user named: whatever fails there is one ValueError.

transformers, peft, safetensors and tokenizers raise errors of every kind over a damaged or hostile folder, from
`KeyError` to their own. Inside `reading` each becomes a message: what was to be read, which file of it is at fault (see
`policy.faults`), and what to do. Given up: telling a library's defect from a damaged file; `raise ... from` keeps both.
"""

import contextlib
import difflib
import os
import re
from collections.abc import Iterator

import torch

from holdfast.internals.moved import MovedError
from holdfast.own_error import is_own
from holdfast.policy.faults import OF_A_MODEL, OF_A_TOKENIZER, check_folder, fault_of


@contextlib.contextmanager
def reading(
    request: str,
    path: str,
    *,
    noun: str,
    advice: str,
    hub_advice: str | None = None,
    subfolder: str | None = None,
) -> Iterator[None]:
    """A context in which the folder or hub id `path` is read. `request` begins the message (`model='x' was to be
    loaded,`), `noun` says as what, and `advice` ends it, or `hub_advice` where there is no such folder.

    ValueError for every error inside, but for those of this package, of memory and of a moved private name.
    """
    folder = os.path.join(path, subfolder) if subfolder and os.path.isdir(path) else path
    try:
        check_folder(folder, OF_A_MODEL if noun == "model" else OF_A_TOKENIZER)
    except ValueError as error:
        raise ValueError(f"{request} a folder that cannot be read as a {noun}: {error}. {advice}") from error
    try:
        yield
    except (MovedError, torch.OutOfMemoryError, MemoryError):
        raise
    except BaseException as error:
        is_panic = type(error).__name__ == "PanicException"  # tokenizers and safetensors, where they did not foresee it
        if not (isinstance(error, Exception) or is_panic) or is_own(error):
            raise
        if os.path.isdir(path):
            found = _why_of_folder(folder if os.path.isdir(folder) else path, error, noun)
            why = f"a folder that cannot be read as a {noun}: {found} {advice}"
        else:
            why = _why_of_hub_id(path, error, hub_advice or advice, but="" if request.endswith(":") else "but ")
        raise ValueError(f"{request} {_CODE if 'trust_remote_code' in str(error) else why}") from error


_CODE = (
    "which has code of its own (`auto_map`) that is run in order to load it. Such code can do all that you can. If you "
    "trust its author, or have read it, set trust_remote_code=True (in a run file `training.trust_remote_code: true`); "
    "else name another one."
)


def _why_of_folder(folder: str, error: BaseException, noun: str) -> str:
    fault = fault_of(folder) if noun == "model" else None
    inside = sorted(os.listdir(folder))
    is_of_a_run = any(re.fullmatch(r"checkpoint-\d+", name) for name in inside)
    advice = " A run has not finished there: name one of its checkpoints." if is_of_a_run else ""
    return f"{fault or _reason(error)}. It holds {inside[:6]}.{advice}"


def _why_of_hub_id(path: str, error: BaseException, advice: str, *, but: str) -> str:
    parent, name = os.path.split(path.rstrip("/"))
    beside = os.listdir(parent or ".") if os.path.isdir(parent or ".") else []
    near = [os.path.join(parent, other) for other in difflib.get_close_matches(name, beside, n=1)]
    return (
        f"{but}there is no such folder, and as a hub id it cannot be read either: {_reason(error)}. "
        f"{f'Did you mean {near[0]!r}? ' if near else ''}{advice}"
    )


def _reason(error: BaseException) -> str:
    first_line = next(iter(str(error).strip().splitlines()), "").rstrip(".")
    if isinstance(error, OSError | ValueError) and first_line:
        return first_line
    return f"{type(error).__name__}: {first_line}".rstrip(": ")
