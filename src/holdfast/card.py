"""The model card that goes with a trained model: what it was trained from, how, and which reference it had."""

from collections.abc import Sequence
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

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

```python
from transformers import pipeline

generator = pipeline("text-generation", model="{{ title }}")
print(generator([{"role": "user", "content": "What holds kelp to the rock?"}], max_new_tokens=64)[0])
```

Trained with {{ versions }}.
"""


def model_card(
    *,
    title: str,
    base_model: str | None,
    dataset: str | Sequence[str] | None,
    tags: Sequence[str],
    loss: str,
    beta: float,
    reference: str,
    versions: str,
    metadata: dict[str, Any],
) -> ModelCard:
    """The card, as Markdown with metadata; `base_model` is named in the metadata only where it can be a hub id."""
    on_hub = base_model is not None and base_model.count("/") <= 1 and not base_model.startswith((".", "/"))
    data = ModelCardData(
        base_model=base_model if on_hub else None,
        library_name="transformers",
        model_name=title,
        datasets=[dataset] if isinstance(dataset, str) else list(dataset or []) or None,
        tags=sorted({*TAGS, *tags}),
        **metadata,
    )
    return ModelCard.from_template(
        data,
        template_str=TEMPLATE,
        title=title,
        base_model=base_model or "a model",
        dataset=dataset or "not named",
        loss=loss,
        beta=beta,
        reference=reference,
        versions=versions,
    )
