"""Mixed LoRA products against a dense mix in fp64 of the weights that peft itself merges."""

import copy
import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import peft
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from families import VOCABULARY, tiny_model
from holdfast.reference.digests import digest
from holdfast.reference.exchange import exchanged
from holdfast.reference.moving import lora_products as products
from policies import POLICIES

Weights = dict[str, Tensor]


def adapted(model: nn.Module, seed: int = 7, config: Any = LoraConfig, **options: Any) -> PeftModel:
    """`model` under an adapter whose parameters are drawn with `seed`."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return get_peft_model(model, config(**options))


def lora(family: str = "llama", **options: Any) -> PeftModel:
    return adapted(tiny_model(family), **{"r": 4, "target_modules": ["q_proj", "v_proj"]} | options)


def layers(**options: Any) -> PeftModel:
    """Three linear layers, 256 to 512 wide, in no model."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        base = nn.ModuleDict(
            {"wide": nn.Linear(256, 512), "square": nn.Linear(384, 384), "narrow": nn.Linear(512, 256)}
        )
    return adapted(base, **{"r": 16, "target_modules": ["wide", "square", "narrow"]} | options)


CASES: dict[str, Callable[[], Any]] = {
    **{
        name: POLICIES[name]
        for name in POLICIES
        if name.startswith("lora") or name in ("dora", "rslora", "pissa", "olora")
    },
    "lora_embedding": lambda: lora(target_modules=["q_proj", "embed_tokens"]),
    "lora_embedding_random": lambda: lora(target_modules=["embed_tokens"], init_lora_weights=False, r=2),
    "lora_bias": lambda: lora("qwen2", lora_bias=True),
    "gpt2": lambda: lora("gpt2", target_modules=["c_attn", "c_proj"], fan_in_fan_out=True),
    "gpt2_dora": lambda: lora("gpt2", target_modules=["c_attn"], fan_in_fan_out=True, use_dora=True),
    "dora_all": lambda: lora(target_modules="all-linear", use_dora=True, r=2),
    "trainable_tokens": lambda: lora(trainable_token_indices=[3, 5]),
}


def merged(policy: nn.Module) -> nn.Module:
    """An fp64 copy of the policy with its adapters merged, by peft."""
    duplicate: Any = copy.deepcopy(policy).double()
    return duplicate.merge_and_unload()


def effective(policy: nn.Module) -> Weights:
    return {name: value.clone() for name, value in merged(policy).state_dict().items()}


def adapted_weights(policy: nn.Module) -> set[str]:
    """The merged model's names of the weights that have a LoRA."""
    prefix = "base_model.model."
    paths = [path for path, module in policy.named_modules() if isinstance(module, LoraLayer)]
    return {f"{path.removeprefix(prefix)}.weight" for path in paths}


def added_by(layer: Any) -> Tensor:
    """What a linear layer's LoRA adds to its weight, in fp64."""
    up, down = (factor["default"].weight.detach().double() for factor in (layer.lora_B, layer.lora_A))
    return layer.scaling["default"] * up @ down


