"""`Attack`: what is done to a copy of the place, which command then runs, and how its outcome is judged."""

import os
import random
import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file

from attacks.arena import Outcome

Judge = Callable[[Path, Outcome], str | None]
"""Takes the folder and the outcome; returns what is wrong, or None."""

NOBODY = 65534


@dataclass(frozen=True, slots=True, kw_only=True)
class Attack:
    """One try. `codes` are the exit codes that are right; `judge` looks further where the code is one of them."""

    kind: str
    name: str
    prepare: Callable[[Path], None]
    argv: Sequence[str] = ("train", "run.yaml")
    codes: frozenset[int] = frozenset({0, 1, 2})
    judge: Judge = lambda folder, outcome: None
    file_bytes: int | None = None
    user: int | None = None
    meanwhile: Callable[[int, float], None] = lambda child, began: None


def fault(attack: Attack, folder: Path, outcome: Outcome) -> str | None:
    """What is wrong with the outcome of an attack; None where nothing is."""
    if outcome.code is None:
        return f"no end after {outcome.seconds:.0f} s"
    if "Traceback (most recent call last)" in outcome.text:
        return "traceback: " + outcome.text.strip().splitlines()[-1][:200]
    if outcome.code not in attack.codes:
        return f"exit code {outcome.code}"
    if outcome.code > 0 and not re.search(r"\w", outcome.text):
        return "no message"
    if re.search(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]", outcome.text.replace("\x1b[", "[")) and "\x1b]" in outcome.text:
        return "a terminal escape"
    return attack.judge(folder, outcome)


# What a run leaves ----------------------------------------------------------------------------------------------------


def weights(folder: Path) -> dict[str, torch.Tensor] | None:
    """The final model's weights; None where there is no final model."""
    file = folder / "out" / "model.safetensors"
    return load_file(file) if file.is_file() else None


def has_trained(folder: Path, outcome: Outcome) -> str | None:
    """Where a run says that all went well, its model must be finite, and not the one that it began with."""
    if outcome.code != 0:
        return None
    found, before = weights(folder), load_file(folder / "model" / "model.safetensors")
    if found is None:
        return "exit 0 without a model in `out`"
    if not all(bool(tensor.isfinite().all()) for tensor in found.values()):
        return "exit 0 with a model that is not finite"
    if all(torch.equal(found[name], before[name]) for name in before if name in found):
        return "exit 0 with the model that it began with"
    return None


def same_weights(control: dict[str, torch.Tensor]) -> Judge:
    """Where a run says that all went well, its model must equal `control` bit for bit."""

    def judge(folder: Path, outcome: Outcome) -> str | None:
        if outcome.code != 0:
            return None
        found = weights(folder)
        if found is None:
            return "exit 0 without a model in `out`"
        unlike = [name for name in control if name not in found or not torch.equal(found[name], control[name])]
        return f"exit 0 with other weights ({len(unlike)} tensors)" if unlike else None

    return judge


# What is done to a file -----------------------------------------------------------------------------------------------

IS_ROOT = os.geteuid() == 0
"""Only root can give files to another user, or mount a small file system."""
FAULTS = (
    "missing", "empty", "cut", "flipped", "garbage", "a folder", "a FIFO", "dangling",
    *(["unreadable"] if IS_ROOT else []),
)  # fmt: skip


def damage(file: Path, fault_name: str, draw: random.Random) -> None:
    """Does that to a file."""
    data = file.read_bytes()
    file.unlink()
    if fault_name == "empty":
        file.write_bytes(b"")
    elif fault_name == "cut":
        file.write_bytes(data[: draw.randrange(max(1, len(data)))])
    elif fault_name == "flipped" and data:
        position = draw.randrange(len(data))
        file.write_bytes(data[:position] + bytes([data[position] ^ (1 << draw.randrange(8))]) + data[position + 1 :])
    elif fault_name == "garbage":
        file.write_bytes(draw.randbytes(len(data)))
    elif fault_name == "a folder":
        file.mkdir()
    elif fault_name == "a FIFO":
        os.mkfifo(file)
    elif fault_name == "dangling":
        file.symlink_to(file.parent / "nowhere")
    elif fault_name == "unreadable":
        file.write_bytes(data)
        file.chmod(0)


def hand_over(folder: Path) -> None:
    """Gives a folder and all in it to a user without rights."""
    for path in [folder, *folder.rglob("*")]:
        os.chown(path, NOBODY, NOBODY, follow_symlinks=False)


def remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    elif path.exists() or path.is_symlink():
        path.unlink()
