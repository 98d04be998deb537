"""The original values of weights that a run holds in half precision, in files of the run's folder meanwhile.

Only values that a cast to half precision loses are written: models that were read from files in half precision have
none. A value that was kept before is written again only where it has changed. Each process keeps its own. Given up:
reading them again from the model's files, which may be gone, and which PiSSA's weights never were in.
"""

from pathlib import Path
from typing import final

from torch import Tensor

from holdfast.reference.identity.digests import tensor_digest
from holdfast.reference.run_folder import RunFolder
from holdfast.reference.tensor_file import TensorFile


@final
class OriginalFiles:
    """Tensors by name, each in a file of its own, in a folder of `root` that goes with this object."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._folder = RunFolder(root)
        self._files: dict[str, tuple[str, TensorFile]] = {}

    def keep(self, name: str, value: Tensor) -> None:
        """See `policy.half_weights.Originals.keep`."""
        digest = tensor_digest(value)
        if name in self._files and self._files[name][0] == digest:
            return
        file = TensorFile(self._folder, f"frozen-{len(self._files)}.safetensors")
        file.write({name: value})
        self._files[name] = digest, file

    def read(self, name: str) -> Tensor:
        """See `policy.half_weights.Originals.read`."""
        _, file = self._files[name]
        return next(value for _, value in file.items())

    def remove(self) -> None:
        """Removes the files."""
        self._files.clear()
        self._folder.remove()
