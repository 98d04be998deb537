"""Whatever changes a log-prob changes its identity, and whatever does not, does not (law L6a): by mutation.

Each row of the table changes one thing about a run whose log-probs are stored. The completions of `rows()` are scored
before and after, live. Where any number differs, the store must find nothing and the run's checkpoint must be refused;
where all are equal bit for bit, the store must find everything. Rows are made from the models themselves (each
parameter, buffer, module setting and config entry), so that a new one enters the table by itself.
"""

import functools
import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, PeftType, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaMLP

from checkpoints import make_earlier, manifest_of
from families import CONFIGS, tiny_model
from holdfast.batch import PairBatch
from holdfast.data.layouts.padded import PaddedLayout
from holdfast.data.layouts.preference_collator import DataCollatorForPreference
from holdfast.reference.identity.identity import Identity
from holdfast.scoring.score import score
from holdfast.store.maintenance import stores
from policies import POLICIES, config, logged, rows, trainer

AHEAD = {"reference": "precomputed", "reference_audit": False}
SAVED = {"save_strategy": "steps", "save_steps": 1, "max_steps": 1, "learning_rate": 0.0, "logging_steps": 1}


@dataclass(frozen=True, kw_only=True, eq=False)
class Run:
    """What a trainer is made of. Only the very same object is the same run, so that what it left can be looked up."""

    policy: Callable[[], nn.Module] = tiny_model
    options: dict[str, Any] = field(default_factory=dict)
    parts: dict[str, Callable[[], Any]] = field(default_factory=dict)

    def made(self, folder: Path, **options: Any) -> Any:
        parts = {name: make() for name, make in self.parts.items()}
        return trainer(self.policy(), config(folder, **AHEAD | SAVED | self.options | options), **parts)


def live(run: Run, folder: Path) -> Tensor:
    """The reference's log-probs of all pairs, one batch after the other, asked without a store."""
    options = {"reference": "auto", "precompute_ref_log_probs": False, "learning_rate": 0.0}
    ours = run.made(folder, **options)
    table = rows().to_list()
    batches = [ours._collated(table[start : start + 3]) for start in range(0, len(table), 3)]
    return torch.cat([ours.reference.logps(batch).per_token for batch in batches])


def names_of_stores() -> set[str]:
    from holdfast.store.store import default_root

    return {facts.name for facts in stores(default_root())}


# --- one thing changed ------------------------------------------------------------------------------------------------


def _changed(make: Callable[[], nn.Module], change: Callable[[Any], Any]) -> Callable[[], nn.Module]:
    def made() -> nn.Module:
        model = make()
        with torch.no_grad():
            changed = change(model)
        return changed if isinstance(changed, nn.Module) else model

    return made


def _in_peft(change: Callable[[Any], Any], policy: str = "lora_sft") -> Run:
    return Run(policy=_changed(POLICIES[policy], change))


def _scaled(model: PeftModel) -> None:
    for module in model.modules():
        if hasattr(module, "scaling") and hasattr(module, "lora_A"):
            module.scaling["default"] *= 2


