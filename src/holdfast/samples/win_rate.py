"""How often a judge prefers the policy's completion to the reference's: the win rate, with its standard error.

Judges, people and models alike, favour the completion that they read first, or the one that they read last. So each
pair is shown in both orders, and the two answers are averaged:

    s_i = (P(policy better | shown first) + 1 - P(other better | shown first)) / 2
    win_rate = mean(s),    win_rate_se = sd(s) / sqrt(n),    sd with n - 1

A tie counts one half. Equal completions are a tie and are not shown. A prompt of which the judge gave no answer, in
either order, does not count. Given up: tests of whether two steps differ; their completions are of the same prompts, so
the standard errors are too wide for that.
"""

import inspect
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, final

from transformers import TrainerCallback

from holdfast.losses.options import shown
from holdfast.record.entries import Sample

logger = logging.getLogger(__name__)

Against = Literal["reference", "chosen"]


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class WinRate:
    """The share of prompts that the policy wins, its standard error (None of a single prompt), the share of ties, and
    the number of prompts that were judged."""

    win_rate: float
    standard_error: float | None
    ties: float
    num_judged: int

    @classmethod
    def of(cls, scores: Sequence[float]) -> "WinRate":
        """The win rate of scores of prompts: 1 where the policy wins, 0 where it loses, 1/2 for a tie."""
        number = len(scores)
        mean = math.fsum(scores) / number
        variance = math.fsum((score - mean) ** 2 for score in scores) / (number - 1) if number > 1 else None
        return cls(
            win_rate=mean,
            standard_error=None if variance is None else math.sqrt(variance / number),
            ties=sum(score == 0.5 for score in scores) / number,
            num_judged=number,
        )


@final
class WinRateCallback(TrainerCallback):
    """Adds `win_rate` and `win_rate_se` to the metrics of each evaluation, over the prompts that `generate_samples`
    completes. `win_rate_ties` is the share of ties.

    `judge` is one of:

    - a function `(prompt, first, second)` of texts, which returns the probability that `first` is the better one: a
      number from 0 to 1, or a bool; None for no answer;
    - with `is_batched`, such a function of lists of texts, which returns a list of these;
    - an object with the method `judge(prompts, completions)` of the common pairwise judges: it gets a list of
      `[first, second]`, and returns 0 for each where the first is better, 1 where the second is, -1 for no answer.

    `against`: the policy's completion is compared with the `reference`'s, or with the `chosen` one of the data.
    The judge is called in the first process only. What it raises ends the run.
    """

    def __init__(
        self, judge: Any, *, is_batched: bool = False, against: Against = "reference", **of_others: Any
    ) -> None:
        if of_others:
            raise TypeError(_advice(of_others))
        if not callable(judge) and not callable(getattr(judge, "judge", None)):
            raise TypeError(
                f"`judge` is a {type(judge).__name__}; pass a function of (prompt, first, second) that returns the "
                "probability that the first is better, or an object with a method `judge(prompts, completions)`."
            )
        if against not in ("reference", "chosen"):
            raise ValueError(f"against={shown(against)} was asked for; it is 'reference' or 'chosen'. Use one of them.")
        self.against: Against = against
        self._ask = _asking(judge, is_batched=is_batched)

    def metrics(self, samples: Sequence[Sample]) -> dict[str, float]:
        """The metrics of these samples; none where the judge answered of no prompt. ValueError where an answer is no
        probability, or where there are more or fewer than questions."""
        found = win_rate(samples, self._ask, self.against)
        if found is None:
            logger.warning("The judge gave no answer of any of %d prompts: there is no win rate.", len(samples))
            return {}
        if found.num_judged < len(samples):
            logger.warning("The judge gave an answer of %d of %d prompts.", found.num_judged, len(samples))
        metrics = {"win_rate": found.win_rate, "win_rate_ties": found.ties}
        return metrics if found.standard_error is None else metrics | {"win_rate_se": found.standard_error}


_INSTEAD = {
    "trainer": "drop it: the callback is one of the trainer's `callbacks`",
    "generation_config": "write samples_max_new_tokens in DPOConfig; completions are greedy",
    "num_prompts": "write generate_samples in DPOConfig",
    "shuffle_order": "drop it: each pair is shown in both orders, always",
    "use_soft_judge": "drop it: a judge may return probabilities, always",
}
"""Arguments of the common trainer's callback of this name."""


