"""Claims about the reference, tried: the statistics, what is measured, and that the page says no more than was seen."""

import json
import math
import os
import re
import runpy
import sys
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from browser import opened
from holdfast.demo.policy import text_logps
from holdfast.demo.world import Pairs

ROOT = Path(__file__).parent.parent
sys.path.append(str(ROOT / "benchmarks"))

from science import curves, page, performing, variants  # noqa: E402
from science.experiments import EXPERIMENTS, beta, tr_dpo  # noqa: E402
from science.records import Results, Run, claim_entry, mean_entry  # noqa: E402
from science.settings import FULL, QUICK, better_first, setting  # noqa: E402
from science.statistics import Mean, paired, student_quantile, verdict  # noqa: E402
from science.training import measured, train, trained_and_measured  # noqa: E402

FOUND = page.documents()
DECIMALS = re.compile(r"(?<![\w.:/])\d+\.\d+(?![\w.]*\d)")


# --- statistics -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("degrees", "quantile"),
    [(1, 12.706), (2, 4.303), (3, 3.182), (4, 2.776), (5, 2.571), (9, 2.262), (10, 2.228), (29, 2.045), (120, 1.980)],
)
def test_students_quantile_is_that_of_the_printed_tables(degrees, quantile):
    assert student_quantile(degrees) == pytest.approx(quantile, abs=5e-4)


def test_a_mean_of_five_seeds_worked_by_hand():
    """1, 2, 3, 4, 5: mean 3; squares of deviations 4 + 1 + 0 + 1 + 4 = 10, so s^2 = 10 / 4 = 2.5 and the standard error
    sqrt(2.5 / 5) = 0.70711; t(4) = 2.77645, half width 1.96325, interval [1.03675, 4.96325]."""
    mean = Mean.of([1, 2, 3, 4, 5])
    assert (mean.mean, mean.error) == (3, pytest.approx(0.7071068))
    assert (mean.low, mean.high) == (pytest.approx(1.036757, abs=1e-6), pytest.approx(4.963243, abs=1e-6))


def test_differences_are_paired_by_seed():
    """Seeds differ by 10 and the runs by 1 and a little: paired [1, 1.1, 0.9], mean 1, s 0.1, error 0.1 / sqrt(3), t(2)
    = 4.30265, half width 0.24841. Taken apart they would differ by nothing that stands out."""
    difference = paired([11, 21.1, 30.9], [10, 20, 30])
    assert difference.values == pytest.approx((1, 1.1, 0.9))
    assert (difference.low, difference.high) == (pytest.approx(0.751590, abs=1e-5), pytest.approx(1.248410, abs=1e-5))
    with pytest.raises(ValueError, match="shorter"):
        paired([1, 2], [1])


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ([0.1, 0.12, 0.11], "reproduced"),
        ([-0.1, -0.12, -0.11], "opposite"),
        ([0.1, -0.12, 0.11], "not seen"),
        ([0.0, 0.0, 0.0], "not seen"),
        ([1.0], "not seen"),  # one seed has no error
        ([0.0, 1.0], "not seen"),  # 0.5 +- 12.7 * 0.5
    ],
)
def test_the_rule_for_verdicts(values, says):
    assert verdict(Mean.of(values)) == says


def test_a_mean_of_nothing_is_refused():
    with pytest.raises(ValueError, match="a mean of no values was asked for"):
        Mean.of([])


def test_one_seed_is_written_without_an_error():
    assert mean_entry(Mean.of([0.5])) == {"values": [0.5], "mean": 0.5}


# --- curves -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kl", "below"),
    [
        (0.0, 0.0),
        (0.5, 0.05),  # halfway from the start policy to the first point
        (1.0, 0.1),
        (2.5, 0.25),  # 0.1 + (2.5 - 1) / (3 - 1) * 0.2
        (3.0, 0.3),
        (9.0, 0.3),  # beyond the end
    ],
)
def test_a_curve_between_its_points(kl, below):
    """The fourth point has a smaller KL than the third: the curve ends there, and its reward counts no more."""
    curve = curves.rising([(1.0, 0.1), (3.0, 0.3), (2.0, 5.0), (4.0, 7.0)])
    assert curve == [(0.0, 0.0), (1.0, 0.1), (3.0, 0.3)]
    assert curves.interpolated(curve, kl) == pytest.approx(below)


