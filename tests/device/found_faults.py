"""Are planted faults found? Each is planted into the real code, a cell is run, and the laws must name its line."""

from pathlib import Path

from cells import Cell
from faults import FAULTS, planted
from laws import broken_laws
from run import run

CELL = Cell(layout="padded")
"""The cell in which faults are planted."""

_SOURCE = (Path(__file__).parent / "faults.py").read_text(encoding="utf-8").splitlines()


def missed_faults() -> list[str]:
    """A line about each fault that no law finds, or that is not found at its line."""
    sound = run(CELL)
    budget = {CELL.name: dict(sound.watch.groups)}
    missed = [f"without any fault: {line}" for line in broken_laws(sound, budget)]
    for name in FAULTS:
        with planted(name):
            found = broken_laws(run(CELL), budget)
        if not any(_line_of(name) in line for line in found):
            missed.append(f"{name}: expected {_line_of(name)!r}, found {found}")
    return missed


def _line_of(name: str) -> str:
    """What the broken law must say: the line that is marked, or, where a fault is no single line, what has grown."""
    for number, text in enumerate(_SOURCE, start=1):
        if text.endswith(f"# planted: {name}"):
            return f"tests/device/faults.py:{number} "
    return "norms "
