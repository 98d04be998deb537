"""What is settled before a run's first step: its reference, the layout of its rows, and that both are right.

The errors found here are silent ones otherwise. A reference that is not the policy, or log-probs that depend on the
rest of a batch, or rows that a model reads wrongly, would train towards another optimum without a word.
"""

import contextlib
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any, final

from accelerate import Accelerator
from torch import Tensor, nn

from holdfast.arguments import check_same_batches
from holdfast.batch import PairBatch
from holdfast.config import DPOConfig
from holdfast.data.layouts.choose import choose_layout, layout_of
from holdfast.data.layouts.trial import LayoutTrial
from holdfast.policy.independence import Dependence, check_resumable, find_dependence
from holdfast.policy.placement import place_reference_models
from holdfast.policy.rotations import pin_rotations
from holdfast.policy.sharding import give_back
from holdfast.policy.untouched import untouched
from holdfast.reference.audit import Checksums, Finding, audit, introduction
from holdfast.reference.build import build_reference
from holdfast.reference.reference import Reference
from holdfast.scoring.routes.choice import compiling_only_in
from holdfast.training.attention_routes import agreed_routes, dtype_of_run, line_about

logger = logging.getLogger(__name__)


@final
class Startup:
    """The choices and checks of one run. `first_checksums` are the policy's when its reference was captured."""

    def __init__(
        self,
        *,
        policy: nn.Module,
        args: DPOConfig,
        accelerator: Accelerator,
        first_checksums: Checksums,
    ) -> None:
        self.is_introduced = False
        self.finding: Finding | None = None
        """What the audit of the reference found."""
        self.introduction: str | None = None
        """The line about the reference, once it was introduced; None without one."""
        self.has_said = False
        """Whether that was said."""
        self._policy = policy
        self._args = args
        self._accelerator = accelerator
        self._first_checksums = first_checksums
        self._run_models: list[nn.Module] = [policy]
        self.longest_row: int | None = None
        self._dependence: Dependence | None = None
        self._attention = ""
        self.attention_line = ""
        """By which routes the models attend; empty where there is no choice."""

    def make_reference(
        self,
        ref_models: Sequence[nn.Module | None],
        train_dataset: Any,
        *,
        is_stream: bool,
        brings_logps: bool,
        layout: Callable[[], str],
    ) -> Reference | None:
        """The run's reference; None where no loss needs one and none is asked for. `ref_models` are those that the user
        chose, with None for the policy itself. `layout()` names the layout in the end.

        ValueError where the options contradict the models, or where a log-prob depends on the rest of its batch and
        would be kept. `brings_logps` says that all data bring the reference's log-probs along: they come from other
        batches, so the comparison with the reference is the check.
        """
        is_main = self._accelerator.is_main_process
        has_ref_model = any(ref_model is not None for ref_model in ref_models)
        options = self._args.reference_options(is_stream=is_stream, has_ref_model=has_ref_model)
        if options.way != "none":
            ref_models = place_reference_models(ref_models, self._policy, self._accelerator.device, is_main=is_main)
        self._run_models = [self._policy, *filter(None, ref_models)]
        self.longest_row = pin_rotations(self._run_models, self._args.max_length, train_dataset, is_main=is_main)
        self._dependence = None if brings_logps else self._find_dependence(self._run_models, train_dataset)
        check_same_batches(self._dependence, self._args)
        return build_reference(
            options,
            self._policy,
            ref_models,
            self._accelerator.autocast,
            mixed_precision=self._accelerator.mixed_precision,
            layout=lambda: layout() + self._attention,
            is_quiet=self._args.disable_tqdm or not self._accelerator.is_local_main_process,
            is_main=is_main,
            wait_for_all=self._accelerator.wait_for_everyone,
        )

    def choose_layout(
        self,
        collator: Any,
        first_pairs: Callable[[], Sequence[Mapping[str, Any]]],
        pair_batch: Callable[[Mapping[str, Tensor]], PairBatch],
    ) -> Any:
        """The data collator, once all models of the run were seen to compute right what it lays out; see
        `data.layouts.choose.choose_layout`. A line says by which routes they attend, where a device has several."""
        trial = LayoutTrial(
            models=self._run_models,
            first_pairs=first_pairs,
            pair_batch=pair_batch,
            accelerator=self._accelerator,
        )
        dtypes = {dtype_of_run(model, self._accelerator) for model in self._run_models}
        with contextlib.ExitStack() as stack:
            for model in self._run_models:
                stack.enter_context(untouched(model))
            stack.enter_context(compiling_only_in(dtypes))
            chosen = choose_layout(collator, self._args, trial)
        self._settle_attention(chosen)
        for model in self._run_models:
            give_back(model)
        self._run_models = [self._policy]  # a reference model that is scored ahead may be let go
        return chosen

    def _settle_attention(self, collator: Any) -> None:
        layout = layout_of(collator)
        routes = agreed_routes(self._run_models, self._accelerator) if layout and layout.fills_rows else {}
        if not routes:
            return
        self.attention_line = line = line_about(routes)
        # Routes round differently, as layouts do. So log-probs of one are not stored as those of another.
        self._attention = f", {line}"
        if self._accelerator.is_main_process:
            logger.warning(line)  # at the level that shows where nobody has configured logging

    def introduce(
        self, reference: Reference | None, batch: PairBatch, *, digest: str | None, is_users_choice: bool
    ) -> str | None:
        """One line about the reference, after it was audited on `batch`; None where the run has none.

        `digest` is that of its weights. ValueError where the audit finds it wrong (see `reference.audit.audit`).
        """
        self.is_introduced = True
        if reference is None:
            return None
        found = Finding(line="not audited")
        if self._args.reference_audit:
            with untouched(self._policy):
                found = audit(
                    self._policy,
                    reference,
                    batch,
                    autocast=self._accelerator.autocast,
                    first_checksums=self._first_checksums,
                    is_users_choice=is_users_choice,
                )
        self.finding, self.introduction = found, introduction(reference, digest, found)
        return self.introduction

    def check_resumable(self, train_dataset: Any) -> None:
        """ValueError where the policy's numbers depend on batches before, which a resumed run has not seen."""
        check_resumable(self._dependence or self._find_dependence([self._policy], train_dataset))

    def _find_dependence(self, models: Sequence[nn.Module], train_dataset: Any) -> Dependence | None:
        return find_dependence(models, train_dataset, self.longest_row, self._accelerator.autocast)
