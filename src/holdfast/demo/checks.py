"""What the demo expects, and whether it happened.

Gates are arithmetic: they hold on every machine and seed, or something is broken. The other checks are findings of the
field that a small experiment usually repeats. A miss of these is reported, and does not fail the demo. "TR-DPO is
better at equal KL" is not among them: at this size it depends on the seed.
"""

import math

from holdfast.demo.frontier import Frontier
from holdfast.demo.policy import Estimate
from holdfast.demo.results import ArmResult, Check

FIRST_LOSS_TOLERANCE = 1e-5
AGREEMENT_TOLERANCE = 1e-4
NUM_ERRORS = 3.0
"""Standard errors by which one number must exceed another to be called larger."""
NUM_ERRORS_OF_BOUND = 5.0
"""Standard errors by which a policy may seem to lie above the frontier: none of many may fail by chance."""

FIXED_ARMS = ("model", "adapter", "precomputed")


def check_all(arms: tuple[ArmResult, ...], frontier: Frontier) -> tuple[Check, ...]:
    """Every check, gates first."""
    by_name = {arm.name: arm for arm in arms}
    fixed, moving, unanchored = by_name["model"], by_name["tr-dpo"], by_name["none"]
    return (
        first_loss(tuple(arm for arm in arms if arm is not unanchored)),
        agreement(tuple(by_name[name] for name in FIXED_ARMS)),
        bounded(arms, frontier),
        Check(
            expected="a moving reference goes further out in KL than a fixed one",
            found=f"{moving.measurement.kl.value:.2f} against {fixed.measurement.kl.value:.2f} nats per text",
            is_met=exceeds(moving.measurement.kl, fixed.measurement.kl),
            is_gate=False,
        ),
        Check(
            expected="without a reference the policy collapses: its texts are less fluent than with one",
            found=f"{unanchored.measurement.fluency.value:.2f} against "
            f"{fixed.measurement.fluency.value:.2f} nats per token",
            is_met=exceeds(fixed.measurement.fluency, unanchored.measurement.fluency),
            is_gate=False,
        ),
    )


def first_loss(arms: tuple[ArmResult, ...]) -> Check:
    """With a reference that is the start policy, the first logged loss is ln 2."""
    worst = max(arms, key=lambda arm: abs(arm.losses[0] - math.log(2)))
    return Check(
        expected=f"the first loss against a reference is ln 2 = {math.log(2):.6f} (to {FIRST_LOSS_TOLERANCE:g})",
        found=f"at worst {worst.losses[0]:.6f} ({worst.label})",
        is_met=abs(worst.losses[0] - math.log(2)) <= FIRST_LOSS_TOLERANCE,
        is_gate=True,
    )


def agreement(arms: tuple[ArmResult, ...]) -> Check:
    """Arms that hold the same reference have the same losses all along, and end as the same policy."""
    first, *others = arms
    loss_gap = max(_largest_gap(first.losses, other.losses) for other in others)
    logp_gap = max(_largest_gap(first.held_out_logps, other.held_out_logps) for other in others)
    return Check(
        expected=f"the three ways to hold a fixed reference are one run (to {AGREEMENT_TOLERANCE:g})",
        found=f"losses differ by at most {loss_gap:.1e}, final log-probs of held-out texts by {logp_gap:.1e} nats",
        is_met=max(loss_gap, logp_gap) <= AGREEMENT_TOLERANCE,
        is_gate=True,
    )


def bounded(arms: tuple[ArmResult, ...], frontier: Frontier) -> Check:
    """No policy has more reward than its KL allows: a theorem, so a miss means that a measurement is wrong."""
    excesses = [(_excess_in_errors(arm, frontier), arm.label) for arm in arms]
    excess, label = max(excesses)
    return Check(
        expected=f"no policy lies above the frontier (by more than {NUM_ERRORS_OF_BOUND:g} standard errors)",
        found=f"highest against it: {label}, {abs(excess):.1f} standard errors {'above' if excess > 0 else 'below'}",
        is_met=excess <= NUM_ERRORS_OF_BOUND,
        is_gate=True,
    )


def exceeds(larger: Estimate, smaller: Estimate) -> bool:
    """Whether one estimate is larger than the other beyond `NUM_ERRORS` standard errors of their difference."""
    return larger.value - smaller.value > NUM_ERRORS * math.hypot(larger.error, smaller.error)


def _excess_in_errors(arm: ArmResult, frontier: Frontier) -> float:
    """How far above the frontier, in standard errors: those of reward, of KL (through the slope) and of the ceiling."""
    kl, reward = arm.measurement.kl, arm.measurement.reward
    ceiling = frontier.reward_ceiling(kl.value)
    slope = (frontier.reward_ceiling(kl.value + kl.error).value - ceiling.value) if kl.error else 0.0
    rounding = 1e-3
    return (reward.value - ceiling.value) / math.hypot(reward.error, slope, ceiling.error, rounding)


def _largest_gap(first: tuple[float, ...], second: tuple[float, ...]) -> float:
    if len(first) != len(second):
        return math.inf
    return max((abs(a - b) for a, b in zip(first, second, strict=True)), default=0.0)
