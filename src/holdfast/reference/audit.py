"""The audit at step 0 (law L1): policy and reference are compared on the first batch, in every run.

A wrong reference is a silent error: training goes on, towards another optimum. A fresh reference must give the policy's
own log-probs, so a difference is an error that names the tensor. Where the user chose another reference, the measured
gap is reported once. The pass over the policy's weights that finds NaN before anything runs is here as well. Given up:
one forward pass of policy and reference, and two sums over all weights.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor, nn

from holdfast.agreement import any_of_all, of_all, raised_together
from holdfast.batch import PairBatch, SequenceLogps
from holdfast.policy.sharding import own_part, parameters_of
from holdfast.reference.base import num_bytes
from holdfast.reference.identity.identity import Identity
from holdfast.reference.reference import Reference
from holdfast.scoring.frozen import Autocast, frozen_logps
from holdfast.scoring.precision import is_half_precision
from holdfast.scoring.tolerance import TOLERANCE_NATS, TOLERANCE_NATS_HALF

_CHUNK = 2**18
"""A number of values that a CPU's caches hold, so that two sums read them from memory once."""

Checksums = Mapping[str, tuple[float, float]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Gap:
    """The difference between two models' log-probs of the same tokens, in nats per token, or per completion for
    sums."""

    mean: float
    largest: float

    @classmethod
    def between(cls, policy: SequenceLogps, reference: SequenceLogps, *, of_sums: bool = False) -> "Gap":
        """The gap on one batch."""
        ours, theirs = (logps.sums() if of_sums else logps.per_token for logps in (policy, reference))
        difference = (ours.detach() - theirs).abs()
        return cls(mean=float(difference.mean()), largest=float(difference.max()))

    def is_zero(self, *, is_half_precision: bool) -> bool:
        """Whether rounding explains the gap. False for NaN."""
        return self.mean <= TOLERANCE_NATS_HALF if is_half_precision else self.largest <= TOLERANCE_NATS


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """What an audit found, in words; with the gap that it measured."""

    line: str
    gap: Gap | None = None


def checksums(policy: nn.Module) -> Checksums:
    """Two sums over each parameter and buffer, by name, which tell later which of them changed; of a sharded one, over
    this process's part. ValueError where a parameter has a NaN or an infinity; it names the first one."""
    sums: dict[str, tuple[float, float]] = {}
    for name, tensor in chain(parameters_of(policy).items(), policy.named_buffers()):
        if tensor.is_meta or own_part(tensor).numel() == 0 or not tensor.is_floating_point():
            continue
        total = square = 0.0
        for chunk in _chunks(own_part(tensor)):
            values = chunk.float()
            total, square = total + float(values.sum()), square + float(torch.dot(values, values))
        sums[name] = (total, square**0.5)
        is_weight = isinstance(tensor, nn.Parameter)  # a mask among the buffers may be infinite
        if is_weight and not math.isfinite(total + square) and not bool(own_part(tensor).isfinite().all()):
            raise ValueError(
                f"The policy has NaN or infinite weights, in `{name}` first. Load it again, or look at how it was "
                "trained: in fp16, a loss scale that overflows leaves such weights behind."
            )
    return sums


def _chunks(values: Tensor) -> Sequence[Tensor]:
    """All values, flat: on a CPU in chunks that its caches hold, elsewhere in one, since each chunk is waited for."""
    return values.reshape(-1).split(_CHUNK if values.device.type == "cpu" else max(1, values.numel()))


def introduction(reference: Reference, weights_digest: str | None, found: Finding) -> str:
    """One line: which reference it is, where it is held, and what the audit has found."""
    weights = f", weights {weights_digest[:12]}" if weights_digest else ""
    return f"Reference: {reference.describe()}{weights}, {num_bytes(reference)} bytes held; {found.line}."


def audit(
    policy: nn.Module,
    reference: Reference,
    batch: PairBatch,
    *,
    autocast: Autocast,
    first_checksums: Checksums,
    is_users_choice: bool,
) -> Finding:
    """The gap between policy and reference on `batch`.

    ValueError where a log-prob is NaN, or where the two differ and the reference is not the user's choice. The message
    names the tensor or setting that differs. `first_checksums` are those of the policy when the reference was made.

    Collective: what one process finds, all raise together, and name the process.
    """
    # Log-probs given by the user are sums, so only sums can be compared: the model they came from may have been freed.
    # A reference that must equal the policy is computed instead, and compared token by token.
    of_sums = is_users_choice and reference.user_logps is not None
    theirs = reference.logps(batch) if of_sums else reference.computed_logps(batch)
    gap = Gap.between(frozen_logps(policy, batch, autocast), theirs, of_sums=of_sums)
    is_half = is_half_precision(policy, autocast)
    with raised_together():
        if math.isnan(gap.mean):
            raise ValueError(
                "Policy and reference were compared on the first batch, and a log-prob is NaN. Check the weights and "
                f"dtype of both. Reference: {reference.describe()}."
            )
    if is_users_choice:
        mean = f"{gap.mean:.3g} nats per {'completion' if of_sums else 'token'}"
        is_policy = gap.is_zero(is_half_precision=is_half)
        same = ", which is rounding: it is the policy as it starts to train" if is_policy else ""
        return Finding(
            line=f"it differs from the policy by {mean} on the first batch, {gap.largest:.3g} at most{same}", gap=gap
        )
    is_wrong = not gap.is_zero(is_half_precision=is_half)
    if any_of_all(is_wrong):
        difference = _difference(reference, policy, first_checksums)  # gathers weights that are sharded
        with raised_together():
            if is_wrong:
                raise ValueError(
                    "The reference is the policy as it starts to train, so at the first step both must give the same "
                    f"log-probs; found a gap of {gap.largest:.3g} nats in one token, {gap.mean:.3g} on average. "
                    f"Reference: {reference.describe()}. {difference} If another reference is what you want, "
                    "name it with `ref_model`; reference_audit=False switches this check off."
                )
    return Finding(
        line=f"it gives the policy's log-probs on the first batch (largest gap {gap.largest:.3g} nats in one token)",
        gap=gap,
    )


def _difference(reference: Reference, policy: nn.Module, first_checksums: Checksums) -> str:
    """A sentence that names the first tensor or setting in which policy and reference differ, on any process.
    Collective."""
    found = next(filter(None, of_all(_differing_tensor(reference, policy, first_checksums))), None)
    if found is not None:
        return found
    differing = reference.identity().differing_from(Identity.of(policy))
    if differing:
        return f"They differ in `{differing[0]}`{f' (and in {len(differing) - 1} more)' if len(differing) > 1 else ''}."
    return (
        "All weights, buffers, adapters and settings agree: look for a forward pass that is random or keeps state in "
        "eval mode, or a numerics setting changed since the reference was scored."
    )


def _differing_tensor(reference: Reference, policy: nn.Module, first_checksums: Checksums) -> str | None:
    """A sentence that names the first tensor of which this process's values differ; None where none does."""
    now = checksums(policy)
    changed = [name for name, sums in now.items() if name in first_checksums and sums != first_checksums[name]]
    if changed:
        return (
            f"The policy's `{changed[0]}` is not what it was when the trainer was made ({len(changed)} tensors changed "
            "since): make the trainer after the last change to the model."
        )
    own = parameters_of(policy)
    for name, tensor in reference.tensors():
        if name in own and (distance := _distance(own_part(own[name]), own_part(tensor))) != 0:
            return f"The reference's `{name}` differs from the policy's by up to {distance:.3g}."
    return None


def _distance(ours: Tensor, theirs: Tensor) -> float:
    if ours.shape != theirs.shape:
        return float("inf")
    ours, theirs = ours.float(), theirs.float().to(ours.device)
    return 0.0 if torch.equal(ours, theirs) else float((ours - theirs).abs().max())
