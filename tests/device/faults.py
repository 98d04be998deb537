"""Faults to plant into the real code: each must be found, with the line that is marked here."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any
from unittest.mock import patch

import torch
from transformers.models.llama import modeling_llama

import holdfast.trainer
from holdfast.scoring.score import Scores


def _host_tensor(scores: Scores) -> None:
    _ = scores.logps.per_token * torch.arange(len(scores.logps.per_token))  # planted: host tensor


def _item(scores: Scores) -> None:
    scores.logps.per_token.sum().item()  # planted: item


def _float(scores: Scores) -> None:
    float(scores.logps.per_token.sum())  # planted: float


def _condition(scores: Scores) -> None:
    if scores.logps.per_token.sum() > 0:  # planted: condition
        pass


def _host_mask(scores: Scores) -> None:
    torch.ones(len(scores.logps.per_token), dtype=torch.bool).to(scores.logps.per_token.device)  # planted: host mask


def _host_list(scores: Scores) -> None:
    torch.tensor([1.0, 2.0], device=scores.logps.per_token.device)  # planted: host list


def _host_index(scores: Scores) -> None:
    _ = scores.logps.per_token[torch.tensor([0, 1])]  # planted: host index


def _boolean_index(scores: Scores) -> None:
    _ = scores.logps.per_token[scores.logps.per_token > 0]  # planted: boolean index


def _to_host(scores: Scores) -> None:
    scores.logps.per_token.detach().cpu()  # planted: to host


def _unpinned(scores: Scores) -> None:
    torch.ones(3).to(scores.logps.per_token.device, non_blocking=True)  # planted: unpinned


def _synchronize(scores: Scores) -> None:
    torch.cuda.synchronize()  # planted: synchronize


_IN_THE_METRICS: dict[str, Callable[[Scores], None]] = {
    "host tensor": _host_tensor,
    "item": _item,
    "float": _float,
    "condition": _condition,
    "host mask": _host_mask,
    "host list": _host_list,
    "host index": _host_index,
    "boolean index": _boolean_index,
    "to host": _to_host,
    "unpinned": _unpinned,
    "synchronize": _synchronize,
}
"""By name: what is done to a batch's scores right before its metrics are computed."""

FAULTS = (*_IN_THE_METRICS, "twice the norms", "no norms")
"""The names of all faults."""


@contextlib.contextmanager
def planted(name: str | None) -> Iterator[None]:
    """Inside, the fault of this name is in the code."""
    if name is None:
        yield
        return
    if name in _IN_THE_METRICS:
        plain, do = holdfast.trainer.batch_metrics, _IN_THE_METRICS[name]

        def batch_metrics(*args: Any, **kwargs: Any) -> Any:
            do(next(value for value in args if isinstance(value, Scores)))
            return plain(*args, **kwargs)

        with patch.object(holdfast.trainer, "batch_metrics", batch_metrics):
            yield
        return
    norm = modeling_llama.LlamaRMSNorm
    forward: Callable[..., Any] = norm.forward

    def other_forward(module: Any, states: Any) -> Any:
        return forward(module, forward(module, states)) if name == "twice the norms" else states

    with patch.object(norm, "forward", other_forward):
        yield
