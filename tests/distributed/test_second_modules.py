"""Second modules over an engine: copies of the policy and reference models, of which each process holds its part.

Also what needs forward passes of a sharded model before training: layouts, and batches in parts of a few tokens. Every
run has the numbers of one process, and no process has more than its share of the memory.
"""

from collections.abc import Callable
from typing import Any

import pytest
from engine_mutations import OF_SECOND_MODULES
from test_engines import faults

pytestmark = pytest.mark.slow

Outcome = Callable[[int, str], dict[str, Any]]

ROWS = {
    "full/model/fixed": False,
    "full/model/hard": False,
    "full/model/soft": True,
    "full/chosen/fixed": True,
    "full/chosen/hard": False,
    "full/chosen/soft": False,
    "full/chosen_path/fixed": False,
    "full/chosen_path/hard": False,
    "full/chosen_path/soft": False,
    "full/chosen_half/fixed": False,
    "full/chosen_half/soft": False,
    "full/chosen_family/fixed": False,
    "full/chosen_precomputed/fixed": True,
    "full/mixture/fixed": False,
    "full/mixture_precomputed/fixed": False,
    "full/padded/fixed": False,
    "full/packed/fixed": False,
    "full/packed_limited/soft": True,
    "full/padding_free/fixed": False,
    "full/limited/fixed": False,
    "llama_tied/model/fixed": False,
    "llama_tied/model/soft": True,
    "llama_tied/chosen_tied/soft": False,
    "partly_frozen/model/soft": False,
    "gemma2/model/fixed": False,
    "gpt2/model/soft": False,
    "lfm2/model/fixed": False,
    "lora_fresh/model/fixed": False,
    "lora_fresh/model/hard": False,
    "lora_fresh/model/soft": False,
    "lora_fresh/limited/fixed": False,
    "lora_sft/model/fixed": False,
    "lora_sft/model/hard": False,
    "lora_sft/model/soft": True,
    "lora_sft/mixture/fixed": False,
    "dora/model/soft": False,
    "lora_head/model/soft": False,
    "lora_embeddings/model/hard": False,
    "lora_modules_to_save/model/fixed": False,
    "lora_modules_to_save/model/soft": False,
}
"""The runs, and whether `make test` makes them, over FSDP2 on two processes. `make nightly` makes all in all `WAYS`."""

WAYS = [(2, "fsdp2"), (4, "fsdp2"), (2, "native"), (4, "native")]


def is_possible(engine: str, row: str) -> bool:
    """A model that was sharded as it was loaded has no adapters, and all of it trains."""
    return engine != "native" or not row.startswith(("lora", "dora", "partly_frozen"))


@pytest.mark.parametrize(
    ("num_processes", "run"),
    [
        pytest.param(n, f"{engine}/{row}", marks=() if is_quick and (n, engine) == WAYS[0] else pytest.mark.nightly)
        for n, engine in WAYS
        for row, is_quick in ROWS.items()
        if is_possible(engine, row)
    ],
)
def test_a_run_has_the_numbers_of_one_process_and_its_share_of_the_memory(
    num_processes: int, run: str, engine_outcome: Outcome
) -> None:
    one = engine_outcome(1, f"one/{run.split('/', 1)[1]}")
    assert list(faults(one, engine_outcome(num_processes, run), run)) == []


@pytest.mark.parametrize(("num_processes", "run"), [(2, f"fsdp2/mutated/{name}") for name in OF_SECOND_MODULES])
def test_what_goes_wrong_is_found(num_processes: int, run: str, engine_outcome: Outcome) -> None:
    """A replica by the bytes that it takes, alone; a part of another process, and an optimizer that moves nothing, by
    the numbers."""
    name = OF_SECOND_MODULES[run.split("/")[2]]
    found = list(faults(engine_outcome(1, f"one/{name}"), engine_outcome(num_processes, run), f"fsdp2/{name}"))
    assert found
    if run.endswith("reference_left_whole"):
        assert all("bytes in memory" in fault for fault in found), found
    else:
        assert any("differs by" in fault for fault in found), found
