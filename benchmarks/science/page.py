"""The tables of docs/science.md, made from the result files.

`<!-- table: claims -->` stands before the claims of all experiments, `<!-- table: NAME -->` before the runs of one.
What follows, up to `<!-- /table -->`, is written here alone.
"""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from science.experiments import EXPERIMENTS
from science.records import Results

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "science"
PAGE = ROOT / "docs" / "science.md"
PICTURES = ROOT / "docs" / "science"
_BLOCK = re.compile(r"(<!-- table: ([\w-]+) -->\n).*?(<!-- /table -->)", re.DOTALL)
_ANSWERS = {"reproduced": "**yes**", "opposite": "**no, the opposite**", "not seen": "no"}


def documents(folder: Path = RESULTS) -> dict[str, dict[str, Any]]:
    """The result files that are there, in the order of the experiments."""
    paths = {name: folder / f"{name}.json" for name in EXPERIMENTS}
    return {name: json.loads(path.read_text("utf-8")) for name, path in paths.items() if path.exists()}


def updated(page: str, found: Mapping[str, Mapping[str, Any]]) -> str:
    """The page with its tables made anew. Blocks of experiments without results stay as they are."""

    def block(match: re.Match[str]) -> str:
        head, name, end = match.groups()
        if name == "claims":
            return f"{head}{_markdown(_claims(found))}{end}"
        if name not in found:
            return match[0]
        return f"{head}{_markdown(EXPERIMENTS[name].table(Results(found[name])))}{end}"

    return _BLOCK.sub(block, page)


def _claims(found: Mapping[str, Mapping[str, Any]]) -> list[list[str]]:
    """A row for each claim."""
    rows = [["claim", "paper", "seen here", "difference", "reproduced?"]]
    for name, content in found.items():
        for claim in content["claims"]:
            paper = f"{claim['paper']}, arXiv:{claim['arxiv']}"
            text = f"[{claim['text']}](#{EXPERIMENTS[name].ANCHOR})"
            rows.append([text, paper, claim["seen"], interval(claim["difference"]), _ANSWERS[claim["verdict"]]])
    return rows


def interval(mean: Mapping[str, float]) -> str:
    """`0.12 [0.08, 0.16]`: a mean and its interval, as the page shows them."""
    if "low" not in mean:
        return f"{mean['mean']:.2f}"
    return f"{mean['mean']:.2f} [{mean['low']:.2f}, {mean['high']:.2f}]"


def _markdown(rows: Sequence[Sequence[str]]) -> str:
    heading, *others = rows
    lines = [heading, ["---"] * len(heading), *others]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)
