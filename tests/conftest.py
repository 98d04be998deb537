"""How every test runs: offline, one thread, caches in a folder of its own, and tensor shapes checked at every call.

The environment is set before anything is imported that reads it once, at import.
"""

import gc
import os
import shutil
import tempfile
from collections.abc import Iterator

_caches = tempfile.mkdtemp(prefix="holdfast-tests-")
os.environ |= {
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_HOME": _caches,
    "HOLDFAST_HOME": os.path.join(_caches, "holdfast"),
    "HF_DATASETS_CACHE": os.path.join(_caches, "datasets"),
    "MPLBACKEND": "Agg",
    "TOKENIZERS_PARALLELISM": "false",
}

from jaxtyping import install_import_hook  # noqa: E402  # after the environment

SCORING = (
    "attention", "completion_head", "head", "last_layer", "score", "segments", "softmax", "softmax_choice",
    "token_limit", "transform", "weight_gradient",
)  # fmt: skip
SHAPED = ("batch", "losses", *(f"scoring.{name}" for name in SCORING))
install_import_hook([f"holdfast.{name}" for name in SHAPED], "shapes.checked")

import pytest  # noqa: E402
import torch  # noqa: E402
from hypothesis import settings  # noqa: E402

# Two workers on two cores; and sums of floats do not depend on the number of threads.
torch.set_num_threads(1)

# Every run of a trainer collects garbage; what is imported now never is any.
import transformers  # noqa: E402, F401

import holdfast.trainer  # noqa: E402, F401
from covering import mark_nightly  # noqa: E402

gc.collect()
gc.freeze()

# The same examples in every run, however slow the machine.
settings.register_profile("holdfast", deadline=None, derandomize=True)
settings.load_profile("holdfast")


@pytest.fixture(autouse=True)
def _own_store(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test finds what another has stored."""
    monkeypatch.setenv("HOLDFAST_HOME", str(tmp_path_factory.mktemp("home")))


@pytest.fixture(autouse=True)
def _same_environment() -> Iterator[None]:
    """`datasets` leaves a copy in the place of `os.environ` when it has mapped with several processes, and whoever has
    kept the one before no longer sees what is set."""
    before = os.environ
    yield
    os.environ = before  # noqa: B003  # the very object


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks rows of large tables before tests are chosen by their marks."""
    mark_nightly(items)


def pytest_unconfigure() -> None:
    """Removes the caches."""
    shutil.rmtree(_caches, ignore_errors=True)
