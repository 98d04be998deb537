"""What a report says, for runs of every kind whose numbers come from formulas: answers, findings, changes."""

import math
from dataclasses import replace
from pathlib import Path

import pytest

import holdfast.losses
from holdfast.record.facts import Audit, Dataset, Reference
from holdfast.record.writer import RecordWriter
from holdfast.report.answers import answers, did_it_help, how_to_resume, is_falling_bad, which_reference
from holdfast.report.changes import changes
from holdfast.report.findings import findings
from holdfast.report.healthy import REFERENCE_FREE, judged
from holdfast.report.run import read_run
from runs import FACTS, moving, squeezed, write_checkpoint, write_run, write_state


def chosen_rises(share: float) -> dict[str, float]:
    return squeezed(share) | {"reference/kl_chosen": 4 * share, "rewards/chosen": 0.4 * share}


def both_fall_alike(share: float) -> dict[str, float]:
    lost = {"reference/kl_chosen": -30 * share, "reference/kl_rejected": -30 * share, "rewards/margins": 0.0}
    return squeezed(share) | lost | {"rewards/chosen": -3 * share, "loss": math.log(2), "rewards/accuracies": 0.5}


def falls_far(share: float) -> dict[str, float]:
    return squeezed(share, 6)


def does_not_help(share: float) -> dict[str, float]:
    return squeezed(share) | {"rewards/accuracies": 0.31}


def says_nothing(share: float) -> dict[str, float]:
    return squeezed(share) | {"rewards/accuracies": 0.51}


# The chosen reward ---------------------------------------------------------------------------------------------------


def test_changes_are_means_over_the_last_fifth_of_the_logs(tmp_path):
    """20 logs, of which those after a tenth of the run are 18; the last 4 have shares 0.85 to 1, 0.925 on average: the
    chosen completions fall by 8 * 0.925 = 7.4 nats, the rejected ones by 18.5, and the margin is 1.11."""
    found = changes(read_run(write_run(tmp_path)))
    assert found is not None
    assert (found.chosen, found.rejected, found.margin) == pytest.approx((-7.4, -18.5, 1.11))
    assert (found.has_chosen_fallen, found.has_rejected_fallen, found.has_order_grown) == (True, True, True)


def test_changes_without_a_reference_are_since_the_first_logs(tmp_path):
    """The first 3 logs have log-probs of -100 - 8 * (0.05, 0.1, 0.15): -100.8 on average. The last fifth has -107.4."""
    numbers = {name: value for name, value in squeezed(1).items() if "reference/" not in name}
    run = read_run(write_state(tmp_path, lambda share: {name: squeezed(share)[name] for name in numbers}))
    found = changes(run)
    assert found is not None
    assert (found.chosen, found.rejected) == pytest.approx((-6.6, -16.5))
    assert not found.is_against_reference


@pytest.mark.parametrize(
    ("numbers", "short", "mood", "finding"),
    [
        (squeezed, "Not by itself: it falls within the usual", "plain", "Both fall: the usual squeeze"),
        (falls_far, "Look at it: rewards/chosen is -4.44, outside its healthy range", "warn", "Both fall: the usual"),
        (chosen_rises, "Here it does not fall: it rises", "good", None),
        (both_fall_alike, "Yes: it falls and the margin does not grow", "warn", "do not gain on the rejected ones"),
    ],
)
def test_whether_falling_is_bad(tmp_path, numbers, short, mood, finding):
    run = read_run(write_run(tmp_path, numbers))
    answer = is_falling_bad(run)
    assert answer.short.startswith(short)
    assert answer.mood == mood
    said = " ".join(each.text for each in findings(run))
    assert (finding in said) if finding is not None else ("fall" not in said)


def test_too_early_to_say(tmp_path):
    RecordWriter(tmp_path).begin(FACTS)
    assert is_falling_bad(read_run(tmp_path)).short == "Too early to say: too little was logged."
    assert did_it_help(read_run(tmp_path)).short == "Nothing was logged yet."


