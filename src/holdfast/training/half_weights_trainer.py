"""`HalfWeightsTrainer`: frozen weights of linear layers are in the autocast dtype while a run computes.

From the first training step to the end of `train`, in evaluations, and while datasets are scored ahead, what linear
layers of the policy and of fixed reference modules have frozen is held in half precision (`policy.half_weights`).
Before weights are saved or loaded they are put back, so files, digests and merged models have the original values.
Weights whose values only a file can keep are held in training alone, where that pays, and in a single process, since
each would write a file of its own. Given up: memory while the trainer is made, when all weights are as loaded.
"""

import contextlib
import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from holdfast.policy.adapters import is_adapted
from holdfast.policy.half_weights import HalfWeights, Holding
from holdfast.policy.own_numbers import own_numbers
from holdfast.reference.originals import OriginalFiles
from holdfast.scoring.causal_lm import unwrap
from holdfast.scoring.frozen import Autocast
from holdfast.training.sampling_trainer import SamplingTrainer

logger = logging.getLogger(__name__)


class HalfWeightsTrainer(SamplingTrainer):
    """Holds frozen weights in half precision while it computes."""

    _half_weights: HalfWeights | None = None
    """None where nothing is held: without autocast, with an engine, or where the user asks for that."""
    _originals: OriginalFiles | None = None
    _has_said_held: bool = False

    def _begin_holding(self, first_rows: Callable[[], Sequence[Any]], longest_row: int | None) -> None:
        """Makes what holds the weights of this run."""
        dtype = None if self._has_engine or self._is_sharded else _dtype(self.accelerator.autocast, self.args.device)
        if dtype is None or self.args.frozen_weights_dtype == "as_loaded":
            return
        self._half_weights = HalfWeights(dtype, own_numbers(first_rows, longest_row, self.accelerator.autocast))
        if self.reference is not None:
            self.reference.while_scoring_datasets = self._holding_meanwhile

    def _run_modules(self) -> list[nn.Module]:
        return [self.model, *(self.reference.fixed_modules() if self.reference is not None else ())]

    def _hold(self, half: HalfWeights, originals: OriginalFiles | None) -> None:
        half.hold(self._run_modules(), originals)
        if not self._has_said_held and self.is_world_process_zero():
            line = holding_line(half.holding(self._run_modules()), half.dtype, originals.root if originals else None)
            self._has_said_held = line is not None
            if line is not None:
                logger.warning(line)

    @contextlib.contextmanager
    def _holding_meanwhile(self) -> Iterator[None]:
        """A context in which weights are held that a cast back restores. Within training, all are held already."""
        half = self._half_weights
        if half is None or self.is_in_train:
            yield
            return
        try:
            self._hold(half, None)
            yield
        finally:
            half.close()

    # --- where weights are held ---------------------------------------------------------------------------------------

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """See `transformers.Trainer.train`. Afterwards the model has its original weights."""
        try:
            return super().train(*args, **kwargs)
        finally:
            if self._half_weights is not None:
                self._half_weights.close()
            if self._originals is not None:
                self._originals.remove()

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """See `transformers.Trainer.training_step`."""
        half = self._half_weights
        if half is None:
            return super().training_step(*args, **kwargs)
        if self._originals is None and self.accelerator.num_processes == 1:
            self._originals = OriginalFiles(self.args.reference_folder)
        self._hold(half, self._originals)
        with half.within_step():
            return super().training_step(*args, **kwargs)

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """See `transformers.Trainer.evaluation_loop`."""
        casts_all = self.args.bf16_full_eval or self.args.fp16_full_eval
        with contextlib.nullcontext() if casts_all else self._holding_meanwhile():
            return super().evaluation_loop(*args, **kwargs)

    # --- where original weights are wanted ----------------------------------------------------------------------------

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """See `transformers.Trainer.save_model`."""
        with self._saving():
            super().save_model(output_dir, _internal_call)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        with self._saving():
            super()._save_checkpoint(model, trial)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        self._put_back()
        super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self) -> None:
        self._put_back()
        super()._load_best_model()

    def _put_back(self) -> None:
        if self._half_weights is not None:
            self._half_weights.put_back()

    @contextlib.contextmanager
    def _saving(self) -> Iterator[None]:
        """A context in which what is saved of the policy has its original values: all of it, or, beside adapters, the
        head, which peft saves with an embedding that trains."""
        half = self._half_weights
        if half is None:
            yield
        elif not is_adapted(self.model):
            half.put_back()
            yield
        else:
            head = unwrap(self.model).get_output_embeddings()
            half.put_back(head.parameters() if head is not None else ())
            with half.reading_adapters():
                yield


def _dtype(autocast: Autocast, device: torch.device) -> torch.dtype | None:
    """The half precision in which a forward pass under `autocast` takes matrix products; None where it does not."""
    with autocast():
        dtype = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None
    return dtype if dtype in (torch.bfloat16, torch.float16) else None


def holding_line(holding: Holding, dtype: torch.dtype, folder: Path | None) -> str | None:
    """What was held, in a line; None where nothing was to be held."""
    name = str(dtype).removeprefix("torch.")
    if holding.num_models_left:
        return (
            f"Frozen weights stay as loaded in {holding.num_models_left} of the run's models, which were not seen to "
            f"compute the same numbers with those of linear layers in {name}."
        )
    if holding.num_weights == 0:
        return None
    saved = holding.bytes_loaded - holding.bytes_held
    kept = f"; the fp32 values of {holding.num_kept} are kept in {folder} meanwhile" if holding.num_kept else ""
    left = f"; {holding.num_left} stay in fp32, since there is no room to keep their values" if holding.num_left else ""
    return (
        f"Frozen weights: {holding.num_weights} of linear layers are held in {name} while the run computes, which "
        f"saves {saved:,} bytes of {holding.bytes_loaded:,} and changes no number{kept}{left} "
        "(frozen_weights_dtype='as_loaded' leaves them as they are)."
    )