def _two_adapters(active: str) -> Callable[[], PeftModel]:
    """Trained adapters "a" and "b", of which one is active."""

    def made() -> PeftModel:
        model = POLICIES["lora_sft"]()
        model.add_adapter("other", LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
        with torch.no_grad(), torch.random.fork_rng():
            torch.manual_seed(3)
            for name, parameter in model.named_parameters():
                if "other" in name:
                    parameter.normal_(std=0.2)
        model.set_adapter(active)
        return model

    return made


def _adapted_ref_model(change: Callable[[Any], Any] = lambda model: None) -> Run:
    return Run(parts={"ref_model": _changed(POLICIES["lora_sft"], change)})


def _fresh(**options: Any) -> Callable[[], PeftModel]:
    options = {"r": 4, "target_modules": ["q_proj", "v_proj"]} | options
    return lambda: get_peft_model(tiny_model(), LoraConfig(**options))


def _with_inputs(**extra: Callable[[Tensor], Any]) -> Run:
    """A collator of the user's that adds model inputs."""

    def collate(features: list[dict[str, Any]]) -> dict[str, Any]:
        batch = DataCollatorForPreference(pad_token_id=0)(features)
        return batch | {name: make(batch["input_ids"]) for name, make in extra.items()}

    return Run(options={"remove_unused_columns": False}, parts={"data_collator": lambda: collate})


def _positions(offset: int, stride: int = 1) -> Callable[[Tensor], Tensor]:
    return lambda ids: (offset + stride * torch.arange(ids.shape[1])).expand(ids.shape).clone()


LLAMA, LORA, TWO = Run(), Run(policy=POLICIES["lora_sft"]), Run(policy=_two_adapters("default"))
NAMED = Run(policy=POLICIES["lora_fresh_over_sft"], options={"ref_adapter_name": "default"})
GIVEN, COLLATED = _adapted_ref_model(), _with_inputs()
PADDED = Run(options={"layout": "padded"})


def _scaling_of(model: Any, name: str, value: float) -> None:
    setattr(model.model.layers[1].self_attn, name, value)


# Code of a user's, in a reference of the user's.


def _coded(change: Callable[[Any], Any]) -> Run:
    return Run(parts={"ref_model": _changed(lambda: tiny_model(seed=1), change)})


def _adding(value: Any) -> Callable[..., Any]:
    def hook(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        return output + value

    return hook


def _halved(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor]:
    return (args[0] / 2,)


def _times(module: nn.Module, args: tuple[Tensor, ...], by: float) -> tuple[Tensor]:
    return (args[0] * by,)


def _patch(layer: Any, factor: float) -> None:
    plain = layer.forward

    @functools.wraps(plain)
    def forward(hidden: Tensor) -> Tensor:
        return plain(hidden) * factor

    layer.forward = forward


def _reclass(layer: Any, kind: type) -> None:
    layer.__class__ = kind


class _OwnMLP(LlamaMLP):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 0.5


class _PatchedMLP(LlamaMLP):
    pass


_PatchedMLP.__module__, _PatchedMLP.__qualname__ = LlamaMLP.__module__, LlamaMLP.__qualname__
_PatchedMLP.forward = lambda self, x: self.down_proj(self.up_proj(x))


def _named_alike(is_first: bool) -> type:
    if is_first:

        class Layer(LlamaMLP):
            def forward(self, x: Tensor) -> Tensor:
                return super().forward(x) * 0.5
    else:

        class Layer(LlamaMLP):
            def forward(self, x: Tensor) -> Tensor:
                return super().forward(x) * 0.6

    return Layer


class _Called(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


class _Scaled(nn.Module):
    def __init__(self, scale: Tensor) -> None:
        super().__init__()
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale


OTHER = _coded(lambda model: None)

MUTATIONS: dict[str, tuple[Run, Run]] = {
    # adapters
    "another adapter is active": (TWO, Run(policy=_two_adapters("other"))),
    "the adapter that trains": (TWO, Run(policy=_two_adapters("default"), options={"model_adapter_name": "other"})),
    "an adapter beside it": (LORA, TWO),
    "scaling": (LORA, _in_peft(_scaled)),
    "a factor": (LORA, _in_peft(lambda m: m.get_parameter(_LORA_B).add_(0.1))),
    "renamed": (LORA, Run(policy=POLICIES["lora_sft_named_ref"])),
    "bare base against trained": (LLAMA, LORA),
    "fresh, rank 4": (LLAMA, Run(policy=_fresh())),
    "fresh, rank 8": (LLAMA, Run(policy=_fresh(r=8, lora_alpha=99))),
    "fresh, other modules": (LLAMA, Run(policy=_fresh(target_modules=["up_proj", "down_proj"]))),
    "fresh, rslora": (LLAMA, Run(policy=_fresh(use_rslora=True))),
    "fresh, modules to save": (LLAMA, Run(policy=_fresh(modules_to_save=["lm_head"]))),
    "fresh, embeddings": (LLAMA, Run(policy=_fresh(target_modules=["embed_tokens"]))),
    "fresh, dropout": (LLAMA, Run(policy=_fresh(lora_dropout=0.3))),
    "fresh over trained": (LLAMA, Run(policy=POLICIES["lora_fresh_over_sft"])),
    "merged": (LORA, _in_peft(lambda m: m.merge_and_unload())),
    "named: the other adapter": (NAMED, Run(policy=POLICIES["lora_fresh_over_sft"])),
    "named: the base": (NAMED, Run(policy=NAMED.policy, options={"ref_adapter_name": "__base__"})),
    "named: as if it were active": (NAMED, LORA),
    "the named base is the base": (
        LLAMA, Run(policy=NAMED.policy, options={"ref_adapter_name": "__base__"}),
    ),
    # a reference of the user's
    "given: the same weights": (LLAMA, Run(parts={"ref_model": tiny_model})),
    "given: others": (LLAMA, Run(parts={"ref_model": lambda: tiny_model(seed=1)})),
    "given: in train mode": (LLAMA, Run(parts={"ref_model": lambda: tiny_model().train()})),
    "given: what the policy is": (GIVEN, Run(policy=POLICIES["lora_sft"])),
    "given: another policy": (GIVEN, Run(policy=lambda: tiny_model(seed=4), parts=GIVEN.parts)),
    "given: scaling": (GIVEN, _adapted_ref_model(_scaled)),
    "given: adapters off": (GIVEN, _adapted_ref_model(lambda m: m.base_model.disable_adapter_layers())),
    "given: merged in place": (GIVEN, _adapted_ref_model(lambda m: m.merge_adapter())),
    # settings of modules, which no config knows of any more
    "attention's scale": (LLAMA, Run(policy=_changed(tiny_model, lambda m: _scaling_of(m, "scaling", 0.5)))),
    "an epsilon": (
        LLAMA, Run(policy=_changed(tiny_model, lambda m: setattr(m.model.norm, "variance_epsilon", 0.1))),
    ),
    "an activation": (
        LLAMA, Run(policy=_changed(tiny_model, lambda m: setattr(m.model.layers[0].mlp, "act_fn", nn.ReLU()))),
    ),
    "the scale of rotations": (
        LLAMA, Run(policy=_changed(tiny_model, lambda m: setattr(m.model.rotary_emb, "attention_scaling", 1.5))),
    ),
    "a layer's index": (LLAMA, Run(policy=_changed(tiny_model, lambda m: _scaling_of(m, "layer_idx", 1)))),
    "a dropout": (LLAMA, Run(policy=_changed(tiny_model, lambda m: _scaling_of(m, "attention_dropout", 0.5)))),
    # code that is no library's
    "code: a hook": (OTHER, _coded(lambda m: m.model.norm.register_forward_hook(_adding(0.1)))),
    "code: another value in a hook": (
        _coded(lambda m: m.model.norm.register_forward_hook(_adding(0.1))),
        _coded(lambda m: m.model.norm.register_forward_hook(_adding(0.2))),
    ),
    "code: another tensor in a hook": (
        _coded(lambda m: m.model.norm.register_forward_hook(_adding(torch.arange(32) / 9))),
        _coded(lambda m: m.model.norm.register_forward_hook(_adding(torch.arange(32) / 8))),
    ),
    "code: a hook before": (OTHER, _coded(lambda m: m.lm_head.register_forward_pre_hook(_halved))),
    "code: a bound argument": (
        _coded(lambda m: m.lm_head.register_forward_pre_hook(functools.partial(_times, by=0.5))),
        _coded(lambda m: m.lm_head.register_forward_pre_hook(functools.partial(_times, by=0.6))),
    ),
    "code: the same hook": (
        _coded(lambda m: m.model.norm.register_forward_hook(_adding(0.1))),
        _coded(lambda m: m.model.norm.register_forward_hook(_adding(0.1))),
    ),
    "code: a patched forward": (OTHER, _coded(lambda m: _patch(m.model.layers[0].mlp, 0.5))),
    "code: another patch": (
        _coded(lambda m: _patch(m.model.layers[0].mlp, 0.5)), _coded(lambda m: _patch(m.model.layers[0].mlp, 0.6)),
    ),
    "code: a patched class": (OTHER, _coded(lambda m: _reclass(m.model.layers[0].mlp, _PatchedMLP))),
    "code: a class of one's own": (OTHER, _coded(lambda m: _reclass(m.model.layers[0].mlp, _OwnMLP))),
    "code: two classes of one name": (
        _coded(lambda m: _reclass(m.model.layers[0].mlp, _named_alike(True))),
        _coded(lambda m: _reclass(m.model.layers[0].mlp, _named_alike(False))),
    ),
    "code: a function among the attributes": (
        OTHER, _coded(lambda m: setattr(m.model.layers[0].mlp, "act_fn", _Called(torch.tanh))),
    ),
    "code: another function": (
        _coded(lambda m: setattr(m.model.layers[0].mlp, "act_fn", _Called(torch.relu))),
        _coded(lambda m: setattr(m.model.layers[0].mlp, "act_fn", _Called(torch.tanh))),
    ),
    "code: another tensor among the attributes": (
        _coded(lambda m: setattr(m.model.layers[0].mlp, "act_fn", _Scaled(torch.tensor(2.0)))),
        _coded(lambda m: setattr(m.model.layers[0].mlp, "act_fn", _Scaled(torch.tensor(3.0)))),
    ),
    "code: input gradients asked for": (OTHER, _coded(lambda m: m.enable_input_require_grads())),
    # numerics
    "dtype": (LLAMA, Run(policy=lambda: tiny_model().bfloat16())),
    "autocast": (LLAMA, Run(options={"bf16": True})),
    "attention": (PADDED, Run(policy=lambda: tiny_model(attn_implementation="eager"), options=PADDED.options)),
    "layout": (LLAMA, PADDED),
    # inputs that a collator adds
    "no input": (COLLATED, _with_inputs()),
    "the positions that the model takes by itself": (COLLATED, _with_inputs(position_ids=_positions(0))),
    "wider positions": (COLLATED, _with_inputs(position_ids=_positions(0, 2))),
    "a plain setting of None": (COLLATED, _with_inputs(labels=lambda ids: None)),
    # what does not count
    **{
        f"run: {name}": (LLAMA, Run(options=options))
        for name, options in {
            "learning rate": {"learning_rate": 1e-3}, "seed": {"seed": 5}, "beta": {"beta": 3.0},
            "loss": {"loss_type": "ipo"}, "weight decay": {"weight_decay": 0.3}, "logging": {"logging_steps": 7},
            "batch size": {"per_device_train_batch_size": 4}, "scoring batch": {"precompute_ref_batch_size": 2},
            "accumulation": {"gradient_accumulation_steps": 2}, "dropout stays": {"disable_dropout": False},
            "ld_alpha": {"ld_alpha": 0.5}, "optimizer": {"optim": "adamw_torch"}, "window": {"reference_window": 2},
        }.items()
    },
    "version 0, soft": (LLAMA, Run(options={"sync_ref_model": True, "ref_model_sync_steps": 1})),
    "version 0, hard": (
        LLAMA, Run(options={"sync_ref_model": True, "ref_model_sync_steps": 1, "ref_model_mixup_alpha": 1.0}),
    ),
    "order": (LLAMA, Run(parts={"train_dataset": lambda: rows().select([*range(11, -1, -1)])})),
}  # fmt: skip
_LORA_B = "base_model.model.model.layers.1.self_attn.v_proj.lora_B.default.weight"


def _of_tensors() -> Iterator[tuple[str, tuple[Run, Run]]]:
    """Every parameter and every buffer of two models moved a little."""
    for family in ("llama", "qwen3"):
        base = Run(policy=lambda family=family: tiny_model(family))
        for name, _ in [*tiny_model(family).named_parameters(), *tiny_model(family).named_buffers()]:
            change = _changed(base.policy, lambda m, name=name: _tensor(m, name).mul_(1.1))
            yield f"{family} {name}", (base, Run(policy=change))


def _tensor(model: nn.Module, name: str) -> Tensor:
    return dict([*model.named_parameters(), *model.named_buffers()])[name]


MUTATIONS |= dict(_of_tensors())


def test_the_table_is_long():
    assert len(MUTATIONS) >= 60


@dataclass(frozen=True, kw_only=True)
class Before:
    """What a run computes live, and what it leaves: its folder, everything that it stored, and its reference's name."""

    logps: Tensor
    folder: Path
    home: Path
    weights: str
    store_name: str


@pytest.fixture(scope="module")
def before(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Run], Before]:
    """What a run was before anything changed. Many rows begin with the same run, which is made once."""

    @functools.cache
    def left_by(run: Run) -> Before:
        root = tmp_path_factory.mktemp("before")
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("HOLDFAST_HOME", str(root / "home"))
            with torch.no_grad():
                logps = live(run, root / "live")
            stored = run.made(root / "run")
            stored.train()
            identity, name = stored.reference.identity(), stored.reference.stored.store.folder.name
        return Before(
            logps=logps, folder=root / "run", home=root / "home", weights=identity.weights_digest, store_name=name
        )

    return left_by


@pytest.mark.slow
@pytest.mark.parametrize("name", MUTATIONS)
def test_identity_follows_the_numbers(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, before: Callable[[Run], Before]
) -> None:
    first, second = MUTATIONS[name]
    left = before(first)
    shutil.copytree(left.folder, tmp_path / "run")
    shutil.copytree(left.home, tmp_path / "home")
    monkeypatch.setenv("HOLDFAST_HOME", str(tmp_path / "home"))
    with torch.no_grad():
        after = live(second, tmp_path / "b")
    is_same = torch.equal(left.logps, after)
    there = names_of_stores()
    assert len(there) == 1
    again = second.made(tmp_path / "other")
    again.reference.state_dict()  # what waits in memory is written
    if is_same:
        assert names_of_stores() == there, "all was found"
        if "sync_ref_model" not in second.options and "reference_window" not in second.options:
            assert again.reference.identity().weights_digest == left.weights
            assert again.reference.stored.store.folder.name == left.store_name
    else:
        again.train()
        assert len(names_of_stores()) == 2 or name in _OF_A_CONTENT_ID
        resumed = second.made(tmp_path / "run", max_steps=2)
        with pytest.raises(ValueError, match="was written by a run that differs in"):
            resumed.train(resume_from_checkpoint=True)


_OF_A_CONTENT_ID = {"wider positions"}


# --- every kind of adapter that peft has ------------------------------------------------------------------------------

KINDS: dict[str, dict[str, Any]] = {
    "ADALORA": {"total_step": 10}, "SHIRA": {"r": 4}, "MISS": {"r": 4}, "WAVEFT": {"n_frequency": 10},
    "VBLORA": {"r": 4, "vector_length": 2, "num_vectors": 8}, "IA3": {"feedforward_modules": []},
}  # fmt: skip
"""What a kind of adapter needs beside the modules that it targets."""
NO_LAYERS = {
    "PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "MULTITASK_PROMPT_TUNING", "CPT", "CARTRIDGE", "ADAPTION_PROMPT",
    "POLY", "XLORA", "TRAINABLE_TOKENS", "LN_TUNING", "SHADOW",
}  # fmt: skip
"""Those that do not wrap the linear layers that they are given."""
COSTS_ANOTHER_STORE = {"OFT", "BOFT", "MISS", "LILY", "GLORA", "BEFT", "C3A", "ROAD", "ADAMSS"}
"""Those of which a fresh one adds nothing, and nobody can tell by a weight that it adds."""


def _of_kind(kind: str) -> Any:
    config_class = PEFT_TYPE_TO_CONFIG_MAPPING[PeftType[kind]]
    for modules in (["q_proj", "v_proj"], ["q_proj", "o_proj"]):
        try:
            torch.manual_seed(3)
            options = {"task_type": "CAUSAL_LM", "target_modules": modules} | KINDS.get(kind, {})
            model = get_peft_model(tiny_model(), config_class(**options)).eval()
            model(torch.ones(1, 2, dtype=torch.long))
            return model
        except (TypeError, ValueError, RuntimeError, ImportError, AssertionError) as error:
            reason = error
    pytest.skip(f"{kind} cannot be made here: {reason}")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", sorted({kind.name for kind in PEFT_TYPE_TO_CONFIG_MAPPING} - NO_LAYERS))
def test_every_kind_of_adapter(kind: str) -> None:
    """A fresh one that gives the base's numbers to the bit is the base; once its values have moved it is not."""
    model, base = _of_kind(kind), tiny_model()
    ids = torch.randint(3, 90, (2, 9), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = base(ids).logits
        is_base = torch.equal(model(ids).logits, expected)
        if kind not in COSTS_ANOTHER_STORE:
            assert (not Identity.of(model).differing_from(Identity.of(base))) == is_base
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2)))
        assert not torch.equal(model(ids).logits, expected)
        assert Identity.of(model).differing_from(Identity.of(base))


