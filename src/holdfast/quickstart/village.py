"""The world of the quickstart: a village of things, questions about them, and answers that can be marked by a rule.

Each thing has a colour, a place, a maker and an age, so there are four facts about each. An answer names the right fact
or a wrong one, and is plain or padded with phrases. A plain, right answer is the best one; a wrong fact is worse than
padding. So what a policy writes can be marked without a person or another model, and a few hundred thousand parameters
are enough to know the whole world. Given up: anything that a real language has beyond that.
"""

import random
from collections.abc import Iterator
from dataclasses import dataclass

THINGS = (
    "boat", "lantern", "chair", "kettle", "door", "coat", "ladder", "basket", "bell", "clock", "bridge", "cart", "flag",
    "barrel", "bench", "stove",
)  # fmt: skip
VALUES = {
    "colour": ("red", "blue", "green", "yellow", "white", "black", "brown", "grey"),
    "place": ("mill", "harbour", "school", "market", "church", "river", "inn", "orchard"),
    "maker": ("Anna", "Boris", "Clara", "David", "Elena", "Frank", "Greta", "Henry"),
    "age": ("two", "three", "four", "five", "six", "seven", "eight", "nine"),
}
QUESTIONS = {
    "colour": ("What colour is the {thing}?", "Which colour does the {thing} have?"),
    "place": ("Where is the {thing}?", "Where can I find the {thing}?"),
    "maker": ("Who made the {thing}?", "Whose work is the {thing}?"),
    "age": ("How old is the {thing}?", "What is the age of the {thing}?"),
}
ANSWERS = {
    "colour": "The {thing} is {value}.",
    "place": "The {thing} is near the {value}.",
    "maker": "The {thing} was made by {value}.",
    "age": "The {thing} is {value} years old.",
}
BEGINNINGS = ("That is a good question. ", "Let me think about it for a while. ")
ENDS = (" I hope that this helps you.", " Please tell me if you want to hear more.", " Is there anything else?")
SHARE_RIGHT, SHARE_PLAIN = 0.6, 0.25
"""The shares of right and of plain answers in the village's talk."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """A question about one fact, in one of its wordings."""

    thing: str
    subject: str
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Mark:
    """What is good about an answer."""

    is_right: bool
    is_plain: bool

    @property
    def points(self) -> int:
        """2 for the right fact, and 1 more for saying nothing else."""
        return 2 * self.is_right + self.is_plain


def true_value(thing: str, subject: str) -> str:
    """The fact: drawn once, and the same on every machine."""
    return random.Random(f"{thing} {subject}").choice(VALUES[subject])


def questions() -> Iterator[Question]:
    """All questions of the village, two to a fact."""
    for thing in THINGS:
        for subject, wordings in QUESTIONS.items():
            for wording in wordings:
                yield Question(thing=thing, subject=subject, text=wording.format(thing=thing))


def is_held_out(question: Question) -> bool:
    """Whether no preference pair for training asks for this fact: so it is for a fifth of the facts."""
    return random.Random(f"held out {question.thing} {question.subject}").random() < 0.2


def answer(question: Question, draw: random.Random, *, share_right: float = SHARE_RIGHT) -> str:
    """An answer as the village gives it: right or wrong, plain or padded, by chance."""
    value = true_value(question.thing, question.subject)
    if draw.random() >= share_right:
        value = draw.choice([other for other in VALUES[question.subject] if other != value])
    plain = ANSWERS[question.subject].format(thing=question.thing, value=value)
    return plain if draw.random() < SHARE_PLAIN else draw.choice(BEGINNINGS) + plain + draw.choice(ENDS)


def mark(question: Question, text: str) -> Mark:
    """What is good about `text` as an answer to `question`. Of a text that states several facts, none is right."""
    stated = {
        value
        for value in VALUES[question.subject]
        if ANSWERS[question.subject].format(thing=question.thing, value=value) in text
    }
    right = true_value(question.thing, question.subject)
    best = ANSWERS[question.subject].format(thing=question.thing, value=right)
    return Mark(is_right=stated == {right}, is_plain=len(text.split()) == len(best.split()))


def judge(prompt: str, first: str, second: str) -> float:
    """The probability that `first` is the better answer: 1, 0, or 0.5 where both have the same points.

    `prompt` holds the question, alone or inside a rendered conversation. ValueError where it holds none.
    """
    question = next((question for question in questions() if question.text in prompt), None)
    if question is None:
        raise ValueError(f"no question of the village is in the prompt {prompt!r}. Ask about one of its things.")
    difference = mark(question, first).points - mark(question, second).points
    return 0.5 if difference == 0 else float(difference > 0)
