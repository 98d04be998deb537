"""Checkpoints without a record of their reference: whether they are such, and who wrote them.

Trainers of transformers write `trainer_state.json` last, so a folder with it and with weights was saved whole. Who did
it is read from the names inside of `training_args.bin`, as text: nothing is unpickled. A save of holdfast that was
killed before its own last file looks the same, and is told apart by these names.
"""

import pickletools
import zipfile
from pathlib import Path

TRAINER_STATE_NAME, TRAINING_ARGS_NAME = "trainer_state.json", "training_args.bin"
"""The names that transformers gives these files. Its trainer takes seconds to import; a manifest is read without it."""
_WEIGHTS = ("model*.safetensors", "adapter_model.safetensors", "pytorch_model*.bin", "adapter_model.bin")
_MOST_BYTES = 1 << 22
_LIBRARIES = {
    "accelerate",
    "builtins",
    "collections",
    "copyreg",
    "datetime",
    "numpy",
    "pathlib",
    "torch",
    "transformers",
}
"""Packages whose classes are among the options of any trainer."""

OWN = "holdfast, which never finished it"
"""What `writer_of` returns for a checkpoint of this package that lacks its record."""


def writer_of(checkpoint: Path) -> str | None:
    """Who wrote a checkpoint that has no record of its reference, in words; None for a folder that is no checkpoint."""
    has_weights = any(next(checkpoint.glob(pattern), None) for pattern in (*_WEIGHTS, *(f"*/{p}" for p in _WEIGHTS)))
    if not has_weights or not (checkpoint / TRAINER_STATE_NAME).is_file():
        return None
    packages = _packages(checkpoint / TRAINING_ARGS_NAME)
    if "holdfast" in packages:
        return OWN
    others = sorted(packages - _LIBRARIES - {"__main__"})
    return f"a trainer of {others[0]}" if others else "a trainer of transformers"


def foreign_checkpoints(run_folder: Path) -> dict[Path, str]:
    """The checkpoints in a run's folder that have no record of their reference, with who wrote them."""
    found = {path: writer_of(path) for path in run_folder.glob("checkpoint-*") if path.is_dir()}
    return {path: writer for path, writer in found.items() if writer is not None}


def _packages(file: Path) -> set[str]:
    """The packages whose classes a file of `torch.save` names; none where it cannot be read. It is taken apart, not
    unpickled."""
    try:
        with zipfile.ZipFile(file) as archive:
            name = next((name for name in archive.namelist() if name.endswith("/data.pkl")), None)
            if name is None or archive.getinfo(name).file_size > _MOST_BYTES:
                return set()
            parts = list(pickletools.genops(archive.read(name)))
    except (OSError, zipfile.BadZipFile, NotImplementedError, RuntimeError, ValueError, EOFError):
        return set()
    return {str(value).split(".")[0].split(" ")[0] for opcode, value, _ in parts if opcode.name == "GLOBAL"}
