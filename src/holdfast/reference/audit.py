"""The step-0 audit (law L1): a fresh reference gives the policy's own log-probs, in every run.

The error that a wrong reference makes is silent: training goes on, towards another optimum. So the two are compared
on the first batch, and a difference is an error that names the tensor. A user may choose a different reference; then
the measured gap is reported once. Also here: the pass over the policy's weights that finds NaN before anything runs.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor, nn

from holdfast.batch import PairBatch, SequenceLogps
from holdfast.reference.base import num_bytes
from holdfast.reference.identity.identity import Identity
from holdfast.reference.reference import Reference
from holdfast.scoring.frozen import Autocast, frozen_logps
from holdfast.scoring.tolerance import TOLERANCE_NATS, TOLERANCE_NATS_HALF

_CACHED = 2**18
"""Values that are read from memory once, however often they are summed up."""

Checksums = Mapping[str, tuple[float, float]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Gap:
    """How far two models' log-probs of the same tokens are apart, nats per token, or per completion for sums."""

    mean: float
    largest: float

    @classmethod
    def between(cls, policy: SequenceLogps, reference: SequenceLogps, *, of_sums: bool = False) -> "Gap":
        """The gap on one batch."""
        ours, theirs = (logps.sums() if of_sums else logps.per_token for logps in (policy, reference))
        difference = (ours.detach() - theirs).abs()
        return cls(mean=float(difference.mean()), largest=float(difference.max()))

    def is_zero(self, *, is_half_precision: bool) -> bool:
        """Whether it is what rounding alone can make. NaN is not."""
        return self.mean <= TOLERANCE_NATS_HALF if is_half_precision else self.largest <= TOLERANCE_NATS


def checksums(policy: nn.Module) -> Checksums:
    """Two sums over each parameter and buffer, to tell later which one changed; raises ValueError on NaN or infinity in
    a parameter, naming the first that has one."""
    sums: dict[str, tuple[float, float]] = {}
    for name, tensor in chain(policy.named_parameters(), policy.named_buffers()):
        if tensor.is_meta or tensor.numel() == 0 or not tensor.is_floating_point():
            continue
        total = square = 0.0
        for part in _parts(tensor.detach()):
            values = part.float()
            total, square = total + float(values.sum()), square + float(torch.dot(values, values))
        sums[name] = (total, square**0.5)
        is_weight = isinstance(tensor, nn.Parameter)  # a mask among the buffers may be infinite
        if is_weight and not math.isfinite(total + square) and not bool(tensor.isfinite().all()):
            raise ValueError(
                f"The policy has NaN or infinite weights, in `{name}` first. Load it again, or look at how it was "
                "trained: in fp16, a loss scale that overflows leaves such weights behind."
            )
    return sums


def _parts(values: Tensor) -> Sequence[Tensor]:
    """All values, flat; on a CPU in parts that its caches hold, elsewhere whole, since each part is waited for."""
    return values.reshape(-1).split(_CACHED if values.device.type == "cpu" else max(1, values.numel()))


def introduction(reference: Reference, digest: str | None, found: str) -> str:
    """Which reference it is, where it is held and what the audit found, in one line; `digest` is that of its
    weights."""
    weights = f", weights {digest[:12]}" if digest else ""
    return f"Reference: {reference.describe()}{weights}, {num_bytes(reference)} bytes held; {found}."


def audit(
    policy: nn.Module,
    reference: Reference,
    batch: PairBatch,
    *,
    autocast: Autocast,
    mixed_precision: str,
    captured: Checksums,
    is_users_choice: bool,
) -> str:
    """What was measured on `batch`, in a clause. ValueError when a captured reference is not the policy, naming what
    differs, or when a log-prob is NaN. `captured` are the policy's checksums when its reference was captured."""
    # Log-probs given by the user are sums, so only sums can be compared: the model they came from may have been freed.
    # Where the reference is the policy, it is asked itself.
    of_sums = is_users_choice and reference.user_logps is not None
    theirs = reference.logps(batch) if of_sums else reference.computed_logps(batch)
    gap = Gap.between(frozen_logps(policy, batch, autocast), theirs, of_sums=of_sums)
    is_half_precision = mixed_precision in ("bf16", "fp16") or next(policy.parameters()).dtype != torch.float32
    if math.isnan(gap.mean):
        raise ValueError(
            "Policy and reference were compared on the first batch, and a log-prob is NaN. Check the weights and dtype "
            f"of both. Reference: {reference.describe()}."
        )
    if is_users_choice:
        found = f"{gap.mean:.3g} nats per {'completion' if of_sums else 'token'}"
        return f"it differs from the policy by {found} on the first batch, {gap.largest:.3g} at most"
    if not gap.is_zero(is_half_precision=is_half_precision):
        raise ValueError(
            "The reference is the policy as it starts to train, so at the first step both must give the same "
            f"log-probs; found a gap of {gap.largest:.3g} nats in one token, {gap.mean:.3g} on average. Reference: "
            f"{reference.describe()}. {_culprit(reference, policy, captured)} If another reference is what you want, "
            "name it with `ref_model`; reference_audit=False switches this check off."
        )
    return f"it gives the policy's log-probs on the first batch (largest gap {gap.largest:.3g} nats in one token)"


def _culprit(reference: Reference, policy: nn.Module, captured: Checksums) -> str:
    moved = [name for name, sums in checksums(policy).items() if name in captured and sums != captured[name]]
    if moved:
        return (
            f"The policy's `{moved[0]}` is not what it was when the trainer was made ({len(moved)} tensors changed "
            "since): make the trainer after the last change to the model."
        )
    own = dict(policy.named_parameters())
    for name, tensor in reference.tensors():
        if name in own and not torch.equal(own[name].detach().float(), tensor.detach().float().to(own[name].device)):
            return f"The reference's `{name}` differs from the policy's by up to {_distance(own[name], tensor):.3g}."
    differing = reference.identity().differing_from(Identity.of(policy))
    if differing:
        return f"They differ in `{differing[0]}`{f' (and in {len(differing) - 1} more)' if len(differing) > 1 else ''}."
    return (
        "All weights, buffers, adapters and settings agree: look for a forward pass that is random or keeps state in "
        "eval mode, or a numerics setting changed since the reference was scored."
    )


def _distance(ours: Tensor, theirs: Tensor) -> float:
    if ours.shape != theirs.shape:
        return float("inf")
    return float((ours.detach().float() - theirs.detach().float().to(ours.device)).abs().max())
