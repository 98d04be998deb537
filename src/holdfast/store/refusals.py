"""What a store says where it refuses values, cannot be read or written, or does not use a file."""

import contextlib
import errno
import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from holdfast.batch import ContentId
from holdfast.store.files import DamagedError, free_bytes
from holdfast.store.shard import MOST_NATS, MOST_TOKENS

logger = logging.getLogger(__name__)

_FULL = {errno.ENOSPC, errno.EFBIG, getattr(errno, "EDQUOT", errno.ENOSPC)}


@contextlib.contextmanager
def reading(folder: Path) -> Iterator[None]:
    """Turns an OSError into a ValueError that says what was to be read, why it was not, and what to do."""
    try:
        yield
    except OSError as error:
        raise ValueError(
            f"the log-prob store {folder} was to be read, which is not possible ({error.strerror or error}). Change "
            "the folder's permissions, or choose another one for the store (`$HOLDFAST_HOME`)."
        ) from error


@contextlib.contextmanager
def writing(folder: Path, content: str, num_completions: int, num_bytes: int) -> Iterator[None]:
    """Turns an OSError into a ValueError that says what was to be written, why it was not, and what to do.

    The store holds `num_completions` in finished shards of `num_bytes`.
    """
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        request = f"{content} were to be written to the log-prob store {folder}"
        if error.errno in _FULL:
            raise ValueError(
                f"{request}, but there is no room for them: {reason}, {free_bytes(folder):,} bytes are free. The "
                f"{num_completions} completions in finished shards are kept ({num_bytes:,} bytes). Free some space "
                "(`holdfast store gc`) or put the store on another disk (`$HOLDFAST_HOME`), and run again: only what "
                "is missing is computed."
            ) from error
        raise ValueError(
            f"{request}, which cannot be written to ({reason}); it can be read, and holds {num_completions} "
            "completions. Change the folder's permissions, or choose another one for the store (`$HOLDFAST_HOME`)."
        ) from error


def warn_unused(folder: Path, kind: str, files: Sequence[tuple[Path, DamagedError]], then: str) -> None:
    """Warns once of all `files`, each with the reason why it is not used. `then` says what was done with them."""
    logger.warning(
        "%d %s of the log-prob store %s are not used (%s%s). They were %s; what they held counts as missing and is "
        "computed again.",
        len(files),
        kind,
        folder,
        "; ".join(f"{path.name}: {error}" for path, error in files[:3]),
        "; ..." if len(files) > 3 else "",
        then,
    )


def check_values(logps: Mapping[ContentId, Tensor]) -> None:
    """ValueError where the log-probs of a completion are no fp32 vector of finite numbers up to 0."""
    wrong = next((value for value in logps.values() if value.dtype != torch.float32 or value.ndim != 1), None)
    if wrong is not None:
        raise ValueError(
            f"the log-probs of a completion were to be stored, one fp32 number per token; found a {wrong.dtype} tensor "
            f"of shape {tuple(wrong.shape)}. Compute them in fp32, and split them by completion."
        )
    values = torch.cat(list(logps.values())) if logps else torch.zeros(0)
    if not bool(values.isfinite().all()):
        num_wrong = sum(not bool(value.isfinite().all()) for value in logps.values())
        raise ValueError(
            f"the log-probs of {len(logps)} completions were to be stored; {num_wrong} of them hold NaN or infinity. "
            "Check the reference's weights for NaN and its dtype for overflow (fp16)."
        )
    if bool((values > MOST_NATS).any()):
        raise ValueError(
            f"the log-probs of {len(logps)} completions were to be stored; one of them is {float(values.max()):g}, and "
            f"none can be above 0, but for rounding ({MOST_NATS}). Check what computes them: a log-prob is the "
            "logarithm of a probability."
        )
    longest = max(map(len, logps.values()), default=0)
    if longest > MOST_TOKENS:
        raise ValueError(
            f"the log-probs of {len(logps)} completions were to be stored; one has {longest:,} tokens, and the store "
            f"takes {MOST_TOKENS:,} at most. Cut it (`max_length`)."
        )
