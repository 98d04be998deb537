"""The greedy completion of prompts: the likeliest next token, again and again, by transformers' `generate`.

Nothing is drawn at random, so no random state moves and the same weights give the same completions. What a model's own
generation config says about how to choose tokens (temperature, penalties, forced tokens) is set aside. A mixture of
models takes the token of the largest sum of weighted log-probs:

    argmax_t  sum_i w_i log pi_i(t | prompt, tokens so far)

The mixture's log-probs of whole completions are known up to a constant (`reference.scorers.mixture`), so this is its
greedy path and not a choice by its own conditionals. Given up: a cache for the second model of a mixture and those
after it, which read the whole row for each token.
"""

import contextlib
import warnings
from collections.abc import Iterator, Sequence
from typing import Any, final

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from holdfast.policy.adapters import is_adapted
from holdfast.policy.sharding import give_back
from holdfast.policy.untouched import untouched
from holdfast.reference.base import Share
from holdfast.scoring.causal_lm import unwrap
from holdfast.scoring.frozen import Autocast, evaluating


def complete_greedily(
    models: Sequence[Share],
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    stop_ids: Sequence[int],
    pad_id: int,
    batch_size: int,
    autocast: Autocast,
) -> list[list[int]]:
    """The token ids of each prompt's completion, without the token of `stop_ids` that ended it.

    `models` are one model, or those of a mixture, each with its share. They are in eval mode meanwhile, and as before
    afterwards. Prompts of a batch are filled up with `pad_id` on the left.
    """
    is_plain = len(models) == 1 and not _learns_prompt(models[0][1])
    size = batch_size if is_plain else 1  # alone, a row needs no filling up
    completions: list[list[int]] = []
    with torch.no_grad(), contextlib.ExitStack() as stack:
        for _, model in models:
            stack.enter_context(_ready(model))
        stack.enter_context(autocast())
        config = GenerationConfig(
            do_sample=False, num_beams=1, use_cache=True, max_new_tokens=max_new_tokens, pad_token_id=pad_id,
            eos_token_id=[*stop_ids] or None,
        )  # fmt: skip
        for start in range(0, len(prompts), size):
            completions += _complete(models, prompts[start : start + size], config, pad_id)
    return [until_stop(ids, stop_ids) for ids in completions]


def until_stop(ids: Sequence[int], stop_ids: Sequence[int]) -> list[int]:
    """The ids before the first of `stop_ids`."""
    end = next((place for place, token in enumerate(ids) if token in stop_ids), len(ids))
    return [*ids[:end]]


def _complete(
    models: Sequence[Share], prompts: Sequence[Sequence[int]], config: GenerationConfig, pad_id: int
) -> list[list[int]]:
    (share, first), *others = models
    device = _device_of(first)
    longest = max(map(len, prompts))
    ids = torch.tensor([[pad_id] * (longest - len(prompt)) + [*prompt] for prompt in prompts], device=device)  # [R T]
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=device)
    processors: Any = LogitsProcessorList([_Mixing(share, others)] if others else [])
    generate: Any = getattr(first, "generate")  # noqa: B009  # nn.Module has no such method
    rows: Tensor = generate(input_ids=ids, attention_mask=mask, generation_config=config, logits_processor=processors)
    return rows[:, longest:].tolist()


def _learns_prompt(model: Any) -> bool:
    """Whether an adapter puts virtual tokens before a row. peft gives the tokens after filled positions other places
    than without them."""
    configs: dict[str, Any] = getattr(model, "peft_config", {}) if is_adapted(model) else {}
    return any(config.is_prompt_learning for config in configs.values())


@final
class _Mixing(LogitsProcessor):
    """Makes the first model's scores of the next token those of the mixture. Rows are not filled up."""

    def __init__(self, share: float, others: Sequence[Share]) -> None:
        self._share = share
        self._others = others

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        mixed = self._share * scores.float().log_softmax(-1)  # [R V]
        for share, model in self._others:
            ids = input_ids.to(_device_of(model))
            logits: Tensor = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits[:, -1]
            mixed = mixed + share * logits.float().log_softmax(-1).to(mixed.device)
        return mixed


@contextlib.contextmanager
def _ready(model: nn.Module) -> Iterator[None]:
    """A context in which the model generates by the config that it is given alone."""
    causal_lm: Any = unwrap(model)
    with untouched(model), evaluating(model), warnings.catch_warnings():
        # peft drops them under virtual tokens; a row that is not filled up has the same without them
        warnings.filterwarnings("ignore", message="Position ids are not supported", category=UserWarning)
        causal_lm.generation_config = GenerationConfig()
        try:
            yield
        finally:
            give_back(model)


def _device_of(model: nn.Module) -> torch.device:
    """Where the model wants its inputs. One with weights on the meta device moves them itself (accelerate)."""
    device = next(model.parameters()).device
    return torch.device("cpu") if device.type == "meta" else device
