"""The model card of a trained model: its base model, how it was trained, and which reference it had."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from huggingface_hub import ModelCard, ModelCardData
from torch import nn

import holdfast
from holdfast.checkpoint.placed import placed
from holdfast.checkpoint.sound import last_complete
from holdfast.config import DPOConfig
from holdfast.data.source_column import sources_with_metrics
from holdfast.internals.transformers import loaded_from
from holdfast.reference.reference import Reference
from holdfast.scoring.causal_lm import unwrap

TAGS = ("holdfast", "dpo")

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
```python
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
) -> None:
    """Writes `README.md` into the run's output folder. `metadata` goes into its header (`language`, `license`, ...).
    The header names the base model only where that can be a hub id. The sources of `train_dataset` are counted.
    ValueError where the file cannot be written."""
    folder = Path(str(args.output_dir))
    base_model = loaded_from(unwrap(model).config) or None
    dataset = metadata.pop("dataset", None) or dataset
    on_hub = base_model is not None and base_model.count("/") <= 1 and not base_model.startswith((".", "/"))
    data = ModelCardData(
        base_model=base_model if on_hub else None,
        library_name="transformers",
        model_name=title or folder.name,
        datasets=[dataset] if isinstance(dataset, str) else list(dataset or []) or None,
        tags=sorted({*TAGS, *([tags] if isinstance(tags, str) else tags or [])}),
        **metadata,
    )
    card = ModelCard.from_template(
        data,
        template_str=TEMPLATE,
        title=title or folder.name,
        base_model=base_model or "a model",
        dataset=dataset or "not named",
        sources={name.replace("|", "\\|"): pairs for name, pairs in sources_with_metrics(train_dataset).items()},
        loss=", ".join(args.loss_types),
        beta=args.beta,
        reference="none" if reference is None else reference.describe(),
        versions=", ".join(
            f"{module.__name__} {module.__version__}" for module in (holdfast, transformers, torch, peft)
        ),
    )
    none = f"start again: there is no complete checkpoint in {folder}"
    with placed(folder, "the model card README.md", lambda: last_complete(folder, none=none)) as staged:
        card.save(staged / "README.md")