def move(policy: nn.Module, seed: int, std: float = 0.1) -> None:
    """A random step of all that trains."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in policy.parameters():
            if parameter.requires_grad:
                parameter += std * torch.randn(parameter.shape, generator=draw)


class Mix:
    """A moving reference: the products as the package holds them, all else averaged, and the dense fp64 mix beside."""

    def __init__(self, policy: nn.Module) -> None:
        self.policy = policy
        self.state = products.captured(policy)
        self.plain = {name: value.double() for name, value in self._plain().items()}
        self.dense = effective(policy)
        self.squares = 0.0

    def sync(self, alpha: float) -> None:
        self.state, self.squares = products.moved(self.policy, self.state, alpha)
        self.plain = {name: torch.lerp(self.plain[name], v.double(), alpha) for name, v in self._plain().items()}
        self.dense = {name: torch.lerp(self.dense[name], v, alpha) for name, v in effective(self.policy).items()}

    def _plain(self) -> Weights:
        replaced = products.names(self.policy)
        return {
            name: p.detach().clone()
            for name, p in self.policy.named_parameters()
            if p.requires_grad and name not in replaced
        }

    @contextmanager
    def held(self) -> Iterator[None]:
        plain = {name: value.float() for name, value in self.plain.items()}
        with exchanged(self.policy, plain | products.in_place(self.policy, self.state)):
            yield


def logits(model: nn.Module) -> Tensor:
    ids = torch.randint(3, VOCABULARY, (2, 12), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        return model.eval()(input_ids=ids).logits


def relative(found: Tensor, right: Tensor) -> float:
    return float((found.double() - right.double()).norm() / right.double().norm())


@pytest.mark.parametrize("case", CASES)
def test_effective_weights_after_every_sync(case):
    """Against lerp in fp64 of merged weights. Six syncs take the tiny layers, 32 wide, from pairs to products."""
    policy = CASES[case]()
    mix = Mix(policy)
    for number, alpha in enumerate((0.6, 0.1, 0.3, 0.9, 0.01, 0.5)):
        move(policy, seed=number)
        before = mix.dense
        mix.sync(alpha)
        with mix.held():
            found = effective(policy)
        assert found.keys() == mix.dense.keys()
        assert max(relative(found[name], right) for name, right in mix.dense.items()) < 3e-6
        distance = sum(float((mix.dense[n] - before[n]).square().sum()) for n in adapted_weights(policy))
        assert mix.squares == pytest.approx(distance, rel=1e-4)


@pytest.mark.parametrize("case", CASES)
def test_logits_of_the_policy_that_holds_it(case):
    """The module with the factors in place computes as a model whose weights are the mix."""
    policy = CASES[case]()
    mix = Mix(policy)
    dense_model = merged(policy)
    for number, alpha in enumerate((0.6, 0.2, 0.5)):
        move(policy, seed=number)
        mix.sync(alpha)
        with mix.held():
            found = logits(policy)
        dense_model.load_state_dict(mix.dense)
        torch.testing.assert_close(found, logits(dense_model).float(), rtol=1e-5, atol=1e-5)
    assert (logits(policy) - found).abs().max() > 1e-2


@pytest.mark.parametrize("case", CASES)
def test_a_captured_reference_is_the_policy(case):
    policy = CASES[case]()
    move(policy, seed=1)
    before = logits(policy)
    with exchanged(policy, products.in_place(policy, products.captured(policy))):
        torch.testing.assert_close(logits(policy), before, rtol=2e-6, atol=2e-6 if "dora" in case else 0)


@pytest.mark.parametrize("case", ["lora_fresh", "dora", "lora_embedding", "gpt2", "lora_frozen_factor"])
def test_a_fresh_one_is_the_bare_base(case):
    """B = 0: nothing is added, to the last bit; a DoRA scales by m / n = 1."""
    policy = CASES[case]()
    with policy.disable_adapter():
        bare = logits(policy)
    with exchanged(policy, products.in_place(policy, products.captured(policy))):
        assert torch.equal(logits(policy), bare)


@pytest.mark.parametrize("case", CASES)
def test_a_hard_sync_copies_the_factors(case):
    policy = CASES[case]()
    state = products.captured(policy)
    for number in range(3):
        move(policy, seed=number)
        state, _ = products.moved(policy, state, 0.5)
    before = Mix(policy)
    with exchanged(policy, products.in_place(policy, state)):
        held = effective(policy)
    after, squares = products.moved(policy, state, 1.0)
    captured = products.captured(policy)
    assert after.keys() == captured.keys()
    assert all(torch.equal(after[name], captured[name]) for name in captured)
    distance = sum(float((before.dense[n] - held[n]).square().sum()) for n in adapted_weights(policy))
    assert squares == pytest.approx(distance, rel=1e-4)


@pytest.mark.parametrize("case", CASES)
def test_the_policy_stays_as_it_is(case):
    policy = CASES[case]()
    move(policy, seed=4)
    gradients = {name: p.requires_grad for name, p in policy.named_parameters()}
    before = digest(policy.named_parameters())
    state = products.captured(policy)
    kept = {name: value.clone() for name, value in state.items()}
    after, _ = products.moved(policy, state, 0.3)
    products.in_place(policy, after)
    assert digest(policy.named_parameters()) == before
    assert {name: p.requires_grad for name, p in policy.named_parameters()} == gradients
    assert all(torch.equal(state[name], value) for name, value in kept.items())
    addresses = {p.data_ptr() for p in policy.parameters()}
    assert not [name for name, value in (state | after).items() if value.data_ptr() in addresses]
    assert {value.dtype for value in after.values()} == {torch.float32}


def test_names():
    found = products.names(CASES["lora_frozen_factor"]())
    layer = "base_model.model.model.layers.0.self_attn.q_proj"
    assert {f"{layer}.lora_A.default.weight", f"{layer}.lora_B.default.weight"} <= found
    assert len(found) == 2 * 2 * 2  # two layers, q_proj and v_proj, two factors
    assert f"{layer}.lora_magnitude_vector.default.weight" in products.names(CASES["dora"]())
    assert f"{layer}.lora_B.default.bias" not in products.names(CASES["lora_bias"]())
    assert "base_model.model.model.embed_tokens.lora_embedding_A.default" in products.names(CASES["lora_embedding"]())
    assert products.names(CASES["lora_fresh_over_sft"]()) == {
        name for name, _ in CASES["lora_fresh_over_sft"]().named_parameters() if ".dpo." in name
    }
    assert products.names(POLICIES["prompt_tuning"]()) == set()


def test_a_frozen_factor_keeps_the_rank():
    policy = CASES["lora_frozen_factor"]()
    state = products.captured(policy)
    for number in range(20):
        move(policy, seed=number)
        state, _ = products.moved(policy, state, 0.2)
    assert {tensor.shape[0] for name, tensor in state.items() if name.endswith(".down")} == {4}


def test_half_precision_policy_full_precision_state():
    """500 syncs with alpha = 0.001 towards a policy that stands still: 1 - 0.999^500 = 39.4 % of the way."""
    policy = lora(init_lora_weights=False).bfloat16()
    state = products.captured(policy)
    start = copy.deepcopy(policy)
    move(policy, seed=0, std=0.2)
    for _ in range(500):
        state, _ = products.moved(policy, state, 0.001)
    values = products.in_place(policy, state)
    assert {value.dtype for value in values.values()} == {torch.bfloat16}
    for path in {name.rpartition(".")[0] for name in state}:
        first, last = (added_by(model.get_submodule(path)) for model in (start, policy))
        held = state.get(f"{path}.product")
        held = state[f"{path}.up"] @ state[f"{path}.down"] if held is None else held
        added = policy.get_submodule(path).scaling["default"] * held.double()
        assert relative(added - first, (1 - 0.999**500) * (last - first)) < 1e-3


def test_dora_rows_whose_scale_is_zero():
    """Row 0 is scaled by 0 throughout. Row 1 is scaled by c, then by -c with another B: the mix of both at 1/2 has
    nothing of W in that row, but half the difference of the two Bs' rows."""
    policy: Any = adapted(nn.ModuleDict({"a": nn.Linear(12, 9)}), r=2, target_modules=["a"], use_dora=True)
    layer = policy.get_submodule("base_model.model.a")
    magnitude, up = layer.lora_magnitude_vector["default"].weight, layer.lora_B["default"].weight
    with torch.no_grad():
        up.normal_(generator=torch.Generator().manual_seed(0))
        magnitude[0] = 0
        norm_before = (layer.weight[1] + layer.get_delta_weight("default")[1]).norm()
        mix = Mix(policy)
        up[:, 0] += 1.0
        norm_after = (layer.weight[1] + layer.get_delta_weight("default")[1]).norm()
        magnitude[1] *= -norm_after / norm_before
    mix.sync(0.5)
    assert mix.state["base_model.model.a.scale"][:2].tolist() == pytest.approx([0, 0], abs=1e-6)
    with mix.held():
        found = effective(policy)["a.weight"]
    assert float(mix.dense["a.weight"][1].norm()) > 0.1
    torch.testing.assert_close(found, mix.dense["a.weight"], rtol=1e-5, atol=1e-6)


