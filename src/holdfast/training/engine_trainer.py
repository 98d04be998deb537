"""What differs from `transformers.Trainer` where an engine (FSDP2, DeepSpeed) trains a model over processes.

The policy is sharded when the trainer is made, so transformers finds it sharded when training begins. With ZeRO-3 it
gets an engine that only scores. DeepSpeed has one engine for a model at a time, so the engine that trains takes its
place. ZeRO-1 and ZeRO-2 leave the weights whole, and their engine is made when training begins.

And a policy that was evaluated first must still be wrapped for training: accelerate takes one that it has prepared for
evaluation as it is, so without DDP around it every process would train on its own.
"""

import contextlib
import copy
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from transformers import Trainer
from transformers.integrations.deepspeed import deepspeed_init

from holdfast.internals.accelerate import forget_preparation, is_prepared
from holdfast.internals.deepspeed import forget_engine
from holdfast.internals.transformers import saving_where_asked
from holdfast.policy.loaded_files import check_same_files
from holdfast.policy.sharding import average_gradients, give_back, is_sharded, shard_policy


class EngineTrainer(Trainer):
    """Trains a policy that may be sharded already."""

    model: Any
    optimizer: Any
    lr_scheduler: Any
    deepspeed: Any
    _is_sharded: bool
    """Whether a process holds only a part of the policy's weights."""

    _is_evaluated_first: bool = False
    """Whether accelerate has prepared the policy for evaluation, where training wants it wrapped."""
    _parameters: Sequence[list[Tensor]] = ()

    @property
    def _has_engine(self) -> bool:
        """Whether an engine of accelerate's trains the policy."""
        return self.is_fsdp_enabled or self.is_deepspeed_enabled

    def _begin_engine(self, policy: nn.Module) -> None:
        """Brings the policy to where, and how, its engine computes with it. `_is_sharded` is set."""
        if is_sharded(policy) and not self._has_engine:
            check_same_files(policy)
        shard_policy(policy, self.accelerator)
        if self.is_deepspeed_enabled:
            plugin: Any = self.accelerator.state.deepspeed_plugin
            if plugin.zero_stage == 3:
                self._make_scoring_engine(plugin.hf_ds_config.config)
            else:
                self._move_model_to_device(policy, self.args.device)
                cast(policy, plugin.hf_ds_config.dtype())
        self._is_sharded = self.is_fsdp_enabled or is_sharded(policy)

    def _make_scoring_engine(self, config: dict[str, Any]) -> None:
        """An engine of ZeRO-3 without an optimizer, as transformers makes it to evaluate. It takes the optimizer's
        block from the config, which is put back."""
        asked = copy.deepcopy(config)
        deepspeed_init(self, num_training_steps=0, inference=True)
        self.deepspeed = self.accelerator.prepare(self.model)
        config.clear()
        config.update(asked)

    def _prepare_for_training(self, *args: Any, **kwargs: Any) -> Any:
        if self._is_evaluated_first:
            self._is_evaluated_first = False
            forget_preparation(self.accelerator, self.model)
        give_back(self.model)  # an optimizer that is made of gathered values would move those alone
        if self.is_deepspeed_enabled:  # the engine before was destroyed
            forget_engine(self.model)
            self.model_wrapped = self.model
        with recomputing_once(self.accelerator):
            prepared = super()._prepare_for_training(*args, **kwargs)
        if self.is_fsdp_enabled and is_sharded(self.model):
            self._keep_parameters()
        return prepared

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """See `transformers.Trainer.training_step`."""
        loss = super().training_step(*args, **kwargs)
        if self.accelerator.sync_gradients and not self.is_deepspeed_enabled:
            average_gradients(self.model)
        return loss

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        """See `transformers.Trainer.create_optimizer`."""
        give_back(self.model)
        optimizer = super().create_optimizer(*args, **kwargs)
        self._parameters = [list(group["params"]) for group in getattr(self.optimizer, "param_groups", [])]
        return optimizer

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """See `transformers.Trainer.evaluation_loop`. Before training, ZeRO-1 and ZeRO-2 have no engine, and none is
        needed."""
        is_first = self.accelerator.num_processes > 1 and not is_prepared(self.model)
        is_plain = self.is_deepspeed_enabled and self.deepspeed is None
        self.is_deepspeed_enabled = self.is_deepspeed_enabled and not is_plain
        try:
            output = super().evaluation_loop(*args, **kwargs)
        finally:
            self.is_deepspeed_enabled = self.is_deepspeed_enabled or is_plain
        self._is_evaluated_first |= is_first and is_prepared(self.model)
        return output

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        """Writes the model; with `save_on_each_node` on each host."""
        with saving_where_asked(self.model, self.args):
            super()._save(output_dir, state_dict)

    def _keep_parameters(self) -> None:
        """Gives the optimizer its parameters again: accelerate takes parameters of which a process has nothing for one
        and the same."""
        for group, parameters in zip(self.optimizer.param_groups, self._parameters, strict=True):
            group["params"] = parameters


@contextlib.contextmanager
def recomputing_once(accelerator: Accelerator) -> Iterator[None]:
    """A context within which accelerate leaves FSDP2's recomputation of activations as it is: the policy has it."""
    plugin = accelerator.state.fsdp_plugin if accelerator.is_fsdp2 else None
    if plugin is None or not plugin.activation_checkpointing:
        yield
        return
    plugin.activation_checkpointing = False
    try:
        yield
    finally:
        plugin.activation_checkpointing = True


def cast(policy: nn.Module, dtype: torch.dtype) -> None:
    """Gives the policy's parameters the dtype in which DeepSpeed will train them, as its engine would; fp32 stays what
    it is."""
    for parameter in policy.parameters():
        if parameter.is_floating_point() and dtype != torch.float32:
            parameter.data = parameter.data.to(dtype)
