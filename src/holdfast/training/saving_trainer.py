"""`SavingTrainer`: what a run writes into its output folder beside checkpoints, whole or not at all.

The trained model, the trainer's state and the metrics are written elsewhere first (`checkpoint.placed`). A policy in
parts is gathered, and the model is that of a run in one process: `from_pretrained` reads it.
"""

import contextlib
import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from accelerate.utils import broadcast_object_list

from holdfast.agreement import raised_together
from holdfast.card import hide_paths
from holdfast.checkpoint.placed import is_json_mapping, keep_copy, placed
from holdfast.checkpoint.sound import last_complete
from holdfast.checkpoint.whole import whole_policy
from holdfast.data.progress import bars
from holdfast.peers.phase import doing
from holdfast.progress import is_displaying
from holdfast.secrets import without_secrets_on_disk
from holdfast.training.pair_trainer import PairTrainer


class SavingTrainer(PairTrainer):
    """Writes models, states and metrics."""

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        """Writes the model and `training_args.bin`, the latter without secrets."""
        has_bars = not self.args.disable_tqdm and not is_displaying()
        with without_secrets_on_disk(self.args), bars(are_shown=has_bars):
            super()._save(output_dir, state_dict)
        hide_paths(Path(str(output_dir or self.args.output_dir)))

    @doing("saving the model", is_long=True)
    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """See `transformers.Trainer.save_model`. ValueError where the disk is full or cannot be written to; the model
        that was in the folder before is then as it was. Collective where the policy is in parts."""
        if output_dir is not None and _internal_call:  # part of a checkpoint, which counts once all of it is written
            if not self._saves_parts:
                with raised_together(where=not self.is_deepspeed_enabled):
                    super().save_model(output_dir, _internal_call=True)
            return
        folder = Path(str(output_dir or self.args.output_dir))
        if self._is_in_parts:
            self._check_model()
            state = whole_policy(self.model, keeps=self.args.should_save)
            with raised_together():
                if self.args.should_save:
                    with self._placed(folder, "the trained model") as staged:
                        keep_copy(folder / "README.md", staged)  # peft adds to it
                        self._write_whole(str(staged), state)
        elif self.is_deepspeed_enabled and self.args.save_on_each_node:  # to disks of which nobody knows the others'
            super().save_model(str(folder), _internal_call=True)
        elif self.args.should_save and not (self.is_deepspeed_enabled and self.args.process_index > 0):
            with self._placed(folder, "the trained model") as staged:
                keep_copy(folder / "README.md", staged)
                super().save_model(self._agreed(staged), _internal_call=True)
                if self.is_deepspeed_enabled:
                    self.accelerator.wait_for_everyone()
        else:
            super().save_model(self._agreed(folder), _internal_call=True)
            if self.is_deepspeed_enabled:
                self.accelerator.wait_for_everyone()
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def _agreed(self, folder: Path) -> str:
        """The folder of the first process, where all processes write one model; else this process's own."""
        names = [str(folder)]
        return broadcast_object_list(names)[0] if self.is_deepspeed_enabled else names[0]

    def save_state(self) -> None:
        """See `transformers.Trainer.save_state`. ValueError where the file cannot be written; an older one stays."""
        if self.is_world_process_zero():
            with self._writing_aside("the state of the trainer"):
                super().save_state()

    def save_metrics(self, split: str, metrics: dict[str, float], combined: bool = True) -> None:
        """See `transformers.Trainer.save_metrics`. ValueError where a file cannot be written; an older one stays."""
        if self.is_world_process_zero():
            with self._writing_aside(f"the metrics ({split})", changed="all_results.json"):
                super().save_metrics(split, metrics, combined)

    def _placed(self, folder: Path, content: str) -> contextlib.AbstractContextManager[Path]:
        run_folder = Path(str(self.args.output_dir))
        again = "call this again, or train again (with save_strategy='steps' a run can be finished by resuming it)"
        return placed(folder, content, lambda: last_complete(run_folder, none=again))

    @contextlib.contextmanager
    def _writing_aside(self, content: str, changed: str | None = None) -> Iterator[None]:
        """A context in which the output folder is a temporary one, with a copy of the file `changed`. Its files are
        moved into the output folder at the end."""
        args = self.args
        folder = Path(str(args.output_dir))
        with self._placed(folder, content) as staged:
            if changed is not None and is_json_mapping(folder / changed):
                keep_copy(folder / changed, staged)
            self.args = copy.copy(args)
            self.args.output_dir = str(staged)
            try:
                yield
            finally:
                self.args = args
