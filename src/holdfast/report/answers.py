"""Four questions that everybody asks of a run, answered in plain words from its numbers.

Which reference did I use? Did it help? Is it bad that the chosen reward falls? How do I resume? Each answer is a short
sentence, what it rests on, and a command where there is one. What was not recorded is said to be unknown.
"""

import math
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import final

from holdfast.record.facts import Facts, Reference
from holdfast.report.changes import Changes, changes
from holdfast.report.findings import PAPERS
from holdfast.report.healthy import BY_METRIC, compares_with_reference, judged
from holdfast.report.run import Run
from holdfast.report.units import in_bytes, percent

_NUM_ERRORS = 2
_RESUME = "training.resume_from_checkpoint"
_DIGITS = 12
_COMMANDS = ("holdfast", "holdfast.exe", "holdfast.cli", "__main__.py")
"""How the command line is called: as a script, or as a module under a launcher."""


class Mood(StrEnum):
    """How an answer is shown."""

    GOOD = "good"
    PLAIN = "plain"
    WARNING = "warn"


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """An answer: the question, a sentence, more sentences, and a command to type."""

    question: str
    short: str
    more: tuple[str, ...] = ()
    command: str | None = None
    mood: Mood = Mood.PLAIN


def answers(run: Run) -> tuple[Answer, ...]:
    """The four answers."""
    return which_reference(run), did_it_help(run), is_falling_bad(run), how_to_resume(run)


# The reference -------------------------------------------------------------------------------------------------------


def which_reference(run: Run) -> Answer:
    """Which reference it was, where it was held, what it was made from, what the audit found, and whether it moved."""
    question = "Which reference did I use?"
    reference = None if run.facts is None else run.facts.reference
    if reference is None:
        return _reference_of_checkpoint(run, question)
    assert run.facts is not None
    named = f"One that you named: {reference.description}."
    captured = "The policy as it started to train, captured from memory."
    short = named if reference.is_users_choice else captured
    described = [] if reference.is_users_choice else [f"In the run's words: {reference.description}."]
    more = [*described, *_held(reference), *_audited(run.facts), *_moved(run, reference), *_recorded(run, reference)]
    return Answer(question=question, short=short, more=tuple(more))


def _reference_of_checkpoint(run: Run, question: str) -> Answer:
    """The answer for a run without a reference, or without a record."""
    manifest = {} if run.checkpoint is None else run.checkpoint.manifest
    if manifest.get("kind", "none") != "none":
        assert run.checkpoint is not None
        weights = f" Weights {str(manifest['weights'])[:_DIGITS]}." if manifest.get("weights") else ""
        more = f"So says {run.checkpoint.folder.name}/reference/manifest.json.{weights}"
        return Answer(question=question, short=f"{_sentence(str(manifest.get('description')))}", more=(more,))
    if run.facts is not None:
        losses = ", ".join(run.facts.loss_types)
        return Answer(question=question, short=f"None: the loss ({losses}) compares with no reference.")
    if manifest:
        return Answer(question=question, short="None: the last checkpoint says that the run had no reference.")
    more = "The run has no record (run_record) and no complete checkpoint."
    return Answer(question=question, short="It was not recorded.", more=(more,), mood=Mood.WARNING)


def _held(reference: Reference) -> Iterator[str]:
    if reference.held_bytes is not None:
        size = in_bytes(reference.held_bytes)
        yield f"It holds {size} beside the policy." if reference.held_bytes else "It holds no memory beside the policy."
    if reference.weights_digest is not None:
        yield f"Its weights have the digest {reference.weights_digest[:_DIGITS]}."


def _audited(facts: Facts) -> Iterator[str]:
    if facts.audit is None:
        yield "It was not audited (reference_audit)."
    else:
        yield f"Audit before the first step: {_sentence(facts.audit.line)}"


def _moved(run: Run, reference: Reference) -> Iterator[str]:
    if not reference.moves:
        yield "It is fixed: it was the same throughout."
        return
    syncs = run.syncs()
    number = run.last("reference/version")
    number = len(syncs) if number is None else max(int(number), len(syncs) if run.events else 0)
    last = f", the last one at step {syncs[-1][0]:,}" if syncs else ""
    how = "" if reference.sync_steps is None else f" every {reference.sync_steps:,} steps"
    how += "" if reference.mixup_alpha is None else f" by {reference.mixup_alpha:g} of the way (mixup alpha)"
    yield f"It moves towards the policy{how}: {number:,} {_plural('sync', number)} so far{last}."


def _recorded(run: Run, reference: Reference) -> Iterator[str]:
    if run.checkpoint is None or not run.checkpoint.manifest:
        return
    name, recorded = run.checkpoint.folder.name, run.checkpoint.manifest.get("weights")
    if reference.weights_digest and recorded and str(recorded) != reference.weights_digest:
        yield f"{name} records another one: weights {str(recorded)[:_DIGITS]}. It is a checkpoint of another run."
    else:
        yield f"{name} records it in reference/manifest.json: a run that resumes there is refused any other."


# Whether it helped ---------------------------------------------------------------------------------------------------


