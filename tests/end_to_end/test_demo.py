"""The demo in its quick form: the real trainer, all five arms, and the files that it leaves."""

import io
import json
import math

import pytest
from matplotlib import image
from rich.console import Console

from holdfast.demo import DemoResult, run_demo

pytestmark = pytest.mark.slow

FIXED = ("model", "adapter", "precomputed")


@pytest.fixture(scope="module")
def printed() -> io.StringIO:
    return io.StringIO()


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory, printed: io.StringIO) -> DemoResult:
    folder = tmp_path_factory.mktemp("demo") / "made" / "by the demo"
    return run_demo(folder, seed=0, quick=True, console=Console(file=printed, width=80))


def test_the_three_fixed_ways_are_one_run(result: DemoResult) -> None:
    model, adapter, precomputed = (result.arm(name) for name in FIXED)
    assert len(model.losses) == 7, "the first step and every fifth of 32"
    for other in (adapter, precomputed):
        assert other.losses == pytest.approx(model.losses, abs=1e-5)
        assert other.held_out_logps == pytest.approx(model.held_out_logps, abs=1e-4)
        assert other.measurement.kl.value == pytest.approx(model.measurement.kl.value, abs=1e-4)
        assert other.accuracy.value == pytest.approx(model.accuracy.value, abs=1e-3)


def test_first_losses(result: DemoResult) -> None:
    """ln 2 against every reference; without one, the loss at the pairs' own log-probs, which is far from it."""
    first = {arm.name: arm.losses[0] for arm in result.arms}
    assert {name: first[name] for name in (*FIXED, "tr-dpo")} == {
        name: pytest.approx(math.log(2), abs=1e-5) for name in (*FIXED, "tr-dpo")
    }
    assert first["none"] > 2 * math.log(2)


def test_the_moving_reference_is_the_fixed_one_until_it_moves(result: DemoResult) -> None:
    """Synced every 8 steps; the logs of steps 1 and 5 come before the first sync, that of step 10 after."""
    fixed, moving = result.arm("model").losses, result.arm("tr-dpo").losses
    assert moving[:2] == pytest.approx(fixed[:2], abs=1e-5)
    assert abs(moving[2] - fixed[2]) > 1e-3


def test_what_is_expected_of_the_arms(result: DemoResult) -> None:
    fixed, moving, alone = (result.arm(name).measurement for name in ("model", "tr-dpo", "none"))
    assert fixed.reward.value > result.start.reward.value + 1
    assert 0.5 < fixed.kl.value < 2 * result.target.kl.value
    assert moving.kl.value > 1.5 * fixed.kl.value
    assert alone.fluency.value < fixed.fluency.value - 0.5
    assert [check.expected for check in result.checks if not check.is_met] == []
    assert result.exit_code == 0


def test_bytes_held_for_the_reference(result: DemoResult) -> None:
    """A second model takes its weights; adapters that are off, log-probs in the store and no reference take nothing."""
    held = {arm.name: arm.num_reference_bytes for arm in result.arms}
    assert held["adapter"] == held["precomputed"] == held["none"] == 0
    assert held["model"] > 84_000 * 4


def test_the_numbers_are_written(result: DemoResult, printed: io.StringIO) -> None:
    written = json.loads((result.output_dir / "results.json").read_text(encoding="utf-8"))
    assert written["exit_code"] == 0
    assert [arm["name"] for arm in written["arms"]] == [*FIXED, "tr-dpo", "none"]
    for arm, found in zip(written["arms"], result.arms, strict=True):
        assert arm["measurement"]["kl"]["value"] == found.measurement.kl.value
        assert arm["losses"] == list(found.losses)
    assert [point["kl"]["value"] for point in written["frontier"]["optima"]] == [
        optimum.kl.value for optimum in result.frontier.optima
    ]
    table = (result.output_dir / "table.txt").read_text(encoding="utf-8")
    for text in (table, printed.getvalue()):
        lines = [line.split() for line in text.splitlines() if line.strip()]
        rows = {words[0]: words for words in reversed(lines)}  # the first: prose below may begin with the same word
        for arm in result.arms:
            reward = arm.measurement.reward
            assert rows[arm.name][1] == f"{reward.value:.2f}±{reward.error:.2f}"
        assert text.count("as expected: ") == len(result.checks)


def test_the_plot_is_a_picture(result: DemoResult) -> None:
    picture = image.imread(result.output_dir / "frontier.png")
    height, width, _ = picture.shape
    assert (height, width) == (840, 1875)
    is_orange = (abs(picture[:, :, :3] - [0xE6 / 255, 0x9F / 255, 0]) < 0.01).all(2)
    assert is_orange[:, : width // 2].sum() > 100, "the marker of the moving reference, against reward"
    assert is_orange[:, width // 2 :].sum() > 100, "and against fluency"


def test_nothing_else_is_left_behind(result: DemoResult) -> None:
    assert sorted(path.name for path in result.output_dir.iterdir()) == ["frontier.png", "results.json", "table.txt"]
