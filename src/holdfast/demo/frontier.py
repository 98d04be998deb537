"""The best that any policy can do: the reward-KL frontier of `pi* ~ pi_ref exp(r / beta)`.

No policy has more reward at the same KL to the reference than `pi*_beta` for some beta (Rafailov et al. 2023, Eq. 4,
arXiv:2305.18290), and here the reward is known, so the frontier can be computed. The reference is a transformer, whose
texts are too many to enumerate; but it learnt a source whose tilted form is known exactly, so texts are drawn from
`q_beta ~ source exp(r / beta)` and weighted by `pi_ref / source`. The reward cancels out of these importance weights,
so they stay near 1 for every beta. Of texts drawn from the reference itself, only a handful would be useful at 4 nats.
Given up: references that are far from a known source.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from holdfast.demo.policy import Estimate, text_logps
from holdfast.demo.world import World


@dataclass(frozen=True, slots=True, kw_only=True)
class Optimum:
    """The optimal policy at one beta: its reward, KL to the reference, fluency, and `log Z(beta)` (nats).

    `effective_texts` is the Kish sample size `(sum w)^2 / sum w^2` that the estimates rest on.
    """

    beta: float
    reward: Estimate
    kl: Estimate
    fluency: Estimate
    log_partition: Estimate
    effective_texts: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Frontier:
    """Optimal policies from the mildest (largest beta) to the strongest."""

    optima: tuple[Optimum, ...]

    def reward_ceiling(self, kl: float) -> Estimate:
        """The most reward that a policy at this KL to the reference can have, with the ceiling's own error.

        For every policy and beta, `E[r] <= beta KL + beta log Z(beta)` (Donsker and Varadhan), with equality for
        `pi*_beta`; the ceiling is the least right-hand side. A coarse grid of betas loosens it and never breaks it.
        """
        optimum = min(self.optima, key=lambda optimum: optimum.beta * (kl + optimum.log_partition.value))
        return Estimate(
            value=optimum.beta * (kl + optimum.log_partition.value), error=optimum.beta * optimum.log_partition.error
        )


def frontier(
    reference: nn.Module,
    world: World,
    betas: Sequence[float],
    *,
    num_texts: int,
    generator: torch.Generator,
    on_step: Callable[[], None] = lambda: None,
) -> Frontier:
    """The optimal policies for each of `betas`, from `num_texts` weighted texts each."""
    optima = []
    for beta in sorted(betas, reverse=True):
        optima.append(optimal_policy(reference, world, beta, num_texts=num_texts, generator=generator))
        on_step()
    return Frontier(optima=tuple(optima))


def optimal_policy(
    reference: nn.Module, world: World, beta: float, *, num_texts: int, generator: torch.Generator
) -> Optimum:
    """The optimum at `beta` by self-normalised importance sampling from the tilted source.

    With `w = pi_ref(y) / p_source(y)` and texts from the tilted source of partition `Z_source`:
    `log Z = log Z_source + log mean(w)`, `E*[f] = mean(w f) / mean(w)`, `KL(pi* || pi_ref) = E*[r] / beta - log Z`.
    Errors are standard errors by the delta method.
    """
    proposal, source_log_partition = world.tilted_source(beta)
    texts = proposal.sample(num_texts, generator)
    source_logps = world.source.token_logps(texts)
    log_weights = text_logps(reference, texts) - source_logps.sum(1)
    log_mean_weight = float(log_weights.logsumexp(0)) - math.log(num_texts)
    importance_weights = (log_weights - log_mean_weight).exp()  # [S], mean 1

    def influence(values: torch.Tensor) -> tuple[float, torch.Tensor]:
        mean = float((importance_weights * values).mean())
        return mean, importance_weights * (values - mean)

    def estimate(value: float, influences: torch.Tensor) -> Estimate:
        return Estimate(value=value, error=float(influences.std()) / math.sqrt(num_texts))

    reward, reward_influence = influence(world.reward(texts))
    fluency, fluency_influence = influence(source_logps.mean(1))
    log_partition, partition_influence = source_log_partition + log_mean_weight, importance_weights - 1
    return Optimum(
        beta=beta,
        reward=estimate(reward, reward_influence),
        kl=estimate(reward / beta - log_partition, reward_influence / beta - partition_influence),
        fluency=estimate(fluency, fluency_influence),
        log_partition=estimate(log_partition, partition_influence),
        effective_texts=num_texts**2 / float(importance_weights.square().sum()),
    )
