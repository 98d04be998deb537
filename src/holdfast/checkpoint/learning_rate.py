"""The learning rate of a resumed run: what is asked for, where a checkpoint would bring its own back.

A checkpoint holds the learning rate in its optimizer and its schedule. Loading them would undo `learning_rate`, so that
a run that broke at a rate too high would break again at the same step. Where both rates are equal, nothing
is touched. Given up: the optimizer's other options (`weight_decay`, betas, eps), which stay those of the checkpoint.
"""

from typing import Any


def heed_learning_rate(asked: float, optimizer: Any, schedule: Any) -> float | None:
    """Puts a loaded `schedule` (an `LRScheduler` of torch) and its optimizer at the learning rate that is
    `asked` for, at the same place of the schedule. The rate it had before is returned, or None where nothing changed.

    Parameter groups of unlike rates, and a schedule that sets rates of its own, stay as they are.
    """
    recorded = {float(rate) for rate in getattr(schedule, "base_lrs", ())}
    if len(recorded) != 1 or recorded == {asked} or 0.0 in recorded:
        return None
    (before,) = recorded
    schedule.base_lrs = [asked for _ in schedule.base_lrs]
    for group in optimizer.param_groups:
        group["initial_lr"] = asked
        group["lr"] = group["lr"] * (asked / before)
    schedule.get_last_lr()[:] = [group["lr"] for group in optimizer.param_groups]  # what is logged next
    return before