# Whether it helped ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("numbers", "short", "mood"),
    [
        (squeezed, "Yes: in 80.0 % ± 2.0 % of 400 held-out pairs", "good"),  # sqrt(0.8 * 0.2 / 400) = 0.02
        (does_not_help, "No: in 31.0 % ± 2.3 % of 400 held-out pairs", "warn"),  # sqrt(0.31 * 0.69 / 400) = 0.0231
        (says_nothing, "Not measurably: in 51.0 % ± 2.5 %", "plain"),  # 0.025: 51 % is within two errors of 50 %
    ],
)
def test_whether_it_helped(tmp_path, numbers, short, mood):
    answer = did_it_help(read_run(write_run(tmp_path, numbers)))
    assert answer.short.startswith(short)
    assert answer.mood == mood
    assert "eval_loss went from" in answer.more[0]


def test_a_policy_without_a_reference_is_compared_with_its_first_evaluation(tmp_path):
    """The shares are 0.5 + 0.3 * (0.25, ..., 1): 57.5 % at step 50 and 80 % at step 200, of 400 pairs."""
    facts = replace(FACTS, loss_types=("simpo",), reference=None)
    answer = did_it_help(read_run(write_run(tmp_path / "a", facts=facts)))
    assert answer.short.startswith("Yes: in 80.0 % ± 2.0 % of 400 held-out pairs the policy gives")
    assert "at the first evaluation (step 50) it was 57.5 %." in answer.short
    answer = did_it_help(read_run(write_run(tmp_path / "b", facts=facts, num_evaluations=1)))
    assert answer.short.startswith("Not known: in 80.0 %")


def test_an_evaluation_before_the_first_step_says_nothing(tmp_path):
    writer = RecordWriter(tmp_path)
    writer.begin(FACTS)
    writer.log(0, 0.0, {"eval_loss": math.log(2), "eval_rewards/accuracies": 0.0, "eval_rewards/margins": 0.0})
    assert did_it_help(read_run(tmp_path)).short.startswith("Not known yet")


def test_nothing_was_held_out(tmp_path):
    answer = did_it_help(read_run(write_run(tmp_path, num_evaluations=0)))
    assert answer.short == "Not known: no pairs were held out."
    assert "rewards/accuracies is 80.0 %" in answer.more[0]


def test_several_evaluation_sets_and_a_judge(tmp_path):
    def numbers(share: float) -> dict[str, float]:
        of_sets = {
            f"eval_{name}_{metric}": value
            for name in ("maths", "chat")
            for metric, value in squeezed(share).items()
            if metric.startswith(("loss", "rewards/"))
        }
        return of_sets | {"win_rate": 0.6, "win_rate_se": 0.04}

    facts = replace(FACTS, data={"train": Dataset(), "maths": Dataset(num_used=100), "chat": Dataset()})
    run = read_run(write_run(tmp_path, numbers, facts=facts, num_evaluations=0))
    assert run.evaluations == ("eval_maths_", "eval_chat_")
    answer = did_it_help(run)
    assert answer.short.startswith("Yes: in 80.0 % ± 4.0 % of 100 held-out pairs (maths)")
    assert any(sentence.startswith("Yes: in 80.0 % of the held-out pairs (chat)") for sentence in answer.more)
    assert any("in 60.0 % ± 4.0 % of the prompts" in sentence for sentence in answer.more)


# The reference -------------------------------------------------------------------------------------------------------


def test_a_captured_reference(tmp_path):
    answer = which_reference(read_run(write_run(tmp_path)))
    assert answer.short == "The policy as it started to train, captured from memory."
    text = " ".join(answer.more)
    assert "adapters off, inside the policy" in text
    assert "holds no memory beside the policy" in text
    assert "0123456789ab." in text
    assert "largest gap 0 nats" in text
    assert "It is fixed" in text


