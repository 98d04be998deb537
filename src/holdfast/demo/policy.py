"""The start policy of the demo, and what is measured of every policy that comes from it.

The policy is a Llama of 84,000 parameters, trained from scratch on text of the source until its loss is next to the
source's entropy. Everything measured here (samples, log-probs, KL) is computed from full logits by a few plain lines.
It is not computed by the package's own log-prob code, so that the demo notices if that is wrong. Given up: speed on
anything larger than this world.

Dimensions: S texts, T tokens per text, V vocabulary.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from holdfast.demo.world import BOS_ID, EOS_ID, PAD_ID, Pairs, World

_CHUNK_TEXTS = 4096
"""Texts per forward pass when scoring: bounds memory, changes no number."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """A mean over samples and its standard error."""

    value: float
    error: float

    @classmethod
    def of(cls, samples: Float[Tensor, "S"]) -> "Estimate":
        """The sample mean, and the sample standard deviation over sqrt(S)."""
        samples = samples.double()
        return cls(value=float(samples.mean()), error=float(samples.std()) / math.sqrt(len(samples)))


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurement:
    """What is known of a policy: true reward, KL to the start policy (nats per text), fluency (nats per token)."""

    reward: Estimate
    kl: Estimate
    fluency: Estimate


def make_policy(world: World, *, hidden_size: int = 64, num_layers: int = 2, seed: int = 0) -> LlamaForCausalLM:
    """A Llama with fresh weights, as large as the world needs."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(
            LlamaConfig(
                vocab_size=world.source.vocabulary_size,
                hidden_size=hidden_size,
                intermediate_size=2 * hidden_size,
                num_hidden_layers=num_layers,
                num_attention_heads=4,
                num_key_value_heads=4,
                max_position_embeddings=max(16, world.source.length + 1),
                pad_token_id=PAD_ID,
                bos_token_id=BOS_ID,
                eos_token_id=EOS_ID,
            )
        )


def pretrain(
    policy: PreTrainedModel,
    world: World,
    *,
    num_steps: int,
    generator: torch.Generator,
    texts_per_step: int = 256,
    learning_rate: float = 5e-3,
    on_step: Callable[[], None] = lambda: None,
) -> None:
    """Trains `policy` in place by maximum likelihood on fresh text of the source: AdamW, warmup, cosine to zero."""
    num_warmup = max(1, num_steps // 20)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=learning_rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / num_warmup, 0.5 * (1 + math.cos(math.pi * step / num_steps)))
    )
    policy.train()
    for _ in range(num_steps):
        texts = world.source.sample(texts_per_step, generator)
        logits = _next_token_logits(policy, texts)
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), texts.flatten())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        on_step()
    policy.eval()


@torch.no_grad()
def sample_texts(policy: nn.Module, *, num_texts: int, length: int, generator: torch.Generator) -> Int[Tensor, "S T"]:
    """Texts drawn from the policy token by token, at temperature 1 and without truncating any distribution."""
    tokens, cache, columns = torch.full((num_texts, 1), BOS_ID), None, []
    with _evaluating(policy):
        for _ in range(length):
            output = policy(input_ids=tokens, past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            tokens = torch.multinomial(output.logits[:, -1].double().softmax(-1), 1, generator=generator)
            columns.append(tokens)
    return torch.cat(columns, dim=1)


@torch.no_grad()
def next_token_logps(policy: nn.Module, texts: Int[Tensor, "S T"]) -> Float[Tensor, "S T V"]:
    """`log pi(v | <bos>, y_<t)` for every next token v, nats, fp64."""
    with _evaluating(policy):
        chunks = [_next_token_logits(policy, chunk).double().log_softmax(-1) for chunk in texts.split(_CHUNK_TEXTS)]
    return torch.cat(chunks)


def text_logps(policy: nn.Module, texts: Int[Tensor, "S T"]) -> Float[Tensor, "S"]:
    """`log pi(y | <bos>)` per text, nats, fp64."""
    return next_token_logps(policy, texts).gather(-1, texts[..., None]).sum((1, 2))


def text_kls(policy: nn.Module, reference: nn.Module, texts: Int[Tensor, "S T"]) -> Float[Tensor, "S"]:
    """Per text drawn from the policy, an unbiased estimate of `KL(policy || reference)`, nats, never negative.

    `sum_t sum_v pi(v | y_<t) [log pi(v | y_<t) - log pi_ref(v | y_<t)]`: the Rao-Blackwellised form of `log pi(y) -
    log pi_ref(y)`, of the same mean and no larger variance (Amini et al. 2025, arXiv:2504.10637).
    """
    policy_logps = next_token_logps(policy, texts)
    difference = policy_logps - next_token_logps(reference, texts)  # [S T V]
    return (policy_logps.exp() * difference).sum((1, 2))


def preference_accuracy(policy: nn.Module, reference: nn.Module | None, pairs: Pairs) -> Estimate:
    """The share of pairs whose chosen text has the larger implicit reward `log pi(y) - log pi_ref(y)`.

    Without a reference the implicit reward is `log pi(y)`. Equal rewards count as wrong.
    """
    rewards = []
    for texts in (pairs.chosen, pairs.rejected):
        logps = text_logps(policy, texts)
        rewards.append(logps if reference is None else logps - text_logps(reference, texts))
    chosen, rejected = rewards
    return Estimate.of((chosen > rejected).double())


def measure(
    policy: nn.Module, reference: nn.Module, world: World, *, num_texts: int, generator: torch.Generator
) -> Measurement:
    """Reward, KL to `reference` and fluency of `policy`, from texts it writes itself.

    Fluency is the mean log-prob per token of its texts under the source; the source's own is minus its entropy rate.
    """
    texts = sample_texts(policy, num_texts=num_texts, length=world.source.length, generator=generator)
    return Measurement(
        reward=Estimate.of(world.reward(texts)),
        kl=Estimate.of(text_kls(policy, reference, texts)),
        fluency=Estimate.of(world.source.token_logps(texts).mean(1)),
    )


def _next_token_logits(policy: nn.Module, texts: Int[Tensor, "S T"]) -> Float[Tensor, "S T V"]:
    prompt = torch.full_like(texts[:, :1], BOS_ID)
    return policy(input_ids=torch.cat((prompt, texts[:, :-1]), dim=1), use_cache=False).logits.float()


@contextmanager
def _evaluating(module: nn.Module) -> Iterator[None]:
    """Evaluation mode inside, the mode of before afterwards: a policy is measured in the middle of its training."""
    was_training = module.training
    module.eval()
    try:
        yield
    finally:
        module.train(was_training)
