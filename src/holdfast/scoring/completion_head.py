"""A stand-in for a model's head, which projects completion tokens only and returns log-probs in place of logits.

The model runs its own forward pass up to its output embeddings. There the stand-in takes the hidden states of the N
completion tokens, so neither prompts nor padding are projected. The log-probs leave as the model's own output, because
wrappers such as FSDP put hooks on the tensors that a forward pass returns.

A head that is a plain matrix is projected by `scoring.head`; where FSDP2 shards it, within the head's own forward pass,
for which its weight is gathered once. Any other runs through its own forward, a chunk at a time,
and a chunk's logits are computed again in the backward pass. Given up there: one more forward pass of the head.
"""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, final

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from holdfast.batch import PairBatch
from holdfast.scoring.forward import replaced_forward
from holdfast.scoring.head import linear_logps, token_logps
from holdfast.scoring.transform import LogitTransform, known_transform, probe, read_transform

PER_TOKEN = "per_token"
"""Where the output of a model with a `CompletionHead` has its tuple of `[N]` log-probs and statistics."""
STATE_SUMS = "state_sums"
"""Where it has the sums of hidden states of each sequence, if the batch asks for them."""


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Projection:
    """How hidden states become log-probs: through the head's `matrix`, or where that is None through its own `forward`.

    At most `chunk_tokens` tokens are projected at a time. `with_statistics` and `any_order` are those of
    `scoring.head.linear_logps`.
    """

    forward: Callable[..., Tensor]
    matrix: nn.Linear | None
    chunk_tokens: int
    with_statistics: bool
    any_order: bool

    def logps(
        self, states: Float[Tensor, "N h"], target: Int[Tensor, "N"], transform: LogitTransform
    ) -> tuple[Float[Tensor, "N"], ...]:
        """The log-probs of `target`, and the statistics of `scoring.head.token_logps` where they were asked for."""
        if self.matrix is not None and not isinstance(self.matrix.weight, DTensor):
            return linear_logps(
                states, self.matrix.weight, self.matrix.bias, target, transform,
                chunk_tokens=self.chunk_tokens, with_statistics=self.with_statistics, any_order=self.any_order,
            )  # fmt: skip
        of_chunk = partial(self._logps_of_chunk, transform)
        chunks = zip(states.split(self.chunk_tokens), target.split(self.chunk_tokens), strict=True)
        if torch.is_grad_enabled():
            results = [checkpoint(of_chunk, states, target, use_reentrant=False) for states, target in chunks]
        else:
            results = [of_chunk(states, target) for states, target in chunks]
        return tuple(torch.cat(values) for values in zip(*results, strict=True))

    def _logps_of_chunk(self, transform: LogitTransform, states: Tensor, target: Tensor) -> tuple[Tensor, ...]:
        return token_logps(transform(self.forward(states).float()), target, self.with_statistics)


@final
class CompletionHead:
    """Stands in for `head`, the output embeddings of `causal_lm`, during one forward pass of a batch."""

    def __init__(
        self, causal_lm: PreTrainedModel, head: nn.Module, vocabulary: int, batch: PairBatch, projection: Projection
    ) -> None:
        self._causal_lm = causal_lm
        self._head = head
        self._vocabulary = vocabulary
        self._batch = batch
        self._projection = projection
        self._model_forward = causal_lm.forward
        self._states: Tensor | None = None
        self._per_token: tuple[Tensor, ...] | None = None

    @contextlib.contextmanager
    def installed(self) -> Iterator[None]:
        """Inside, the model returns `{PER_TOKEN: ...}` (and `aux_loss`, if it computes one); on leaving, its logits."""
        with replaced_forward(self._head, self._forward_head), replaced_forward(self._causal_lm, self._forward_model):
            yield

    def _forward_head(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self._states is None:
            self._states = self._completion_states(hidden)
        match known_transform(self._causal_lm):
            case "unread":
                return probe(self._vocabulary, hidden.device)
            case "own forward":
                return self._projection.forward(self._states)[None]
            case transform:
                self._per_token = self._projection.logps(self._states, self._target(self._states), transform)
                return self._states[:0].sum().reshape(1, 1, 1).clone()  # zero, with a graph

    def _forward_model(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        outputs = self._model_forward(*args, **kwargs)
        if self._states is None:
            raise ValueError(
                f"{type(self._causal_lm).__name__} was asked for log-probs, but its forward pass never called its "
                "output embeddings. holdfast scores causal language models; check `get_output_embeddings()`."
            )
        anchor = outputs.logits
        if known_transform(self._causal_lm) == "unread":
            if read_transform(self._causal_lm, self._vocabulary, outputs.logits) == "own forward":
                outputs = self._model_forward(*args, **kwargs)
            else:
                anchor = self._head(self._states)  # through `__call__`: sharding hooks on the head must run
        if self._per_token is None:
            logits = outputs.logits[0]
            self._per_token = token_logps(logits, self._target(logits), self._projection.with_statistics)
        elif torch.is_grad_enabled():
            # Adds zero. The gradient passes through the head's output first, where the hooks of a head that is
            # sharded by itself wait for it, to gather the weights that the recomputation needs.
            self._per_token = (self._per_token[0] + anchor[:0].sum(), *self._per_token[1:])
        aux_loss = getattr(outputs, "aux_loss", None)
        sums = {STATE_SUMS: self._state_sums(self._states)} if self._batch.sums_states else {}
        return {PER_TOKEN: self._per_token} | sums | ({} if aux_loss is None else {"aux_loss": aux_loss})

    def _target(self, like: Tensor) -> Int[Tensor, "N"]:
        return self._batch.target.to(like.device)

    def _state_sums(self, states: Float[Tensor, "N h"]) -> Float[Tensor, "S h"]:
        """The sums of the hidden states of each sequence, without gradients, in fp32 or wider."""
        states = states.detach().to(torch.promote_types(states.dtype, torch.float32))
        sums = states.new_zeros(self._batch.num_sequences, states.shape[-1])
        return sums.index_add_(0, self._batch.sequence.to(states.device), states)

    def _completion_states(self, hidden: Tensor) -> Float[Tensor, "N h"]:
        """The hidden states that predict the completion tokens.

        Prompt-learning adapters put virtual tokens before each row, so a row's own tokens are counted from its end.
        """
        num_columns = self._batch.inputs["input_ids"].shape[1]
        hidden = hidden[:, hidden.shape[1] - num_columns :]
        return hidden.reshape(-1, hidden.shape[-1])[self._batch.source.to(hidden.device)]
