"""The model card of a trained model: its base model, how it was trained, and which reference it had."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from torch import nn

import holdfast
from holdfast.checkpoint.placed import placed
from holdfast.checkpoint.sound import last_complete
from holdfast.config import DPOConfig
from holdfast.data.mixing.source_column import sources_with_metrics
from holdfast.internals.transformers import loaded_from
from holdfast.record.entries import Sample
from holdfast.reference.reference import Reference
from holdfast.samples.tables import as_markdown
from holdfast.scoring.causal_lm import unwrap
from holdfast.visible import visible

TAGS = ("holdfast", "dpo")

_OF_THE_BASE = "base_model:"
"""What a tag begins with that peft makes of the base model's name."""

TEMPLATE = """---
{{ card_data }}
---

# {{ title }}

A fine-tuned version of {{ base_model }}, trained on preference pairs with Direct Preference Optimization
([Rafailov et al. 2023](https://arxiv.org/abs/2305.18290)).

| | |
|---|---|
| loss | {{ loss }} |
| beta | {{ beta }} |
| reference | {{ reference }} |
| dataset | {{ dataset }} |
{% for source, pairs in sources.items() %}| pairs of {{ source }} | {{ pairs }} |
{% endfor %}
{{ results }}```python
from transformers import pipeline

generator = pipeline("text-generation", model="{{ title }}")
print(generator([{"role": "user", "content": "What holds kelp to the rock?"}], max_new_tokens=64)[0])
```

Trained with {{ versions }}.
"""


def write_card(
    args: DPOConfig,
    model: nn.Module,
    reference: Reference | None,
    *,
    train_dataset: Any,
    title: str | None,
    dataset: str | Sequence[str] | None,
    tags: str | Sequence[str] | None,
    metadata: dict[str, Any],
    log_history: Sequence[Mapping[str, Any]] = (),
    samples: Sequence[Sample] = (),
) -> None:
    """Writes `README.md` into the run's output folder. `metadata` goes into its header (`language`, `license`, ...),
    what `transformers` calls `finetuned_from`, `dataset_tags` and `tasks` under the names that headers have for it. A
    base model or dataset is named only where that can be a hub id: a path is nobody else's. The sources of
    `train_dataset` are counted. The last numbers of `log_history`, the first of `samples` and the picture of the run's
    report, where the folder has one, are shown. ValueError where the file cannot be written."""
    folder = Path(str(args.output_dir))
    metadata = dict(metadata)
    names = _listed(metadata.pop("dataset", None)) or _listed(dataset)
    on_hub = [name for name in _listed(metadata.pop("dataset_tags", None)) or names if is_hub_id(name)]
    shown = [name for name in names if not is_path(name)] or on_hub
    details = _listed(metadata.pop("dataset_args", None))
    tasks = _listed(metadata.pop("tasks", None))
    base_model = metadata.pop("finetuned_from", None) or loaded_from(unwrap(model).config)
    if tasks:
        metadata.setdefault("pipeline_tag", tasks[0])
    data = ModelCardData(
        base_model=base_model if is_hub_id(base_model) else None,
        library_name="transformers",
        model_name=title or folder.name,
        datasets=on_hub or None,
        tags=sorted({*TAGS, *_listed(tags), *tasks[1:]}),
        **metadata,
    )
    card = ModelCard.from_template(
        data,
        template_str=TEMPLATE,
        title=title or folder.name,
        base_model=base_model if is_hub_id(base_model) else "a model",
        dataset=", ".join([*shown, *(f"({detail})" for detail in details)]) or "not named",
        sources={name.replace("|", "\\|"): pairs for name, pairs in sources_with_metrics(train_dataset).items()},
        loss=", ".join(args.loss_types),
        beta=args.beta,
        reference="none" if reference is None else reference.describe(),
        results=_results(folder, log_history, samples),
        versions=", ".join(
            f"{module.__name__} {module.__version__}" for module in (holdfast, transformers, torch, peft)
        ),
    )
    none = f"start again: there is no complete checkpoint in {folder}"
    with placed(folder, "the model card README.md", lambda: last_complete(folder, none=none)) as staged:
        card.save(staged / "README.md")


