"""Runs the cells of a notebook in this process, without a kernel, and writes what they show into it.

Usage, in the folder in which the notebook is to run: python dev/notebook_outputs.py examples/first_run.ipynb
"""

import ast
import base64
import contextlib
import io
import json
import sys
from pathlib import Path
from typing import Any


def run(notebook: dict[str, Any]) -> dict[str, Any]:
    """The names that the cells leave behind. The notebook's outputs become theirs: text, a last value, figures."""
    names: dict[str, Any] = {"__name__": "__main__"}
    code_cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    for number, cell in enumerate(code_cells, start=1):
        cell["execution_count"] = number
        cell["outputs"] = outputs_of("".join(cell["source"]), f"cell {number}", names, number)
    return names


def outputs_of(source: str, name: str, names: dict[str, Any], number: int) -> list[dict[str, Any]]:
    """What a cell shows, as a notebook holds it."""
    tree = ast.parse(source, name)
    last = ast.Expression(tree.body.pop().value) if isinstance(tree.body[-1], ast.Expr) else None
    printed, value = io.StringIO(), None
    with contextlib.redirect_stdout(printed):
        exec(compile(tree, name, "exec"), names)
        if last is not None:
            value = eval(compile(last, name, "eval"), names)
    outputs: list[dict[str, Any]] = []
    if printed.getvalue():
        outputs.append({"output_type": "stream", "name": "stdout", "text": printed.getvalue().splitlines(True)})
    if value is not None and not source.rstrip().endswith(";"):
        shown = {"text/plain": repr(value).splitlines(True)}
        outputs.append({"output_type": "execute_result", "execution_count": number, "metadata": {}, "data": shown})
    return outputs + [{"output_type": "display_data", "metadata": {}, "data": each} for each in figures()]


def figures() -> list[dict[str, Any]]:
    """The figures that are open, which are closed then: as PNG, with a text in their place."""
    if "matplotlib.pyplot" not in sys.modules:
        return []
    pyplot = sys.modules["matplotlib.pyplot"]
    found = []
    for number in pyplot.get_fignums():
        picture = io.BytesIO()
        pyplot.figure(number).savefig(picture, format="png", dpi=80, metadata={"Software": None})
        found.append({"image/png": base64.b64encode(picture.getvalue()).decode(), "text/plain": ["<Figure>"]})
    pyplot.close("all")
    return found


def main() -> None:
    path = Path(sys.argv[1])
    notebook = json.loads(path.read_text(encoding="utf-8"))
    run(notebook)
    path.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
