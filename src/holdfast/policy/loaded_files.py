"""A check that all processes have loaded their parts of a policy from the same files.

A model that is sharded as it is loaded is put together of the parts that each process has cut out of its own files. On
several hosts these may be files of unlike models, and nothing in a part says so. Sizes and samples of the files are
compared. Given up: files that differ between the samples, and models whose files are not in a local folder.
"""

from pathlib import Path
from typing import Any

import xxhash
from accelerate.utils import gather_object
from torch import nn

from holdfast.internals.transformers import loaded_from
from holdfast.scoring.causal_lm import unwrap

_NUM_SAMPLES = 64
_SAMPLE_BYTES = 4096


def check_same_files(policy: nn.Module) -> None:
    """ValueError, on all processes, where they have loaded `policy` from unlike files. Collective."""
    config: Any = unwrap(policy).config
    name = loaded_from(config)
    folder = Path(name)
    files = sorted(folder.glob("*.safetensors")) if name and folder.is_dir() else []
    own = {file.name: _sampled(file) for file in files}
    everyones = gather_object([(own, str(folder))])
    first, first_folder = everyones[0]
    for process, (other, other_folder) in enumerate(everyones):
        unlike = sorted(name for name in first.keys() | other.keys() if first.get(name) != other.get(name))
        if first and other and unlike:
            raise ValueError(
                f"The policy was loaded in parts, from {first_folder} by process 0 and from {other_folder} by process "
                f"{process}, and `{unlike[0]}` is not the same file there: the parts of two models would be put "
                "together as one. Give all hosts the same files."
            )


def _sampled(file: Path) -> str:
    """A digest of the file's size and of stretches of it."""
    size = file.stat().st_size
    state = xxhash.xxh3_128(str(size).encode())
    with file.open("rb") as stream:
        for number in range(_NUM_SAMPLES):
            stream.seek(number * size // _NUM_SAMPLES)
            state.update(stream.read(_SAMPLE_BYTES))
    return state.hexdigest()