def test_a_reference_that_was_named(tmp_path):
    reference = Reference(
        description="org/sft, a module of its own, asked per batch, fixed", kind="model", held_bytes=1_500_000_000,
        is_users_choice=True,
    )  # fmt: skip
    audit = Audit(line="it differs from the policy by 0.12 nats per token on the first batch, 3.4 at most")
    answer = which_reference(read_run(write_run(tmp_path, facts=replace(FACTS, reference=reference, audit=audit))))
    assert answer.short == "One that you named: org/sft, a module of its own, asked per batch, fixed."
    assert "It holds 1.5 GB beside the policy." in answer.more
    assert any("differs from the policy by 0.12 nats" in sentence for sentence in answer.more)


def test_a_moving_reference(tmp_path):
    answer = which_reference(read_run(write_run(tmp_path, facts=moving(steps=50), syncs=(50, 100, 150))))
    assert (
        "It moves towards the policy every 50 steps by 0.6 of the way (mixup alpha): 3 syncs so far, the last one at "
        "step 150."
    ) in answer.more


def test_no_reference(tmp_path):
    answer = which_reference(
        read_run(write_run(tmp_path, facts=replace(FACTS, reference=None, loss_types=("simpo",), audit=None)))
    )
    assert answer.short == "None: the loss (simpo) compares with no reference."


def test_the_reference_of_a_run_without_a_record(tmp_path):
    assert which_reference(read_run(write_state(tmp_path))).short == "It was not recorded."
    write_checkpoint(tmp_path, 100)
    answer = which_reference(read_run(tmp_path))
    assert answer.short == "the policy as it was handed in."
    assert "checkpoint-100/reference/manifest.json. Weights abababababab." in answer.more[0]


@pytest.mark.parametrize(
    ("weights", "said"),
    [("0123456789abcdef" * 2, "is refused any other"), ("cd" * 16, "records another one: weights cdcd")],
)
def test_the_checkpoint_and_the_record_are_compared(tmp_path, weights, said):
    write_checkpoint(write_run(tmp_path), 100, weights=weights)
    assert any(said in sentence for sentence in which_reference(read_run(tmp_path)).more)


# Resuming ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("outcome", "checkpoint", "short", "command"),
    [
        ("interrupted", 150, "From checkpoint-150, at step 150 of 200; 50 steps after it are trained again.", True),
        ("failed", 200, "From checkpoint-200, at step 200 of 200.", True),
        (None, 190, "From checkpoint-190, at step 190 of 200; 10 steps after it are trained again.", True),
        ("interrupted", None, "It has to begin anew: there is no complete checkpoint.", False),
        ("finished", 200, "There is nothing to resume: all 200 steps are done.", True),
        ("finished", None, "There is nothing to resume: all 200 steps are done.", None),
    ],
)
def test_how_to_resume(tmp_path, outcome, checkpoint, short, command):
    write_run(tmp_path, outcome=outcome)
    if checkpoint is not None:
        write_checkpoint(tmp_path, checkpoint)
    answer = how_to_resume(read_run(tmp_path))
    assert answer.short == short
    again = "holdfast train run.yaml --set training.beta=0.1"
    resumed = f"{again} --set training.resume_from_checkpoint=true"
    assert answer.command == {True: resumed, False: again, None: None}[command]


@pytest.mark.parametrize(
    ("argv", "command"),
    [
        (
            ["/v/bin/holdfast", "train", "a b.yaml", "--set", "training.resume_from_checkpoint=out/checkpoint-3"],
            "holdfast train 'a b.yaml' --set training.resume_from_checkpoint=true",
        ),
        (
            ["__main__.py", "train", "r.yaml", "--set=training.resume_from_checkpoint=x"],
            "holdfast train r.yaml --set training.resume_from_checkpoint=true",
        ),
        (["dpo.py", "model"], "trainer.train(resume_from_checkpoint=True)"),
        (["train", "run.yaml"], "trainer.train(resume_from_checkpoint=True)"),
        (None, "holdfast train run.yaml --set training.resume_from_checkpoint=true"),
    ],
)
def test_the_command_is_that_of_the_run(tmp_path, argv, command):
    facts = replace(FACTS, command=None if argv is None else tuple(argv))
    write_checkpoint(write_run(tmp_path, facts=facts, outcome="interrupted"), 100)
    assert how_to_resume(read_run(tmp_path)).command == command