def drifting(policy: PeftModel, *, is_smooth: bool) -> Iterator[None]:
    """Factors that move without end: along a curve, or by independent steps of the same length."""
    draw = torch.Generator().manual_seed(11)

    def random(like: Tensor) -> Tensor:
        return torch.randn(like.shape, generator=draw) / like.shape[-1] ** 0.5

    trained = [p for p in policy.parameters() if p.requires_grad]
    waves = [[random(p) for _ in range(3)] for p in trained]
    starts = [p.detach().clone() for p in trained]
    for step in itertools.count(1):
        angle = torch.tensor(0.03 * step)
        for parameter, start, (first, second, third) in zip(trained, starts, waves, strict=True):
            if is_smooth:
                parameter.data = start + angle * first + angle.sin() * second + (2 * angle).cos() * third
            else:
                parameter.data += 0.03 * random(parameter)
        yield


@pytest.mark.slow
@pytest.mark.parametrize("alpha", [0.6, 0.1, 0.01])
@pytest.mark.parametrize("is_smooth", [True, False], ids=["smooth", "random_walk"])
def test_two_hundred_syncs(alpha, is_smooth):
    """The error of what the reference adds to the base, which is more than that of effective weights, against fp64; and
    the memory: never more than the weights' own `in * out`, and where a sync forgets most of the past and the policy
    moves along a curve, 8 r (in + out)."""
    policy = layers()
    lora_layers = {path: m for path, m in policy.named_modules() if isinstance(m, LoraLayer)}

    def added() -> Weights:
        return {path: added_by(layer) for path, layer in lora_layers.items()}

    state = products.captured(policy)
    with torch.no_grad():
        exact = added()
        for _ in itertools.islice(drifting(policy, is_smooth=is_smooth), 200):
            before = exact
            exact = {path: torch.lerp(exact[path], value, alpha) for path, value in added().items()}
            state, squares = products.moved(policy, state, alpha)
            distance = sum(float((exact[path] - before[path]).square().sum()) for path in exact)
            assert squares == pytest.approx(distance, rel=1e-3)
        with exchanged(policy, products.in_place(policy, state)):
            found = added()
    for path, layer in lora_layers.items():
        base = layer.get_base_layer().weight.double()
        assert relative(base + found[path], base + exact[path]) < 1e-4
        assert relative(found[path], exact[path]) < 1e-4
        taken = sum(tensor.numel() for name, tensor in state.items() if name.startswith(f"{path}."))
        assert taken <= layer.in_features * layer.out_features
        if alpha == 0.6 and is_smooth:
            assert taken <= 8 * 16 * (layer.in_features + layer.out_features)


