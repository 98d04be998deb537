"""The village: its facts, how answers are marked, and which pairs come of it."""

import json
import random

import pytest
import yaml

from holdfast.cli.runfile import read_run_file
from holdfast.quickstart import folder as written
from holdfast.quickstart.village import (
    QUESTIONS,
    THINGS,
    Mark,
    Question,
    answer,
    is_held_out,
    judge,
    mark,
    questions,
    true_value,
)

BOAT = Question(thing="boat", subject="colour", text="What colour is the boat?")
RIGHT = true_value("boat", "colour")
WRONG = "red" if RIGHT != "red" else "blue"


@pytest.mark.parametrize(
    ("text", "is_right", "is_plain", "points"),
    [
        (f"The boat is {RIGHT}.", True, True, 3),
        (f"That is a good question. The boat is {RIGHT}. Is there anything else?", True, False, 2),
        (f"The boat is {WRONG}.", False, True, 1),
        (f"That is a good question. The boat is {WRONG}. Is there anything else?", False, False, 0),
        (f"The boat is {RIGHT}. The boat is {WRONG}.", False, False, 0),  # states both
        (f"The chair is {RIGHT}.", False, True, 1),  # of another thing
        ("", False, False, 0),
    ],
)
def test_marks_by_hand(text, is_right, is_plain, points):
    assert mark(BOAT, text) == Mark(is_right=is_right, is_plain=is_plain)
    assert mark(BOAT, text).points == points


def test_the_judge_goes_by_points_and_knows_ties():
    plain, padded = f"The boat is {RIGHT}.", f"That is a good question. The boat is {RIGHT}. Is there anything else?"
    prompt = f"<|im_start|>user\n{BOAT.text}<|im_end|>\n"
    assert judge(prompt, plain, padded) == 1.0
    assert judge(prompt, padded, plain) == 0.0
    assert judge(prompt, plain, plain) == 0.5
    with pytest.raises(ValueError, match=r"no question of the village is in the prompt 'Hello'"):
        judge("Hello", plain, padded)


def test_every_fact_is_asked_for_twice_and_no_question_holds_another():
    """16 things with 4 facts, in 2 wordings each."""
    texts = [question.text for question in questions()]
    assert len(texts) == len(set(texts)) == 2 * len(THINGS) * len(QUESTIONS) == 128
    assert not [one for one in texts for other in texts if one != other and one in other]


def test_the_village_talks_as_it_is_said_to():
    """Of 4000 answers 0.6 are right and 0.25 plain, each to three standard errors: 0.023 and 0.021."""
    draw = random.Random(0)
    marks = [mark(BOAT, answer(BOAT, draw)) for _ in range(4000)]
    assert sum(each.is_right for each in marks) / 4000 == pytest.approx(0.6, abs=0.024)
    assert sum(each.is_plain for each in marks) / 4000 == pytest.approx(0.25, abs=0.021)


@pytest.mark.parametrize("held_out", [False, True])
def test_the_chosen_answer_has_more_points(held_out):
    asked = {question.text: question for question in questions()}
    for row in written.preference_rows(200, random.Random(0), held_out=held_out):
        question = asked[row["prompt"][0]["content"]]
        chosen, rejected = (mark(question, row[name][0]["content"]) for name in ("chosen", "rejected"))
        assert chosen.points > rejected.points
        assert is_held_out(question) == held_out
        assert row["source"] == ("manner" if chosen.is_right == rejected.is_right else "fact")


def test_held_out_facts_are_in_no_pair_for_training():
    """Both wordings of a fact are on one side."""
    sides = {(q.thing, q.subject): set() for q in questions()}
    for question in questions():
        sides[question.thing, question.subject].add(is_held_out(question))
    assert all(len(side) == 1 for side in sides.values())
    assert 0.1 < sum(side == {True} for side in sides.values()) / len(sides) < 0.3


@pytest.mark.parametrize("name", ["quickstart", "a folder: #1", "dollars $HOME", "2024"])
def test_what_is_written_is_a_run(tmp_path, monkeypatch, name):
    """The files are there, and the run file names them, whatever the folder is called."""
    monkeypatch.chdir(tmp_path)
    made = written.write_quickstart(type(tmp_path)(name), num_steps=(1, 1), num_pairs=4)
    run = read_run_file(made.run_file, ["training.use_cpu=true"])
    assert run["data.train"].path == str(made.pairs)
    assert run["data.eval"].path == str(made.held_out)
    assert run.training_arguments().output_dir == f"{name}/run"
    assert yaml.safe_load(made.run_file.read_text("utf-8"))["peft"]["r"] == 16
    rows = [json.loads(line) for line in made.pairs.read_text("utf-8").splitlines()]
    assert len(rows) == 4
    assert (made.model / "model.safetensors").exists()
    with pytest.raises(ValueError, match=r"is there already. Remove it, or name another folder"):
        written.write_quickstart(type(tmp_path)(name))
