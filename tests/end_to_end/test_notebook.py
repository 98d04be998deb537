"""The notebook: its cells are run without a kernel, on a model that has hardly learnt anything."""

import json
import math
from pathlib import Path

import notebook_outputs
import pytest

from holdfast.quickstart.folder import write_quickstart

NOTEBOOK = Path(__file__).parents[2] / "examples" / "first_run.ipynb"


@pytest.mark.slow
def test_the_cells_run(tmp_path, monkeypatch):
    """Before training the loss is ln 2; afterwards the policy is another model than the reference."""
    monkeypatch.chdir(tmp_path)
    write_quickstart(Path("quickstart"), num_steps=(2, 2), num_pairs=40)
    notebook = json.loads(NOTEBOOK.read_text("utf-8"))
    published = [[output["output_type"] for output in cell.get("outputs", [])] for cell in notebook["cells"]]
    names = notebook_outputs.run(notebook)
    assert names["before"]["eval_loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert names["after"]["eval_loss"] < names["before"]["eval_loss"]
    assert names["after"]["eval_reference/kl_chosen"] != 0
    assert len(names["policy"]) == len(names["reference"]) == len(names["asked"])
    # What is shown in the repository has the outputs that the cells have.
    assert [[output["output_type"] for output in cell.get("outputs", [])] for cell in notebook["cells"]] == published


def test_what_a_cell_shows():
    """Printed text, the value of a last expression, and nothing where a semicolon ends it."""
    names = {}
    shown = notebook_outputs.outputs_of("x = 2\nprint('a')\nx + 1", "cell", names, 3)
    assert [output["output_type"] for output in shown] == ["stream", "execute_result"]
    assert (shown[0]["text"], shown[1]["data"]["text/plain"], names["x"]) == (["a\n"], ["3"], 2)
    assert notebook_outputs.outputs_of("x + 1;", "cell", names, 4) == []
