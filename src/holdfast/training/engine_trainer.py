"""What differs from `transformers.Trainer` where an engine (FSDP2, DeepSpeed) spreads a model over processes.

The policy is sharded when the trainer is made, so transformers finds it sharded when training begins. And a policy that
was evaluated first must still be wrapped for training: accelerate takes one that it has prepared for evaluation as it
is, so without DDP around it every process would train on its own.
"""

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from transformers import Trainer

from holdfast.internals.accelerate import forget_preparation, is_prepared
from holdfast.policy.sharding import give_back, is_sharded


class EngineTrainer(Trainer):
    """Trains a policy that may be sharded already."""

    model: Any
    optimizer: Any
    _is_sharded: bool
    """Whether a process holds only a part of the policy's weights."""

    _is_evaluated_first: bool = False
    """Whether accelerate has prepared the policy for evaluation, where training wants it wrapped."""
    _parameters: Sequence[list[Tensor]] = ()

    def _prepare_for_training(self, *args: Any, **kwargs: Any) -> Any:
        if self._is_evaluated_first:
            self._is_evaluated_first = False
            forget_preparation(self.accelerator, self.model)
        give_back(self.model)  # an optimizer that is made of gathered values would move those alone
        prepared = super()._prepare_for_training(*args, **kwargs)
        if self.is_fsdp_enabled and is_sharded(self.model):
            self._keep_parameters()
        return prepared

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        """See `transformers.Trainer.create_optimizer`."""
        give_back(self.model)
        optimizer = super().create_optimizer(*args, **kwargs)
        self._parameters = [list(group["params"]) for group in getattr(self.optimizer, "param_groups", [])]
        return optimizer

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """See `transformers.Trainer.evaluation_loop`."""
        is_first = self.accelerator.num_processes > 1 and not is_prepared(self.model)
        output = super().evaluation_loop(*args, **kwargs)
        self._is_evaluated_first |= is_first and is_prepared(self.model)
        return output

    def _keep_parameters(self) -> None:
        """Gives the optimizer its parameters again: accelerate takes parameters of which a process has nothing for one
        and the same."""
        for group, parameters in zip(self.optimizer.param_groups, self._parameters, strict=True):
            group["params"] = parameters
