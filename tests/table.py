"""The table of references: every kind of policy, way to hold, motion, kind of data and time to ask; what comes of each.

`contract/test_table.py` runs the cells: those of `COVERING` in `make test`, all of them in `make nightly`. The page
`docs/references.md` shows the table; as a script, this writes the page's anew.
"""

import itertools
import re
import textwrap
from collections.abc import Iterator
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

from covering import covering
from holdfast.reference import build

PAGE = Path(__file__).parent.parent / "docs" / "references.md"
BEGIN, END = "<!-- table: references -->", "<!-- /table -->"

KINDS = {
    "full": "full",
    "partly_frozen": "partly frozen",
    "lora_fresh": "fresh LoRA",
    "lora_sft": "LoRA after SFT",
    "lora_modules_to_save": "LoRA with `modules_to_save`",
    "dora": "DoRA",
    "pissa": "PiSSA",
}
"""Kinds of policies (the names of `policies.POLICIES`), and how the page calls them."""

PLACES = {"device": "on the device", "cpu": "in host memory", "disk": "on disk"}
"""Where a snapshot is held, and how the page calls it."""


def _ways() -> Iterator[tuple[str, tuple[str, dict[str, Any]]]]:
    """By name, every way that the package has; a snapshot once for each place."""
    for name in (*build.WAYS, "precomputed"):
        if name == "snapshot":
            yield name, (f"`{name}` {PLACES['device']}", {"reference": name})
            for place in ("cpu", "disk"):
                yield f"{name}_{place}", (f"`{name}` {PLACES[place]}", {"reference": name, "snapshot_device": place})
        else:
            yield name, (f"`{name}`", {"reference": name})


WAYS = dict(_ways())
"""Ways to hold a reference: how the page calls them, and the options that ask for them."""

SYNC_STEPS = 3
MOTIONS: dict[str, float] = {"fixed": 0.0, "hard": 1.0, "soft": 0.3}
"""The mixup alpha; 0 for a reference that stays."""

DATA = ("map", "stream")
WINDOWS = {"online": 1, "windowed": 2}
"""The length of a window in optimizer steps."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Refusal:
    """A combination without a meaning: the message (a pattern) of its ValueError, and the reason in a clause."""

    match: str
    reason: str


NO_ADAPTER = Refusal(
    match=r"reference='adapter'.*without a PEFT adapter.*use reference='model'",
    reason="the policy has no adapter, so use any of the other ways",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """One combination."""

    kind: str
    way: str
    motion: str
    data: str
    window: str

    def __str__(self) -> str:
        return "-".join((self.kind, self.way, self.motion, self.data, self.window))

    @property
    def refusal(self) -> Refusal | None:
        """Why it is refused; None where it trains."""
        return NO_ADAPTER if self.way == "adapter" and self.kind in ("full", "partly_frozen") else None

    @property
    def options(self) -> dict[str, Any]:
        """The options that ask for it. What is precomputed is not asked in each batch's turn: it leaves the length of
        the window open where the others are online."""
        options = dict(WAYS[self.way][1]) if self.way != "auto" else {}
        options["reference_window"] = WINDOWS[self.window]
        if self.way == "precomputed" and self.window == "online":
            options["reference_window"] = None
        if alpha := MOTIONS[self.motion]:
            options |= {
                "sync_ref_model": True, "ref_model_mixup_alpha": alpha, "ref_model_sync_steps": SYNC_STEPS,
            }  # fmt: skip
        return options


CELLS = [
    Cell(kind=kind, way=way, motion=motion, data=data, window=window)
    for kind, way, motion, data, window in itertools.product(KINDS, WAYS, MOTIONS, DATA, WINDOWS)
]
_COVERING_ROWS = set(covering([astuple(cell) for cell in CELLS], strength=3))
COVERING = [cell for cell in CELLS if astuple(cell) in _COVERING_ROWS]
"""The cells in which any three values meet that meet in any cell."""


def block() -> str:
    """The page's table, between its two comments: a row per way and a column per kind of policy, each cell the
    outcome of all its runs."""
    notes: list[str] = []
    lines = [f"| | {' | '.join(KINDS.values())} |", "|---" * (len(KINDS) + 1) + "|"]
    for way, (label, _) in WAYS.items():
        outcomes = [_outcome([c for c in CELLS if (c.kind, c.way) == (kind, way)], notes) for kind in KINDS]
        lines.append(f"| {label} | {' | '.join(outcomes)} |")
    runs_each = len(CELLS) // (len(KINDS) * len(WAYS))
    footnotes = "; ".join(f"({number}) {reason}" for number, reason in enumerate(notes, start=1))
    explained = (
        f"{footnotes}. A cell is {runs_each} runs: fixed, and synced with alpha 1 and 0.3; on a dataset and on a "
        "stream; online (what is precomputed: all ahead, or up to the next sync) and in windows of two steps. Of the "
        f"{len(CELLS)}, {sum(cell.refusal is None for cell in CELLS)} follow, "
        "loss by loss and weight by weight to 1e-5, a naive loop with a second fp32 model; the others are refused with "
        f"a message. `make nightly` runs all of them (`tests/contract/test_table.py`), and `make test` {len(COVERING)} "
        "in which any three values meet that meet in one. This table is written by `tests/table.py`."
    )
    return "\n".join([BEGIN, *lines, "", *textwrap.wrap(explained, 120, break_on_hyphens=False), END])


def _outcome(cells: list[Cell], notes: list[str]) -> str:
    """What comes of `cells`; reasons that are new are added to `notes`."""
    reasons = sorted({cell.refusal.reason for cell in cells if cell.refusal})
    notes += [reason for reason in reasons if reason not in notes]
    numbers = ", ".join(str(notes.index(reason) + 1) for reason in reasons)
    num_refused = sum(cell.refusal is not None for cell in cells)
    if not num_refused:
        return "yes"
    return f"refused ({numbers})" if num_refused == len(cells) else f"{num_refused} of {len(cells)} refused ({numbers})"


def written() -> str | None:
    """The block as the page has it; None where it has none."""
    found = re.search(f"{re.escape(BEGIN)}.*?{re.escape(END)}", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    return found and found[0]


if __name__ == "__main__":
    was = written()
    assert was is not None, f"{PAGE} has no block between {BEGIN} and {END}: put both where the table goes"
    PAGE.write_text(PAGE.read_text(encoding="utf-8").replace(was, block()), encoding="utf-8")