def did_it_help(run: Run) -> Answer:
    """What held-out pairs say, with standard errors; and a judge, if there was one."""
    question = "Did it help?"
    if not run.logs:
        return Answer(question=question, short="Nothing was logged yet.")
    judges = [*_judged_samples(run)]
    name = "rewards/accuracies"
    evaluated = [prefix for prefix in run.evaluations if (run.series(prefix + name)[0] > 0).any()]
    if run.evaluations and not evaluated:
        short = "Not known yet: held-out pairs were evaluated before the first step only."
        return Answer(question=question, short=short)
    if not evaluated:
        of_training = run.last("rewards/accuracies")
        seen = (
            "" if of_training is None else f"On its own training pairs rewards/accuracies is {percent(of_training)}. "
        )
        more = f"{seen}Only held-out pairs tell whether it learnt more than these: name some as `data: eval`."
        return Answer(question=question, short="Not known: no pairs were held out.", more=(more, *judges))
    verdicts = [_verdict(run, prefix) for prefix in evaluated]
    short, mood = verdicts[0]
    trends = [sentence for prefix in evaluated for sentence in _trend(run, prefix)]
    more = [text for text, _ in verdicts[1:]] + trends + judges
    return Answer(question=question, short=short, more=tuple(more), mood=mood)


def _verdict(run: Run, prefix: str) -> tuple[str, Mood]:
    share, number = run.last(f"{prefix}rewards/accuracies"), _num_pairs(run, prefix)
    assert share is not None
    error = math.sqrt(share * (1 - share) / number) if number else None
    spread = "" if error is None else f" ± {percent(error)}"
    of_pairs = f"{number:,} held-out pairs" if number else "the held-out pairs"
    name = "" if prefix == "eval_" else f" ({prefix.removeprefix('eval_').removesuffix('_')})"
    found = f"in {percent(share)}{spread} of {of_pairs}{name} the policy"
    if compares_with_reference(run):
        what = f"{found} prefers the chosen completion more than the reference does (50 % is chance)."
        return _judged(share - 0.5, error or 0.0, what)
    what = f"{found} gives the chosen completion the higher reward"
    steps, shares = run.series(f"{prefix}rewards/accuracies")
    if len(shares) < 2:
        return f"Not known: {what}, and there is no evaluation before to compare with (eval_on_start).", Mood.PLAIN
    before = f"{what}; at the first evaluation (step {steps[0]:,.0f}) it was {percent(shares[0])}."
    return _judged(share - float(shares[0]), math.sqrt(2) * (error or 0.0), before)


def _judged(gain: float, error: float, found: str) -> tuple[str, Mood]:
    """The verdict on a gain that has this standard error."""
    if gain > _NUM_ERRORS * error:
        return f"Yes: {found}", Mood.GOOD
    if gain < -_NUM_ERRORS * error:
        return f"No: {found}", Mood.WARNING
    return f"Not measurably: {found}", Mood.PLAIN


def _num_pairs(run: Run, prefix: str) -> int | None:
    """The number of pairs of an evaluation set, as its rows were used."""
    if run.facts is None:
        return None
    name = prefix.removeprefix("eval_").removesuffix("_")
    found = run.facts.data.get(name or "eval", run.facts.data.get("eval") if not name else None)
    return None if found is None else found.num_used


def _trend(run: Run, prefix: str) -> Iterator[str]:
    """How loss and margin went from the first to the last evaluation."""
    steps, losses = run.series(f"{prefix}loss")
    if len(losses) > 1:
        best = int(losses.argmin())
        yield (
            f"{prefix}loss went from {losses[0]:.4g} (step {steps[0]:,.0f}) to {losses[-1]:.4g} (step "
            f"{steps[-1]:,.0f}); the lowest is {losses[best]:.4g} at step {steps[best]:,.0f}."
        )
    elif len(losses):
        yield f"{prefix}loss is {losses[-1]:.4g} at step {steps[-1]:,.0f}, the only evaluation."
    margin = run.last(f"{prefix}rewards/margins")
    if margin is not None:
        yield f"{prefix}rewards/margins is {margin:.4g}."


def _judged_samples(run: Run) -> Iterator[str]:
    for metric in run.metrics:
        if metric.split("/")[0].endswith("win_rate"):
            share, error = run.last(metric), run.last(f"{metric}_se")
            if share is not None:
                spread = "" if error is None else f" ± {percent(error)}"
                what = "the policy's completion"
                yield f"The judge preferred {what} in {percent(share)}{spread} of the prompts ({metric})."


# The chosen reward ---------------------------------------------------------------------------------------------------


