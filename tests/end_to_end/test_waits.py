"""What a step waits for on a GPU: nothing. Operations that need a value of the device in host memory, counted by name.

On a CPU nobody waits, but the same operations are called, so they are seen here, with the line that asks for them.
"""

import traceback
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
import transformers
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader

import holdfast
from holdfast import DPOConfig, DPOTrainer
from holdfast.batch import PairBatch
from holdfast.data.layouts.padded import PaddedLayout
from holdfast.data.layouts.preference_collator import DataCollatorForPreference
from holdfast.data.layouts.prefix_shared import SharedLayout
from policies import POLICIES, config, rows, tiny_tokenizer, trainer

READS = {
    "aten::_local_scalar_dense", "aten::equal", "aten::nonzero", "aten::masked_select", "aten::_unique2",
    "aten::unique_dim", "aten::unique_consecutive", "aten::repeat_interleave", "aten::bincount",
}  # fmt: skip
"""Operations whose result, or its size, must be known to the host."""

CALLS = {"tolist", "item", "numpy", "cpu", "tensor", "as_tensor", "new_tensor", "from_numpy"}
"""Functions that copy to the host, or from it (which waits as well, unless memory is pinned)."""

RUNS: dict[str, tuple[str, dict[str, Any], set[str]]] = {
    "full": ("full", {}, set()),
    "lora": ("lora_fresh", {}, set()),
    "lora_sft": ("lora_sft", {}, set()),
    "clipped": ("full", {"max_grad_norm": 1.0, "activation_checkpointing": True}, set()),
    "losses": ("full", {"loss_type": ["ipo", "sppo_hard"], "use_weighting": True, "ld_alpha": 0.5}, set()),
    "packed": ("full", {"layout": "packed"}, set()),
    "window": ("full", {"reference": "snapshot", "reference_window": 2}, set()),
    "no reference": ("full", {"loss_type": "simpo"}, set()),
    "parts": ("full", {"tokens_per_batch": 20}, set()),
    "accumulated": ("full", {"gradient_accumulation_steps": 2}, set()),
    "precomputed": ("full", {"precompute_ref_log_probs": True}, set()),
    # The length of the move, once per sync.
    "sync": ("full", {"sync_ref_model": True, "ref_model_sync_steps": 2}, {"read"}),
    # transformers looks whether there is any padding in the attention mask, in every forward pass.
    "padded": ("full", {"layout": "padded"}, {"_ignore_causal_mask_sdpa"}),
    "padded, precomputed": (
        "full", {"layout": "padded", "precompute_ref_log_probs": True}, {"_ignore_causal_mask_sdpa"},
    ),
    "padded, parts": ("full", {"layout": "padded", "tokens_per_batch": 60}, {"_ignore_causal_mask_sdpa"}),
    "offloaded": ("full", {"activation_offloading": True}, set()),
}  # fmt: skip
"""By name: the policy, options, and the functions that do read something."""

NOT_ON_THE_DEVICE = ("torch/utils/data/", "holdfast/data/layouts/", "holdfast/store/store.py")
"""Where batches are made, and stored log-probs found, in host memory."""


WRITTEN_IN = tuple(f"{Path(str(package.__file__)).parent}/" for package in (holdfast, transformers, accelerate))
"""The folders of what may ask."""


class Waits(TorchDispatchMode):
    """Counts, while the trainer is between its logs, what would wait for a device, by the function that asks."""

    def __init__(self, watched: DPOTrainer) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()
        self.watched = watched

    def count(self, operation: str) -> None:
        """One more, unless it is in host memory on a GPU, too, or at a log."""
        if not 0 < self.watched.state.global_step < self.watched.args.logging_steps - 1:
            return
        asking = [frame for frame in traceback.extract_stack() if frame.filename != __file__]
        if any(place in frame.filename for frame in asking for place in NOT_ON_THE_DEVICE):
            return
        known = [frame for frame in asking if frame.filename.startswith(WRITTEN_IN)]
        last = [frame for frame in known if not frame.name.startswith("<")][-1]
        self.found[f"{last.name} ({Path(last.filename).name}:{last.lineno}, {operation})"] += 1

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name
        indices = args[1] if name in ("aten::index", "aten::index_put", "aten::index_put_") else []
        if name in READS or any(isinstance(i, Tensor) and i.dtype in (torch.bool, torch.uint8) for i in indices):
            self.count(name)
        return func(*args, **(kwargs or {}))


class Copies(TorchFunctionMode):
    """The same for functions that are seen by their Python name only."""

    def __init__(self, waits: Waits) -> None:
        super().__init__()
        self.waits = waits

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") in CALLS:
            self.waits.count(func.__name__)
        return func(*args, **(kwargs or {}))


