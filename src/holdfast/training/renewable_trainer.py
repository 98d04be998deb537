"""`RenewableTrainer`: each run of a trainer with `model_init` trains a fresh policy against a reference of its own.

`transformers.Trainer` makes the model when training begins and puts in place what was there. Here a reference was made
of the policy before, so it is made again, with the options of the trial, before transformers asks for the model.
"""

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import nn
from transformers import Trainer, set_seed

from holdfast.callbacks import SyncCallback
from holdfast.reference.audit import Checksums, checksums
from holdfast.reference.load import RefModel
from holdfast.training.hooked_trainer import HookedTrainer
from holdfast.training.interruption import InterruptionCallback
from holdfast.training.makings import Makings


class RenewableTrainer(HookedTrainer):
    """Makes the policy again where `model_init` says how, and all that was made of the one before."""

    _makings: Makings
    _first_checksums: Checksums
    _is_fresh: bool = False
    """Whether the policy came from `model_init` and has not been trained."""

    @abstractmethod
    def _begin_with(self, policy: nn.Module, ref_model: RefModel | Sequence[RefModel]) -> None:
        """Makes all that a run of this policy needs."""

    def call_model_init(self, trial: Any = None) -> nn.Module:
        """See `transformers.Trainer.call_model_init`: the policy, which was made of what `model_init` returns."""
        return self.model

    def _make_fresh(self, trial: Any) -> None:
        """Makes the policy of a run and its reference, unless they are fresh already. ValueError where `model_init`
        returns a trained model, or where the options of `trial` cannot be right."""
        is_fresh, self._is_fresh = self._is_fresh and trial is None, False
        if self.model_init is None or is_fresh:
            return
        self._hp_search_setup(trial)  # transformers asks for the trial's options only once the model is made
        self.args.check()
        set_seed(self.args.seed)
        ref_model = self._makings.ref_model_again(self.reference, self.args)
        policy = self._makings.policy(Trainer.call_model_init(self, trial), self.args, before=self.model)
        for callback in (SyncCallback, InterruptionCallback):
            self.remove_callback(callback)
        if self.place_model_on_device:
            self._move_model_to_device(policy, self.args.device)
        self.model = self.model_wrapped = policy
        self.optimizer = self.lr_scheduler = self._provenance = self._base = self._infinite_masks = None
        self._first_checksums = checksums(policy)
        self._prepare_again()
        self._begin_with(policy, ref_model)

    def _prepare_again(self) -> None:
        """The datasets and the collator where the options of a trial ask for others."""
        args: Any = self.args
        preparation = replace(self._preparation, max_length=args.max_length, truncation_mode=args.truncation_mode)
        if preparation != self._preparation:
            self._preparation = preparation
            self.train_dataset, self.eval_dataset = self._prepared(args)
        if not self._makings.has_own_collator:
            self.data_collator = self._make_collator(args, self._overridden_hooks(args))
