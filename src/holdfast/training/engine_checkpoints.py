"""What an engine's checkpoints are: in parts, one of each process, or whole, as those of a run in one process.

transformers has its own files for each engine, which no other engine reads, and none at all of a model that was sharded
as it was loaded: one process's part of the optimizer would be saved for the whole. Here sharded weights are saved whole
(`checkpoint.whole`), or with `state_dict_type: SHARDED_STATE_DICT` in parts (`checkpoint.parts`), and read from either
by every run. DeepSpeed's stay as they are. Where one process cannot write, all raise its error together.
"""

import contextlib
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, final

import torch
from accelerate import PartialState
from transformers import Trainer
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME

from holdfast.agreement import of_all, raise_first, raised_together
from holdfast.checkpoint import parts
from holdfast.checkpoint.engine import PARTS, WHOLE, ZERO, Engine
from holdfast.checkpoint.policy_state import load_whole_policy
from holdfast.checkpoint.shared_folder import check_shared
from holdfast.checkpoint.whole import cut_optimizer, whole_optimizer, whole_policy
from holdfast.policy.sharding import is_sharded
from holdfast.scoring.causal_lm import unwrap
from holdfast.training.engine_trainer import EngineTrainer


class EngineCheckpoints(EngineTrainer):
    """Saves and loads a policy and an optimizer that may be in parts."""

    def __init__(self, *args: Any, **options: Any) -> None:
        is_sharded_at_load = getattr(options["model"], "is_distributed_loading_by_transformers", False)
        own = options["args"].save_only_model
        options["args"].save_only_model = (
            own or is_sharded_at_load
        )  # transformers has no optimizer's state of such a run
        try:
            super().__init__(*args, **options)
        finally:
            options["args"].save_only_model = own

    @property
    def _is_in_parts(self) -> bool:
        """Whether each process holds a part of the policy as FSDP2 makes them."""
        return is_sharded(self.model) and not self.is_deepspeed_enabled

    @property
    def _saves_parts(self) -> bool:
        """Whether checkpoints are to be in parts."""
        kind = str(getattr(getattr(self.accelerator.state, "fsdp_plugin", None), "state_dict_type", ""))
        return self._is_in_parts and "SHARDED_STATE_DICT" in kind

    def _engine(self) -> Engine:
        """What the manifest of a checkpoint records of this run."""
        if self.is_deepspeed_enabled:
            plugin: Any = self.accelerator.state.deepspeed_plugin
            name = f"DeepSpeed ZeRO-{plugin.zero_stage}"
        elif self._is_in_parts:
            name = "FSDP2" if self.is_fsdp_enabled else "weights sharded as they were loaded"
        else:
            name = "DDP" if self.args.world_size > 1 else "no engine"
        form = ZERO if self.is_deepspeed_enabled else PARTS if self._saves_parts else WHOLE
        return Engine(name=name, num_processes=self.args.world_size, state_dicts=form)

    def _prepare_for_training(self, *args: Any, **kwargs: Any) -> Any:
        self._check_folder()
        return super()._prepare_for_training(*args, **kwargs)

    def _check_folder(self) -> None:
        """ValueError where processes on several machines need one folder, and have several."""
        args = self.args
        if args.world_size == 1:
            return
        folder, request, remedy = Path(str(args.output_dir)), None, "set load_best_model_at_end=False"
        if self._saves_parts:
            request = "Checkpoints in parts were asked for (state_dict_type='SHARDED_STATE_DICT' in fsdp_config)"
            remedy = "set state_dict_type='FULL_STATE_DICT': then one process writes all of it"
        elif self.is_deepspeed_enabled and not args.save_on_each_node:
            request, remedy = "DeepSpeed's checkpoints have a part of each process", "set save_on_each_node=True"
        elif args.load_best_model_at_end and not args.save_on_each_node:
            request = "load_best_model_at_end=True was asked for"
        if self._saves_parts and args.save_on_each_node:
            raise ValueError(
                f"{request}, and save_on_each_node=True, but these are one checkpoint. Drop one of the two."
            )
        if request is not None:
            check_shared(folder, request, remedy)

    # --- written ------------------------------------------------------------------------------------------------------

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """See `transformers.Trainer.save_model`; a policy in parts is saved whole. Collective then."""
        if self._is_in_parts:
            self._write_whole(str(output_dir), whole_policy(self.model, keeps=self.args.should_save))
        else:
            super().save_model(output_dir, _internal_call)

    def _write_whole(self, folder: str, state: Mapping[str, Any]) -> None:
        """Writes the model with the tensors `state`, in the processes that write. No other process is waited for."""
        if self.args.should_save:
            with _without_mesh(self.model):
                self._save(folder, state_dict=dict(state))

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not self._is_in_parts:
            with raised_together(where=not self.is_deepspeed_enabled):
                super()._save_optimizer_and_scheduler(output_dir)
            return
        folder, writes = Path(output_dir), self.args.should_save
        if self._saves_parts:
            parts.save_policy(folder, self.model)
            parts.save_optimizer(folder, self.model, self.optimizer)
            state = None
        else:
            state = whole_optimizer(self.optimizer, keeps=writes)
        with raised_together():
            if writes and state is not None:
                torch.save(state, folder / OPTIMIZER_NAME)
            if writes:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # torch says that the optimizer must be saved as well
                    torch.save(self.lr_scheduler.state_dict(), folder / SCHEDULER_NAME)

    # --- read again ---------------------------------------------------------------------------------------------------

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        in_parts = checkpoint is not None and parts.has_parts(Path(checkpoint), parts.OPTIMIZER)
        if checkpoint is None or self.is_deepspeed_enabled or not (in_parts or self._is_in_parts):
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        if not in_parts:
            with self._standing_in(optimizer=_Cutting(self.optimizer), args=_OnHost(self.args), is_fsdp_enabled=False):
                in_turn(lambda: Trainer._load_optimizer_and_scheduler(self, checkpoint))
        elif (Path(checkpoint) / SCHEDULER_NAME).is_file():
            parts.load_optimizer(Path(checkpoint), self.model, self.optimizer)
            self._load_schedule(Path(checkpoint))

    def _load_schedule(self, checkpoint: Path) -> None:
        """Has transformers load the schedule, which it only does beside an optimizer: here beside an empty one."""
        with TemporaryDirectory() as folder, self._standing_in(optimizer=_Nothing(), is_fsdp_enabled=False):
            torch.save({}, Path(folder) / OPTIMIZER_NAME)
            shutil.copyfile(checkpoint / SCHEDULER_NAME, Path(folder) / SCHEDULER_NAME)
            Trainer._load_optimizer_and_scheduler(self, folder)

    @contextlib.contextmanager
    def _standing_in(self, **attributes: Any) -> Iterator[None]:
        """A context in which transformers finds other attributes of this trainer."""
        own = {name: getattr(self, name) for name in attributes}
        vars(self).update(attributes)
        try:
            yield
        finally:
            vars(self).update(own)

    def _load_policy(self, checkpoint: Path) -> bool:
        """Loads the policy if it is in parts, here or in the checkpoint. Whether it was."""
        if parts.has_parts(checkpoint):
            parts.load_policy(checkpoint, self.model)
        elif is_sharded(self.model):
            load_whole_policy(checkpoint, self.model)
        else:
            return False
        return True