def test_many_syncs_of_a_dora():
    policy = layers(use_dora=True)
    mix = Mix(policy)
    for _ in itertools.islice(drifting(policy, is_smooth=True), 40):
        mix.sync(0.2)
    with mix.held():
        found = effective(policy)
    assert max(relative(found[name], right) for name, right in mix.dense.items()) < 5e-5


def held_ranks(state: Weights) -> dict[str, int]:
    """Layer to rank; 0 for a product."""
    ranks = {name.removesuffix(".product"): 0 for name in state if name.endswith(".product")}
    return ranks | {name.removesuffix(".down"): len(value) for name, value in state.items() if name.endswith(".down")}


def test_seven_syncs_are_concatenations():
    """Nothing is cut up to 8 r: exact but for the rounding of a sum in fp32, 6e-8 a term."""
    policy = layers(init_lora_weights=False)
    mix = Mix(policy)
    for number in range(7):
        move(policy, seed=number, std=0.02)
        mix.sync(0.2)
        assert set(held_ranks(mix.state).values()) == {16 * (number + 2)}
    with mix.held():
        found = effective(policy)
    assert max(relative(found[name], right) for name, right in mix.dense.items()) < 3e-7


def test_a_policy_that_stands_still_is_cut_back():
    """After 40 syncs with 0.9, all but 1e-40 of the reference is one product of rank 16, and a cut sees that."""
    policy = layers(init_lora_weights=False)
    state = products.captured(policy)
    move(policy, seed=1)
    lowest = 10**6
    for _ in range(40):
        state, _ = products.moved(policy, state, 0.9)
        lowest = min(lowest, *held_ranks(state).values())
        assert 0 < min(held_ranks(state).values()) <= max(held_ranks(state).values()) <= 8 * 16
    assert lowest == 16


