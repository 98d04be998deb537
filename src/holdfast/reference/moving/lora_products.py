"""The moving reference of a LoRA policy, held inside the policy's own module: products mixed, not factors.

A sync is `alpha * policy + (1 - alpha) * reference` in effective weights. For a LoRA that is a mix of the products
`B A`; the mix of `A` and `B` apart is another model. Mixed products are again a product, of more columns: kept as the
pair `up = [(1 - alpha) up, alpha B]`, `down = [down; A]`, which is exact, and peft's layers compute with a pair of any
rank. So the reference is a flat dict of fp32 tensors, and all here are pure functions of it and the policy; whoever
holds it exchanges the factors' storage to score.

The rank grows by r with every sync. When it comes to 8 r (then 16 r, 32 r, ...) the pair is cut to its numerical rank
(`TOLERANCE`), if that halves it. Where the pair would take as much memory as the product itself, the product is kept
instead, which is exact from there on: `in * out` numbers are the most that a layer ever takes, whatever its motion, and
a policy that moves little between syncs takes a few r (in + out). Given up: a fixed rank. It would need a tolerance
that grows with the motion, so a reference that is silently wrong just where the policy has moved far.

DoRA's effective weight is `diag(m / n) (W + s B A)`, n the row norms of the bracket (Liu et al. 2024, Eq. 5,
arXiv:2402.09353). A mix of such is `diag(d) W + s up down` with d the mixed m / n and `diag(m / n) B` in place of B,
which is a DoRA layer again: factors `up / d` and `down`, magnitude `d * norm(W + s (up / d) down)`.
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

TOLERANCE = 5e-5
"""What all cuts together may change, relative to the product (Frobenius). One cut gets a share: cuts are four syncs
apart at least, and what a cut has changed shrinks by `1 - alpha` with every sync."""

RANKS = 8
"""A pair is cut when it comes to this many times the policy's rank, and then to twice as many, and so on."""

LARGEST_CUT = 512
"""Highest rank at which cutting a pair is tried, or 8 r: its cost is cubic in the rank."""

SMALLEST_SCALE = 1e-9
"""Stands for a DoRA scale of 0, which the factors are divided by: rows of W that vanish are held 1e9 times smaller."""

_LINEAR_TUNERS = (FourierFTLayer, IA3Layer, LNTuningLayer, ShiraLayer, TrainableTokensLayer)

# Quantised layers by name: their classes exist only where the package they need does. All compute what `Linear` does.
_QUANTISED = {
    "AqlmLoraLinear", "AwqLoraLinear", "EetqLoraLinear", "GPTQLoraLinear", "HqqLoraLinear", "Linear4bit",
    "Linear8bitLt",
}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class _Layer:
    """One LoRA layer of the policy: path, factors `down [r in]` and `up [out r]` under their parameters' names, the
    factor s of their product, and for DoRA the magnitude `[out]`."""

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
        """The base weight `[out in]`, dequantised, in the factors' dtype."""
        weight = dequantize_module_weight(self.module.get_base_layer()).detach()
        return transpose(weight, self.module.fan_in_fan_out).to(self.down.device, self.down.dtype)

    def norms(self, product: Tensor) -> Tensor:
        """Row norms `[out]` of `W + s product`, in fp32, with peft's numerics."""
        return torch.linalg.norm(self.weight() + self.scaling * product.to(self.down.dtype), dim=1).float()


