"""Texts that pages show, such as what a command prints: who compares each with what is really said.

A text is known by its page and the beginning of its first line. It is compared either by a test that is named here, or
with what a function here returns.
"""

import io
import logging
import math
import textwrap
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from signal import SIGTERM
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from rich.console import Console

import families
import holdfast.checkpoint.folder
import test_architecture
from code_blocks import blocks_of
from holdfast.cli import app, errors
from holdfast.data.layouts.choose import FIRST, choose_layout
from holdfast.data.layouts.trial import known_problem
from holdfast.inspect.lines import as_text
from holdfast.inspect.pair_numbers import PairNumbers
from holdfast.inspect.ranking.flipping import Objective
from holdfast.inspect.ranking.inspection import ScoredDataset, inspect_ranking
from holdfast.inspect.ranking.lines import report_lines
from holdfast.interruption import Interrupted
from holdfast.losses import LossOptions, PairLogps, preference_loss
from holdfast.peers.beat import Beat
from holdfast.peers.verdict import Peer, judge
from holdfast.scoring.routes import probes
from holdfast.scoring.routes.choice import ROUTES
from holdfast.training import interruption
from holdfast.training.attention_routes import line_about
from page_workplace import Workplace
from ranked_pairs import AFTER_CHOSEN, AFTER_REJECTED, eight_pairs

PAGE_WIDTH = 120


def order_of_imports(place: Workplace) -> str:
    """The line of CONTRIBUTING, where it is in the order that the architecture's test holds."""
    (block,) = [block for block in blocks_of("CONTRIBUTING.md") if block.text.startswith("internals <-")]
    written = [{name.strip() for name in part.split(",")} for part in block.text.replace("\n", " ").split("<-")]
    ranks = {name: rank for rank, names in enumerate(test_architecture.LAYERS) for name in names}
    order = [rank for names in written for rank in sorted({ranks[name] for name in names})]
    return block.text if order == sorted(order) else f"in the order of LAYERS: {ranks}"


def what_is_said_of_a_stop(place: Workplace) -> str:
    """By a command that got SIGTERM after 301 of 5,000 steps."""
    stopped, said = Interrupted(SIGTERM), io.StringIO()
    trainer = SimpleNamespace(state=SimpleNamespace(global_step=301, max_steps=5000))
    callback: Any = SimpleNamespace(_trainer=trainer, _saved_step=301, _first_step=0, is_evaluation_due=False)
    with _complete("out/checkpoint-301"), mock.patch.object(errors, "_console", Console(file=said, width=PAGE_WIDTH)):
        interruption.InterruptionCallback._describe(callback, stopped, None, Path("out"))
        errors._print_interruption(stopped, lambda stopped: app._command("train", Path("run.yaml"), [], stopped))
    return said.getvalue()


def what_is_said_of_a_lost_process(place: Workplace) -> str:
    """By rank 0, of rank 3 that was killed in step 17."""
    beat = Beat(rank=3, host="node-a", pid=4711, name="training", step=17)
    verdict = judge(Peer(beat=beat, heard_at=0.0, is_connected=False), 8, 0.0, 30.0)
    assert verdict is not None
    with _complete("out/checkpoint-10"), mock.patch.dict("os.environ", {"WORLD_SIZE": "8"}):
        advice = app._advice("train", Path("run.yaml"), [], "out")
    line = f"{verdict.text} Rank 0 cannot go on without it. {advice}"
    return textwrap.fill(line, PAGE_WIDTH, break_on_hyphens=False)


@contextmanager
def _complete(*checkpoints: str) -> Iterator[None]:
    """These checkpoints are complete."""
    found = [Path(name) for name in checkpoints]
    with (
        mock.patch.object(holdfast.checkpoint.folder, "complete_checkpoints", return_value=found),
        mock.patch.object(interruption, "complete_checkpoints", return_value=found),
    ):
        yield


@contextmanager
def _logged() -> Iterator[list[str]]:
    """The lines that are logged meanwhile."""
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    logger = logging.getLogger("holdfast")
    logger.addHandler(handler)
    try:
        yield lines
    finally:
        logger.removeHandler(handler)


def what_is_said_of_padded_rows(place: Workplace) -> str:
    """Of a model whose layers are partly no attention."""
    reason = known_problem(families.tiny_model("falcon_h1"))
    trial: Any = SimpleNamespace(
        problem=lambda layout: reason if layout.fills_rows else None, accelerator=SimpleNamespace(is_main_process=True)
    )
    layout: Any = FIRST(0, 64, "keep_start", None)
    options: Any = SimpleNamespace(layout="auto", padding_free=False)
    with _logged() as lines, mock.patch("holdfast.data.layouts.choose.layout_of", return_value=layout):
        choose_layout(layout, options, trial)
    return lines[0]


def what_is_said_of_a_broken_route(place: Workplace) -> str:
    """Of one whose kernel raises an error."""
    error = RuntimeError("FlashAttention only supports Ampere GPUs or newer.")
    with _logged() as lines, mock.patch.object(probes, "largest_gap", side_effect=error):
        assert not probes.is_right(ROUTES[0], torch.device("cuda:0"), torch.bfloat16)
    return lines[0]


def lines_about_routes(place: Workplace) -> str:
    """Of a model with one route, and of one with two."""
    by_name = {route.name: route for route in reversed(ROUTES)}
    both = [by_name["flex"]] * 36 + [by_name["varlen"]] * 12
    return "\n".join(map(line_about, ({"LlamaForCausalLM": [by_name["varlen"]]}, {"Llama4ForCausalLM": both})))