# --- entries of a config ----------------------------------------------------------------------------------------------

FAMILIES = ("llama", "qwen2", "gemma3", "gpt2", "mixtral", "granite")
ELSEWHERE = {
    "rope_parameters": "kinds of layers that a two-layer model has none of",
    "attn_logit_softcapping": "read by eager attention alone",
    "reorder_and_upcast_attn": "rounds in half precision alone",
    "use_bidirectional_attention": "masks that attention implementations make from it",
}
"""Entries that may change numbers of other models than these; a key that has them is right."""


def _others(value: Any) -> list[Any]:
    """Other values of the same kind."""
    if isinstance(value, bool):
        return [not value]
    if isinstance(value, int):
        return [value + 1, value * 2]
    if isinstance(value, float):
        return [1.5 * value + 0.01, value / 2]
    if isinstance(value, str):
        return ["relu" if "elu" in value or value == "silu" else f"{value}x"]
    if isinstance(value, dict):
        return [{**value, key: other} for key, item in value.items() for other in _others(item)]
    return [value[::-1]] if isinstance(value, list) else [True, 2, 0.5]


def _rows_of_unlike_lengths() -> PairBatch:
    long = {"prompt_ids": [*range(3, 20)], "chosen_ids": [*range(20, 60)], "rejected_ids": [*range(60, 20, -1)]}
    short = {"prompt_ids": [5, 6], "chosen_ids": [9, 8, 7], "rejected_ids": [3, 4]}
    return PairBatch.from_tensors(PaddedLayout(0)([long, short]))