def test_the_best_run_of_a_seed_is_chosen_on_the_others():
    """Sums without seed 0: a 1 + 1 = 2, b 2 + 1 = 3. Without seed 2: a 9 + 1 = 10, b 0 + 2 = 2."""
    values = {"a": [9.0, 1.0, 1.0], "b": [0.0, 2.0, 1.0]}
    assert [beta.best_elsewhere(values, place) for place in range(3)] == ["b", "a", "a"]
    assert beta.best_elsewhere({"a": [1.0], "b": [2.0]}, 0) == "b"


# --- runs -------------------------------------------------------------------------------------------------------------

TINY = replace(
    QUICK, name="tiny", num_pretrain_steps=4, num_train_steps=2, num_held_out_pairs=60, num_measured_texts=60
)


@pytest.fixture(scope="module")
def tiny_setting(tmp_path_factory):
    return setting(3, TINY, tmp_path_factory.mktemp("science") / "setting")


def test_a_setting_is_the_same_when_it_is_read_again(tiny_setting):
    again = setting.__wrapped__(3, TINY, tiny_setting.folder)
    assert torch.equal(again.pairs.chosen, tiny_setting.pairs.chosen)
    assert torch.equal(again.reference_margins, tiny_setting.reference_margins)
    assert again.frontier == tiny_setting.frontier
    assert len(again.pairs.chosen) == TINY.num_pairs


def test_what_is_measured_of_the_start_policy(tiny_setting):
    """It is its own reference: no KL, no implicit reward, no pair turned round. Its KL to the optimum of beta is log Z
    - E[r] / beta, and a wrong pair is one whose rejected text has the larger log-prob."""
    numbers = measured(tiny_setting.policy, tiny_setting, beta=1)
    held_out = tiny_setting.held_out
    wrong = text_logps(tiny_setting.policy, held_out.chosen) < text_logps(tiny_setting.policy, held_out.rejected)
    assert (numbers["kl"], numbers["accuracy"], numbers["flipped"], numbers["unflipped"]) == (0, 0, 0, 0)
    assert tiny_setting.wrong_share == float(wrong.double().mean())
    assert numbers["ranking"] == pytest.approx(1 - tiny_setting.wrong_share)
    log_partition = next(each for each in tiny_setting.frontier.optima if each.beta == 1).log_partition.value
    assert numbers["to_optimum"] == pytest.approx(log_partition - numbers["reward"])
    assert "to_optimum" not in measured(tiny_setting.policy, tiny_setting, beta=0.123)


@pytest.mark.parametrize("run", ["sigmoid-0.05-watched", "ipo-4-certain", "alpha-0.6-tau-25", "sft"])
def test_runs_of_every_kind(tiny_setting, run):
    """Every kind of run gives all measures, the same ones a second time."""
    found = {run.name: run for experiment in EXPERIMENTS.values() for run in experiment.runs(TINY)}[run]
    numbers = found.perform(tiny_setting, found.options)
    assert {"reward", "kl", "below", "accuracy", "ranking", "flipped"} <= numbers.keys()
    assert numbers["kl"] > 0
    assert all(map(math.isfinite, numbers.values()))
    if "watched" in run:
        assert numbers["kl_halfway"] < numbers["kl"]
        assert numbers == {**found.perform(tiny_setting, found.options)}


def test_certain_labels_turn_round_what_people_got_wrong():
    pairs = Pairs(chosen=torch.tensor([[1], [2], [3]]), rejected=torch.tensor([[4], [5], [6]]))
    rewards = torch.tensor([0.0, 1.0, 0.0, 2.0, 0.0, 1.0, 2.0])
    world = SimpleNamespace(reward=lambda texts: rewards[texts[:, 0]])
    turned = better_first(world, pairs)
    assert (turned.chosen.flatten().tolist(), turned.rejected.flatten().tolist()) == ([1, 5, 3], [4, 2, 6])


def test_training_leaves_the_setting_alone(tiny_setting):
    before = {name: value.clone() for name, value in tiny_setting.policy.state_dict().items()}
    policy = train(tiny_setting, tiny_setting.pairs, {"beta": 1})
    assert all(torch.equal(value, before[name]) for name, value in tiny_setting.policy.state_dict().items())
    assert not torch.equal(policy.lm_head.weight, before["lm_head.weight"])


