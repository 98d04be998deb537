"""What follows the head: how a model changes its logits after the output embeddings.

Gemma bounds its logits by a soft cap; Cohere, Granite and Falcon-H1 multiply or divide them. `scoring.head` computes
logits itself, a chunk at a time, so it must do the same. Each model's configuration names the cap and the factor, but
not which of them its code applies, nor in which direction. So the first forward pass of a model sends known values, the
probe, through its own code in place of logits. What comes back must match one of the transforms that the configuration
allows. The match is remembered for the model.

A model whose weights are sharded over processes is read by all of them in the same forward pass, however much of it one
of them knew before: the pass that reads calls the head twice, and a head that is gathered is gathered by all.

A model that matches none, because it masks some tokens for example, is scored through its own logits. That is exact.
Given up: memory for such a model, since all its `[N V]` logits are alive at once.
"""

import weakref
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel

from holdfast.agreement import of_all

SCALE_NAMES = ("logit_scale", "logits_scaling", "output_multiplier", "lm_head_multiplier")
"""Configuration names of the number by which a model family multiplies or divides its logits."""

CAP_NAME = "final_logit_softcapping"
"""Configuration name of the bound on a model's logits."""


class LogitTransform(NamedTuple):
    """What a model does to the output of its head: `cap * tanh(scale * x / cap)`; without a cap, `scale * x`."""

    scale: float = 1.0
    cap: float | None = None

    def __call__(self, logits: Tensor) -> Tensor:
        if self.scale != 1.0:
            logits = logits * self.scale
        if self.cap is not None:
            logits = self.cap * torch.tanh(logits / self.cap)
        return logits

    def apply_(self, logits: Tensor) -> None:
        """Overwrites the logits with their transform."""
        if self.cap is not None:
            logits.mul_(self.scale / self.cap).tanh_().mul_(self.cap)
        elif self.scale != 1.0:
            logits.mul_(self.scale)


Reading = LogitTransform | Literal["unread", "own forward"]
"""What is known of a model: its transform; "unread" before its first forward pass; or "own forward" where only the
model's own code knows what it does to its logits."""

_Readings = weakref.WeakKeyDictionary[nn.Module, tuple[tuple[float | None, ...], Any]]
"""By model: the configured numbers at the time of reading, and the reading."""

_READINGS: _Readings = weakref.WeakKeyDictionary()
"""What this process knows."""

_AGREED: _Readings = weakref.WeakKeyDictionary()
"""What all processes know of sharded models."""


def known_transform(causal_lm: PreTrainedModel) -> Reading:
    """What is known of the model; "unread" again once its configured numbers have changed."""
    configured, reading = (_AGREED if causal_lm in _AGREED else _READINGS).get(causal_lm, (None, "unread"))
    return reading if configured == _configured(causal_lm) else "unread"


def agree_on_transform(causal_lm: PreTrainedModel) -> None:
    """From now on all processes know the same of this model, whose weights are sharded: nothing, unless all knew the
    same before. Collective the first time, before the model's first forward pass."""
    if causal_lm not in _AGREED:
        first, *others = of_all(known_transform(causal_lm))
        is_same = all(other == first for other in others)
        _AGREED[causal_lm] = (_configured(causal_lm), first if is_same else "unread")


def probe(vocabulary: int, device: torch.device) -> Float[Tensor, "1 1 V"]:
    """The values that are sent through a model in place of logits."""
    return torch.linspace(-60.0, 60.0, vocabulary, device=device)[None, None]


def read_transform(causal_lm: PreTrainedModel, vocabulary: int, answer: Tensor) -> Reading:
    """The transform that turned the probe into `answer`, the model's output; remembered for the model. For a sharded
    model that is a collective call, and "own forward" where processes read differently."""
    configured = _configured(causal_lm)
    cap, *multipliers = configured
    scales = [1.0, *(scale for m in multipliers if m for scale in (float(m), 1.0 / float(m)))]
    sent = probe(vocabulary, answer.device)
    reading: Reading = "own forward"
    for transform in (LogitTransform(scale, c) for c in (None, cap) for scale in scales):
        if answer.shape == sent.shape and torch.allclose(answer.float(), transform(sent), rtol=1e-4, atol=1e-4):
            reading = transform
            break
    if causal_lm not in _AGREED:
        _READINGS[causal_lm] = (configured, reading)
        return reading
    readings: list[Reading] = of_all(reading)
    first, *others = readings
    agreed: Reading = first if all(other == first for other in others) else "own forward"
    _AGREED[causal_lm] = (configured, agreed)
    return agreed


def _configured(causal_lm: PreTrainedModel) -> tuple[float | None, ...]:
    config = causal_lm.config.get_text_config()
    return tuple(getattr(config, name, None) for name in (CAP_NAME, *SCALE_NAMES))