@dataclass(frozen=True, slots=True, kw_only=True)
class _Held:
    """What the state holds of one layer, fp32: a pair, or where `down` is None the product `up [out in]`; for DoRA the
    scale d of W `[out]`, which is folded into `up` as well, and the magnitude `[out]`."""

    up: Tensor
    down: Tensor | None
    scale: Tensor | None = None
    magnitude: Tensor | None = None

    @classmethod
    def of_policy(cls, layer: _Layer) -> "_Held":
        """The layer as it is now; nothing of the policy is referred to."""
        down, up = (factor.detach().float().clone() for factor in (layer.down, layer.up))
        if layer.magnitude is None:
            return cls(up=up, down=down)
        magnitude = layer.magnitude.detach().float().clone()
        scale = magnitude / layer.norms(layer.up.detach() @ layer.down.detach())
        return cls(up=scale[:, None] * up, down=down, scale=scale, magnitude=magnitude)

    @classmethod
    def of_state(cls, state: Mapping[str, Tensor], layer: _Layer) -> "_Held":
        """The layer's part of `state`, where the layer is. ValueError where there is none."""
        parts = {
            part: state[f"{layer.path}.{part}"].to(layer.down.device)
            for part in ("up", "down", "product", "scale", "magnitude")
            if f"{layer.path}.{part}" in state
        }
        wanted = {"scale", "magnitude"} if layer.magnitude is not None else set()
        if not (parts.keys() == wanted | {"up", "down"} or parts.keys() == wanted | {"product"}):
            raise ValueError(
                f"The reference of the LoRA layer `{layer.path}` was asked for, but what is held of it is "
                f"{sorted(parts) or 'nothing'}: it was captured from a policy with other adapters. Capture it again, "
                "from this policy, and keep the policy's adapters as they are from there on."
            )
        up = parts.get("product", parts.get("up"))
        assert up is not None
        return cls(up=up, down=parts.get("down"), scale=parts.get("scale"), magnitude=parts.get("magnitude"))

    def named(self, path: str) -> dict[str, Tensor]:
        """As the state holds it."""
        parts = {"product" if self.down is None else "up": self.up, "down": self.down}
        parts |= {"scale": self.scale, "magnitude": self.magnitude}
        return {f"{path}.{part}": value.contiguous() for part, value in parts.items() if value is not None}

    def product(self) -> Tensor:
        """`up down` `[out in]`."""
        return self.up if self.down is None else self.up @ self.down

    def up_of_dora(self) -> Tensor:
        """`up`, or the product, as the factor of a DoRA layer: with d taken out of its rows."""
        assert self.scale is not None
        return self.up / _away_from_zero(self.scale)[:, None]


def why_not(policy: nn.Module) -> str | None:
    """None where every adapter of the PEFT model `policy` can be mixed in effective weights: plain LoRA and DoRA by
    `moved`, and what is linear in its parameters by averaging these. Else a clause that says which layer cannot."""
    owners: dict[int, str] = {}
    for path, module in policy.named_modules():
        if not isinstance(module, BaseTunerLayer):
            continue
        reason = _why_not_layer(module)
        if reason is not None:
            return f"`{path}` {reason}"
        for factor in _factors(module):
            if id(factor) in owners:
                return f"`{path}` shares a factor with `{owners[id(factor)]}`, so they cannot be cut to a rank apart"
            owners[id(factor)] = path
    return None


def names(policy: nn.Module) -> set[str]:
    """The names of the parameters that the products stand for, trainable or not: both factors of every active LoRA
    layer and DoRA's magnitudes. Not a factor's bias, which is a plain tensor."""
    return {
        name
        for layer in _layers(policy)
        for name in (layer.down_name, layer.up_name, layer.magnitude_name)
        if name is not None
    }


@torch.no_grad()
def captured(policy: nn.Module) -> dict[str, Tensor]:
    """The state of a reference that is `policy` as it is now: fp32 copies.

    Of a LoRA layer at path L: `L.down [R in]` and `L.up [out R]`, for embeddings `in` is the vocabulary; the layer's
    scaling s is not folded in. A state that has moved may hold `L.product [out in]` instead of the two. For DoRA `up`
    (or `product`) holds `diag(d) B`, with `L.scale [out]` d = m / n, and `L.magnitude [out]` m.
    """
    state: dict[str, Tensor] = {}
    for layer in _layers(policy):
        state |= _Held.of_policy(layer).named(layer.path)
    return state


@torch.no_grad()
def moved(policy: nn.Module, state: Mapping[str, Tensor], alpha: float) -> tuple[dict[str, Tensor], float]:
    """The state after a sync, `alpha * policy + (1 - alpha) * state` in effective weights, and the squared L2 length of
    that move over all LoRA layers.

    TR-DPO (Gorbatovski et al. 2024, Eq. 3, arXiv:2404.09656). With alpha = 1 the state is `captured(policy)` exactly;
    else it is exact but for rounding and `TOLERANCE`. Neither `policy` nor `state` is changed. ValueError where `state`
    is of a policy with other adapters.
    """
    after: dict[str, Tensor] = {}
    squares = 0.0
    for layer in _layers(policy):
        theirs, ours = _Held.of_state(state, layer), _Held.of_policy(layer)
        difference = _difference(layer, ours, theirs)
        squares += float(_squared_length(layer, ours, theirs, difference))
        after |= (ours if alpha == 1 else _mixed(layer, ours, theirs, difference, alpha)).named(layer.path)
    return after, alpha**2 * squares


