"""A moving reference of a LoRA policy, as the products of its factors.

A sync is `alpha * policy + (1 - alpha) * reference` in effective weights. For a LoRA layer this mixes the products
`B A`; a mix of `A` and `B` apart would be another model. The mix of two products is again a product, whose rank is the
sum of their ranks: `up = [(1 - alpha) up, alpha B]`, `down = [down; A]`. The pair is exact, and peft's layers compute
with a pair of any rank. So the reference's state is a flat dict of fp32 tensors. The functions here are pure: they
depend on that state and the policy. To score, `SoftSnapshot` exchanges the storage of the policy's factors.

The rank grows by the policy's rank r with every sync. At 8 r (then 16 r, 32 r, ...) the pair is cut to its numerical
rank (`TOLERANCE`), if that at least halves it. Where the pair would take as much memory as the product, the state has
the product instead, which is exact. So a layer takes at most `in * out` numbers, and a few r (in + out) if the policy
moves little between syncs. Given up: a fixed rank. It would need a tolerance that grows with the motion, so the
reference would be silently wrong just where the policy has moved far.

Factors that are spread over processes have a fixed shape, and are gathered to be mixed. All processes compute the same
pair, keep a share of it each, and add its product to the layer's output to score (see `moving.added_products`).

DoRA's effective weight is `diag(m / n) (W + s B A)`, where n are the row norms of the bracket (Liu et al. 2024, Eq. 5,
arXiv:2402.09353). The mix of two is `diag(d) W + s up down`, where d is the mix of the two m / n, and where
`diag(m / n) B` is mixed in place of B. This is again a DoRA layer: its factors are `up / d` and `down`, its magnitude
is `d * norm(W + s (up / d) down)`.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.fourierft.layer import FourierFTLayer
from peft.tuners.ia3.layer import IA3Layer
from peft.tuners.ln_tuning.layer import LNTuningLayer
from peft.tuners.lora.layer import Embedding, Linear, LoraLayer
from peft.tuners.lora.variants import DoraLinearVariant
from peft.tuners.shira.layer import ShiraLayer
from peft.tuners.trainable_tokens.layer import TrainableTokensLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.integrations import dequantize_module_weight
from peft.utils.other import transpose
from torch import Tensor, nn

from holdfast.internals.torch import class_of
from holdfast.policy.sharding import give_back, is_part, shape_of, whole
from holdfast.reference.moving.rank import TOLERANCE, bound_rank, break_even_rank
from holdfast.reference.moving.squares import read

SMALLEST_SCALE = 1e-9
"""The least absolute value of a DoRA scale, since factors are divided by it. It replaces a scale of 0, so a row of W
that vanishes is 1e9 times smaller instead."""

_LINEAR_TUNERS = (FourierFTLayer, IA3Layer, LNTuningLayer, ShiraLayer, TrainableTokensLayer)

# Quantised LoRA layers, by name, since a class exists only where its package is installed. All compute as `Linear`.
_QUANTISED = {
    "AqlmLoraLinear", "AwqLoraLinear", "EetqLoraLinear", "GPTQLoraLinear", "HqqLoraLinear", "Linear4bit",
    "Linear8bitLt",
}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Layer:
    """One LoRA layer of the policy: its factors `down [r in]` and `up [out r]` and their parameters' names, the scaling
    s of their product, and for DoRA the magnitude `[out]`. They may be spread over processes."""

    path: str
    down_name: str
    up_name: str
    magnitude_name: str | None
    down: Tensor
    up: Tensor
    magnitude: Tensor | None
    scaling: float
    module: Any

    def weight(self) -> Tensor:
        """The layer's base weight W `[out in]`, dequantised, in the factors' dtype."""
        weight = whole(dequantize_module_weight(self.module.get_base_layer()))
        return transpose(weight, self.module.fan_in_fan_out).to(self.down.device, self.down.dtype)

    def up_bias(self) -> Tensor | None:
        """The bias that the layer adds to `up down x`."""
        adapter = _active(self.module)[0]
        return None if isinstance(self.module, Embedding) else self.module.lora_B[adapter].bias

    def dtype(self) -> torch.dtype:
        """The dtype in which the factors compute now: within a forward pass of FSDP2 another than they are kept in."""
        return _factors(self.module)[0].dtype

    def norms(self, product: Tensor) -> Tensor:
        """Row norms `[out]` of `W + s product` in fp32, computed as peft does."""
        return torch.linalg.norm(self.weight() + self.scaling * product.to(self.down.dtype), dim=1).float()


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerState:
    """The state of one layer, in fp32: the pair `up [out R]` and `down [R in]`, or the product `up [out in]` where
    `down` is None. For DoRA also the scale d of W `[out]`, by which the rows of `up` are multiplied already, and the
    magnitude `[out]`."""

    up: Tensor
    down: Tensor | None
    scale: Tensor | None = None
    magnitude: Tensor | None = None

    @classmethod
    def of_policy(cls, layer: Layer) -> "LayerState":
        """The state of a reference that is the policy. All tensors are copies."""
        factors = down, up = whole(layer.down), whole(layer.up)
        down, up = (factor.float().clone() for factor in factors)
        if layer.magnitude is None:
            return cls(up=up, down=down)
        magnitude = whole(layer.magnitude).float().clone()
        scale = magnitude / layer.norms(factors[1] @ factors[0])
        return cls(up=scale[:, None] * up, down=down, scale=scale, magnitude=magnitude)

    @classmethod
    def of_state(cls, state: Mapping[str, Tensor], layer: Layer) -> "LayerState":
        """The layer's tensors in `state`, on the layer's device. ValueError where `state` does not have them."""
        tensors = {
            name: state[f"{layer.path}.{name}"].to(layer.down.device)
            for name in ("up", "down", "product", "scale", "magnitude")
            if f"{layer.path}.{name}" in state
        }
        of_dora = {"scale", "magnitude"} if layer.magnitude is not None else set()
        if tensors.keys() not in (of_dora | {"up", "down"}, of_dora | {"product"}):
            raise ValueError(
                f"The reference of the LoRA layer `{layer.path}` was asked for, but what is held of it is "
                f"{sorted(tensors) or 'nothing'}: it was captured from a policy with other adapters. Capture it again, "
                "from this policy, and keep the policy's adapters as they are from there on."
            )
        up = tensors.get("product", tensors.get("up"))
        assert up is not None
        return cls(up=up, down=tensors.get("down"), scale=tensors.get("scale"), magnitude=tensors.get("magnitude"))

    def by_name(self, path: str) -> dict[str, Tensor]:
        """The tensors under their names in the state of a reference, for a layer at `path`."""
        tensors = {"product" if self.down is None else "up": self.up, "down": self.down}
        tensors |= {"scale": self.scale, "magnitude": self.magnitude}
        return {f"{path}.{name}": value.contiguous() for name, value in tensors.items() if value is not None}

    def product(self) -> Tensor:
        """`up down` `[out in]`."""
        return self.up if self.down is None else self.up @ self.down

    def up_of_dora(self) -> Tensor:
        """`up`, or the product, with its rows divided by d: the factor of a DoRA layer."""
        assert self.scale is not None
        return self.up / _away_from_zero(self.scale)[:, None]


def mixing_obstacle(policy: nn.Module) -> str | None:
    """None where every adapter of the PEFT model `policy` can be mixed in effective weights, else a clause that names a
    layer which cannot. Plain LoRA and DoRA are mixed by `synced_state`. Adapters whose effect is linear in their
    parameters are mixed by averaging these."""
    owners: dict[int, str] = {}
    for path, module in policy.named_modules():
        if not isinstance(module, BaseTunerLayer):
            continue
        reason = _layer_obstacle(module)
        if reason is not None:
            return f"`{path}` {reason}"
        for factor in _factors(module):
            if id(factor) in owners:
                return f"`{path}` shares a factor with `{owners[id(factor)]}`, so they cannot be cut to a rank apart"
            owners[id(factor)] = path
    return None


def factor_names(policy: nn.Module) -> set[str]:
    """The names of the parameters that are mixed by products, trainable or not: both factors of every active LoRA
    layer, and DoRA's magnitudes. A factor's bias is a plain tensor and not among them."""
    return {
        name
        for layer in layers_of(policy)
        for name in (layer.down_name, layer.up_name, layer.magnitude_name)
        if name is not None
    }


def is_spread(policy: nn.Module) -> bool:
    """Whether factors of `policy` are spread over processes, so that they have a fixed shape."""
    return any(is_part(factor) for layer in layers_of(policy) for factor in (layer.down, layer.up))


@torch.no_grad()
def policy_state(policy: nn.Module) -> dict[str, Tensor]:
    """The state of a reference that is `policy` as it is now: fp32 copies.

    For a LoRA layer at path L the state has `L.down [R in]` and `L.up [out R]`, without the layer's scaling s. For an
    embedding, `in` is the vocabulary. After a sync it may have `L.product [out in]` instead of the two. For DoRA, `up`
    (or `product`) is multiplied by `diag(d)`, and there are `L.scale [out]`, d = m / n, and `L.magnitude [out]`, m.
    """
    state: dict[str, Tensor] = {}
    for layer in layers_of(policy):
        state |= LayerState.of_policy(layer).by_name(layer.path)
    return state


@torch.no_grad()
def synced_state(policy: nn.Module, state: Mapping[str, Tensor], alpha: float) -> tuple[dict[str, Tensor], float]:
    """The state after a sync, `alpha * policy + (1 - alpha) * state` in effective weights, and the squared L2 norm of
    the change over all LoRA layers.

    TR-DPO (Gorbatovski et al. 2024, Eq. 3, arXiv:2404.09656). With alpha = 1 the result is exactly
    `policy_state(policy)`; otherwise it is exact up to rounding and `TOLERANCE`. Neither `policy` nor `state` is
    changed. ValueError where `state` belongs to a policy with other adapters.
    """
    after: dict[str, Tensor] = {}
    squares: list[Tensor] = []
    for layer in layers_of(policy):
        theirs, ours = LayerState.of_state(state, layer), LayerState.of_policy(layer)
        difference = _difference(ours, theirs)
        squares.append(_squared_distance(layer, ours, theirs, difference))
        after |= (ours if alpha == 1 else _mix(layer, ours, theirs, difference, alpha)).by_name(layer.path)
    return after, alpha**2 * sum(read(squares))


@torch.no_grad()
def factor_values(policy: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Values for the parameters `factor_names(policy)` with which the LoRA layers of `policy` compute as the reference.

    They have the parameters' dtype and device, and may have another rank. A product becomes one factor; the other is an
    identity matrix, which all layers of that width share. A value may be a tensor of `state`, so it must not be
    changed.
    """
    values: dict[str, Tensor] = {}
    identities: dict[tuple[int, torch.dtype, torch.device], Tensor] = {}
    for layer in layers_of(policy):
        own = LayerState.of_state(state, layer)
        up = own.up if own.scale is None else own.up_of_dora()
        down = own.down
        if down is None:
            out_features, in_features = up.shape
            width = min(out_features, in_features)
            key = (width, layer.down.dtype, layer.down.device)
            if key not in identities:
                identities[key] = torch.eye(width, dtype=layer.down.dtype, device=layer.down.device)
            up, down = (up, identities[key]) if in_features <= out_features else (identities[key], up)
        values[layer.down_name] = down.to(layer.down.dtype)
        values[layer.up_name] = up.to(layer.up.dtype)
        if layer.magnitude_name is not None:
            assert own.magnitude is not None
            assert layer.magnitude is not None
            values[layer.magnitude_name] = own.magnitude.to(layer.magnitude.device, layer.magnitude.dtype)
    return values