def is_falling_bad(run: Run) -> Answer:
    """Whether the chosen completions became less likely, and what that means here."""
    question = "Is it bad that the chosen reward falls?"
    found = changes(run)
    if found is None:
        return Answer(question=question, short="Too early to say: too little was logged.")
    against = "from the reference's" if found.is_against_reference else "since the first logs"
    where = "held-out" if found.is_held_out else "training"
    numbers = (
        f"Over the last logs of {where} pairs the log-prob of the chosen completions is {found.chosen:+.3g} nats away "
        f"{against}, and that of the rejected ones {found.rejected:+.3g}."
    )
    if not found.has_chosen_fallen:
        how = "it rises" if found.has_chosen_risen else "it stays where it was"
        return Answer(question=question, short=f"Here it does not fall: {how}.", more=(numbers,), mood=Mood.GOOD)
    if not found.has_order_grown:
        short = "Yes: it falls and the margin does not grow. The run loses text without learning the order."
        more = (numbers, "Lower the learning rate, and look whether chosen and rejected are swapped.")
        return Answer(question=question, short=short, more=more, mood=Mood.WARNING)
    return _of_squeeze(run, question, numbers, found)


def _of_squeeze(run: Run, question: str, numbers: str, found: Changes) -> Answer:
    """The answer where the chosen completions fall and still gain on the rejected ones."""
    reward = judged(run, "rewards/chosen")
    is_far = reward is not None and reward.since is not None
    both = "Both fall, the rejected ones further" if found.has_rejected_fallen else "The margin grows nevertheless"
    why = (
        f"{both}: this is the usual squeeze (see {PAPERS}). The loss asks for the difference of the two alone, and "
        "likelihood goes to completions that are in no pair. It is bad where those are worse: look at the samples, and "
        "whether held-out accuracy still rises."
    )
    cure = (
        "To hold the chosen completions up: add `sft` to `loss_type`, raise `beta`, lower the learning rate, or train "
        "for fewer epochs."
    )
    if is_far:
        assert reward is not None
        healthy = BY_METRIC["rewards/chosen"].words
        short = f"Look at it: rewards/chosen is {reward.value:.3g}, outside its healthy range ({healthy})."
        return Answer(question=question, short=short, more=(numbers, why, cure), mood=Mood.WARNING)
    short = "Not by itself: it falls within the usual, and the margin grows."
    return Answer(question=question, short=short, more=(numbers, why, cure))


# Resuming ------------------------------------------------------------------------------------------------------------


def how_to_resume(run: Run) -> Answer:
    """The command that goes on from the last complete checkpoint, and what would be lost."""
    question = "How do I resume?"
    done, whole = run.last_step, 0 if run.facts is None else run.facts.max_steps
    if run.facts is not None and run.facts.outcome == "finished":
        short = f"There is nothing to resume: all {whole:,} steps are done."
        if run.checkpoint is None:
            return Answer(question=question, short=short, more=("It left no checkpoint that could be trained on.",))
        more = f"To train on from {run.checkpoint.folder.name}, raise `num_train_epochs` or `max_steps` as well."
        return Answer(question=question, short=short, more=(more,), command=_command(run, True))
    if run.checkpoint is None:
        short = "It has to begin anew: there is no complete checkpoint."
        more = "`save_strategy: steps` with `save_steps` writes some."
        mood = Mood.WARNING if run.is_over else Mood.PLAIN
        return Answer(question=question, short=short, more=(more,), command=_command(run, False), mood=mood)
    lost = max(0, done - run.checkpoint.step)
    again = f"; {lost:,} {_plural('step', lost)} after it are trained again" if lost else ""
    of_all = f" of {whole:,}" if whole > 0 else ""
    short = f"From {run.checkpoint.folder.name}, at step {run.checkpoint.step:,}{of_all}{again}."
    more = ["It goes on bit for bit on a CPU: weights, optimizer, the place in the data, and the reference are in it."]
    if run.facts is not None and run.facts.num_processes > 1:
        more.append(f"Start it with the same launcher: it had {run.facts.num_processes} processes.")
    if not run.is_over:
        more.append("The run is going on, or was killed without a word: see when it last logged.")
    return Answer(question=question, short=short, more=tuple(more), command=_command(run, True))


def _command(run: Run, resumes: bool) -> str:
    """The command line of a run made by `holdfast train`, else a line of Python."""
    argv = [] if run.facts is None or run.facts.command is None else list(run.facts.command)
    if "train" in argv and _is_holdfast(argv[: argv.index("train")]):
        words = _without_option(argv[argv.index("train") :])
        return shlex.join(["holdfast", *words, *(["--set", f"{_RESUME}=true"] if resumes else [])])
    if run.facts is None or not argv:
        return f"holdfast train run.yaml --set {_RESUME}=true" if resumes else "holdfast train run.yaml"
    return "trainer.train(resume_from_checkpoint=True)" if resumes else "trainer.train()"


def _is_holdfast(before: list[str]) -> bool:
    names = [Path(word).name for word in before]
    return any(name in _COMMANDS for name in names)


def _without_option(words: list[str]) -> list[str]:
    """The words without an earlier `--set training.resume_from_checkpoint=...`."""
    kept: list[str] = []
    for word in words:
        if word.removeprefix("--set=").startswith(f"{_RESUME}="):
            if kept and kept[-1] == "--set":
                kept.pop()
        else:
            kept.append(word)
    return kept


def _plural(word: str, number: int) -> str:
    return word if number == 1 else f"{word}s"


def _sentence(text: str) -> str:
    return text if text.endswith(".") else f"{text}."