@pytest.mark.parametrize("family", FAMILIES)
def test_config_entries(family: str) -> None:
    """Each entry, with other values, in a model of the same weights: the identity differs exactly where numbers do."""
    base, batch = tiny_model(family), _rows_of_unlike_lengths()
    with torch.no_grad():
        expected = score(base, batch).logps.per_token
    identity, wrong, num_tried = Identity.of(base), {}, 0
    for entry, value in base.config.to_dict().items():
        for other in _others(value):
            try:
                changed = type(base.config).from_dict({**base.config.to_dict(), entry: other})
                changed._attn_implementation = base.config._attn_implementation
                model = transformers.AutoModelForCausalLM.from_config(changed).float().eval()
                model.load_state_dict(base.state_dict())
                with torch.no_grad():
                    found = score(model, batch).logps.per_token
            except Exception:
                continue  # no such model
            num_tried += 1
            is_same, one = torch.equal(found, expected), Identity.of(model)
            has_same = (one.weights_digest, one.config_digest) == (identity.weights_digest, identity.config_digest)
            if has_same != is_same and not (is_same and entry in ELSEWHERE):
                wrong[entry] = (other, "stale" if has_same else one.differing_from(identity))
    assert not wrong
    assert num_tried >= 20


# --- buffers of other families ----------------------------------------------------------------------------------------