def layers_of(policy: nn.Module) -> Iterator[Layer]:
    """The LoRA layers of `policy` that have an active adapter."""
    give_back(policy)
    parameter_names = {id(parameter): name for name, parameter in policy.named_parameters()}
    modules: Any = policy.named_modules()
    for path, module in modules:
        adapters = _active(module) if isinstance(module, LoraLayer) else []
        if not adapters:
            continue
        assert len(adapters) == 1, mixing_obstacle(policy)
        down, up, magnitude = [*_factors(module), None][:3]
        yield Layer(
            path=path,
            down_name=parameter_names[id(down)],
            up_name=parameter_names[id(up)],
            magnitude_name=None if magnitude is None else parameter_names[id(magnitude)],
            down=down,
            up=up,
            magnitude=magnitude,
            scaling=float(module.scaling[adapters[0]]),
            module=module,
        )


def _active(layer: Any) -> list[str]:
    """The active adapters of which the tuner layer has parameters. A layer that does not keep its parameters by adapter
    counts as having them."""
    values = [getattr(layer, attribute, None) for attribute in layer.adapter_layer_names]
    by_adapter: list[Any] = [value for value in values if hasattr(value, "keys")]
    return [name for name in layer.active_adapters if not by_adapter or any(name in value for value in by_adapter)]


