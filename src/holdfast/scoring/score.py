"""Log-probs of completion tokens: `(model, PairBatch) -> Scores`, for policy and reference alike.

The model runs its own forward pass, whatever wraps it (DDP, FSDP, PEFT, autocast), up to its output embeddings; there
only the N completion positions are taken, projected in chunks, and reduced to numbers per token. So neither prompts nor
padding reach the head, and no tensor of `[N V]` is alive. A head that is a plain matrix goes through `scoring.head`;
any other (adapters, hooks, quantised or sharded weights) through its own forward, with a chunk's logits made again in
the backward pass.

What a model does to its logits after the head (soft-capping in Gemma, scaling in Cohere and Granite) is read from its
configuration and *checked against the model itself* on first use, by sending known values through the real forward.
A model that does something else (masks some tokens, say) is scored exactly through its own logits, at `[N V]` memory.

Given up: one more matrix product of a trained head per step (the recomputation) against keeping the logits.
"""

import contextlib
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, cast, final

import torch
from accelerate.utils import extract_model_from_parallel
from jaxtyping import Float, Int
from peft import PeftModel
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from holdfast.batch import PairBatch, SequenceLogps
from holdfast.internals.torch import compiler, is_compiled, uncompiled
from holdfast.scoring.attention import attending
from holdfast.scoring.head import LogitTransform, is_sharded, linear_columns, matrix_of, token_columns

CHUNK_LOGITS = 2**26
"""Logits alive at once: 256 MiB in fp32, which is 2,048 tokens of a 32k vocabulary and 441 of a 152k one."""