def test_a_pair_too_large_to_cut_becomes_a_product(monkeypatch):
    """With r = 2 and a largest cut of 16, a slow mix of independent values grows by 2 columns a sync to the break-even
    of its layer, 256 * 512 / 768 = 170 or 384 / 2 = 192, and is the product from the next on. One cut of each layer is
    tried on the way, when its rank comes to more than 8 r."""
    monkeypatch.setattr(products, "LARGEST_CUT", 16)
    tried: list[int] = []
    cut = products._cut
    monkeypatch.setattr(products, "_cut", lambda u, d, t: tried.append(u.shape[1]) or cut(u.clone(), d.clone(), t))
    policy = layers(r=2, init_lora_weights=False)
    exact = {path: added_by(m) for path, m in policy.named_modules() if isinstance(m, LoraLayer)}
    state = products.captured(policy)
    for number in range(100):
        move(policy, seed=number, std=1.0)
        exact = {path: torch.lerp(value, added_by(policy.get_submodule(path)), 0.02) for path, value in exact.items()}
        state, _ = products.moved(policy, state, 0.02)
        for path, rank in held_ranks(state).items():
            break_even = 192 if "square" in path else 170
            assert rank == (2 * (number + 2) if 2 * (number + 2) <= break_even else 0)
    for path, right in exact.items():
        layer: Any = policy.get_submodule(path)
        assert relative(layer.scaling["default"] * state[f"{path}.product"], right) < 1e-6
    assert set(tried) == {2 * 8 + 2}
    assert len(tried) == 3 + 1  # the narrow layer's is done on its transpose


whole = st.integers(-8, 8)


@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 3), st.lists(st.floats(0.01, 1.0), max_size=8), whole)
def test_any_widths_and_alphas(in_features, out_features, rank, alphas, seed):
    """The weight of the policy's value at sync k is alpha_k (1 - alpha_{k+1}) (1 - alpha_{k+2}) ..."""
    base = nn.ModuleDict({"a": nn.Linear(in_features, out_features)})
    policy: Any = adapted(base, r=rank, lora_alpha=2 * rank, target_modules=["a"], init_lora_weights=False)
    layer = policy.get_submodule("base_model.model.a")
    state = products.captured(policy)
    values = [layer.get_delta_weight("default").detach().double()]
    for number, alpha in enumerate(alphas):
        move(policy, seed=100 * seed + number, std=0.5)
        values.append(layer.get_delta_weight("default").detach().double())
        state, _ = products.moved(policy, state, alpha)
    right = torch.zeros_like(values[0])
    remaining = 1.0
    for alpha, value in zip([1.0, *alphas][::-1], values[::-1], strict=True):
        right += remaining * alpha * value
        remaining *= 1 - alpha
    with exchanged(policy, products.in_place(policy, state)):
        found = layer.get_delta_weight("default").detach().double()
    assert float((found - right).norm()) <= 1e-5 * max(float(value.norm()) for value in values)