def _factors(layer: Any) -> list[Any]:
    """`down`, `up` and, for DoRA, the magnitude of a tuner layer's active adapter; empty for a layer without LoRA."""
    adapters = _active(layer)
    if not isinstance(layer, LoraLayer) or not adapters:
        return []
    name = adapters[0]
    if isinstance(layer, Embedding):
        return [layer.lora_embedding_A[name], layer.lora_embedding_B[name]]
    by_adapter = [getattr(layer, attribute) for attribute in ("lora_A", "lora_B", "lora_magnitude_vector")]
    return [factors[name].weight for factors in by_adapter if name in factors]


def _layer_obstacle(layer: Any) -> str | None:
    """A clause that says why a tuner layer cannot be mixed; None where it can, or where it has no active adapter."""
    adapters = _active(layer)
    own_class = class_of(layer)
    kind = f"{own_class.__module__.removeprefix('peft.tuners.')}.{own_class.__name__}"
    if len(adapters) > 1:
        return f"has more than one active adapter ({', '.join(adapters)})"
    if not adapters or isinstance(layer, _LINEAR_TUNERS):
        return None
    if not isinstance(layer, LoraLayer):
        return f"is adapted by a {kind}, which is no LoRA and not linear in its parameters"
    if not isinstance(layer, Linear | Embedding) and own_class.__name__ not in _QUANTISED:
        return f"is a {kind}: LoRA can be mixed on linear layers and embeddings only"
    if layer.merged:
        return f"has its adapter ({adapters[0]}) merged into its weight; unmerge it first"
    variant = getattr(layer, "lora_variant", {}).get(adapters[0])
    is_dora = type(variant) is DoraLinearVariant
    if variant is not None and not is_dora:
        return f"is a LoRA of the variant {type(variant).__name__}: plain LoRA, and DoRA on linear layers, can be mixed"
    if isinstance(layer, Embedding) and layer.get_base_layer().max_norm is not None:
        return "is an embedding with max_norm, which rescales the rows of the LoRA as they are looked up"
    base: Any = layer.base_layer
    if is_dora and (isinstance(base, BaseTunerLayer) or any(p.requires_grad for p in base.parameters())):
        return "is a DoRA on a weight that trains itself, and its norms with it"
    return None


