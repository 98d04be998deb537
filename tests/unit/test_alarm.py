"""The alarm over logged numbers: chosen falls while margins rise, beyond what noise does, once per onset."""

import math
import random

import pytest

from holdfast.record import Log, alarms, training_logs
from holdfast.record.alarm import Alarm, _Line, falling

KL, LOGPS, MARGIN = "reference/kl_chosen", "logps/chosen", "rewards/margins"


def logs(chosen: list[float], margins: list[float], key: str = KL, **more: float) -> list[Log]:
    """Logs of every tenth step."""
    both = enumerate(zip(chosen, margins, strict=True), 1)
    return [Log(step=10 * n, epoch=None, seconds=None, numbers={"loss": 0.5, key: c, MARGIN: m, **more})
            for n, (c, m) in both]  # fmt: skip


def line(first: float, slope: float, num: int, noise: float = 0.0, seed: int = 0) -> list[float]:
    draw = random.Random(seed)
    return [first + slope * n + noise * draw.gauss(0, 1) for n in range(num)]


FALLS, RISES, STAYS = line(-0.5, -1, 8), line(0.1, 0.1, 8), [0.2] * 8


@pytest.mark.parametrize(
    ("chosen", "margins", "key", "step"),
    [
        (FALLS, RISES, KL, 40),  # a window has four logs at least
        (FALLS, RISES, LOGPS, 40),  # without a reference: the policy's own
        (FALLS, FALLS, KL, None),
        (RISES, RISES, KL, None),
        (FALLS, STAYS, KL, None),
        (STAYS, RISES, KL, None),
        (line(-0.1, -0.01, 8), RISES, KL, None),  # less than a nat in all
        (line(9, -1, 8), RISES, KL, None),  # still above the reference
        (line(-90, -1, 8), RISES, LOGPS, 40),
        (line(-1, -1, 12, 0.5), line(0.1, 0.1, 12, 0.05, 1), KL, 60),
        (FALLS[:3], RISES[:3], KL, None),
    ],
)
def test_when_it_sounds(chosen: list[float], margins: list[float], key: str, step: int | None) -> None:
    found = alarms(logs(chosen, margins, key))
    assert [alarm.step for alarm in found] == ([] if step is None else [step])
    assert [alarm.is_against_reference for alarm in found] == ([] if step is None else [key == KL])


def test_noise_alone_sets_off_none() -> None:
    """40 runs of 64 logs without a trend, in which chosen and margins are as noisy as the rejected side."""
    draw, num_alarms = random.Random(1), 0
    for _ in range(40):
        chosen = [draw.gauss(-100, 20) for _ in range(64)]
        margins = [0.1 * (each + 100) - draw.gauss(0, 2) for each in chosen]
        num_alarms += len(alarms(logs(chosen, margins, LOGPS)))
    assert num_alarms == 0


def test_it_says_the_ends_of_the_lines() -> None:
    """Of 4 logs -1, -2, -3, -4 and 0.1 to 0.4: the lines go through all of them."""
    found = falling(logs([-1, -2, -3, -4], [0.1, 0.2, 0.3, 0.4]))
    assert isinstance(found, Alarm)
    assert (found.since, found.step) == (10, 40)
    values = [found.chosen_before, found.chosen_now, found.margin_before, found.margin_now]
    assert values == pytest.approx([-1, -4, 0.1, 0.4])
    text = found.sentence(["sigmoid"], learning_rate=5e-6, beta=0.1)
    for part in ("-1 to -4 nats against the reference since step 10", "0.1 to 0.4", "5e-06", "[sigmoid, sft]"):
        assert part in text
    assert "more weight" in found.sentence(["sigmoid", "sft"], learning_rate=5e-6, beta=0.1)


def test_a_line_and_its_noise_by_hand() -> None:
    """Steps 10..40, chosen -2, -4, -5, -7: mean -4.5, slope -(1.5*2.5+0.5*0.5+0.5*0.5+1.5*2.5)/5 = -1.6 a log; the
    residuals are 0.1, -0.3, 0.3, -0.1, their squares add up to 0.2, so t = -1.6 / sqrt(0.2/2/5) = -11.3: within what
    noise does in one of 1000 windows of four (22.3)."""
    assert falling(logs([-2, -4, -5, -7], [0.1, 0.2, 0.3, 0.4])) is None
    line = _Line()
    for step, value in ((40, -7), (30, -5), (20, -4), (10, -2)):
        line.add(step, value)
    assert (line.first(), line.last(), line.t()) == pytest.approx((-2.1, -6.9, -1.6 / math.sqrt(0.02)))


def test_once_per_onset() -> None:
    """It falls, stays, and falls on: one alarm. Half of the fall is made good, and it falls again: another."""
    chosen = [*line(-1, -1, 8), *[-8.0] * 8, *line(-8, -1, 8)]
    assert len(alarms(logs(chosen, line(0, 0.1, len(chosen))))) == 1
    again = [*chosen, *line(-10, 2, 5), *line(-2, -1, 8)]
    assert len(alarms(logs(again, line(0, 0.1, len(again))))) == 2


def test_a_moving_reference_is_judged_by_the_policy_alone() -> None:
    """After each sync the log-probs against it begin at 0 again; those of the policy fall on."""
    numbers = [
        {"loss": 0.5, KL: -(n % 2), MARGIN: 0.1 * (n % 2), LOGPS: -50 - n, "logps/rejected": -50 - 3 * n,
         "reference/version": n // 2, "step": n}
        for n in range(8)
    ]  # fmt: skip
    assert [alarm.is_against_reference for alarm in alarms(training_logs(numbers))] == [False]
    assert training_logs([{"eval_loss": 1.0, "step": 1}, {"train_loss": 1.0, "step": 1}]) == []