@pytest.mark.parametrize("change", ["seed", "scale", "options", "perform"])
def test_a_run_is_kept_under_all_that_defines_it(tmp_path, change):
    task = performing.Task(
        run=Run(name="a", perform=trained_and_measured, options={"beta": 1}), seed=0, scale=QUICK, work=tmp_path
    )
    other = {
        "seed": {"seed": 1},
        "scale": {"scale": TINY},
        "options": {"run": replace(task.run, options={"beta": 2})},
        "perform": {"run": replace(task.run, perform=variants.with_certain_labels)},
    }[change]
    assert replace(task, **other).path != task.path
    assert replace(task, run=replace(task.run, name="b")).path == task.path


def test_a_run_that_is_kept_is_not_performed_again(tmp_path):
    task = performing.Task(run=Run(name="a", perform=_never, options={}), seed=0, scale=TINY, work=tmp_path)
    task.path.parent.mkdir()
    task.path.write_text(json.dumps({"numbers": {"reward": 1.5}}))
    assert performing.perform(task) == (task, 0.0)
    assert performing.numbers(task) == {"reward": 1.5}


def _never(setting, options):
    raise AssertionError("performed again")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["beta", "gamma"], "there is no experiment gamma: there are beta, tr_dpo"),
        (["--seeds", "0"], "--seeds 0 --workers 2: both must be at least 1"),
    ],
)
def test_what_the_command_refuses(arguments, says, monkeypatch, capsys):
    run = _script(monkeypatch)
    monkeypatch.setattr(sys, "argv", ["run.py", *arguments])
    with pytest.raises(SystemExit):
        run.main()
    assert says in capsys.readouterr().err


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_runs_have_names_of_their_own(name):
    names = [run.name for run in EXPERIMENTS[name].runs(QUICK)]
    assert len(names) == len({*names}) > 1


@pytest.mark.slow
@pytest.mark.nightly
@pytest.mark.parametrize("name", EXPERIMENTS)
def test_an_experiment_from_nothing_and_again(name, tmp_path, monkeypatch, capfd):
    """With two seeds: result file, picture and claims. A second time nothing is performed, and the file is the same."""
    run = _script(monkeypatch)
    argv = ["run.py", name, "--quick", "--seeds", "2"]
    for option in ("work", "results", "page", "pictures"):
        argv += [f"--{option}", str(tmp_path / option)]
    monkeypatch.setattr(sys, "argv", argv)
    run.main()
    first = (tmp_path / "results" / f"{name}.json").read_bytes()
    assert json.loads(first)["claims"]
    assert (tmp_path / "pictures" / f"{name}.svg").exists()
    run.main()
    assert (tmp_path / "results" / f"{name}.json").read_bytes() == first
    assert "setting" not in capfd.readouterr().out.rpartition("runs, ")[2]


def _script(monkeypatch):
    """benchmarks/science/run.py as a module. What it changes in the process is undone afterwards."""
    monkeypatch.setattr(sys, "path", [str(ROOT / "benchmarks" / "science"), *sys.path])
    for name in ("OMP_NUM_THREADS", "TOKENIZERS_PARALLELISM", "HF_HUB_OFFLINE"):
        monkeypatch.setenv(name, os.environ.get(name, ""))
    return SimpleNamespace(**runpy.run_path(str(ROOT / "benchmarks" / "science" / "run.py")))


# --- what is published ------------------------------------------------------------------------------------------------

published = pytest.mark.parametrize("name", FOUND)


@published
def test_a_result_file_is_of_these_runs_and_seeds(name):
    found = FOUND[name]
    assert found["scale"] == json.loads(json.dumps(asdict(FULL)))
    assert len(found["seeds"]) >= 3
    assert [*found["runs"]] == [run.name for run in EXPERIMENTS[name].runs(FULL)]
    for run in found["runs"].values():
        for numbers in run["numbers"].values():
            assert numbers == mean_entry(Mean.of(numbers["values"]))
            assert len(numbers["values"]) == len(found["seeds"])


@published
def test_claims_follow_from_the_numbers_of_the_runs(name):
    """Computed anew they are the same; and the verdict is that of the rule, from the differences that are written."""
    found = FOUND[name]
    assert [claim_entry(claim) for claim in EXPERIMENTS[name].claims(Results(found))] == found["claims"]
    for claim in found["claims"]:
        assert claim["verdict"] == verdict(Mean.of(claim["difference"]["values"]))
        assert re.fullmatch(r"\d{4}\.\d{5}", claim["arxiv"])


