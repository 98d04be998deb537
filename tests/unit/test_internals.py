"""A private name that a library renames is an error that says so, and never another number."""

import ast
import contextlib
import inspect
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, inject_adapter_in_model
from peft.tuners.lora.layer import Linear as LoraLinear
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel, Trainer, TrainingArguments

import holdfast.trainer
from families import tiny_model
from holdfast.internals import moved
from holdfast.internals import peft as of_peft
from holdfast.internals import torch as of_torch
from holdfast.internals import transformers as of_transformers
from holdfast.internals.moved import MovedError
from policies import POLICIES, config, logged, trainer

METHODS = {**of_transformers.OVERRIDDEN, **of_transformers.CALLED}


def test_the_message() -> None:
    error = MovedError("peft", "LoraLayer.scaling", "it is a list")
    assert isinstance(error, RuntimeError)
    assert "peft.LoraLayer.scaling moved in version" in str(error)
    assert "it is a list" in str(error)
    assert "Nothing was scored with it. Install peft>=" in str(error)


# --- Trainer ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", METHODS)
def test_a_method_that_is_gone(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delattr(Trainer, name)
    with pytest.raises(MovedError, match=rf"transformers.Trainer.{name} moved in version .*has no such method"):
        trainer(tiny_model(), config(tmp_path))


@pytest.mark.parametrize("name", [name for name, parameters in METHODS.items() if parameters])
def test_a_parameter_that_is_gone(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(Trainer, name, lambda self, something_else=None: None)
    with pytest.raises(MovedError, match=rf"Trainer.{name} moved in version .*it takes no `{METHODS[name][0]}`"):
        trainer(tiny_model(), config(tmp_path))


def test_a_method_that_nobody_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on transformers 5.2, where resuming skipped the wrong batches of a stream."""
    monkeypatch.setattr(Trainer, "_in_vain", lambda self: None, raising=False)
    monkeypatch.setitem(of_transformers.OVERRIDDEN, "_in_vain", ())
    with pytest.raises(MovedError, match=r"Trainer._in_vain moved in version .*`Trainer` no longer calls it"):
        of_transformers.check_trainer()


def test_every_method_that_is_replaced_or_called_is_in_the_table() -> None:
    """What `DPOTrainer` defines and `Trainer` has too, and what it calls of `Trainer`'s private methods."""
    body: list[ast.stmt] = []
    for kind in inspect.getmro(holdfast.trainer.DPOTrainer):
        if kind.__module__.startswith("holdfast."):
            tree = ast.parse(inspect.getsource(inspect.getmodule(kind)))
            (own,) = [node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == kind.__name__]
            body += own.body
    own = {node.name for node in body if isinstance(node, ast.FunctionDef)} - {"__init__", "__init_subclass__"}
    assert {name for name in own if hasattr(Trainer, name)} == set(of_transformers.OVERRIDDEN)
    used = {
        node.attr
        for statement in body
        for node in ast.walk(statement)
        if isinstance(node, ast.Attribute) and re.match("_(?!_)", node.attr) and hasattr(Trainer, node.attr)
    } - {"__init__"}
    assert used <= set(METHODS)
    assert set(of_transformers.CALLED) <= used


def test_no_private_attribute_is_one_of_the_base_class() -> None:
    """What `DPOTrainer` keeps under a name that `Trainer` reads would be taken for something else."""
    kinds = [kind for kind in inspect.getmro(holdfast.trainer.DPOTrainer) if kind.__module__.startswith("holdfast.")]
    ours, theirs = "\n\n".join(map(inspect.getsource, kinds)), ast.parse(inspect.getsource(Trainer))
    nodes = [*ast.walk(ast.parse(ours))]
    kept = {node.attr for node in nodes if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store)}
    kept |= {node.name for node in nodes if isinstance(node, ast.FunctionDef)}
    read = {node.attr for node in ast.walk(theirs) if isinstance(node, ast.Attribute)}
    assert {name for name in kept & read if name.startswith("_")} - {"__init__", "_signature_columns"} <= set(METHODS)


def test_the_options_that_may_be_json(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "fsdp_config" in of_transformers.dict_fields()
    monkeypatch.delattr(TrainingArguments, "_VALID_DICT_FIELDS")
    with pytest.raises(MovedError, match=r"TrainingArguments\._VALID_DICT_FIELDS moved"):
        of_transformers.dict_fields()


# --- models -----------------------------------------------------------------------------------------------------------


def test_the_attention_of_a_config_that_moved(monkeypatch: pytest.MonkeyPatch) -> None:
    found = tiny_model().config
    of_transformers.set_attention(found, "eager")
    assert of_transformers.attention_of(found) == "eager"
    monkeypatch.setattr(PretrainedConfig, "_attn_implementation", property(lambda self: "sdpa"))
    with pytest.raises(MovedError, match=r"'eager' was written to it, and models read 'sdpa'"):
        of_transformers.set_attention(found, "eager")
    monkeypatch.delattr(PretrainedConfig, "_attn_implementation")
    with pytest.raises(MovedError, match=r"PretrainedConfig\._attn_implementation moved"):
        of_transformers.attention_of(PretrainedConfig())


def test_recomputation_by_other_means() -> None:
    layer = nn.Module()
    layer.gradient_checkpointing = True
    with pytest.raises(MovedError, match=r"_gradient_checkpointing_func moved .*recomputes its layers by other means"):
        of_transformers.recomputation(layer)
    layer.gradient_checkpointing = False
    assert of_transformers.recomputation(layer) is None


@pytest.mark.parametrize(
    ("read", "name"),
    [
        (of_transformers.is_on_attention_interface, "_can_set_attn_implementation"),
        (of_transformers.carries_state, "_is_stateful"),
    ],
)
def test_what_a_model_class_says_of_itself(read: Any, name: str) -> None:
    read(tiny_model())
    with pytest.raises(MovedError, match=rf"transformers.SimpleNamespace.{name} moved"):
        read(SimpleNamespace())


def test_adapters_of_transformers_own(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not of_transformers.has_own_adapters(tiny_model())
    owner = next(kind for kind in PreTrainedModel.__mro__ if "_hf_peft_config_loaded" in vars(kind))
    monkeypatch.delattr(owner, "_hf_peft_config_loaded")
    with pytest.raises(MovedError, match="_hf_peft_config_loaded moved"):
        of_transformers.has_own_adapters(tiny_model())


# --- torch ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("read", [of_torch.has_hooks, of_torch.hooks_before, of_torch.hooks_after, of_torch.own_state])
def test_names_of_a_module_that_are_gone(read: Any) -> None:
    read(nn.Linear(2, 2))
    with pytest.raises(MovedError, match=r"torch.SimpleNamespace._\w+ moved"):
        read(SimpleNamespace())


def test_a_state_without_the_parameters(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nn.Linear, "_save_to_state_dict", lambda self, state, prefix, keep_vars: None)
    with pytest.raises(MovedError, match=r"_save_to_state_dict moved .*it leaves out 'weight'"):
        of_torch.own_state(nn.Linear(2, 2))


def test_a_dropout_class_that_is_another(monkeypatch: pytest.MonkeyPatch) -> None:
    assert issubclass(nn.Dropout, of_torch.dropout_class())
    monkeypatch.setattr(nn.modules.dropout, "_DropoutNd", nn.Linear)
    with pytest.raises(MovedError, match=r"_DropoutNd moved .*nn.Dropout is none"):
        of_torch.dropout_class()


def test_a_forward_pass_of_fsdp_that_cannot_be_ended() -> None:
    """The names are looked up, so that one that is gone is no silent stale value."""
    state = SimpleNamespace(_training_state=SimpleNamespace(name="IDLE"))
    for module in (SimpleNamespace(), SimpleNamespace(_get_fsdp_state=lambda: state)):
        with pytest.raises(MovedError, match="moved in version"):
            of_torch.end_forward(module)  # type: ignore[arg-type]


def test_a_tensor_without_a_base(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same memory, with a gradient; a view, where torch makes one of it, is an error."""
    leaf = torch.randn(2, 3, requires_grad=True)
    found = of_torch.without_base(leaf.t())
    assert not found._is_view()
    assert found.data_ptr() == leaf.data_ptr()
    assert torch.equal(torch.autograd.grad(found, leaf, torch.ones(3, 2))[0], torch.ones(2, 3))
    monkeypatch.setattr(torch.ops.aten, "_unsafe_view", lambda tensor, shape: tensor.expand(shape))
    with pytest.raises(MovedError, match=r"_unsafe_view moved .*it returns a view"):
        of_torch.without_base(leaf.t())


def test_a_dimension_is_marked() -> None:
    """Two sizes, one graph."""
    calls: list[int] = []

    def backend(module: Any, inputs: Any) -> Any:
        calls.append(1)
        return module.forward

    torch._dynamo.reset()
    doubled = torch.compile(lambda values: values * 2, backend=backend, fullgraph=True)
    marked = torch.ones(5)
    of_torch.mark_dynamic(marked, 0)
    assert torch.equal(doubled(marked), torch.full((5,), 2.0))
    assert torch.equal(doubled(torch.ones(7)), torch.full((7,), 2.0))
    assert len(calls) == 1


def test_hooks_are_seen() -> None:
    layer = nn.Linear(2, 2)
    assert not of_torch.has_hooks(layer)
    layer.register_full_backward_hook(lambda *_: None)
    assert of_torch.has_hooks(layer)


# --- peft -------------------------------------------------------------------------------------------------------------


def _renamed(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """peft reads the flag `name` under another name: what is set under this one has no effect."""
    for kind in (BaseTunerLayer, AuxiliaryTrainingWrapper):
        match name:
            case "_disable_adapters":
                monkeypatch.setattr(kind, "disable_adapters", property(lambda self: vars(self).get("_off", False)))
            case "_active_adapter":
                active = property(lambda self: vars(self).get("_now", ["default"]))
                monkeypatch.setattr(kind, "active_adapters", active)
    of_peft.check_switching.cache_clear()


NAMED = {"model_adapter_name": "dpo"}
MOVING = {"sync_ref_model": True, "ref_model_sync_steps": 1}
WAYS: dict[str, tuple[str, dict[str, Any]]] = {
    "adapter off": ("lora_fresh", {}),
    "adapter off, by name": ("lora_fresh", {"reference": "adapter"}),
    "adapter off, stored": ("lora_fresh", {"reference": "precomputed"}),
    "adapter off, ahead": ("lora_fresh", {"reference_window": 2}),
    "the bare base": ("lora_fresh_over_sft", {"ref_adapter_name": "__base__"} | NAMED),
    "another adapter": ("lora_fresh_over_sft", {"ref_adapter_name": "default"} | NAMED),
    "values in place": ("lora_sft", {}),
    "values in place, saved whole": ("lora_modules_to_save", {}),
    "a merged copy": ("lora_sft", {"reference": "model"}),
    "a snapshot that moves": ("lora_fresh", {"ref_model_mixup_alpha": 1.0} | MOVING),
    "mixed products": ("lora_sft", {"ref_model_mixup_alpha": 0.5} | MOVING),
    "mixed scaled products": ("dora", {"ref_model_mixup_alpha": 0.5} | MOVING),
    "a copy that moves": ("lora_sft", {"reference": "model", "ref_model_mixup_alpha": 0.5} | MOVING),
}


@pytest.mark.parametrize("flag", ["_disable_adapters", "_active_adapter"])
@pytest.mark.parametrize("way", WAYS)
def test_a_flag_of_peft_that_was_renamed(way: str, flag: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No way to hold the reference goes on with the policy in its place: the trainer is not made."""
    policy, options = WAYS[way]
    made = POLICIES[policy]()
    _renamed(monkeypatch, flag)
    with pytest.raises(MovedError, match=r"peft\..* moved in version"):
        trainer(made, config(tmp_path, **options))
    monkeypatch.undo()
    of_peft.check_switching.cache_clear()


def test_null_ref_context_under_a_renamed_flag(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    ours = trainer(POLICIES["lora_fresh"](), config(tmp_path))
    _renamed(monkeypatch, "_disable_adapters")
    with pytest.raises(MovedError, match=r"peft\..* moved in version"), ours.null_ref_context():
        pass
    monkeypatch.undo()
    of_peft.check_switching.cache_clear()


def test_a_flag_that_is_gone(tmp_path: Path) -> None:
    policy = POLICIES["lora_fresh"]()
    layer = policy.base_model.model.model.layers[0].self_attn.q_proj
    layer.__class__ = type("Moved", (LoraLinear,), {"_disable_adapters": property(lambda self: None)})
    with pytest.raises(MovedError, match="disable_adapters"), of_peft.switched(policy, None):
        pass


@pytest.mark.parametrize("fault", ["is never off", "always has the first", "is off for ever"])
def test_a_layer_that_computes_otherwise_than_it_says(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Flags and properties agree, and the numbers are wrong."""
    plain = LoraLinear.forward

    def forward(self: Any, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        before = self._disable_adapters, self._active_adapter
        match fault:
            case "is never off":
                self._disable_adapters = False
            case "always has the first":
                self._active_adapter = ["first"]
            case "is off for ever":
                self._disable_adapters = True
        try:
            return plain(self, x, *args, **kwargs)
        finally:
            self._disable_adapters, self._active_adapter = before

    monkeypatch.setattr(LoraLinear, "forward", forward)
    of_peft.check_switching.cache_clear()
    with pytest.raises(MovedError, match=r"peft.LoraLayer.forward moved"):
        of_peft.check_switching()
    monkeypatch.undo()
    of_peft.check_switching.cache_clear()
    of_peft.check_switching()


@pytest.mark.parametrize("adapter", [None, "default", "dpo"])
def test_switching_changes_no_requires_grad_and_comes_back(adapter: str | None) -> None:
    """What a user had frozen stays frozen, also after an error inside."""
    policy = POLICIES["lora_fresh_over_sft"]()
    for name, parameter in policy.named_parameters():
        parameter.requires_grad_("lora_A.default" in name)
    before = {name: parameter.requires_grad for name, parameter in policy.named_parameters()}
    ids = torch.randint(3, 90, (1, 7))
    policy.eval()
    expected = policy(ids).logits
    inside = {}
    with contextlib.suppress(KeyError), of_peft.switched(policy, adapter):
        inside = {name: parameter.requires_grad for name, parameter in policy.named_parameters()}
        raise KeyError
    assert inside == before
    assert {name: parameter.requires_grad for name, parameter in policy.named_parameters()} == before
    assert torch.equal(policy(ids).logits, expected)


def test_what_is_switched_to_is_what_peft_computes() -> None:
    """Beside peft's own way of doing it, on a model of its own."""
    ids = torch.randint(3, 90, (1, 7))
    ours, theirs = POLICIES["lora_fresh_over_sft"]().eval(), POLICIES["lora_fresh_over_sft"]().eval()
    with of_peft.switched(ours, "default"):
        found = ours(ids).logits
    theirs.set_adapter("default")
    torch.testing.assert_close(found, theirs(ids).logits, rtol=0, atol=0)
    with of_peft.switched(ours, None):
        found = ours(ids).logits
    with theirs.disable_adapter():
        torch.testing.assert_close(found, theirs(ids).logits, rtol=0, atol=0)
    torch.testing.assert_close(found, tiny_model()(ids).logits)


def test_merged_adapters_are_not_switched() -> None:
    policy = POLICIES["lora_sft"]()
    policy.merge_adapter()
    lost = pytest.raises(ValueError, match=r"\['default'\] are merged into `.*so it would lose them")
    with lost, of_peft.switched(policy, None):
        pass


# --- adapters in a model that is no PeftModel -------------------------------------------------------------------------


def _folder(path: Path) -> Path:
    """A saved LoRA on a saved base."""
    torch.manual_seed(3)
    tiny_model().save_pretrained(path / "base")
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(path / "base")
    tuned: Any = get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.2)
    tuned.save_pretrained(path / "adapter")
    return path / "adapter"


def _loaded(path: Path) -> nn.Module:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(_folder(path))


def _load_adapter(path: Path) -> nn.Module:
    model = tiny_model()
    model.load_adapter(str(_folder(path)))
    return model


def _add_adapter(path: Path) -> nn.Module:
    torch.manual_seed(3)
    model = tiny_model()
    model.add_adapter(LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False))
    return model


def _injected(path: Path) -> nn.Module:
    torch.manual_seed(3)
    return inject_adapter_in_model(LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False), tiny_model())


LOOSE = {"loaded": _loaded, "load_adapter": _load_adapter, "add_adapter": _add_adapter, "injected": _injected}


@pytest.mark.parametrize("is_fresh", [False, True])
@pytest.mark.parametrize("kind", LOOSE)
def test_adapters_without_a_peft_model_are_refused(kind: str, is_fresh: bool, tmp_path: Path) -> None:
    """Also beside a `peft_config`, whose adapter would overwrite them."""
    parts = {"peft_config": LoraConfig(r=2, target_modules=["q_proj"])} if is_fresh else {}
    with pytest.raises(ValueError, match=r"is a LlamaForCausalLM with adapter layers in it .*no PeftModel.*from_pr"):
        trainer(LOOSE[kind](tmp_path), config(tmp_path / "run"), **parts)


@pytest.mark.filterwarnings("ignore:You are trying to modify a model with PEFT for a second time:UserWarning")
@pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute in the model:UserWarning")
@pytest.mark.parametrize("kind", ["loaded", "load_adapter", "add_adapter"])
def test_adapters_under_a_peft_model_are_refused(kind: str, tmp_path: Path) -> None:
    """Where peft or transformers shows that they are there; of injected layers, those of another name."""
    model: Any = get_peft_model(
        LOOSE[kind](tmp_path),  # type: ignore[arg-type]
        LoraConfig(r=2, target_modules=["q_proj"]),
        adapter_name="fresh",
    )
    with pytest.raises(
        ValueError, match=r"is a PeftModel of .*'fresh'\] around a model that had adapter layers before"
    ):
        trainer(model, config(tmp_path / "run"))


@pytest.mark.filterwarnings("ignore:You are trying to modify a model with PEFT for a second time:UserWarning")
@pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute in the model:UserWarning")
@pytest.mark.parametrize("name", ["default", "fresh"])
def test_injected_layers_that_the_adapter_does_not_target(name: str, tmp_path: Path) -> None:
    """Also under one name: the saved adapter's config would not know the injected layers."""
    fresh = LoraConfig(r=2, target_modules=["v_proj"])
    model: Any = get_peft_model(_injected(tmp_path), fresh, adapter_name=name)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"around a model that had adapter layers before \(\["):
        trainer(model, config(tmp_path / "run"))


def test_layers_of_several_adapters_are_all_targeted() -> None:
    """Of factors on parameters and of modules that are saved whole too; what is injected below them is seen."""
    for policy in POLICIES.values():
        if isinstance(made := policy(), PeftModel):
            assert of_peft.untargeted_layers(made) == []
    experts = LoraConfig(r=2, target_modules=["q_proj"], target_parameters=["mlp.experts.gate_up_proj"])
    model: Any = get_peft_model(tiny_model("mixtral"), experts)
    model.add_adapter("other", LoraConfig(r=2, target_modules=["v_proj"]))
    assert of_peft.untargeted_layers(model) == []
    for layer in model.base_model.model.model.layers:
        inject_adapter_in_model(LoraConfig(r=2, target_modules=["o_proj"]), layer.self_attn, adapter_name="other")
    assert {path.rsplit(".", 1)[-1] for path in of_peft.untargeted_layers(model)} == {"o_proj"}


def test_merged_adapters_are_refused(tmp_path: Path) -> None:
    policy = POLICIES["lora_sft"]()
    policy.merge_adapter()
    with pytest.raises(ValueError, match=r"adapters \['default'\] are merged into its weights"):
        trainer(policy, config(tmp_path))


@pytest.mark.parametrize("kind", LOOSE)
def test_as_a_reference_they_count_as_they_are(kind: str, tmp_path: Path) -> None:
    """Live and stored, beside the loss of the same model with its adapter merged."""
    model: Any = LOOSE[kind](tmp_path)
    losses = []
    for way in ({"reference": "model"}, {"precompute_ref_log_probs": True}):
        ours = trainer(tiny_model(), config(tmp_path / "run", **way), ref_model=LOOSE[kind](tmp_path))
        ours.train()
        losses.append(logged(ours))
    assert losses[1] == pytest.approx(losses[0], abs=1e-6)
    for layer in of_peft.adapter_layers(model).values():
        layer.merge()
    plain = tiny_model()
    with torch.no_grad():
        for name, parameter in plain.named_parameters():
            own = dict(model.named_parameters())
            head, tail = name.rsplit(".", 1)
            parameter.copy_(own.get(f"{head}.base_layer.{tail}", own.get(name)))
    ours = trainer(tiny_model(), config(tmp_path / "run"), ref_model=plain)
    ours.train()
    assert losses[0] == pytest.approx(logged(ours), abs=1e-5)


@pytest.mark.parametrize("policy", ["full", "lora_fresh"])
def test_as_a_reference_they_do_not_move(policy: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"A sync mixes the weights .*base_layer.weight` is in one only"):
        trainer(POLICIES[policy](), config(tmp_path / "run", **MOVING), ref_model=_injected(tmp_path)).train()


def test_an_adapter_folder_beside_a_fresh_adapter_is_refused(tmp_path: Path) -> None:
    fresh = LoraConfig(r=2, target_modules=["q_proj"])
    with pytest.raises(ValueError, match=r"`peft_config` was given, but `model` already carries .*'default'"):
        trainer(str(_folder(tmp_path)), config(tmp_path / "run"), peft_config=fresh)


def test_an_adapter_folder_as_a_policy_is_a_peft_model(tmp_path: Path) -> None:
    ours = trainer(str(_folder(tmp_path)), config(tmp_path / "run"))
    assert isinstance(ours.model, PeftModel)
    ours.train()


# --- versions ---------------------------------------------------------------------------------------------------------


def test_the_tested_versions_are_the_claimed_ones() -> None:
    """The newest in constraints.txt, the oldest in constraints-oldest.txt, both inside the ranges of pyproject.toml."""
    root = Path(holdfast.trainer.__file__).parents[2]
    if not (root / "constraints.txt").exists():
        pytest.skip("not in a checkout")
    for number, name in enumerate(("constraints-oldest.txt", "constraints.txt")):
        pins = dict(line.split("==") for line in (root / name).read_text().splitlines() if "==" in line)
        for library, tested in moved.TESTED.items():
            assert pins[library] == tested[number], (name, library)