class Convolving(nn.Module):
    """Parts that LoRA goes on, but not as a linear layer or an embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv1d(4, 4, 3)
        self.attention = nn.MultiheadAttention(8, 2)
        self.table = nn.Embedding(9, 4, max_norm=1.0)
        self.linear = nn.Linear(8, 8)


def parts(**options: Any) -> PeftModel:
    return adapted(Convolving(), r=2, **options)


def _two_active() -> PeftModel:
    policy = lora()
    policy.add_adapter("other", LoraConfig(r=2, target_modules=["q_proj"]))
    policy.base_model.set_adapter(["default", "other"])
    return policy


def _shared_factor() -> PeftModel:
    policy = lora()
    first, second = [m for m in policy.modules() if isinstance(m, LoraLayer)][:3:2]
    second.lora_A["default"].weight = first.lora_A["default"].weight
    return policy


def _merged_in() -> PeftModel:
    policy = lora()
    policy.merge_adapter()
    return policy


def _dora_on_unfrozen() -> PeftModel:
    policy = lora(use_dora=True)
    next(m for m in policy.modules() if isinstance(m, LoraLayer)).get_base_layer().requires_grad_(True)
    return policy


def _experts() -> PeftModel:
    return adapted(tiny_model("qwen3_moe"), r=2, target_modules=[], target_parameters=["mlp.experts.gate_up_proj"])


def _other(config: Any, **options: Any) -> Callable[[], PeftModel]:
    return lambda: adapted(tiny_model(), config=config, **{"target_modules": ["q_proj"]} | options)


REFUSED: dict[str, tuple[Callable[[], PeftModel], str]] = {
    "loha": (_other(peft.LoHaConfig), r"q_proj` is adapted by a loha\.\S+, which is no LoRA"),
    "lokr": (_other(peft.LoKrConfig), r"q_proj` is adapted by a lokr\.\S+, which is no LoRA"),
    "vera": (_other(peft.VeraConfig), r"q_proj` is adapted by a vera\.\S+, which is no LoRA"),
    "adalora": (_other(peft.AdaLoraConfig, total_step=9), r"q_proj` is a adalora.*linear layers and embeddings only"),
    "two_active": (_two_active, r"q_proj` has more than one active adapter \(default, other\)"),
    "experts": (_experts, r"experts` is a lora\.layer\.ParamWrapper: LoRA can be mixed on linear layers and emb"),
    "convolution": (lambda: parts(target_modules=["convolution"]), r"convolution` is a lora\.layer\.Conv1d"),
    "attention": (lambda: parts(target_modules=["attention"]), r"attention` is a lora\.layer\.MultiheadAttention"),
    "max_norm": (lambda: parts(target_modules=["table"]), r"table` is an embedding with max_norm"),
    "alora": (
        lambda: lora(alora_invocation_tokens=[5, 6], task_type="CAUSAL_LM"),
        r"q_proj` is a LoRA of the variant ALoraLinearVariant",
    ),
    "dora_embedding": (
        lambda: lora(target_modules=["embed_tokens"], use_dora=True),
        r"embed_tokens` is a LoRA of the variant DoraEmbeddingVariant: plain LoRA, and DoRA on linear layers",
    ),
    "dora_on_unfrozen": (_dora_on_unfrozen, r"q_proj` is a DoRA on a weight that trains itself"),
    "shared_factor": (_shared_factor, r"1\.self_attn\.q_proj` shares a factor with `.*0\.self_attn\.q_proj`"),
    "merged": (_merged_in, r"q_proj` has its adapter \(default\) merged into its weight; unmerge it first"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_mixed(case):
    make, clause = REFUSED[case]
    reason = products.why_not(make())
    assert reason is not None
    with pytest.raises(ValueError, match=clause):
        raise ValueError(reason)


LINEAR = {
    "prompt_tuning": POLICIES["prompt_tuning"],
    "ia3": _other(peft.IA3Config, target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "layer_norms": _other(peft.LNTuningConfig, target_modules=["input_layernorm"]),
    "tokens": _other(peft.TrainableTokensConfig, target_modules=["embed_tokens"], token_indices=[3]),
}


@pytest.mark.filterwarnings("ignore:Unsupported layer type:UserWarning")  # peft's, about the layer norms it wraps
@pytest.mark.parametrize("case", [*CASES, *LINEAR])
def test_what_can_be_mixed(case):
    assert products.why_not((CASES | LINEAR)[case]()) is None


@pytest.mark.filterwarnings("ignore:Unsupported layer type:UserWarning")
@pytest.mark.parametrize("case", LINEAR)
def test_no_products_where_there_is_no_lora(case):
    policy = LINEAR[case]()
    assert products.captured(policy) == {}
    assert products.moved(policy, {}, 0.5) == ({}, 0.0)
    assert products.in_place(policy, {}) == {}


def test_a_state_of_another_policy():
    state = products.captured(lora(target_modules=["q_proj"]))
    with pytest.raises(ValueError, match=r"layer `.*v_proj` was asked for.*held of it is nothing.*Capture it again"):
        products.moved(lora(), state, 0.5)
    with pytest.raises(ValueError, match=r"q_proj` was asked for.*held of it is \['down', 'up'\].*other adapters"):
        products.in_place(lora(use_dora=True), state)