@published
def test_no_run_lies_above_what_is_possible(name):
    """By no more than 5 standard errors of a run's own reward: a theorem, so a miss means a wrong measurement."""
    for run, each in FOUND[name]["runs"].items():
        numbers = each["numbers"]
        if "below" not in numbers:
            continue  # no policy: a formula that was checked
        for below, error in zip(numbers["below"]["values"], numbers["reward_error"]["values"], strict=True):
            assert below > -5 * error, run


def test_methods_are_compared_where_the_curve_of_their_rival_is():
    """No claim rests on a KL beyond the end of a curve, where its last value counts."""
    if "beta" in FOUND:
        results = Results(FOUND["beta"])
        ends = curves.reach(results, beta.sweep("sigmoid"))
        assert all(kl < end for kl, end in zip(results.values("sft", "kl"), ends, strict=True))
        assert all(end > beta.COMPARED_KL for loss in beta.BETAS for end in curves.reach(results, beta.sweep(loss)))
    if "tr_dpo" in FOUND:
        results = Results(FOUND["tr_dpo"])
        ends = curves.reach(results, beta.sweep("sigmoid"))
        for alpha in tr_dpo.ALPHAS:
            for tau in tr_dpo.TAUS:
                kls = results.values(tr_dpo.name(alpha, tau), "kl")
                assert all(kl < end for kl, end in zip(kls, ends, strict=True))


def test_the_tables_of_the_page_are_those_of_the_numbers():
    text = page.PAGE.read_text("utf-8")
    assert page.updated(text, FOUND) == text, "run `python benchmarks/science/run.py --draw`"
    assert all(f"<!-- table: {name} -->" in text for name in ("claims", *FOUND))


def test_every_figure_of_a_paragraph_is_in_a_table_of_its_section():
    """Numbers with a decimal point: in the section's own table, or among its claims in the first one."""
    text = page.PAGE.read_text("utf-8")
    claims = [line for line in text.splitlines() if line.startswith("| [")]
    for section in re.split(r"^## ", text, flags=re.MULTILINE)[1:]:
        name = next(iter(re.findall(r"<!-- table: (\w+) -->", section)), None)
        if name not in FOUND:
            continue
        anchor = EXPERIMENTS[name].ANCHOR
        own = [line for line in claims if f"(#{anchor})" in line]
        assert own, "the table of claims has a row for each"
        tables = "\n".join([*own, *(line for line in section.splitlines() if line.startswith("|"))])
        prose = "\n".join(line for line in section.splitlines() if not line.startswith(("|", "<")))
        prose = re.sub(r"arXiv:\S+|\]\(\S+\)|`[^`]*`", "", prose)
        missing = {*DECIMALS.findall(prose)} - {*DECIMALS.findall(tables)}
        assert not missing, f"{name}: no table of the section has {sorted(missing)}"


@published
def test_pictures_are_those_of_the_numbers(name, tmp_path):
    """Drawn anew they have the same texts and as many lines; their shapes are left to the version of matplotlib."""
    EXPERIMENTS[name].draw(Results(FOUND[name]), tmp_path / f"{name}.svg")
    for drawn in tmp_path.glob("*.svg"):
        fresh, committed = ((folder / drawn.name).read_text("utf-8") for folder in (tmp_path, page.PICTURES))
        assert re.findall(r"<desc>.*?</desc>", fresh) == re.findall(r"<desc>.*?</desc>", committed)
        assert fresh.count("<path") == committed.count("<path")


@pytest.mark.nightly
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("picture", sorted(page.PICTURES.glob("*.svg")), ids=lambda path: path.name)
def test_pictures_are_read_in_light_and_dark(picture, scheme, tmp_path):
    """Texts of 10 pixels and more, apart from each other, of contrast 4.5."""
    svg = picture.read_text("utf-8")
    back = {"light": "#fff", "dark": "#16181b"}[scheme]
    html = f'<!doctype html><body style="margin:0;background:{back}">{svg[svg.index("<svg") :]}</body>'
    (tmp_path / "page.html").write_text(html, "utf-8")
    seen = opened(tmp_path / "page.html", width=900, scheme=scheme)
    assert (seen.complaints, seen.requests, seen.overlapping) == ((), (), ())
    assert seen.smallest_text >= 10
    assert seen.faintest[0] >= 4.5, seen.faintest