def formulas_of_the_loss(place: Workplace) -> str:
    """The two lines of the page, where the loss of the package has their value: beta 0.1, log-probs -10 and -14 of the
    policy, -12 and -13 of the reference."""
    (block,) = [block for block in blocks_of("docs/index.md") if block.text.startswith("r(x, y)")]
    reward, loss = (line.partition(" = ")[2] for line in block.text.splitlines())
    names: dict[str, Any] = {"beta": 0.1, "log_sigmoid": lambda x: -math.log1p(math.exp(-x))}
    rewards = [
        eval(reward.replace("log pi_theta(y|x)", str(policy)).replace("log pi_ref(y|x)", str(reference)), names)
        for policy, reference in ((-10.0, -12.0), (-14.0, -13.0))
    ]
    for name, value in zip(("r(x, y_chosen)", "r(x, y_rejected)"), rewards, strict=True):
        loss = loss.replace(name, str(value))
    found = eval(loss.replace("log sigmoid", "log_sigmoid").replace("--", "- -"), names)
    expected = preference_loss(
        _pair(-10.0, -14.0), _pair(-12.0, -13.0), loss_types=["sigmoid"], loss_weights=[1.0],
        options=LossOptions(beta=0.1),
    )  # fmt: skip
    assert math.isclose(found, expected.item(), rel_tol=1e-6)
    return block.text


def losses_of_two_rewards(place: Workplace) -> str:
    """The lines of the page with the loss of the package at the rewards that each names."""
    (block,) = [block for block in blocks_of("docs/troubleshooting.md") if block.text.startswith("loss = ")]
    first, *lines = block.text.splitlines()
    return "\n".join([first, *map(_with_its_loss, lines)])


def _with_its_loss(line: str) -> str:
    """A line `... sigmoid(a - b) = ...` with the loss at the rewards a and b: beta 1, a reference of log-prob 0."""
    numbers = line.partition("sigmoid(")[2].rpartition(") = ")[0]
    chosen, rejected = (float(part.strip(" ()")) for part in numbers.split(" - "))
    found = preference_loss(
        _pair(chosen, rejected), _pair(0.0, 0.0), loss_types=["sigmoid"], loss_weights=[1.0],
        options=LossOptions(beta=1.0),
    )  # fmt: skip
    return f"{line.rpartition(' = ')[0]} = {found.item():.3f}"


def _pair(chosen: float, rejected: float) -> PairLogps:
    logps = [torch.tensor([value]) for value in (chosen, rejected)]
    lengths = torch.tensor([4])
    return PairLogps(
        chosen=logps[0], rejected=logps[1], chosen_lengths=lengths, rejected_lengths=lengths,
        chosen_likelihood=logps[0],
    )  # fmt: skip


def what_is_said_of_eight_pairs(place: Workplace) -> str:
    """Before training."""
    return _report_on_eight_pairs(None)


def what_is_said_of_eight_trained_pairs(place: Workplace) -> str:
    """After training: from the policy's name on, up to what is said before training too."""
    text = _report_on_eight_pairs(eight_pairs(AFTER_CHOSEN, AFTER_REJECTED))
    return text[text.index("policy: ") : text.index("  How the reference ranks")]


def _report_on_eight_pairs(policy: PairNumbers | None) -> str:
    texts: Any = None  # of which none is read
    pairs = ScoredDataset(name="train", reference=eight_pairs(), policy=policy, texts=texts)
    inspection = inspect_ranking(
        [pairs],
        reference="path/to/model, as it starts to train",
        policy=None if policy is None else "out",
        objective=Objective.of(LossOptions(), ["sigmoid"]),
        num_shown=0,
    )
    return as_text(report_lines(inspection, PAGE_WIDTH))


TEXTS: Mapping[tuple[str, str], str | Callable[[Workplace], str]] = {
    ("README.md", "src/holdfast/"): "tests/test_docs.py::test_the_tree_in_the_readme_is_the_package",
    ("CONTRIBUTING.md", "internals <-"): order_of_imports,
    (
        "docs/howto/data.md",
        "model model",
    ): "tests/test_docs.py::test_the_report_of_the_documentation_is_what_is_printed",
    ("docs/howto/inspect.md", "reference: path/to/model"): what_is_said_of_eight_pairs,
    ("docs/howto/inspect.md", "policy: out"): what_is_said_of_eight_trained_pairs,
    ("docs/howto/select.md", "train: 4 of 8 pairs"): (
        "tests/unit/inspect/test_selection.py::test_the_text_of_the_page_is_what_is_said"
    ),
    ("docs/howto/script.md", "DPOConfig was given"): (
        "tests/test_docs.py::test_the_error_of_the_page_is_the_one_that_a_script_gets"
    ),
    ("docs/howto/job.md", "stopped by SIGTERM"): what_is_said_of_a_stop,
    ("docs/howto/lost-process.md", "Rank 3 of 8"): what_is_said_of_a_lost_process,
    ("docs/index.md", "r(x, y) ="): formulas_of_the_loss,
    ("docs/layouts.md", "layout: padded"): what_is_said_of_padded_rows,
    ("docs/layouts.md", "attention: varlen is not"): what_is_said_of_a_broken_route,
    ("docs/layouts.md", "attention: varlen"): lines_about_routes,
    ("docs/troubleshooting.md", "loss = -log"): losses_of_two_rewards,
    ("docs/templates.md", "# one turn"): "tests/unit/test_templates.py::test_the_page_is_what_the_table_says",
}