PICTURE = "report.png"
"""The picture of a run's report, in its output folder."""

_NUMBERS = (
    "loss", "rewards/accuracies", "rewards/margins", "rewards/chosen", "rewards/rejected", "logps/chosen",
    "logps/rejected", "reference/kl_chosen", "reference/kl_rejected", "win_rate", "win_rate_se",
)  # fmt: skip
"""The metrics that a card shows."""


def _results(folder: Path, log_history: Sequence[Mapping[str, Any]], samples: Sequence[Sample]) -> str:
    """The part of the card that says how the run went, in Markdown; empty before the first log."""
    parts = [_table_of_numbers(log_history)] if log_history else []
    if samples:
        parts.append(f"What it says at step {samples[0].step} on a held-out prompt:\n\n{as_markdown(samples[:1])}")
    if (folder / PICTURE).is_file():
        parts.append(f"![The run's curves]({PICTURE})")
    return "".join(f"{part}\n\n" for part in parts if part)


def _table_of_numbers(log_history: Sequence[Mapping[str, Any]]) -> str:
    """The last log of training beside the last evaluation of each set, a column for each."""
    columns: dict[str, dict[str, float]] = {}
    for log in log_history:
        if "loss" in log:
            columns[""] = {"step": log["step"], **{name: log[name] for name in _NUMBERS if name in log}}
        names = [name.removesuffix("loss") for name in log if name.startswith("eval_") and name.endswith("_loss")]
        prefixes = [name for name in names if f"{name}rewards/margins" in log]
        for prefix in prefixes:
            own = {name: log[prefix + name] for name in _NUMBERS if prefix + name in log}
            columns[prefix] = {"step": log["step"], **own}
    if not columns:
        return ""
    heads = [_head(prefix) for prefix in columns]
    lines = [f"| | {' | '.join(heads)} |", f"|---|{'---:|' * len(heads)}"]
    for name in ("step", *_NUMBERS):
        if any(name in own for own in columns.values()):
            cells = [
                f"{own[name]:.4g}" if name in own and name != "step" else str(own.get(name, ""))
                for own in columns.values()
            ]
            lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _head(prefix: str) -> str:
    """The heading of the column of the metrics that begin with `prefix`."""
    name = prefix.removeprefix("eval_").removesuffix("_")
    return f"evaluation ({visible(name)})".replace("|", "\\|") if name else "evaluation" if prefix else "training"


def is_path(name: str) -> bool:
    """Whether a name is a path on this machine, or could be one on another."""
    return (
        name.startswith((".", "/", "~")) or "\\" in name or ":" in name or name.count("/") > 1 or os.path.exists(name)
    )


def is_hub_id(name: str | None) -> bool:
    """Whether a model or dataset of this name may be found on the hub: `name` or `owner/name`, and nothing here."""
    if not name or is_path(name):
        return False
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def hide_paths(folder: Path) -> None:
    """Takes out of the header of a folder's `README.md`, which peft writes, the path that its base was loaded from."""
    file = folder / "README.md"
    if not file.is_file():
        return
    card = ModelCard.load(file)
    data: Any = card.data
    base_model, tags = data.get("base_model"), data.tags or []
    kept = [tag for tag in tags if not (tag.startswith(_OF_THE_BASE) and is_path(tag.split(":", 2)[-1]))]
    if isinstance(base_model, str) and is_path(base_model):
        data.base_model = None
    elif kept == tags:
        return
    data.tags = kept or None
    card.save(file)


def _listed(value: str | Sequence[str] | None) -> list[str]:
    return [value] if isinstance(value, str) else list(value or [])