def _difference(ours: LayerState, theirs: LayerState) -> Tensor | None:
    """The policy's product (`ours`) minus the reference's (`theirs`), `[out in]`. None where the pairs are so small
    that computing with them is cheaper than with their products."""
    assert ours.down is not None
    if theirs.down is None:
        return torch.addmm(theirs.up, ours.up, ours.down, beta=-1)
    if ours.scale is not None or 2 * (len(theirs.down) + len(ours.down)) > break_even_rank(ours.up, ours.down):
        return (theirs.up @ theirs.down).addmm_(ours.up, ours.down, beta=-1)
    return None


def _mix(layer: Layer, ours: LayerState, theirs: LayerState, difference: Tensor | None, alpha: float) -> LayerState:
    """`alpha * ours + (1 - alpha) * theirs` in effective weights. `ours` is the policy's state, a pair."""
    assert ours.down is not None
    up, down = theirs.up, theirs.down
    if down is None:
        assert difference is not None
        up = torch.add(up, difference, alpha=alpha)
    elif torch.equal(down, ours.down):  # A is frozen, so the products are mixed by mixing B
        up, down = torch.lerp(up, ours.up, alpha), ours.down
    else:
        rank = down.shape[0]
        up = torch.cat([(1 - alpha) * up, alpha * ours.up], dim=1)
        down = torch.cat([down, ours.down])
        up, down = bound_rank(up, down, rank, shape_of(layer.down)[0], TOLERANCE * (1 - (1 - alpha) ** 4))
    if ours.scale is None:
        return LayerState(up=up, down=down)
    assert theirs.scale is not None
    scale = torch.lerp(theirs.scale, ours.scale, alpha)
    # The norms are those of the factors with which peft will compute: without d, and rounded to the layer's dtype.
    rounded_up = LayerState(up=up, down=down, scale=scale).up_of_dora().to(layer.up.dtype)
    rounded_down = None if down is None else down.to(layer.up.dtype)
    norms = layer.norms(LayerState(up=rounded_up, down=rounded_down).product())
    return LayerState(up=up, down=down, scale=scale, magnitude=_away_from_zero(scale) * norms)


def _squared_distance(layer: Layer, ours: LayerState, theirs: LayerState, difference: Tensor | None) -> Tensor:
    """Squared L2 distance of two states of a layer in effective weights, in fp64.

    `difference` is that of their products. Where it is None, the distance is computed from inner products of the pairs:
    `<U D, V E> = sum((U^T V) * (D E^T))`.
    """
    if difference is None:
        (u, d), (v, e) = [(own.up.double(), own.down.double()) for own in (ours, theirs) if own.down is not None]
        inner = [((a.T @ b) * (p @ q.T)).sum() for a, p, b, q in ((u, d, u, d), (u, d, v, e), (v, e, v, e))]
        return layer.scaling**2 * (inner[0] - 2 * inner[1] + inner[2]).clamp_min(0)
    difference = layer.scaling * difference
    if ours.scale is not None and theirs.scale is not None:
        difference += (ours.scale - theirs.scale)[:, None] * layer.weight().float()
    rows = torch.linalg.vector_norm(difference, dim=1)
    return torch.linalg.vector_norm(rows, dtype=torch.float64).square()


def _away_from_zero(scale: Tensor) -> Tensor:
    """`scale`, with `SMALLEST_SCALE` in place of values that are closer to 0."""
    return scale.where(scale.abs() >= SMALLEST_SCALE, SMALLEST_SCALE)
