"""The lines that a run begins with, and the line of a log."""

from dataclasses import replace

import pytest

from holdfast.record import Dataset, Memory, Model
from holdfast.training.banner import banner, count, size
from holdfast.training.progress_callback import log_line
from run_facts import FACTS

LORA = Model(
    name="org/base", class_name="Qwen2ForCausalLM", num_parameters=494_032_768, num_trainable=1_081_344,
    dtype="bfloat16", adapter="default: LORA r=16",
)  # fmt: skip
DATA = {"train": Dataset(num_rows=1300, num_used=1297, left_out={"too long": 2, "identical": 1},
                         sources={"code": 97, "help": 1200}), "eval": Dataset()}  # fmt: skip
MEMORY = Memory(weights=2**30, reference=0, gradients=512, optimizer=None)


def test_six_lines() -> None:
    facts = replace(FACTS, model=LORA, data=DATA, memory=MEMORY)
    assert banner(facts, "Reference: a copy; it gives the same.", "out, record/").splitlines() == [
        "model      org/base (Qwen2ForCausalLM): 494 M parameters, 1.08 M trained (0.22 %), adapter default: LORA "
        "r=16, bfloat16, on cpu",
        "data       train 1,297 of 1,300 pairs (left out: 2 too long, 1 identical) from help 1,200, code 97; eval a "
        "stream",
        "reference  a copy; it gives the same.",
        "layout     padded: ",
        "memory     1 GiB without activations: weights 1 GiB, reference 0 B, gradients 512 B, optimizer unknown",
        "results    out, record/",
    ]


def test_without_a_reference_it_says_why() -> None:
    facts = replace(FACTS, loss_types=("simpo",))
    assert banner(facts, None, "out").splitlines()[2] == "reference  none: simpo compares with none"


@pytest.mark.parametrize("width", [40, 80, 200])
def test_long_lines_go_on_below_their_beginning(width: int) -> None:
    facts = replace(FACTS, model=LORA, data=DATA)
    lines = banner(facts, "Reference: " + "word " * 60, "out", width=width).splitlines()
    assert max(map(len, lines)) <= width
    assert len([line for line in lines if not line.startswith(" ")]) == 6


def test_names_cannot_steer_the_terminal() -> None:
    facts = replace(FACTS, data={"a\x1b[2J\n": Dataset(num_rows=1, num_used=1, sources={"\u202eb": 1})})
    text = banner(facts, None, "out\r")
    assert text.count("\n") == 5
    assert not [each for each in text.replace("\n", "") if not each.isprintable()]


@pytest.mark.parametrize(
    ("function", "number", "text"),
    [
        (count, 950, "950"), (count, 1240, "1.24 k"), (count, 999_999, "1 M"), (count, 494_032_768, "494 M"),
        (count, 7 * 10**15, "7e+03 T"), (size, 512, "512 B"), (size, 1023, "0.999 KiB"), (size, 3 * 2**29, "1.5 GiB"),
    ],
)  # fmt: skip
def test_numbers_in_three_digits(function, number: int, text: str) -> None:
    assert function(number) == text


TRAINING = {
    "loss": 0.69314, "grad_norm": 1.5, "learning_rate": 5e-6, "rewards/chosen": -0.01234, "rewards/rejected": -0.5,
    "rewards/accuracies": 0.625, "rewards/margins": 0.48766, "logps/chosen": -90.0, "rewards/margins_p10": 0.1,
    "loss_term/sft": 1.0, "time/data": 0.1, "speed/pairs_per_second": 41.84, "speed/tokens_per_second": 5210.4,
    "memory/peak_bytes": 5, "epoch": 0.5,
}  # fmt: skip
LINE = "step   8/120  loss 0.6931  margin 0.488  accuracy 0.625"


@pytest.mark.parametrize(
    ("logs", "options", "line"),
    [
        (TRAINING, {"left": "0:01:00"}, f"{LINE}  rewards -0.0123 / -0.5  lr 5e-06  41.8 pairs/s  5,210 tokens/s  "
                                        "0:01:00 left"),
        (TRAINING, {"width": 80}, f"{LINE}  rewards -0.0123 / -0.5"),
        (TRAINING, {"width": 20}, "step   8/120"),
        ({"eval_loss": 0.5, "eval_rewards/margins": 0.25, "eval_rewards/margins/maths": 1.0, "eval_runtime": 2.0,
          "eval_win_rate": 0.75, "epoch": 1}, {}, "step   8/120  eval  loss 0.5  margin 0.25  win_rate 0.75"),
        ({"eval_hard_loss": 0.5}, {}, "step   8/120  eval_hard  loss 0.5"),
        ({"train_runtime": 90.4, "train_loss": 0.25, "train_samples_per_second": 1}, {},
         "step   8/120  trained in 0:01:30, mean loss 0.25"),
        ({"my/\x1bscore": 3}, {}, "step   8/120  my/\\x1bscore 3"),
    ],
)  # fmt: skip
def test_the_line_of_a_log(logs, options, line: str) -> None:
    assert log_line(logs, 8, 120, **options) == line
