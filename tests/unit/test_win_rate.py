"""Win rates against values worked out by hand: both orders, ties, standard errors, and answers that are none."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch

from holdfast import WinRateCallback
from holdfast.record.entries import Sample


def samples(*pairs: tuple[str, str]) -> list[Sample]:
    """Samples of (policy, reference), whose prompts are p0, p1, ..."""
    return [
        Sample(step=1, dataset="eval", row=row, prompt=f"p{row}", policy=own, reference=other, chosen=f"c{row}")
        for row, (own, other) in enumerate(pairs)
    ]


def table(answers: dict[tuple[str, str], Any]) -> Callable[[str, str, str], Any]:
    """A judge that answers of (first, second) what the table says."""
    return lambda prompt, first, second: answers[first, second]


def test_both_orders_are_averaged() -> None:
    """s_0 = (0.9 + 1 - 0.3) / 2 = 0.8; s_1 = (0.6 + 1 - 0.8) / 2 = 0.4; s_2 = (1 + 1 - 1) / 2 = 0.5, since the judge
    takes the first. Mean 1.7 / 3; deviations 0.7/3, -0.5/3, -0.2/3, squares 0.78 / 9, over n - 1 = 2: 0.0433333."""
    judge = table({
        ("a", "x"): 0.9, ("x", "a"): 0.3, ("b", "y"): 0.6, ("y", "b"): 0.8, ("c", "z"): True, ("z", "c"): True
    })  # fmt: skip
    metrics = WinRateCallback(judge).metrics(samples(("a", "x"), ("b", "y"), ("c", "z")))
    expected = {"win_rate": 1.7 / 3, "win_rate_ties": 1 / 3, "win_rate_se": math.sqrt(0.78 / 9 / 2 / 3)}
    assert metrics == pytest.approx(expected)


def test_a_judge_that_takes_the_first_always_finds_a_tie() -> None:
    metrics = WinRateCallback(lambda prompt, first, second: 1).metrics(samples(("a", "x"), ("b", "y")))
    assert metrics == {"win_rate": 0.5, "win_rate_ties": 1.0, "win_rate_se": 0.0}


def test_equal_completions_are_a_tie_that_is_not_asked_about() -> None:
    """Scores 1 and 1/2: mean 3/4, sd = sqrt(2 (1/4)^2 / 1), over sqrt(2): 1/4."""
    asked = []

    def judge(prompt: str, first: str, second: str) -> float:
        asked.append((prompt, first, second))
        return float(first == "good")

    metrics = WinRateCallback(judge).metrics(samples(("same", "same"), ("good", "bad")))
    assert asked == [("p1", "good", "bad"), ("p1", "bad", "good")]
    assert metrics == pytest.approx({"win_rate": 0.75, "win_rate_ties": 0.5, "win_rate_se": 0.25})


def test_a_single_prompt_has_no_standard_error() -> None:
    metrics = WinRateCallback(lambda prompt, first, second: len(first) > len(second)).metrics(samples(("long", "s")))
    assert metrics == {"win_rate": 1.0, "win_rate_ties": 0.0}


def test_the_chosen_completions_of_the_data() -> None:
    seen: list[str] = []
    callback = WinRateCallback(lambda prompt, first, second: seen.append(second) or 0.5, against="chosen")
    assert callback.metrics(samples(("a", "x")))["win_rate"] == 0.5
    assert seen == ["c0", "a"]


def test_a_prompt_without_an_answer_does_not_count(caplog: pytest.LogCaptureFixture) -> None:
    """Of p0 one order has no answer; p1 is won."""
    judge = table({("a", "x"): 1.0, ("x", "a"): None, ("b", "y"): 1.0, ("y", "b"): 0.0})
    callback = WinRateCallback(judge)
    assert callback.metrics(samples(("a", "x"), ("b", "y"))) == {"win_rate": 1.0, "win_rate_ties": 0.0}
    assert "The judge gave an answer of 1 of 2 prompts." in caplog.text
    assert callback.metrics(samples(("a", "x"))) == {}
    assert "no answer of any of 1 prompts: there is no win rate" in caplog.text


class Pairwise:
    """The common pairwise judge: prefers the longer one, and would shuffle."""

    def __init__(self, ranks: Callable[[str, str], int]) -> None:
        self.ranks = ranks
        self.asked: list[Any] = []

    def judge(self, prompts: list[str], completions: list[list[str]], shuffle_order: bool = True) -> list[int]:
        assert type(prompts) is list
        assert all(type(pair) is list for pair in completions)
        self.asked.append((prompts, completions, shuffle_order))
        return [self.ranks(*pair) for pair in completions]


def test_a_common_pairwise_judge() -> None:
    """It returns the place of the better one: p0 is won in both orders, p1 lost in one and without answer in none."""
    judge = Pairwise(lambda first, second: 0 if len(first) > len(second) else 1)
    metrics = WinRateCallback(judge).metrics(samples(("long", "s"), ("s", "long"), ("longer", "long")))
    assert judge.asked == [
        (
            ["p0", "p1", "p2"] * 2,
            [["long", "s"], ["s", "long"], ["longer", "long"], ["s", "long"], ["long", "s"], ["long", "longer"]],
            False,
        )
    ]
    assert metrics == pytest.approx({"win_rate": 2 / 3, "win_rate_ties": 0, "win_rate_se": 1 / 3})
    assert WinRateCallback(Pairwise(lambda *_: -1)).metrics(samples(("a", "b"))) == {}


def test_a_batch_of_questions() -> None:
    def judge(prompts: Sequence[str], first: Sequence[str], second: Sequence[str]) -> Any:
        return np.array([0.75] * len(prompts), dtype=np.float32)

    metrics = WinRateCallback(judge, is_batched=True).metrics(samples(("a", "x"), ("b", "y")))
    assert metrics["win_rate"] == 0.5
    answers = torch.tensor([1.0, 1.0, 0.0, 0.0])
    assert (
        WinRateCallback(lambda *_: answers, is_batched=True).metrics(samples(("a", "x"), ("b", "y")))["win_rate"] == 1
    )


@pytest.mark.parametrize(
    ("judge", "is_batched", "message"),
    [
        (lambda *_: 1.5, False, r"answered 1\.5, which is no probability.*from 0 to 1, or None"),
        (lambda *_: math.nan, False, r"answered nan, which is no probability"),
        (lambda *_: "the first", False, r"answered 'the first', which is no probability"),
        (lambda *_: [0.5], True, r"asked of 2 pairs of completions, and returned 1 answers"),
        (lambda *_: 0.5, True, r"asked of 2 pairs of completions, and returned a float.*is_batched=False"),
        (Pairwise(lambda *_: 2), False, r"pairwise judge answered 2, which is no place.*Return 0 or 1"),
    ],
)
def test_answers_that_are_none(judge: Any, is_batched: bool, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        WinRateCallback(judge, is_batched=is_batched).metrics(samples(("a", "x")))


def test_arguments_of_the_common_trainers_callback() -> None:
    with pytest.raises(TypeError, match=r"(?s)given 3 names.*- trainer: drop it: .*- num_prompts: write generate_sam"
                       r".*- judges: there is nothing"):  # fmt: skip
        WinRateCallback(lambda *_: 1, trainer=object(), num_prompts=4, judges=1)


def test_what_is_no_judge() -> None:
    with pytest.raises(TypeError, match=r"`judge` is a str; pass a function of \(prompt, first, second\)"):
        WinRateCallback("gpt")
    with pytest.raises(ValueError, match=r"against='base' was asked for; it is 'reference' or 'chosen'"):
        WinRateCallback(lambda *_: 1, against="base")  # pyright: ignore[reportArgumentType]
