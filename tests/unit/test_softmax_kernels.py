"""The head's kernels where there is no GPU: run by Triton's interpreter, and compiled for two kinds of GPU."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")

INTERPRETED = Path(__file__).with_name("interpreted_kernels.py")


@pytest.mark.parametrize("rows", ["not nightly", pytest.param("nightly", marks=pytest.mark.nightly)])
def test_they_compute_what_plain_torch_does(rows: str) -> None:
    """Triton reads TRITON_INTERPRET at its import, so the tests are run by a process of their own."""
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "-p",
        "no:xdist",
        "-m",
        rows,
        INTERPRETED,
    ]
    done = subprocess.run(
        command, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert int(re.findall(r"(\d+) passed", done.stdout)[0]) > 100
    assert "skipped" not in done.stdout.splitlines()[-1]


ARGUMENTS = {
    "logits": "*{}", "out": "*{}", "target": "*i64", "first": "i32", "vocabulary": "i32", "row_stride": "i32",
    "out_stride": "i32", "scale": "fp32", "inner": "fp32", "cap": "fp32",
}  # fmt: skip
CONSTANTS = {"HAS_CAP": True, "IS_EXACT": False, "HAS_FACTOR": True, "BLOCK": 2048}
ALIGNED = ("logits", "out", "vocabulary", "row_stride", "out_stride")


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("name", ["_fold_kernel", "_errors_kernel"])
@pytest.mark.parametrize("dtype", ["bf16", pytest.param("fp16", marks=pytest.mark.nightly), "fp32"])
def test_they_compile(name: str, dtype: str, capability: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """To machine code. Aligned rows are read 16 bytes at a time, and bf16 is rounded, not cut off. The sums hold no
    fused product: a logit is the same number wherever it is computed."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    from triton import compile
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from holdfast.scoring import softmax_kernels

    kernel: Any = getattr(softmax_kernels, name)
    names = kernel.arg_names
    kinds = {n: "constexpr" if n in CONSTANTS else ARGUMENTS.get(n, "*fp32").format(dtype) for n in names}
    constants = {n: value for n, value in CONSTANTS.items() if n in names}
    aligned = {(names.index(n),): [["tt.divisibility", 16]] for n in ALIGNED if n in names}
    made = compile(
        ASTSource(kernel, kinds, constants, aligned), target=GPUTarget("cuda", capability, 32),
        options={"num_warps": softmax_kernels._NUM_WARPS, "enable_fp_fusion": False},
    )  # fmt: skip
    assert len(made.asm["cubin"]) > 0
    code = made.asm["ptx"]
    assert re.search(r"ld\.global\S*\.v4\.b32", code)
    if name == "_errors_kernel":
        assert re.search(r"st\.global\S*\.v4\.b32", code)
        assert "fma." not in code
        if dtype == "bf16":
            assert re.search(r"cvt\.rn\S*\.bf16", code)