def of_common_trainer(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """A user's own collator, of the keys of the common trainer."""
    return DataCollatorForPreference(0)(rows)


def with_token_types(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The same with a further input, which content ids must cover."""
    batch = DataCollatorForPreference(0)(rows)
    return batch | {"position_ids": torch.arange(batch["input_ids"].shape[1]).expand_as(batch["input_ids"]) + 1}


def around_a_layout(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """One that hands on what a layout makes."""
    return PaddedLayout(0)(rows)


COLLATORS: dict[str, Any] = {
    "DataCollatorForPreference": DataCollatorForPreference(0),
    "of the common trainer": of_common_trainer,
    "with another input": with_token_types,
    "around a layout": around_a_layout,
}


def waits_between_logs(
    policy: str, folder: Path, filters: bool = False, collator: Any = None, **options: Any
) -> Counter[str]:
    args = config(folder, max_steps=5, logging_steps=5, **options)
    ours = trainer(POLICIES[policy](), args, train_dataset=rows(36), data_collator=collator)
    ours.args.logging_nan_inf_filter = filters  # refused where options are checked
    with Waits(ours) as waits, Copies(waits):
        ours.train()
    assert ours.state.global_step == 5
    return waits.found


@pytest.mark.slow
@pytest.mark.parametrize("run", RUNS)
def test_nothing_waits_between_logs(run: str, tmp_path: Path) -> None:
    policy, options, exceptions = RUNS[run]
    found = waits_between_logs(policy, tmp_path, **options)
    assert {where.split(" ")[0] for where in found} == exceptions, found


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [{"precompute_ref_log_probs": True}, pytest.param({"reference": "model"}, marks=pytest.mark.nightly)],
    ids=str,
)
@pytest.mark.parametrize("collator", COLLATORS)
def test_nothing_waits_under_a_collator_of_the_user(collator: str, options: dict[str, Any], tmp_path: Path) -> None:
    found = waits_between_logs("full", tmp_path, collator=COLLATORS[collator], **options)
    assert {where.split(" ")[0] for where in found} <= {"_ignore_causal_mask_sdpa"}, found


@pytest.mark.parametrize("collator", COLLATORS)
def test_what_a_collator_of_the_user_makes_is_known_in_host_memory(collator: str, tmp_path: Path) -> None:
    """The same ids, lengths and rows as the tensors on the device say, in the loader and where a batch is collated."""
    ours = trainer(POLICIES["full"](), config(tmp_path), data_collator=COLLATORS[collator])
    loaded = [ours._pair_batch(tensors) for tensors in ours.get_eval_dataloader(ours.train_dataset)]
    collated = [ours._collated(rows().to_list()[start : start + 8]) for start in (0, 8)]
    for batch, other in zip(loaded, collated, strict=True):
        read = replace(batch, host_sequences=None)
        assert batch.host_sequences is not None
        assert batch.content_ids() == read.content_ids() == other.content_ids()
        assert batch.lengths() == read.lengths() == other.lengths()
        assert batch.tokens_of_rows() == read.tokens_of_rows()
        assert batch.inputs.keys() == other.inputs.keys()


def test_a_layout_s_batch_that_a_collator_changes_is_read_again(tmp_path: Path) -> None:
    """It leaves out pairs, and what the layout said in host memory stays as it was."""

    def shorter(given: list[dict[str, Any]]) -> dict[str, Any]:
        batch, small = PaddedLayout(0)(given), PaddedLayout(0)(given[:1])
        return small | {"host_sequences": batch["host_sequences"]}

    ours = trainer(POLICIES["full"](), config(tmp_path), data_collator=shorter)
    batch = ours._collated(rows().to_list()[:3])
    assert batch.content_ids() == PairBatch.from_tensors(PaddedLayout(0)(rows().to_list()[:1])).content_ids()


def test_a_subclass_gets_the_keys_of_the_common_trainer(tmp_path: Path) -> None:
    keys = []

    class Own(DPOTrainer):
        def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            keys.append(sorted(inputs))
            return super().compute_loss(model, inputs, *args, **kwargs)

    ours = Own(
        POLICIES["full"](), args=config(tmp_path, max_steps=1), train_dataset=rows(), processing_class=tiny_tokenizer()
    )
    ours.train()
    assert keys == [["attention_mask", "completion_mask", "input_ids"]]


def test_the_run_in_parts_has_parts() -> None:
    assert len(SharedLayout(0, row_tokens=20)(rows(36).to_list()[:3])["input_ids"]) > 1


def test_the_counter_counts(tmp_path: Path) -> None:
    """transformers' own filter of NaN asks twice a step, of whatever the loss is; three steps are watched."""
    found = waits_between_logs("full", tmp_path, filters=True)
    assert [(where.split(" ")[0], count) for where, count in found.items()] == [("_run_epoch", 2 * 3)]


def test_what_is_no_tensor_stays_in_host_memory(tmp_path: Path) -> None:
    """Through workers, accelerate and the trainer: what the collator made, and tensors beside it."""
    dataset, layout = rows(), SharedLayout(0)
    ours = trainer(POLICIES["full"](), config(tmp_path, dataloader_num_workers=1))
    loader = DataLoader(dataset.to_list(), batch_size=3, collate_fn=layout, num_workers=1)  # type: ignore[arg-type]
    prepared: Any = ours.accelerator.prepare_data_loader(loader)
    batches = [ours._prepare_inputs(batch) for batch in prepared]
    expected = [layout(dataset.to_list()[start : start + 3]) for start in range(0, len(dataset), 3)]
    for found, made in zip(batches, expected, strict=True):
        assert found["row_segments"] == made["row_segments"]
        assert found["host_sequences"] == made["host_sequences"]
        assert torch.equal(found["input_ids"], made["input_ids"])


def test_batches_are_copied_ahead_from_pinned_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there is pinned memory, and nobody has decided otherwise."""
    assert config(tmp_path).accelerator_config.non_blocking is False
    plain: Any = DPOConfig.device
    monkeypatch.setattr(DPOConfig, "device", property(lambda args: plain.fget(args) and torch.device("cuda")))
    for expected, options in (
        (True, {}),
        (False, {"dataloader_pin_memory": False}),
        (False, {"accelerator_config": {"even_batches": False}}),
    ):
        assert config(tmp_path, use_cpu=False, bf16=False, **options).accelerator_config.non_blocking is expected