@final
class _Cutting:
    """What transformers takes for the optimizer: it takes this process's part of what is loaded."""

    def __init__(self, optimizer: Any) -> None:
        self._optimizer = optimizer

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Loads a whole state dict."""
        self._optimizer.load_state_dict(cut_optimizer(state, self._optimizer))


@final
class _Nothing:
    """What transformers takes for the optimizer where that is loaded already."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Loads nothing."""


@final
class _OnHost:
    """What transformers takes for the options: those of a run that reads into host memory."""

    world_size, device = 1, torch.device("cpu")

    def __init__(self, args: Any) -> None:
        self._args = args

    def __getattr__(self, name: str) -> Any:
        return getattr(self._args, name)


def in_turn(load: Callable[[], None]) -> None:
    """Calls `load` in one process of each machine after the other, so that only one has all of a file in memory. All
    raise the first error."""
    numbers: list[int] = of_all(PartialState().local_process_index)
    failure: Exception | None = None
    for number in range(max(numbers) + 1):
        if number == PartialState().local_process_index:
            try:
                load()
            except Exception as error:
                failure = error
        of_all(None)
    raise_first(failure)


@contextlib.contextmanager
def _without_mesh(model: Any) -> Iterator[None]:
    """A context in which transformers saves a model as one that no mesh of processes has."""
    config = unwrap(model).config
    own = getattr(config, "distributed_config", None)
    if own is not None:
        config.distributed_config = None
    try:
        yield
    finally:
        if own is not None:
            config.distributed_config = own