_MLA = {
    "num_hidden_layers": 2, "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16,
    "n_group": 1, "topk_group": 1, "first_k_dense_replace": 0, "hidden_size": 32, "intermediate_size": 48,
    "num_attention_heads": 4, "num_key_value_heads": 4, "vocab_size": 97, "max_position_embeddings": 128,
}  # fmt: skip
ROUTED: dict[str, Callable[[], Any]] = {
    "deepseek_v3": lambda: transformers.DeepseekV3Config(
        **_MLA, q_lora_rank=None, kv_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=8
    ),
    "glm4_moe": lambda: transformers.Glm4MoeConfig(**_MLA, head_dim=8),
    "gpt_neox": CONFIGS["gpt_neox"],
    "phi3": CONFIGS["phi3"],
    "gemma3": CONFIGS["gemma3"],
}


@pytest.mark.parametrize("family", ROUTED)
def test_buffers(family: str) -> None:
    """Every buffer, persistent or not, moved: the identity differs exactly where numbers do."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(ROUTED[family]()).float().eval()
    batch = _rows_of_unlike_lengths()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
        expected, identity = score(model, batch).logps.per_token, Identity.of(model)
        names = [name for name, buffer in model.named_buffers() if buffer.is_floating_point()]
        assert names
        for name in names:
            buffer = model.get_buffer(name)
            kept = buffer.clone()
            buffer.add_(torch.linspace(0.1, 2.0, buffer.numel()).view(buffer.shape))
            is_same = torch.equal(score(model, batch).logps.per_token, expected)
            assert (Identity.of(model).weights_digest == identity.weights_digest) == is_same, name
            buffer.copy_(kept)
        assert Identity.of(model).weights_digest == identity.weights_digest


# --- what else is kept ------------------------------------------------------------------------------------------------


def test_versions_of_the_same_weights_are_found(tmp_path: Path) -> None:
    """A moving reference that has not moved, kept or not, is the fixed one; and so is one that moved nowhere."""
    moving = {"sync_ref_model": True, "ref_model_sync_steps": 1, "max_steps": 3, "reference_store_versions": True}
    first = Run(options=moving).made(tmp_path / "a")
    first.train()
    first.reference.state_dict()
    there = names_of_stores()
    fixed = Run(options={"max_steps": 3}).made(tmp_path / "b")
    assert len(fixed.reference.stored.store.missing(_ids(fixed))) < len(_ids(fixed))
    fixed.train()
    assert logged(fixed) == pytest.approx(logged(first), abs=1e-6)
    assert len(there) >= 1


def _ids(ours: Any) -> list[Any]:
    return ours._collated(rows().to_list()).content_ids()


def test_a_manifest_of_an_earlier_version_is_refused(tmp_path: Path) -> None:
    LLAMA.made(tmp_path).train()
    make_earlier(tmp_path / "checkpoint-1")
    path = manifest_of(tmp_path / "checkpoint-1")
    manifest = json.loads(path.read_text())
    del manifest["config"]
    path.write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match=r"earlier version of holdfast, which did not record \['config'\]"):
        LLAMA.made(tmp_path, max_steps=2).train(resume_from_checkpoint=True)


def test_the_setting_that_differs_is_named(tmp_path: Path) -> None:
    LLAMA.made(tmp_path).train()
    other = Run(policy=lambda: tiny_model(rms_norm_eps=1e-3)).made(tmp_path, max_steps=2)
    with pytest.raises(ValueError, match=r"differs in the model's setting `rms_norm_eps`: recorded 1e-06, found 0.001"):
        other.train(resume_from_checkpoint=True)
