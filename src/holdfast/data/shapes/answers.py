"""Several answers to a prompt and what was thought of them -> the best and the worst of them, or that there is no pair.

By scores, the pair is the answer of the highest score and that of the lowest. Of several with the same score it is the
first in each case. There is no pair where all scores are equal, where no answer is the best, or where fewer than two
answers are judged. Given up: every other pairing (all pairs, the best against a random one).
"""

import math
import reprlib
from collections.abc import Sequence
from typing import Any

TIE = "no answer is preferred"
TOO_FEW = "fewer than two answers are judged"


class NoPairError(Exception):
    """The answers of a row make no pair; the text says why, `TIE` or `TOO_FEW`."""


def by_scores(answers: Sequence[Any], scores: Sequence[Any], *, less_is_better: bool = False) -> tuple[Any, Any]:
    """The answers of the best and the worst score. Answers without a score (None) do not count. Raises `NoPairError`,
    and `ValueError` for scores that are no numbers or not as many as there are answers."""
    if len(answers) != len(scores):
        raise ValueError(
            f"there must be a score for each answer; found {len(answers)} answers and {len(scores)} scores. Correct "
            "the row."
        )
    judged = [(_number(score), answer) for score, answer in zip(scores, answers, strict=True) if not _is_none(score)]
    if len(judged) < 2:
        raise NoPairError(TOO_FEW)
    values = [-score if less_is_better else score for score, _ in judged]
    if max(values) == min(values):
        raise NoPairError(TIE)
    return judged[values.index(max(values))][1], judged[values.index(min(values))][1]


def by_best(answers: Sequence[Any], names: Sequence[str], best: Any) -> tuple[Any, Any]:
    """The best of two answers and the other one. `best` is its number from 0, the name of its column or the end of that
    name (`model_a` for `conversation_a`); None or a text that begins with "tie" says that none is. Raises
    `NoPairError`, and `ValueError` for anything else and for another number of answers than two."""
    if len(answers) != 2:
        raise ValueError(
            f"'best' tells which of two answers is preferred; found {len(answers)}. Give 'scores' or 'ranks' for more."
        )
    if _is_none(best) or (isinstance(best, str) and best.strip().lower().startswith("tie")):
        raise NoPairError(TIE)
    number = _number_of_best(best, names)
    if number is None:
        raise ValueError(
            f"'best' must be the number of an answer (0 or 1), or one of {list(names)} or its ending; found "
            f"{reprlib.repr(best)}. Correct the row, or what `columns` names."
        )
    return answers[number], answers[1 - number]


def by_preference(answers: Sequence[Any], preference: Any) -> tuple[Any, Any]:
    """The preferred of two answers and the other one, by a number that is below 0 for the first and above for the
    second. Raises `NoPairError` for 0 and None, and `ValueError` for what is no number and for other than two
    answers."""
    if len(answers) != 2:
        raise ValueError(f"'preference' is about two answers; found {len(answers)}. Give 'scores' or 'ranks' for more.")
    if _is_none(preference) or _number(preference) == 0:
        raise NoPairError(TIE)
    first, second = answers
    return (first, second) if _number(preference) < 0 else (second, first)


def _number_of_best(best: Any, names: Sequence[str]) -> int | None:
    if isinstance(best, bool | int | float) and best in (0, 1):
        return int(best)
    if not isinstance(best, str):
        return None
    word = best.strip().lower()
    if word in ("0", "1"):
        return int(word)
    lowered = [name.lower() for name in names]
    if word in lowered:
        return lowered.index(word)
    endings = [name.rpartition("_")[2] for name in lowered]
    ending = word.rpartition("_")[2]
    return endings.index(ending) if endings.count(ending) == 1 else None


def _is_none(value: Any) -> bool:
    is_nan = isinstance(value, float) and math.isnan(value)
    return value is None or is_nan or (isinstance(value, str) and value.strip().lower() in ("", "n/a", "nan", "none"))


def _number(value: Any) -> float:
    try:
        if isinstance(value, bool | int | float | str):
            return float(value)
    except ValueError:
        pass
    raise ValueError(f"a score, rank or preference must be a number; found {reprlib.repr(value)}. Correct the row.")
