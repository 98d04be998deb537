"""What is written down of a run while it trains, and said at its beginning: the record, times, the alarm.

A callback that comes before all others. So what it adds to a log (times, speeds, memory: numbers that differ from
machine to machine) reaches trackers and the console, and neither `log_history` nor a checkpoint.
"""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, final

from transformers import TrainerCallback

from holdfast.interruption import interruption_behind
from holdfast.record import Alarms, RecordWriter, training_logs
from holdfast.training.banner import banner, terminal_width
from holdfast.training.pace import Pace, peak_bytes
from holdfast.training.run_facts import facts_of, memory_facts, reference_facts

logger = logging.getLogger(__name__)


@final
class RunWatch(TrainerCallback):
    """Watches the runs of `trainer`."""

    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer
        self.pace = Pace(trainer.args.device)
        self.writer: RecordWriter | None = None
        self._alarms = Alarms()
        self._last_log = 0
        self._counts = 0.0, 0.0
        self._has_measured = False

    # --- a run --------------------------------------------------------------------------------------------------------

    def open(self, folder: Path) -> None:
        """Begins to watch a run with this output folder. Nothing is written yet."""
        has_record = self._trainer.args.run_record and self._trainer.is_world_process_zero()
        self.writer = RecordWriter(folder) if has_record else None

    def close(self, error: BaseException | None) -> None:
        """Ends, with what training has ended with."""
        self.pace.end()
        if self.writer is None:
            return
        is_asked = error is not None and (isinstance(error, KeyboardInterrupt) or interruption_behind(error))
        self.writer.end("finished" if error is None else "interrupted" if is_asked else "failed")

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Writes the facts and says them. See `transformers.TrainerCallback` for this and the other events."""
        trainer, history = self._trainer, training_logs(state.log_history)
        self._last_log = history[-1].step if history else 0
        self._alarms = Alarms(history)
        self._has_measured = False
        if trainer.is_world_process_zero():
            facts = self._facts(state)
            checkpoint = trainer._resumed
            if self.writer is not None and checkpoint is None:
                self.writer.begin(facts)
            elif self.writer is not None:
                self.writer.resume(facts, state.global_step, trainer._record_lines(checkpoint))
            if trainer._startup.is_introduced:
                self._say(facts)
        self.pace.begin(state.global_step)

    def introduced(self) -> None:
        """Says and writes what the audit has found, once it has, of a policy that could not be audited before."""
        facts = self._facts(self._trainer.state)  # by all processes: it gives back what FSDP holds gathered
        if not self._trainer.is_world_process_zero():
            return
        self._say(facts)
        if self.writer is not None:
            self.writer.update(audit=facts.audit, reference=facts.reference, memory=facts.memory)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Reads, once, what the optimizer holds now."""
        if self.writer is not None and not self._has_measured:
            self._has_measured = True
            trainer = self._trainer
            memory = memory_facts(trainer.model, trainer.reference, trainer.optimizer, args)
            reference = reference_facts(
                trainer.reference, args, digest=trainer._reference_digest(),
                is_users_choice=trainer._is_reference_chosen,
            )  # fmt: skip
            self.writer.update(memory=memory, reference=reference)

    # --- logs and events ----------------------------------------------------------------------------------------------

    def counted(self, num_pairs: float, num_tokens: float) -> None:
        """Takes the pairs and tokens, of all processes, that the log which comes next is about."""
        self._counts = num_pairs, num_tokens

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Adds times, speeds and memory to a log of training, writes the log, and looks whether an alarm is due."""
        if logs is None:
            return
        if "loss" in logs:
            logs |= self.pace.read(state.global_step, *self._counts, since_step=self._last_log)
            self._last_log, peak = state.global_step, peak_bytes(args.device)
            if peak is not None:
                logs["memory/peak_bytes"] = peak
        if not state.is_world_process_zero:
            return
        if self.writer is not None:
            self.writer.log(state.global_step, state.epoch, {k: v for k, v in logs.items() if k != "epoch"})
        for log in training_logs([logs | {"step": state.global_step}]):
            if (alarm := self._alarms.add(log)) is not None:
                text = alarm.sentence(args.loss_types, learning_rate=args.learning_rate, beta=args.beta)
                logger.warning(text)
                self.event(state.global_step, "alarm", text, **alarm.numbers())

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **kwargs: Any) -> None:
        """Writes that it was evaluated."""
        named: Mapping[str, Any] = metrics or {}
        losses = {k: v for k, v in named.items() if k.endswith("_loss") and isinstance(v, int | float)}
        if losses:
            text = ", ".join(f"{name} {value:.4g}" for name, value in losses.items())
            self.event(state.global_step, "evaluation", f"Evaluated: {text}.", **losses)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Writes that a checkpoint is complete."""
        self.event(state.global_step, "checkpoint", f"checkpoint-{state.global_step} is complete.")

    def synced(self, step: int) -> None:
        """Writes that the reference has moved."""
        reference = self._trainer.reference
        text = f"Sync {reference.version} of the reference moved it by {reference.drift:.3g} (L2 norm of its weights)."
        self.event(step, "sync", text, version=reference.version, drift=reference.drift)

    def event(self, step: int, kind: str, text: str, **numbers: float) -> None:
        """Writes an event."""
        if self.writer is not None:
            self.writer.event(step, kind, text, **numbers)

    # --- what is said -------------------------------------------------------------------------------------------------

    def _facts(self, state: Any) -> Any:
        trainer = self._trainer
        return facts_of(
            policy=trainer.model,
            reference=trainer.reference,
            args=trainer.args,
            data=trainer._datasets(),
            optimizer=trainer.optimizer,
            finding=trainer._startup.finding,
            digest=trainer._reference_digest(),
            is_users_choice=trainer._is_reference_chosen,
            layout=trainer._layout_name(),
            attention=trainer._startup.attention_line,
            max_steps=state.max_steps,
            num_epochs=state.num_train_epochs,
        )

    def _say(self, facts: Any) -> None:
        """Says the banner, once for each policy."""
        startup = self._trainer._startup
        if startup.has_said:
            return
        startup.has_said = True
        # At the level that shows where nobody has configured logging.
        logger.warning(banner(facts, startup.introduction, self._results(), width=terminal_width()))

    def _results(self) -> str:
        args, writer = self._trainer.args, self.writer
        strategy = str(getattr(args.save_strategy, "value", args.save_strategy))
        every = f"{args.save_steps:g} steps" if strategy == "steps" else "epoch"
        kept = "no checkpoints" if strategy == "no" else f"a checkpoint every {every}"
        kept = "the best checkpoint" if strategy == "best" else kept
        parts = [str(args.output_dir), kept, *(["record/"] if writer is not None else [])]
        trackers = [str(name) for name in args.report_to or [] if name != "none"]
        return ", ".join([*parts, *(["logs to " + " and ".join(trackers)] if trackers else [])])
