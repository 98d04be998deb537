"""What a way to hold the reference asks of the trainer besides options: other models, given or on disk."""

from pathlib import Path
from typing import Any

import families
from cells import Cell


def trainer_arguments(cell: Cell, folder: Path) -> dict[str, Any]:
    """The arguments of `DPOTrainer` for the cell's way. `folder` is where models may be written."""
    if cell.way == "ref_model":
        return {"ref_model": families.tiny_model(cell.family, seed=1)}
    if cell.way == "ref_path":
        families.tiny_model(cell.family, seed=1).save_pretrained(folder / "reference")
        return {"ref_model": str(folder / "reference")}
    if cell.way == "mixture":
        return {"ref_model": [families.tiny_model(cell.family, seed=1), None]}
    return {}
