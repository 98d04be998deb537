"""The demo's table and verdict, on the console and as a text file."""

import io
from pathlib import Path

from rich import box
from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from holdfast.demo.policy import Estimate
from holdfast.demo.results import ArmResult, DemoResult
from holdfast.store.files import write_durably

_FILE_WIDTH = 100
_HEADINGS = (
    "true\nreward", "KL,\nnats/text", "below\nbound", "held-out\naccuracy", "fluency,\nnats/token",
    "held,\nKiB", "time,\ns",
)  # fmt: skip


def print_result(result: DemoResult, console: Console, path: Path) -> None:
    """Prints the table and what the checks say, and writes the same, without colours, to `path`."""
    content = Group(result_table(result), _notes(result), verdict(result))
    console.print(content)
    text = io.StringIO()
    Console(file=text, width=_FILE_WIDTH, color_system=None, force_terminal=False).print(content)
    write_durably(path, text.getvalue().encode())
    console.print(f"Written to {result.output_dir}: frontier.png, results.json, table.txt", highlight=False)


def result_table(result: DemoResult) -> Table:
    """One row for each arm, between the start policy and the optimum that the fixed arms aim at."""
    table = Table(
        title=f"DPO, beta {result.beta:g}: what the policy is anchored to", title_justify="left",
        box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0),
    )  # fmt: skip
    table.add_column("reference", no_wrap=True)
    for heading in _HEADINGS:
        table.add_column(heading, justify="right", no_wrap=True)
    start, target = result.start, result.target
    table.add_row("(start)", _plus_minus(start.reward), "0", "", "", _plus_minus(start.fluency), "", "", style="dim")
    for arm in result.arms:
        _add_arm(table, arm, result)
    table.add_row(
        "(optimum)", _plus_minus(target.reward), _plus_minus(target.kl), "0",
        _plus_minus(result.best_accuracy), _plus_minus(target.fluency), "", "", style="dim",
    )  # fmt: skip
    return table


def verdict(result: DemoResult) -> Text:
    """A line for each check: as expected, or what is off."""
    text = Text()
    for check in result.checks:
        mark, style = ("as expected", "green") if check.is_met else ("OFF", "bold red")
        text.append(f"{mark}: ", style=style)
        text.append(f"{check.expected}; {check.found}\n")
    return text


def _add_arm(table: Table, arm: ArmResult, result: DemoResult) -> None:
    measurement = arm.measurement
    gap = result.frontier.reward_ceiling(measurement.kl.value).value - measurement.reward.value
    table.add_row(
        arm.name,
        _plus_minus(measurement.reward),
        _plus_minus(measurement.kl),
        f"{gap:.2f}",
        _plus_minus(arm.accuracy),
        _plus_minus(measurement.fluency),
        f"{arm.num_reference_bytes / 1024:,.0f}",
        f"{arm.seconds:.1f}",
    )


def _notes(result: DemoResult) -> Text:
    effective = min(optimum.effective_texts for optimum in result.frontier.optima)
    error = max(optimum.beta * optimum.log_partition.error for optimum in result.frontier.optima)
    return Text(
        "± is one standard error; KL is to the start policy, per text. The optimum's accuracy is that of the true "
        f"reward on the same labels; the source's own fluency is {_plus_minus(result.source_fluency)}. The frontier is "
        "by importance sampling from the exactly tilted source: at least "
        f"{effective:,.0f} effective texts per beta, reward bound right to {error:.3f}. Precomputed log-probs grow "
        "with the data, a second model does not: real models are larger than their log-probs, this one need not be. "
        f"Seed {result.seed}, {result.seconds:.0f} s in all.\n"
    )


def _plus_minus(estimate: Estimate) -> str:
    return f"{estimate.value:.2f}±{estimate.error:.2f}" if estimate.error >= 0.005 else f"{estimate.value:.2f}±<.01"
