"""Makes a CPU build of torch take tensors "on" cuda: two small libraries, compiled once and loaded before torch.

They are kept in the user's cache folder, by torch's version and their own source. Nothing here imports torch, since the
first of them must be loaded before it.
"""

import ctypes
import hashlib
import importlib.metadata
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

SOURCES = Path(__file__).parent
LIBRARIES = {"guard": ("-lc10",), "hooks": ("-lc10", "-ltorch_cpu")}
"""By source: the libraries of torch that it needs."""


class CannotPretend(RuntimeError):
    """Why there is no pretend accelerator on this machine."""


def load() -> None:
    """From now on `import torch` gives a torch that believes in one CUDA device. `CannotPretend` says why not."""
    if "torch" in sys.modules:
        raise CannotPretend("torch was imported before the pretend accelerator was loaded: use a process of its own")
    torch_folder = _torch_folder()
    built = {name: _built(name, torch_folder) for name in LIBRARIES}
    ctypes.CDLL(str(built["guard"]), mode=ctypes.RTLD_GLOBAL)
    for name in ("libc10.so", "libtorch_cpu.so"):
        ctypes.CDLL(str(torch_folder / "lib" / name), mode=ctypes.RTLD_GLOBAL)
    ctypes.CDLL(str(built["hooks"]))


def why_not() -> str | None:
    """Why `load` would fail, without loading anything; None where it would not."""
    try:
        torch_folder = _torch_folder()
        for name in LIBRARIES:
            _built(name, torch_folder)
    except CannotPretend as reason:
        return str(reason)
    return None


def _torch_folder() -> Path:
    found = importlib.util.find_spec("torch")
    if found is None or not found.submodule_search_locations:
        raise CannotPretend("torch is not installed")
    folder = Path(found.submodule_search_locations[0])
    if (folder / "lib" / "libtorch_cuda.so").exists():
        raise CannotPretend("this torch was built for CUDA; the pretend accelerator takes its place in a CPU build")
    for needed in ("include/c10/core/impl/DeviceGuardImplInterface.h", "lib/libtorch_cpu.so", "lib/libc10.so"):
        if not (folder / needed).exists():
            raise CannotPretend(f"torch's {needed} is not installed")
    return folder


def _built(name: str, torch_folder: Path) -> Path:
    source = SOURCES / f"{name}.cpp"
    version = importlib.metadata.version("torch")
    digest = hashlib.sha256(source.read_bytes() + str(torch_folder).encode()).hexdigest()[:16]
    library = _cache() / f"{name}-{version}-{digest}.so"
    if library.exists():
        return library
    compiler = shutil.which("g++")
    if compiler is None:
        raise CannotPretend("g++ is not installed")
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:
        made = Path(folder) / library.name
        command = [
            compiler, "-shared", "-fPIC", "-std=c++20", "-O0", f"-I{torch_folder}/include",
            f"-I{torch_folder}/include/torch/csrc/api/include", str(source), "-o", str(made),
            f"-L{torch_folder}/lib", *LIBRARIES[name], f"-Wl,-rpath,{torch_folder}/lib",
        ]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode != 0:
            raise CannotPretend(f"g++ cannot compile {source.name}: {done.stderr.strip()[:500]}")
        made.replace(library)  # whole, or not at all: another process may build it too
    return library


def _cache() -> Path:
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    folder = Path(root) / "holdfast" / "pretend-accelerator"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CannotPretend(f"no library can be kept in {folder}: {error}") from error
    return folder
