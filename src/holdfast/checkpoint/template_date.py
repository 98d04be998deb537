"""The date that chat templates print in a resumed run: the one that its checkpoint records.

A template that prints the day would otherwise give other token ids on the day of the resume. How templates print a date
is in `data.dates`.
"""

from pathlib import Path

from holdfast.checkpoint.manifest import complete_checkpoints, is_complete, recorded
from holdfast.checkpoint.sound import check_sound, resuming
from holdfast.config import DPOConfig


def recorded_date(args: DPOConfig) -> str | None:
    """The date recorded by the checkpoint that `args.resume_from_checkpoint` names; None where there is none.

    It is read before the trainer is made, so that the data are not tokenized and scored for another date first.
    ValueError where the checkpoint is damaged, as far as the sizes of its files show it.
    """
    to_resume = args.resume_from_checkpoint
    checkpoint = Path(to_resume) if isinstance(to_resume, str) else None
    if to_resume is True:
        checkpoint = next(reversed(complete_checkpoints(Path(str(args.output_dir)))), None)
    if checkpoint is None or not is_complete(checkpoint):
        return None
    return check_sound(checkpoint, resuming(checkpoint), reads_all=False).get("template_date")


def date_to_print(checkpoint: Path, current: str | None, template_date: str | None) -> str | None:
    """The date that chat templates print in a run that resumes `checkpoint` and has printed `current` so far.
    ValueError where the option `template_date` is another one."""
    date = recorded(checkpoint).get("template_date")
    if date is None or current is None:
        return current
    if template_date is not None and template_date != date:
        raise ValueError(
            f"template_date={template_date!r} was asked for, but chat templates printed {date} in the run that wrote "
            f"{checkpoint}, so its rows have other token ids. Drop template_date, or set it to {date!r}."
        )
    return date