@torch.no_grad()
def in_place(policy: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors with which, put in place of the parameters of that name, the LoRA layers of `policy` compute as the
    reference: in the parameters' dtype, on their device, of another rank. A product is one factor, beside an identity
    that all layers of a width share. They may be the state's own tensors: read them only."""
    values: dict[str, Tensor] = {}
    identities: dict[tuple[int, torch.dtype, torch.device], Tensor] = {}
    for layer in _layers(policy):
        held = _Held.of_state(state, layer)
        up = held.up if held.scale is None else held.up_of_dora()
        down = held.down
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
            assert held.magnitude is not None
            assert layer.magnitude is not None
            values[layer.magnitude_name] = held.magnitude.to(layer.magnitude.device, layer.magnitude.dtype)
    return values


def _layers(policy: nn.Module) -> Iterator[_Layer]:
    """The LoRA layers of `policy` in which an adapter is active."""
    parameter_names = {id(parameter): name for name, parameter in policy.named_parameters()}
    modules: Any = policy.named_modules()
    for path, module in modules:
        adapters = _active(module) if isinstance(module, LoraLayer) else []
        if not adapters:
            continue
        assert len(adapters) == 1, why_not(policy)
        down, up, magnitude = [*_factors(module), None][:3]
        yield _Layer(
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
    """The active adapters that the tuner layer has parts of; all of them where its parts do not go by adapter."""
    parts = [getattr(layer, attribute, None) for attribute in layer.adapter_layer_names]
    keyed: list[Any] = [part for part in parts if hasattr(part, "keys")]
    return [name for name in layer.active_adapters if not keyed or any(name in part for part in keyed)]


def _factors(layer: Any) -> list[Any]:
    """`down`, `up` and, for DoRA, the magnitude of the active adapter of a tuner layer; empty for one without LoRA."""
    adapters = _active(layer)
    if not isinstance(layer, LoraLayer) or not adapters:
        return []
    name = adapters[0]
    if isinstance(layer, Embedding):
        return [layer.lora_embedding_A[name], layer.lora_embedding_B[name]]
    parts = [getattr(layer, attribute) for attribute in ("lora_A", "lora_B", "lora_magnitude_vector")]
    return [part[name].weight for part in parts if name in part]


def _why_not_layer(layer: Any) -> str | None:
    """Why a tuner layer cannot be mixed; None where it can, or where no adapter is active in it."""
    adapters = _active(layer)
    kind = f"{type(layer).__module__.removeprefix('peft.tuners.')}.{type(layer).__name__}"
    if len(adapters) > 1:
        return f"has more than one active adapter ({', '.join(adapters)})"
    if not adapters or isinstance(layer, _LINEAR_TUNERS):
        return None
    if not isinstance(layer, LoraLayer):
        return f"is adapted by a {kind}, which is no LoRA and not linear in its parameters"
    if not isinstance(layer, Linear | Embedding) and type(layer).__name__ not in _QUANTISED:
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


def _difference(layer: _Layer, ours: _Held, theirs: _Held) -> Tensor | None:
    """`ours - theirs` of the two products `[out in]`; None where the pairs are so much smaller that they should stay
    apart."""
    assert ours.down is not None
    if theirs.down is None:
        return torch.addmm(theirs.up, ours.up, ours.down, beta=-1)
    if ours.scale is not None or 2 * (len(theirs.down) + len(ours.down)) > _break_even(ours.up, ours.down):
        return (theirs.up @ theirs.down).addmm_(ours.up, ours.down, beta=-1)
    return None


def _mixed(layer: _Layer, ours: _Held, theirs: _Held, difference: Tensor | None, alpha: float) -> _Held:
    """`alpha * ours + (1 - alpha) * theirs`, ours being the policy's pair."""
    assert ours.down is not None
    up, down = theirs.up, theirs.down
    if down is None:
        assert difference is not None
        up = torch.add(up, difference, alpha=alpha)
    elif torch.equal(down, ours.down):  # a frozen A: the mix is one of the Bs
        up, down = torch.lerp(up, ours.up, alpha), ours.down
    else:
        rank = down.shape[0]
        up = torch.cat([(1 - alpha) * up, alpha * ours.up], dim=1)
        down = torch.cat([down, ours.down])
        up, down = _bounded(up, down, rank, layer.down.shape[0], TOLERANCE * (1 - (1 - alpha) ** 4))
    if ours.scale is None:
        return _Held(up=up, down=down)
    assert theirs.scale is not None
    scale = torch.lerp(theirs.scale, ours.scale, alpha)
    held = _Held(up=up, down=down, scale=scale)
    in_place_up, in_place_down = held.up_of_dora().to(layer.up.dtype), None if down is None else down.to(layer.up.dtype)
    norms = layer.norms(_Held(up=in_place_up, down=in_place_down).product())
    return _Held(up=up, down=down, scale=scale, magnitude=_away_from_zero(scale) * norms)


def _bounded(
    up: Tensor, down: Tensor, rank_before: int, rank_of_policy: int, tolerance: float
) -> tuple[Tensor, Tensor | None]:
    """The pair `up [out R]`, `down [R in]`, cut where its rank has come to a limit, or as `(product, None)`."""
    rank = down.shape[0]
    break_even = _break_even(up, down)
    first = RANKS * rank_of_policy
    limit = first
    while limit < rank_before:
        limit *= 2
    limit = min(limit, break_even)
    if rank <= limit:
        return up, down
    if first <= limit <= max(LARGEST_CUT, first):
        cut = _cut(up, down, tolerance)
        if cut[1].shape[0] <= limit // 2:
            return cut
    return (up @ down, None) if rank > break_even else (up, down)


def _cut(up: Tensor, down: Tensor, tolerance: float) -> tuple[Tensor, Tensor]:
    """The pair of the least rank that is within `tolerance` of `up down` (Eckart and Young 1936): an orthonormal basis
    of the shorter factor by QR, and the principal directions of the rest by its Gram matrix. In fp64, since a Gram
    matrix resolves only the square root of a dtype's precision."""
    if up.shape[0] < down.shape[1]:
        transposed = _cut(down.T, up.T, tolerance)
        return transposed[1].T, transposed[0].T
    basis, triangle = torch.linalg.qr(down.T.double())  # [in K], [K R]
    rest = up.double() @ triangle.T  # [out K]
    squares, vectors = torch.linalg.eigh(rest.T @ rest)  # ascending
    squares = squares.clamp_min(0)
    dropped = int((squares.cumsum(0) <= tolerance**2 * squares.sum()).sum())
    vectors = vectors[:, min(dropped, len(squares) - 1) :]
    return (rest @ vectors).float(), (basis @ vectors).T.float()


def _break_even(up: Tensor, down: Tensor) -> int:
    """The rank at which the pair `up [out R]`, `down [R in]` takes as many numbers as the product."""
    out_features, in_features = up.shape[0], down.shape[1]
    return in_features * out_features // (in_features + out_features)


def _squared_length(layer: _Layer, ours: _Held, theirs: _Held, difference: Tensor | None) -> Tensor:
    """Squared L2 distance of the two layers' effective weights, fp64; `difference` is that of their products, or None
    where the distance comes from inner products of the pairs: `<U D, V E> = sum((U^T V) * (D E^T))`."""
    if difference is None:
        (u, d), (v, e) = [(held.up.double(), held.down.double()) for held in (ours, theirs) if held.down is not None]
        inner = [((a.T @ b) * (p @ q.T)).sum() for a, p, b, q in ((u, d, u, d), (u, d, v, e), (v, e, v, e))]
        return layer.scaling**2 * (inner[0] - 2 * inner[1] + inner[2]).clamp_min(0)
    difference = layer.scaling * difference
    if ours.scale is not None and theirs.scale is not None:
        difference += (ours.scale - theirs.scale)[:, None] * layer.weight().float()
    rows = torch.linalg.vector_norm(difference, dim=1)
    return torch.linalg.vector_norm(rows, dtype=torch.float64).square()


def _away_from_zero(scale: Tensor) -> Tensor:
    """`scale`, where it is 0 or next to it `SMALLEST_SCALE`."""
    return scale.where(scale.abs() >= SMALLEST_SCALE, SMALLEST_SCALE)
