"""An inspection as JSON: every number, without the rows that are shown."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from holdfast.inspect.data import DataInspection, DatasetInspection
from holdfast.store.files import write_durably


def as_json(inspection: DataInspection) -> dict[str, Any]:
    """The numbers of all datasets as plain values; `datasets` is by name. None stands for a mean over no pairs."""
    values = {
        "model": inspection.model,
        "tokenizer": inspection.tokenizer,
        "num_embeddings": inspection.num_embeddings,
        "max_length": inspection.max_length,
        "truncation_mode": inspection.truncation_mode,
        "template_date": inspection.template_date,
        "datasets": {each.name: _dataset(each) for each in inspection.datasets},
    }
    return json.loads(json.dumps(values))


def write_json(inspection: DataInspection, path: Path) -> None:
    """Writes the numbers as a JSON file."""
    write_durably(path, (json.dumps(as_json(inspection), indent=2) + "\n").encode())


def _dataset(inspection: DatasetInspection) -> dict[str, Any]:
    return {
        "is_part": inspection.is_part,
        **asdict(inspection.numbers),
        "leak": None if inspection.leak is None else asdict(inspection.leak),
        "notes": [asdict(note) for note in inspection.notes],
        "said": list(inspection.said),
        "refusal": inspection.refusal,
        "by_source": {name: asdict(numbers) for name, numbers in inspection.by_source.items()},
    }