CHUNK_TOKENS_MIN = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenStatistics:
    """What the metrics and WPO want to know of each completion token's distribution p; no gradients.

    `entropy` nats, `mean_logit` mean over the vocabulary, `is_top1` 1.0 where the token is the most likely one,
    `log_sum_sq_probs` = log sum_v p(v)^2 (Zhou et al. 2024, Eq. 2, arXiv:2406.11827).
    """

    entropy: Float[Tensor, "N"]
    mean_logit: Float[Tensor, "N"]
    is_top1: Float[Tensor, "N"]
    log_sum_sq_probs: Float[Tensor, "N"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Scores:
    """The log-probs of a batch, statistics when they were asked for, and the MoE load-balancing loss when it was."""

    logps: SequenceLogps
    statistics: TokenStatistics | None = None
    aux_loss: Float[Tensor, ""] | None = None


def score(
    model: nn.Module,
    batch: PairBatch,
    *,
    statistics: bool = False,
    router_logits: bool = False,
    chunk_tokens: int | None = None,
) -> Scores:
    """Log-probs `log pi(y_t | x, y_<t)` (nats, fp32) of the batch's N completion tokens under `model`.

    `model` is a causal language model, as it is or wrapped (PEFT, DDP, FSDP, `torch.compile`). Gradients flow when they
    are enabled. The log-softmax is taken in fp32 whatever the autocast dtype. `statistics` adds `TokenStatistics`,
    `router_logits` the model's own load-balancing loss. `chunk_tokens` bounds the tokens projected at a time; its
    default keeps a chunk at `CHUNK_LOGITS` logits. Raises ValueError when the model has no output embeddings.
    """
    options = {"use_cache": False} | ({"output_router_logits": True} if router_logits else {})
    head = _CompletionHead(model, batch, statistics, chunk_tokens)
    narrows = not is_compiled(model)  # to the compiler a forward that comes and goes is another model
    switched = attending(head.causal_lm, batch.inputs, needs_mask=router_logits, narrows=narrows)
    with switched as inputs, head.installed(), _body_compiled(model, head) as run:
        outputs = run(**inputs, **options)
    # A model that is split over devices ends on another one than it began on.
    columns = tuple(column.to(batch.sequence.device) for column in outputs["columns"])
    logps = SequenceLogps(per_token=columns[0], sequence=batch.sequence, num_sequences=batch.num_sequences)
    return Scores(
        logps=logps,
        statistics=_statistics(columns) if statistics else None,
        aux_loss=outputs.get("aux_loss"),
    )


def unwrap(model: nn.Module) -> PreTrainedModel:
    """The transformers model inside `model`: without DDP, FSDP, DeepSpeed, `torch.compile` and PEFT around it."""
    inner: Any = extract_model_from_parallel(model, keep_torch_compile=False)
    return cast(PreTrainedModel, inner.get_base_model() if isinstance(inner, PeftModel) else inner)


def _statistics(columns: tuple[Tensor, ...]) -> TokenStatistics:
    entropy, mean_logit, is_top1, log_sum_sq_probs = columns[1:]
    return TokenStatistics(entropy=entropy, mean_logit=mean_logit, is_top1=is_top1, log_sum_sq_probs=log_sum_sq_probs)


# --- the head -------------------------------------------------------------------------------------------------------


@final
class _CompletionHead:
    """Stands in for a model's head during one forward pass, and makes the model return per-token columns.

    The columns travel as the model's own output, because wrappers such as FSDP hook the tensors a forward returns.
    """

    def __init__(self, model: nn.Module, batch: PairBatch, with_statistics: bool, chunk_tokens: int | None) -> None:
        self.causal_lm = causal_lm = unwrap(model)
        self.batch = batch
        self.with_statistics = with_statistics
        self.vocabulary = vocabulary_size(causal_lm)
        self.chunk_tokens = chunk_tokens or max(CHUNK_TOKENS_MIN, CHUNK_LOGITS // self.vocabulary)
        self.head = output_embeddings(causal_lm)
        self.matrix = None if is_sharded(model) else matrix_of(self.head)
        self.head_forward = self.head.forward
        self.model_forward = causal_lm.forward
        self.states: Tensor | None = None
        self.columns: tuple[Tensor, ...] | None = None

    @contextlib.contextmanager
    def installed(self) -> Iterator[None]:
        """Both forwards patched on their instances; undone on leaving, so `generate` never sees them."""
        with _patched(self.head, self._forward_head), _patched(self.causal_lm, self._forward_model):
            yield

    def _forward_head(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self.states is None:
            self.states = self._completion_states(hidden)
        match _known_transform(self.causal_lm):
            case "unread":
                return _probe(self.vocabulary, hidden.device)
            case "own forward":
                return self.head_forward(self.states)[None]
            case transform:
                self.columns = self._chunked_columns(transform, self.states)
                return self.states[:0].sum().reshape(1, 1, 1).clone()  # zero, with a graph

    def _forward_model(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        outputs = self.model_forward(*args, **kwargs)
        if self.states is None:
            raise ValueError(
                f"{type(self.causal_lm).__name__} was asked for log-probs, but its forward pass never called its "
                "output embeddings. holdfast scores causal language models; check `get_output_embeddings()`."
            )
        anchor = outputs.logits
        if _known_transform(self.causal_lm) == "unread":
            if _read_transform(self.causal_lm, outputs.logits) == "own forward":
                outputs = self.model_forward(*args, **kwargs)
            else:
                anchor = self.head(self.states)  # through `__call__`: sharding hooks on the head must run
        if self.columns is None:
            self.columns = token_columns(outputs.logits[0], self._target(outputs.logits), self.with_statistics)
        else:
            # Adds zero. The gradient so passes through the head's output first, where the hooks of a head that is
            # sharded by itself wait for it to gather the weights that the recomputation needs.
            self.columns = (self.columns[0] + anchor[:0].sum(), *self.columns[1:])
        aux_loss = getattr(outputs, "aux_loss", None)
        return {"columns": self.columns} | ({} if aux_loss is None else {"aux_loss": aux_loss})

    def _target(self, like: Tensor) -> Int[Tensor, "N"]:
        return self.batch.target.to(like.device)

    def _completion_states(self, hidden: Tensor) -> Float[Tensor, "N h"]:
        """The hidden states that predict the completion tokens.

        Prompt-learning adapters put virtual tokens before each row, so a row's own tokens are counted from its end.
        """
        num_columns = self.batch.inputs["input_ids"].shape[1]
        hidden = hidden[:, hidden.shape[1] - num_columns :]
        return hidden.reshape(-1, hidden.shape[-1])[self.batch.source.to(hidden.device)]

    def _columns(self, transform: LogitTransform, states: Tensor, target: Tensor) -> tuple[Tensor, ...]:
        return token_columns(transform(self.head_forward(states).float()), target, self.with_statistics)

    def _chunked_columns(self, transform: LogitTransform, states: Float[Tensor, "N h"]) -> tuple[Tensor, ...]:
        """`token_columns` a chunk at a time.

        Heads that are more than a matrix run through their own forward; with gradients enabled a chunk's logits are
        then made again in the backward pass.
        """
        if self.matrix is not None:
            return linear_columns(
                states, self.matrix.weight, self.matrix.bias, self._target(states), transform,
                chunk_tokens=self.chunk_tokens, with_statistics=self.with_statistics,
                any_order=self.batch.num_pairs == 0,  # of which no policy is scored, to be compared with
            )  # fmt: skip
        columns = partial(self._columns, transform)
        chunks = zip(states.split(self.chunk_tokens), self._target(states).split(self.chunk_tokens), strict=True)
        if torch.is_grad_enabled():
            results = [checkpoint(columns, *chunk, use_reentrant=False) for chunk in chunks]
        else:
            results = [columns(*chunk) for chunk in chunks]
        return tuple(torch.cat(column) for column in zip(*results, strict=True))


@contextlib.contextmanager
def _body_compiled(model: nn.Module, head: _CompletionHead) -> Iterator[nn.Module]:
    """What to call instead of a `model` under `torch.compile`: itself as it was before, with its body compiled alone.

    The head that stands in is another one in every forward pass, and so would be the whole model to the compiler.
    """
    if not is_compiled(model):
        yield model
        return
    body: Any = head.causal_lm.base_model
    if body is head.causal_lm:
        raise ValueError(
            f"{type(body).__name__} was to be scored under torch.compile, which compiles a model's body without its "
            f"head; found none at {body.base_model_prefix!r}. Use torch_compile=False."
        )
    compiled: Any = compiler(model)
    with _patched(body, compiled(body.forward)):
        yield uncompiled(model)


@contextlib.contextmanager
def _patched(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """`module.forward` replaced on the instance, and put back as it was found, patched by somebody else or not."""
    previous = module.__dict__.get("forward")
    module.forward = forward
    try:
        yield
    finally:
        if previous is None:
            del module.forward
        else:
            module.forward = previous


def output_embeddings(causal_lm: PreTrainedModel) -> nn.Module:
    """The language-model head. Raises ValueError when the model has none."""
    head = causal_lm.get_output_embeddings() if hasattr(causal_lm, "get_output_embeddings") else None
    if head is None:
        raise ValueError(
            f"{type(causal_lm).__name__} was asked for log-probs, but it has no output embeddings (language-model "
            "head). Pass a causal language model, for example from `AutoModelForCausalLM`."
        )
    return head


def vocabulary_size(causal_lm: PreTrainedModel) -> int:
    """Number of logits per token, after any resizing of the embeddings."""
    head = output_embeddings(causal_lm)
    size = getattr(head, "out_features", None)
    return size if isinstance(size, int) else len(cast(Tensor, head.weight))


# --- what the model does after the head ------------------------------------------------------------------------------

ReadTransform = LogitTransform | Literal["unread", "own forward"]
_READ: "weakref.WeakKeyDictionary[nn.Module, tuple[tuple[float | None, ...], Any]]" = weakref.WeakKeyDictionary()
"""Per model: the configured numbers its transform was read under, and the transform (or that only its own forward
knows what it does to its logits)."""

SCALE_NAMES = ("logit_scale", "logits_scaling", "output_multiplier", "lm_head_multiplier")
"""Configuration names under which model families multiply or divide their logits (Cohere, Granite, Falcon-H1, ...)."""


def _configured(causal_lm: PreTrainedModel) -> tuple[float | None, ...]:
    config = causal_lm.config.get_text_config()
    return (getattr(config, "final_logit_softcapping", None), *(getattr(config, name, None) for name in SCALE_NAMES))


def _known_transform(causal_lm: PreTrainedModel) -> "ReadTransform":
    configured, transform = _READ.get(causal_lm, (None, "unread"))
    return transform if configured == _configured(causal_lm) else "unread"


def _probe(vocabulary: int, device: torch.device) -> Float[Tensor, "1 1 V"]:
    """Values sent through a model in place of logits, to see what comes back."""
    return torch.linspace(-60.0, 60.0, vocabulary, device=device)[None, None]


def _read_transform(causal_lm: PreTrainedModel, answer: Tensor) -> "ReadTransform":
    """Which transform turned `_probe` into `answer`; remembered for the model."""
    configured = _configured(causal_lm)
    cap, *multipliers = configured
    scales = [1.0, *(scale for m in multipliers if m for scale in (float(m), 1.0 / float(m)))]
    probe = _probe(vocabulary_size(causal_lm), answer.device)
    found: ReadTransform = "own forward"
    for transform in (LogitTransform(scale, c) for c in (None, cap) for scale in scales):
        if answer.shape == probe.shape and torch.allclose(answer.float(), transform(probe), rtol=1e-4, atol=1e-4):
            found = transform
            break
    _READ[causal_lm] = (configured, found)
    return found
