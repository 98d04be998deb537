"""Files of a reference have one owner: nobody else changes or removes them, and what a killed owner left goes."""

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import holdfast
from holdfast.reference import run_folder
from holdfast.reference.run_folder import RunFolder, running
from holdfast.reference.scorers.offloaded import OffloadedReference
from holdfast.reference.tensor_file import TensorFile

HOLDER = """
import sys, time
from pathlib import Path
from holdfast.reference.run_folder import RunFolder, running
how, root = sys.argv[1], Path(sys.argv[2])
folder = RunFolder(root)
with running(root):
    (folder.path() / "content").write_text("mine")
    print("ready", flush=True)
    if how == "raises":
        raise RuntimeError("ends")
    if how == "waits":
        sys.stdin.read()
    if how == "forks":
        import os
        if os.fork() == 0:
            sys.exit()
        os.wait()
        print((folder.path() / "content").read_text(), flush=True)
        sys.stdin.read()
"""


@pytest.fixture
def another(tmp_path: Path) -> Iterator[Any]:
    """Starts another process that holds a folder in `tmp_path`, and then waits or ends."""
    started: list[subprocess.Popen[str]] = []

    def start(how: str = "waits") -> subprocess.Popen[str]:
        source = str(Path(holdfast.__file__).parent.parent)
        process = subprocess.Popen(
            [sys.executable, "-c", HOLDER, how, str(tmp_path)],
            env=os.environ | {"PYTHONPATH": source}, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip
        started.append(process)
        assert process.stdout
        assert process.stdout.readline() == "ready\n"
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


def contents(root: Path) -> list[str]:
    """What the folders in `root` hold."""
    return [path.read_text() for path in root.glob("*/content")]


@pytest.mark.parametrize("how", ["returns", "raises"])
def test_a_folder_goes_with_its_process(how: str, tmp_path: Path, another: Any) -> None:
    process = another(how)
    process.wait()
    assert not tmp_path.exists()


def test_a_folder_goes_with_its_reference(tmp_path: Path) -> None:
    root = tmp_path / "_reference"
    ours, theirs = RunFolder(root), RunFolder(root)
    assert ours.path() != theirs.path()
    assert ours.path() == ours.path()
    left = ours.path()
    del ours
    assert not left.exists()
    assert theirs.path().is_dir()
    del theirs
    assert not root.exists()


def test_a_fork_removes_nothing(tmp_path: Path, another: Any) -> None:
    process = another("forks")
    assert process.stdout.readline() == "mine\n"


@pytest.mark.parametrize("with_locks", [True, False], ids=["locks", "no locks"])
def test_what_a_kill_left_is_removed_and_nothing_else(
    with_locks: bool, tmp_path: Path, another: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Two others, one of them killed: the next run removes that one's folder and tells of the one that lives."""
    living, killed = another(), another()
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    assert contents(tmp_path) == ["mine", "mine"]
    if not with_locks:
        monkeypatch.setattr(run_folder, "_lock", lambda descriptor: None)
    with running(tmp_path):
        assert contents(tmp_path) == ["mine"]
    (said,) = [record.getMessage() for record in caplog.records]
    assert f"is in use by another run (process {living.pid} on" in said
    assert living.poll() is None


def test_without_locks_what_another_machine_left_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The number of a process says nothing on another machine: neither a folder of such an owner, nor one whose owner
    is not written yet, is removed."""
    monkeypatch.setattr(run_folder, "_lock", lambda descriptor: None)
    ended = {"process": 2**22 + 1, "is_run": False}
    for name, content in {
        "far": json.dumps(ended | {"machine": "elsewhere"}),
        "unknown": "",
        "near": json.dumps(ended | {"machine": run_folder.machine()}),
    }.items():
        (tmp_path / name).mkdir()
        (tmp_path / f"{name}.lock").write_text(content)
    with running(tmp_path):
        assert {path.name for path in tmp_path.iterdir() if path.is_dir()} == {"far", "unknown"}


def test_a_lock_file_that_goes_before_it_is_locked_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between making a lock file and locking it another run may take it for left over."""
    lock, tries = run_folder._lock, []

    def late(descriptor: int) -> bool | None:
        tries.append(descriptor)
        if len(tries) == 1:
            for path in tmp_path.glob("*.lock"):
                path.unlink()
        return lock(descriptor)

    monkeypatch.setattr(run_folder, "_lock", late)
    folder = RunFolder(tmp_path)
    assert folder.path().with_suffix(".lock").is_file()
    assert len(tries) == 2


# --- tensors in it ----------------------------------------------------------------------------------------------------

WRITABLE = [
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2,
    torch.float8_e4m3fnuz, torch.float8_e5m2fnuz, torch.float8_e8m0fnu, torch.float4_e2m1fn_x2, torch.int64,
    torch.int32, torch.int16, torch.int8, torch.uint64, torch.uint32, torch.uint16, torch.uint8, torch.bool,
    torch.complex64,
]  # fmt: skip
DTYPES = sorted({value for value in vars(torch).values() if isinstance(value, torch.dtype)}, key=str)


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """The bytes of a tensor."""
    return tensor.contiguous().reshape(-1).view(torch.uint8)


@pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental", "ignore:torch.quantize_per_tensor")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype_comes_back_from_disk_or_is_refused(dtype: torch.dtype, tmp_path: Path) -> None:
    tensor_file = TensorFile(RunFolder(tmp_path), "kept.safetensors")
    if dtype not in WRITABLE:
        with pytest.raises(ValueError, match=rf"kept on disk, but 'b' is of {dtype}, which safetensors cannot write"):
            tensor_file.write({"a": torch.zeros(2), "b": torch.empty(4, dtype=dtype)})
        return
    draw = torch.randint(0, 2 if dtype == torch.bool else 256, (3 * 16,), dtype=torch.uint8)
    values = {
        "matrix": draw.view(dtype).view(3, -1), "other": torch.arange(3.0), "empty": torch.empty(0, dtype=dtype),
        "scalar": draw[: dtype.itemsize].clone().view(dtype).view(()),
    }  # fmt: skip
    if dtype == torch.float4_e2m1fn_x2:  # two values a byte: safetensors has no scalar of it
        del values["scalar"]
    tensor_file.write(values)
    found = dict(tensor_file.items())
    assert found.keys() == values.keys()
    for name, value in values.items():
        assert (found[name].dtype, found[name].shape) == (value.dtype, value.shape), name
        assert torch.equal(bits(found[name]), bits(value)), name
    tensor_file.change(lambda name, value: bits(value).zero_() if name == "matrix" else None)
    found = dict(tensor_file.items())
    assert not bits(found["matrix"]).any()
    assert torch.equal(found["other"], values["other"])


def test_a_file_that_was_changed_is_refused_by_tensor(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    tensor_file = TensorFile(folder, "kept.safetensors")
    values = {"first": torch.arange(100.0), "second": torch.arange(100.0) + 1}
    tensor_file.write(values)
    file = folder.path() / "kept.safetensors"
    whole = file.read_bytes()
    place = whole.index(bits(values["second"]).numpy().tobytes())

    file.write_bytes(whole[: place + 6] + b"\x01" + whole[place + 7 :])
    found = tensor_file.items()
    assert torch.equal(next(found)[1], values["first"])
    with pytest.raises(ValueError, match=r"'second' was to be read .* is another than was written .*Start again"):
        next(found)
    with pytest.raises(ValueError, match="'second' was to be read"):
        tensor_file.change(lambda name, value: None)

    file.write_bytes(whole[: place + 6])
    with pytest.raises(ValueError, match=r"'second' was to be read .* which ends before it.*Start again"):
        list(tensor_file.items())

    file.unlink()
    with pytest.raises(ValueError, match=r"2 tensors were kept in .*cannot be opened.*Start again"):
        list(tensor_file.items())

    tensor_file.write(values)
    assert [name for name, _ in tensor_file.items()] == ["first", "second"]


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.int8], ids=str)
def test_an_offloaded_module_has_its_weights_again_whatever_their_dtype(dtype: torch.dtype, tmp_path: Path) -> None:
    """Weights of 8 bits beside plain ones: empty while offloaded, and all bytes as before while it is asked."""
    module = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    packed = (torch.randn(8, 8) * 50).to(dtype)
    module[1].weight = nn.Parameter(packed.clone(), requires_grad=False)
    offloaded = OffloadedReference.offload(
        module, contextlib.nullcontext, folder=RunFolder(tmp_path), name="offloaded.safetensors", origin="the module"
    )
    frame = offloaded._module
    assert not any(parameter.numel() for parameter in frame.parameters())
    with offloaded.in_place():
        for (name, found), expected in zip(frame.named_parameters(), module.parameters(), strict=True):
            assert found.dtype == expected.dtype, name
            assert torch.equal(bits(found.detach()), bits(expected.detach())), name
        assert torch.equal(bits(frame[1].weight.detach()), bits(packed))
    assert not any(parameter.numel() for parameter in frame.parameters())