def _advice(of_others: Mapping[str, Any]) -> str:
    lines = [f"- {name}: {_INSTEAD.get(name, 'there is nothing of this name; drop it')}." for name in of_others]
    return "\n".join([f"WinRateCallback was given {len(of_others)} names that are none of its arguments:", *lines])


Ask = Callable[[Sequence[str], Sequence[str], Sequence[str]], Sequence[float | None]]
"""Asks of prompts, first and second completions for the probabilities that the first is better."""


def win_rate(samples: Sequence[Sample], ask: Ask, against: Against) -> WinRate | None:
    """The win rate of the policy's completions; None where the judge answered of no prompt."""
    pairs = [(each.prompt, each.policy, other) for each in samples if (other := getattr(each, against)) is not None]
    differing = [pair for pair in pairs if pair[1] != pair[2]]
    answers: Sequence[float | None] = []
    if differing:
        prompts, own, others = zip(*differing, strict=True)
        answers = ask([*prompts, *prompts], [*own, *others], [*others, *own])
    half = len(differing)
    scores = [0.5] * (len(pairs) - half)
    for first, second in zip(answers[:half], answers[half:], strict=True):
        if first is not None and second is not None:
            scores.append((first + 1 - second) / 2)
    return WinRate.of(scores) if scores else None


def _asking(judge: Any, *, is_batched: bool) -> Ask:
    """The judge as a function of lists that checks its answers."""
    if callable(getattr(judge, "judge", None)):
        read, answers = _of_rank, _of_pairwise(judge)
    elif is_batched:
        read, answers = _of_probability, judge
    else:
        read, answers = _of_probability, _one_by_one(judge)

    def ask(prompts: Sequence[str], first: Sequence[str], second: Sequence[str]) -> list[float | None]:
        found = answers(prompts, first, second)
        if not hasattr(found, "__len__") or isinstance(found, str) or len(found) != len(prompts):
            got = f"{len(found)} answers" if hasattr(found, "__len__") else f"a {type(found).__name__}"
            raise ValueError(
                f"The judge was asked of {len(prompts)} pairs of completions, and returned {got}. Return a list with "
                "one for each; a function of single texts needs is_batched=False."
            )
        return [read(each) for each in found]

    return ask


def _one_by_one(judge: Callable[[str, str, str], Any]) -> Callable[..., Sequence[Any]]:
    return lambda prompts, first, second: [judge(*texts) for texts in zip(prompts, first, second, strict=True)]


def _of_pairwise(judge: Any) -> Callable[..., Sequence[Any]]:
    """The common pairwise judge, in the order in which completions are given: it would shuffle them itself."""
    takes_order = "shuffle_order" in inspect.signature(judge.judge).parameters
    options = {"shuffle_order": False} if takes_order else {}

    def answers(prompts: Sequence[str], first: Sequence[str], second: Sequence[str]) -> Sequence[Any]:
        pairs = [list(pair) for pair in zip(first, second, strict=True)]
        return judge.judge(list(prompts), pairs, **options)

    return answers


def _of_probability(answer: Any) -> float | None:
    number = _number(answer)
    if number is None or 0 <= number <= 1:
        return number
    raise ValueError(
        f"The judge answered {shown(answer)}, which is no probability that the first completion is better. Return a "
        "number from 0 to 1, or None for no answer."
    )


def _of_rank(answer: Any) -> float | None:
    number = _number(answer)
    if number is None or number in (-1, 0, 1):
        return None if number in (None, -1) else 1 - number
    raise ValueError(
        f"The pairwise judge answered {shown(answer)}, which is no place of the better completion. Return 0 or 1, or "
        "-1 for no answer."
    )


def _number(answer: Any) -> float | None:
    """The number that an answer is, also one of numpy or torch; NaN for what is none."""
    if answer is None:
        return None
    try:
        return float(answer) if not isinstance(answer, str) else math.nan
    except (TypeError, ValueError):
        return math.nan