# Findings ------------------------------------------------------------------------------------------------------------


def overfitted(share: float) -> dict[str, float]:
    return squeezed(share) | {"loss": 0.6 if share < 0.3 else 0.5 + 0.1 * share}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"numbers": overfitted}, "eval_loss was lowest at step 100 (0.55) and is 0.6 now"),
        ({"numbers": lambda share: squeezed(share, 1e-3)}, "the policy has hardly moved"),
        ({"facts": replace(FACTS, data={"train": Dataset(num_rows=10, left_out={"too long": 2, "empty": 1})})},
         "3 of 10 rows of the train data (30.0 %) are left out, most of them since: too long (2)"),
        ({"numbers": lambda share: squeezed(share) | {"time/reference": 0.57}},
         "The reference took 50.0 % of the time"),
        ({"numbers": lambda share: squeezed(share) | {"entropy": 2 - 1.9 * share}},
         "outside its healthy range (above half of its first value) since step 120"),
        ({"numbers": lambda share: squeezed(share) | {"win_rate": 0.3}},
         "outside its healthy range (above 0.5, where policy and reference win equally often) since step 30"),
    ],
)  # fmt: skip
def test_what_stands_out(tmp_path, change, said):
    assert said in " ".join(each.text for each in findings(read_run(write_run(tmp_path, **change))))


def test_pairs_that_are_learnt_by_heart(tmp_path):
    writer = RecordWriter(tmp_path)
    writer.begin(FACTS)
    for number in range(1, 11):
        writer.log(20 * number, None, squeezed(1) | {"rewards/accuracies": 0.95})
    writer.log(
        200, None, {f"eval_{name}": value for name, value in squeezed(1).items()} | {"eval_rewards/accuracies": 0.7}
    )
    said = " ".join(each.text for each in findings(read_run(tmp_path)))
    assert "eval_rewards/accuracies is 0.7, and 0.95 in training: the pairs are being learnt by heart" in said


def test_a_range_is_left_since_the_last_log_within(tmp_path):
    """The chosen reward is -4.8 times the share: below -3 from the share 0.65 on, which is step 130."""
    found = judged(read_run(write_run(tmp_path, falls_far)), "rewards/chosen")
    assert found is not None
    assert (found.value, found.since) == (pytest.approx(-4.8 * 0.925), 130)


def test_a_reward_without_a_reference_has_no_range(tmp_path):
    facts = replace(FACTS, loss_types=("simpo",), reference=None)
    run = read_run(write_run(tmp_path, falls_far, facts=facts))
    assert judged(run, "rewards/chosen") is None
    assert judged(run, "rewards/margins") is not None
    assert judged(run, "loss") is None


def test_the_losses_that_compare_with_no_reference():
    assert {name for name, loss in holdfast.losses.LOSSES.items() if not loss.needs_reference} == REFERENCE_FREE


def test_the_four_questions(tmp_path):
    questions = [answer.question for answer in answers(read_run(write_run(tmp_path)))]
    assert questions == [
        "Which reference did I use?", "Did it help?", "Is it bad that the chosen reward falls?", "How do I resume?",
    ]  # fmt: skip


def test_alarms_of_the_run_are_repeated(tmp_path):
    writer = RecordWriter(tmp_path)
    writer.begin(FACTS)
    writer.log(10, None, squeezed(0.5))
    writer.event(10, "alarm", "chosen log-probs fall while margins rise")
    assert [each.text for each in findings(read_run(Path(tmp_path))) if "Said in the run at step 10" in each.text]
