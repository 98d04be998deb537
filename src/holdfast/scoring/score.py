"""Log-probs of completion tokens: `(model, PairBatch) -> Scores`, one forward pass for policy and reference alike.

The model runs its own forward pass, whatever wraps it (DDP, FSDP, PEFT, autocast). Three things differ from a plain
call, each in a module of its own, and each is undone when the pass ends:

- its head projects completion tokens only, in chunks, and returns log-probs (`scoring.completion_head`);
- where rows hold several sequences, its attention keeps them apart (`scoring.attention`);
- under `torch.compile`, its body is compiled without its head (`scoring.forward`).

So no `[N V]` tensor of logits is alive. Given up: a trained head's logits are computed once more in the backward pass.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

from jaxtyping import Float
from torch import Tensor, nn

from holdfast.batch import PairBatch, SequenceLogps
from holdfast.internals.torch import is_compiled
from holdfast.scoring.attention import attending
from holdfast.scoring.causal_lm import is_sharded, matrix_of, output_embeddings, unwrap, vocabulary_size
from holdfast.scoring.completion_head import PER_TOKEN, STATE_SUMS, CompletionHead, Projection
from holdfast.scoring.forward import compiled_body
from holdfast.scoring.router import returning_sums
from holdfast.scoring.transform import agree_on_transform

CHUNK_LOGITS = 2**26
"""Most logits of a chunk: 256 MiB in fp32, which is 2,048 tokens of a 32k vocabulary and 441 of a 152k one."""

CHUNK_TOKENS_MIN = 64
"""Fewest tokens of a chunk, however large the vocabulary."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenStatistics:
    """What the metrics and WPO read of each completion token's distribution p; no gradients.

    `entropy` in nats; `mean_logit`, the mean over the vocabulary; `is_top1`, 1.0 where the token is the most likely
    one; `log_sum_sq_probs` = log sum_v p(v)^2 (Zhou et al. 2024, Eq. 2, arXiv:2406.11827).
    """

    entropy: Float[Tensor, "N"]
    mean_logit: Float[Tensor, "N"]
    is_top1: Float[Tensor, "N"]
    log_sum_sq_probs: Float[Tensor, "N"]

    @classmethod
    def of_columns(cls, columns: Sequence[Tensor]) -> Self:
        """The statistics whose `columns()` these are."""
        entropy, mean_logit, is_top1, log_sum_sq_probs = columns
        return cls(entropy=entropy, mean_logit=mean_logit, is_top1=is_top1, log_sum_sq_probs=log_sum_sq_probs)

    def columns(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The statistics in the order of `scoring.head.token_logps`."""
        return self.entropy, self.mean_logit, self.is_top1, self.log_sum_sq_probs


@dataclass(frozen=True, slots=True, kw_only=True)
class Scores:
    """The log-probs of a batch; its statistics, and its load-balancing loss (MoE) or the `router_sums` behind it, where
    they were asked for."""

    logps: SequenceLogps
    statistics: TokenStatistics | None = None
    aux_loss: Float[Tensor, ""] | None = None
    router_sums: Float[Tensor, "K"] | None = None


def score(
    model: nn.Module,
    batch: PairBatch,
    *,
    statistics: bool = False,
    router_logits: bool = False,
    router_weights: Tensor | None = None,
    chunk_tokens: int | None = None,
) -> Scores:
    """Log-probs `log pi(y_t | x, y_<t)` (nats, fp32) of the batch's N completion tokens under `model`.

    `model` is a causal language model, as it is or wrapped (PEFT, DDP, FSDP, `torch.compile`). Gradients flow when they
    are enabled. The log-softmax is taken in fp32 whatever the autocast dtype. `statistics` adds `TokenStatistics`,
    `router_logits` the model's own load-balancing loss, or in its place the `router_sums` of `scoring.router`, where
    `router_weights` say how often each token counts. `chunk_tokens` bounds the tokens projected at a time; its default
    keeps a chunk at `CHUNK_LOGITS` logits. Raises ValueError when the model has no output embeddings.
    """
    causal_lm = unwrap(model)
    if is_sharded(model):
        agree_on_transform(causal_lm)
    vocabulary, head = vocabulary_size(causal_lm), output_embeddings(causal_lm)
    projection = Projection(
        forward=head.forward,
        matrix=matrix_of(head),
        chunk_tokens=chunk_tokens or max(CHUNK_TOKENS_MIN, CHUNK_LOGITS // vocabulary),
        with_statistics=statistics,
        any_order=batch.num_pairs == 0,  # such a batch is scored for the store, and compared with no policy
    )
    completion_head = CompletionHead(causal_lm, head, vocabulary, batch, projection)
    narrows = not is_compiled(model)  # to the compiler a layer whose forward comes and goes is another model
    options = {"use_cache": False} | ({"output_router_logits": True} if router_logits else {})
    with (
        attending(causal_lm, batch.inputs, needs_mask=router_logits, narrows=narrows) as inputs,
        completion_head.installed(),
        returning_sums(causal_lm, router_weights),
        compiled_body(model, causal_lm) as run,
    ):
        outputs = run(**inputs, **options)
    # A model that is split over devices ends on another one than it began on.
    logps, *columns = (values.to(batch.sequence.device) for values in outputs[PER_TOKEN])
    sums = outputs[STATE_SUMS].to(batch.sequence.device) if batch.sums_states else None
    return Scores(
        logps=SequenceLogps(
            per_token=logps, sequence=batch.sequence, num_sequences=batch.num_sequences, state_sums=sums
        ),
        statistics=TokenStatistics.of_columns(columns) if statistics else None,
        aux_loss=outputs.get("aux_loss") if router_weights is None else None,
        router_sums=None if router_weights is None else outputs.get("aux_loss"),
    )
