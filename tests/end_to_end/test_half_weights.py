"""Frozen weights of linear layers held in the autocast dtype: the run is the same to the bit, and so is what it leaves.

Each run is compared with the same run that leaves weights as they were loaded (`frozen_weights_dtype="as_loaded"`).
"""

import gc
import json
import logging
import weakref
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import IA3Config, LoHaConfig, LoraConfig, VeraConfig, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import TrainerCallback

from families import tiny_model
from holdfast.policy import half_weights
from holdfast.policy.frozen_linears import frozen_linears, num_bytes
from holdfast.reference.identity.digests import digest
from policies import POLICIES, config, logged, rows, trainer

BF16 = torch.bfloat16


def adapted(family: str, adapter: Any) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(7)
        return get_peft_model(tiny_model(family), adapter)


KINDS = POLICIES | {
    "lora_gpt2": lambda: adapted("gpt2", LoraConfig(r=4, target_modules=["c_attn", "c_fc"], fan_in_fan_out=True)),
    "lora_opt": lambda: adapted("opt", LoraConfig(r=4, target_modules=["q_proj", "fc1"])),
    "lora_tied": lambda: adapted("llama_tied", LoraConfig(r=4, target_modules=["q_proj", "down_proj"])),
    "lora_experts": lambda: adapted("mixtral", LoraConfig(r=4, target_modules=["q_proj"])),
    "lora_target_parameters": lambda: adapted(
        "mixtral", LoraConfig(r=4, target_modules=["q_proj"], target_parameters=["mlp.experts.down_proj"])
    ),
    "vera": lambda: adapted("llama", VeraConfig(r=4, target_modules=["q_proj", "v_proj"])),
    "ia3": lambda: adapted(
        "llama", IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"])
    ),
    "loha": lambda: adapted("llama", LoHaConfig(r=4, target_modules=["q_proj", "v_proj"])),
}  # fmt: skip
WAYS: dict[str, dict[str, Any]] = {
    "auto": {},
    "model": {"reference": "model"},
    "adapter": {"reference": "adapter"},
    "base": {"ref_adapter_name": "__base__"},
    "snapshot": {"reference": "snapshot"},
    "disk": {"reference": "snapshot", "snapshot_device": "disk", "reference_window": 2},
    "precomputed": {"reference": "precomputed"},
    "chosen": {},
    "path": {"precompute_ref_log_probs": True},
    "mixture": {},
    "hard": {"sync_ref_model": True, "ref_model_sync_steps": 2, "ref_model_mixup_alpha": 1.0},
    "soft": {"sync_ref_model": True, "ref_model_sync_steps": 2, "ref_model_mixup_alpha": 0.5},
    "soft_model": {
        "reference": "model", "sync_ref_model": True, "ref_model_sync_steps": 2, "ref_model_mixup_alpha": 0.5
    },
    "stored_versions": {
        "precompute_ref_log_probs": True, "sync_ref_model": True, "ref_model_sync_steps": 2,
        "ref_model_mixup_alpha": 1.0,
    },
}  # fmt: skip
BARE = {"full", "partly_frozen"}
UNSWITCHED = BARE | {"lora_unfrozen_norm", "lora_bias_all", "lora_modules_to_save", "prompt_tuning", "prefix_tuning"}
OTHER_FAMILY = {"lora_gpt2", "lora_opt", "lora_tied", "lora_experts", "lora_target_parameters", "trainable_tokens"}
UNMIXED = {"prompt_tuning", "prefix_tuning", "trainable_tokens", "lora_target_parameters", "ia3", "vera", "loha"}
"""Policies without an adapter, whose adapters cannot be switched off alone, of another model, and of which there is no
mix with another."""


def is_possible(kind: str, way: str) -> bool:
    barred = {
        "adapter": BARE, "base": UNSWITCHED | {"lora_fresh_over_sft"}, "soft": UNMIXED, "soft_model": UNMIXED,
        "chosen": OTHER_FAMILY, "path": OTHER_FAMILY, "mixture": OTHER_FAMILY,
    }  # fmt: skip
    return kind not in barred.get(way, set())


def run(kind: str, way: str, folder: Path, **options: Any) -> Any:
    """A trainer of that policy and reference, under bf16 autocast."""
    other = tiny_model(seed=5) if kind != "lora_bias_all" else tiny_model("qwen2", seed=5)
    models: dict[str, Any] = {"chosen": other, "mixture": [None, other]}
    if way == "path":
        other.save_pretrained(folder / "other")
        models["path"] = str(folder / "other")
    is_ahead = way in ("precomputed", "path", "stored_versions")
    store = {"reference_store": str(folder / "store")} if is_ahead else {}
    args = config(folder, bf16=True, **store, **WAYS[way] | options)
    return trainer(KINDS[kind](), args, ref_model=models.get(way), eval_dataset=rows(4, 3))


def as_loaded(kind: str, way: str, folder: Path, **options: Any) -> Any:
    return run(kind, way, folder, frozen_weights_dtype="as_loaded", **options)


def tensors(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in [*model.named_parameters(), *model.named_buffers()]}


def are_equal(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> bool:
    return ours.keys() == theirs.keys() and all(
        tensor.dtype == theirs[name].dtype and torch.equal(tensor, theirs[name]) for name, tensor in ours.items()
    )


class Seen(TrainerCallback):
    """The bytes of the parameters of modules, and how many frozen fp32 weights linear layers have, at each step's
    end."""

    def __init__(self, *modules: nn.Module) -> None:
        self.modules = modules
        self.num_left: list[int] = []
        self.num_bytes: list[int] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.num_left.append(len(frozen_linears(self.modules)))
        self.num_bytes.append(num_bytes({id(p): p for m in self.modules for p in m.parameters()}.values()))


FAST = [
    ("partly_frozen", "snapshot", "auto"), ("lora_sft", "soft_model", "auto"), ("dora", "model", "packed"),
    ("pissa", "hard", "padded"), ("lora_head", "mixture", "auto"), ("lora_fresh", "stored_versions", "auto"),
]  # fmt: skip
TABLE = [
    (kind, way, layout)
    for kind in KINDS
    for way in WAYS
    for layout in ("auto", "packed", "padded")
    if is_possible(kind, way) and (layout == "auto" or kind not in ("prompt_tuning", "prefix_tuning"))
]


@pytest.mark.parametrize(
    ("kind", "way", "layout"),
    [pytest.param(*row, marks=[] if row in FAST else pytest.mark.nightly) for row in TABLE],
)
def test_the_run_is_the_same_to_the_bit(kind: str, way: str, layout: str, tmp_path: Path) -> None:
    """Losses, margins, evaluations, weights and store keys; the first loss of a live reference is ln 2."""
    both = []
    for make in (as_loaded, run):
        ours = make(kind, way, tmp_path / make.__name__, layout=layout, eval_strategy="steps", eval_steps=2)
        seen = Seen(ours.model)
        ours.add_callback(seen)
        first = ours.evaluate()["eval_loss"]
        ours.train()
        last = ours.evaluate()["eval_loss"]
        key = None if ours.reference.stored is None else ours.reference.stored.store.folder.name
        losses = [logged(ours, name) for name in ("loss", "rewards/margins", "grad_norm", "eval_loss")]
        both.append((losses, first, last, key, ours.reference.fingerprint(), tensors(ours.model)))
        num_linears = len(frozen_linears([ours.model]))
        mixes_all = way in ("hard", "soft") and ours.reference.module is not None
        are_back = make is as_loaded, way in ("soft_model", "stored_versions") or mixes_all  # always, and at a sync
        assert seen.num_left == [num_linears * any(are_back[: step + 1]) for step in (0, 1, 0, 1)]
    plain, ours = both
    assert plain[:-1] == ours[:-1]
    assert are_equal(plain[-1], ours[-1])
    is_live = way not in ("chosen", "path", "mixture", "precomputed", "stored_versions", "base", "soft_model")
    if is_live and kind not in ("lora_experts", "lora_target_parameters"):
        assert ours[0][0][0] == pytest.approx(0.6931471805599453, abs=2e-7)


@pytest.mark.parametrize(
    "way", ["auto", "model", *(pytest.param(way, marks=pytest.mark.nightly) for way in ("chosen", "mixture"))]
)
def test_bytes_while_a_run_computes_are_those_of_the_arithmetic(way: str, tmp_path: Path) -> None:
    """By hand: embedding 97 x 32 and five norms of 32 stay in fp32, with the adapters; the rest takes half."""
    ours = run("lora_sft", way, tmp_path)
    second = [module for module in ours.reference.fixed_modules() if module is not ours.model]
    seen = Seen(ours.model, *second)
    ours.add_callback(seen)
    before = num_bytes(p for module in seen.modules for p in module.parameters())
    ours.train()
    one_model = 2 * (32 * 32 * 2 + 32 * 16 * 2 + 32 * 48 * 3) + 97 * 32  # attention, MLP, head
    num_models = {"auto": 1, "model": 2, "chosen": 2, "mixture": 2}[way]
    assert set(seen.num_bytes) == {before - 2 * num_models * one_model}
    assert num_bytes(p for module in seen.modules for p in module.parameters()) == before


def test_an_8b_lora_holds_half_of_its_base() -> None:
    """On the meta device, Llama 3 8B with LoRA on all linears: 32.1 GB become 17.1, since the embedding of 128,256 x
    4,096 stays in fp32; by the arithmetic of its config."""
    from transformers import LlamaConfig, LlamaForCausalLM

    width, wide, layers, vocabulary = 4096, 14336, 32, 128256
    with torch.device("meta"):
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=vocabulary, hidden_size=width, intermediate_size=wide, num_hidden_layers=layers,
                num_attention_heads=32, num_key_value_heads=8, tie_word_embeddings=False,
            )
        )  # fmt: skip
        policy = get_peft_model(model, LoraConfig(r=16, target_modules="all-linear"))
    linears = layers * (2 * width * width + 2 * width * 1024 + 3 * width * wide) + vocabulary * width
    base = linears + vocabulary * width + (2 * layers + 1) * width
    found = frozen_linears([policy])
    second = frozen_linears([policy, policy.get_base_model()])
    assert second.keys() == found.keys(), "a weight that two models have is held once"
    assert num_bytes(found.values()) == 4 * linears
    assert num_bytes(found.values(), BF16) == 2 * linears
    assert num_bytes(p for p in policy.parameters() if not p.requires_grad) == 4 * base
    assert (4 * base - 2 * linears) / (4 * base) == pytest.approx(0.533, abs=1e-3)


# --- what is left behind ----------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`:UserWarning")
@pytest.mark.parametrize(
    ("kind", "is_exact"),
    [
        pytest.param(*row, marks=[] if row in (("lora_head", False), ("partly_frozen", True)) else pytest.mark.nightly)
        for row in product(["lora_sft", "partly_frozen", "pissa", "lora_head", "lora_embeddings"], [False, True])
    ],
)
def test_what_is_saved_and_merged_has_the_original_values(
    kind: str, is_exact: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Checkpoints, the saved model, a state dict and a save from a callback, and the merged model, tensor by tensor.
    Weights that half precision can hold are kept nowhere."""

    class Saves(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
            if state.global_step == 3:
                model.save_pretrained(Path(args.output_dir) / "of_callback")
                (found := {k: v.clone() for k, v in model.state_dict().items()})
                states.append(found)

    def rounded(model: nn.Module) -> nn.Module:
        for parameter in model.parameters():
            parameter.data = parameter.data.to(BF16).float() if is_exact else parameter.data
        return model

    monkeypatch.setitem(KINDS, kind, lambda make=KINDS[kind]: rounded(make()))
    states: list[dict[str, Tensor]] = []
    both = []
    for make in (as_loaded, run):
        folder = tmp_path / make.__name__
        ours = make(kind, "auto", folder, save_strategy="steps", save_steps=2)
        ours.add_callback(Saves())
        ours.train()
        ours.save_model(str(folder / "final"))
        merged = ours.model.merge_and_unload() if kind != "partly_frozen" else ours.model
        merged.save_pretrained(folder / "merged")
        both.append({str(f.relative_to(folder)): load_file(f) for f in sorted(folder.rglob("*model*.safetensors"))})
        manifest = json.loads((folder / "checkpoint-4" / "reference" / "manifest.json").read_text())
        both[-1]["manifest"] = {"policy": torch.tensor([*manifest["policy"].encode()])}
        assert not list(folder.rglob("frozen-*"))
    plain, ours = both
    assert plain.keys() == ours.keys()
    assert len(plain) >= 6
    for name, values in plain.items():
        assert are_equal(values, ours[name]), name
    assert are_equal(states[0], states[1])


def test_weights_of_half_precision_files_are_kept_nowhere(tmp_path: Path) -> None:
    """None of the weights has a file, but the one whose values bf16 cannot hold."""
    model = KINDS["lora_sft"]()
    for parameter in model.parameters():
        parameter.data = parameter.data.to(BF16).float()
    odd = model.get_base_model().model.layers[0].self_attn.q_proj.base_layer.weight
    odd.data[0, 0] = 1 + 2**-20
    ours = trainer(model, config(tmp_path, bf16=True))
    files: list[int] = []

    class Looks(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            files.append(len(list(tmp_path.rglob("frozen-*.safetensors"))))

    ours.add_callback(Looks())
    ours.train()
    assert set(files) == {1}
    assert float(odd.data[0, 0]) == 1 + 2**-20


def test_datasets_are_scored_ahead_by_weights_in_half_precision(tmp_path: Path) -> None:
    """To the same store, and the reference model in it is written to its file as it was loaded."""
    both = []
    for dtype in ("as_loaded", "auto"):
        other, model = tiny_model(seed=5).bfloat16().float(), KINDS["lora_sft"]()
        dtypes: set[torch.dtype] = set()
        other.lm_head.register_forward_pre_hook(lambda head, _, dtypes=dtypes: dtypes.add(head.weight.dtype))
        store = {"reference_store": str(tmp_path / dtype), "precompute_ref_log_probs": True}
        args = config(tmp_path / "run", bf16=True, frozen_weights_dtype=dtype, **store)
        ours = trainer(model, args, ref_model=other)
        assert (BF16 in dtypes) == (dtype == "auto")
        assert {p.dtype for p in other.parameters()} == {torch.float32}
        ours.train()
        files = sorted(f.relative_to(tmp_path / dtype) for f in (tmp_path / dtype).rglob("*") if f.is_dir())
        both.append((files, ours.reference.fingerprint(), logged(ours)))
    assert both[0] == both[1]


def test_a_run_without_room_leaves_the_weights_that_need_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A full disk is no reason to stop: what cannot be kept stays in fp32, the line says so, and numbers are equal."""
    plain = as_loaded("lora_sft", "auto", tmp_path / "plain")
    plain.train()

    def full(self: Any, name: str, value: Tensor) -> None:
        if name.endswith("q_proj.base_layer.weight"):
            raise ValueError("no room")

    ours = run("lora_sft", "auto", tmp_path / "ours")
    from holdfast.reference.originals import OriginalFiles

    keep = OriginalFiles.keep
    monkeypatch.setattr(OriginalFiles, "keep", lambda *a: (full(*a), keep(*a)))
    with caplog.at_level(logging.WARNING):
        ours.train()
    assert "2 stay in fp32, since there is no room to keep their values" in caplog.text
    assert logged(ours) == logged(plain)


def test_the_originals_are_back_after_an_error(tmp_path: Path) -> None:
    class Fails(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            raise KeyError("planted")

    ours = run("partly_frozen", "snapshot", tmp_path)
    frozen = {name: p.detach().clone() for name, p in ours.model.named_parameters() if not p.requires_grad}
    ours.add_callback(Fails())
    with pytest.raises(KeyError, match="planted"):
        ours.train()
    assert are_equal(frozen, {name: p for name, p in ours.model.named_parameters() if not p.requires_grad})


@pytest.mark.parametrize("kind", [pytest.param("lora_sft", marks=pytest.mark.nightly), "partly_frozen"])
def test_a_resumed_run_is_the_uninterrupted_one(kind: str, tmp_path: Path) -> None:
    """A checkpoint of a run that held its weights is resumed by one that does not, and the other way round."""
    whole = run(kind, "auto", tmp_path / "whole", save_strategy="steps", save_steps=2, load_best_model_at_end=False)
    whole.train()
    for make in (as_loaded, run):
        ours = make(kind, "auto", tmp_path / make.__name__)
        ours.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
        assert logged(ours)[-2:] == logged(whole)[-2:]
        assert are_equal(tensors(ours.model), tensors(whole.model))


def test_the_best_model_is_loaded_over_the_originals(tmp_path: Path) -> None:
    both = []
    options = {"eval_strategy": "steps", "save_strategy": "steps", "eval_steps": 1, "save_steps": 1}
    for make in (as_loaded, run):
        ours = make("partly_frozen", "snapshot", tmp_path / make.__name__, load_best_model_at_end=True, **options)
        ours.train()
        both.append((ours.state.best_global_step, tensors(ours.model)))
    assert both[0][0] == both[1][0]
    assert are_equal(both[0][1], both[1][1])


# --- who else uses the model ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["lora_sft", pytest.param("partly_frozen", marks=pytest.mark.nightly)])
def test_a_callback_that_runs_the_model_in_fp32_gets_fp32(kind: str, tmp_path: Path) -> None:
    """Generation and logits in a callback, outside of autocast, are those of the run that holds nothing."""

    class Generates(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
            inner = getattr(model, "base_model", model) if kind == "lora_sft" else model
            ids = torch.tensor([[5, 6, 7]])
            with torch.no_grad():
                results.append(inner(input_ids=ids).logits)
                results.append(model.generate(input_ids=ids, max_new_tokens=4, do_sample=False))

    both = []
    for make in (as_loaded, run):
        results: list[Tensor] = []
        ours = make(kind, "auto", tmp_path / make.__name__)
        ours.add_callback(Generates())
        ours.train()
        both.append((results, logged(ours)))
    assert all(torch.equal(a, b) for a, b in zip(both[0][0], both[1][0], strict=True))
    assert both[0][1] == both[1][1]


def test_what_a_callback_unfreezes_trains_in_fp32(tmp_path: Path) -> None:
    class Unfreezes(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
            if state.global_step == 2:
                model.get_parameter(NAME).requires_grad_(True)

    NAME = "model.layers.0.mlp.up_proj.weight"
    both = []
    for make in (as_loaded, run):
        ours = make("partly_frozen", "snapshot", tmp_path / make.__name__)
        ours.add_callback(Unfreezes())
        ours.model.get_parameter(NAME).requires_grad_(True)
        ours.create_optimizer()  # which has it
        ours.model.get_parameter(NAME).requires_grad_(False)
        ours.train()
        both.append((logged(ours), tensors(ours.model)))
    assert both[0][0] == both[1][0]
    assert are_equal(both[0][1], both[1][1])


def test_a_weight_that_a_callback_changes_is_an_error(tmp_path: Path) -> None:
    """Merging in a callback would round the adapter into the held weight."""

    class Merges(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
            model.merge_adapter()
            model.unmerge_adapter()

    ours = run("lora_sft", "snapshot", tmp_path)
    ours.add_callback(Merges())
    with pytest.raises(ValueError, match=r"was held in torch.bfloat16.*frozen_weights_dtype='as_loaded'"):
        ours.train()
    plain = as_loaded("lora_sft", "snapshot", tmp_path / "plain")
    plain.add_callback(Merges())
    plain.train()


def test_a_pass_outside_of_autocast_within_a_step_is_an_error(tmp_path: Path) -> None:
    from holdfast import DPOTrainer
    from policies import tiny_tokenizer

    class Regularised(DPOTrainer):
        def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            loss = super().compute_loss(model, inputs, *args, **kwargs)
            with torch.autocast("cpu", enabled=False):
                self.model.get_base_model().model(input_ids=torch.tensor([[5, 6]]))
            return loss

    for dtype in ("auto", "as_loaded"):
        args = config(tmp_path, bf16=True, frozen_weights_dtype=dtype)
        ours = Regularised(KINDS["lora_sft"](), args=args, train_dataset=rows(), processing_class=tiny_tokenizer())
        if dtype == "as_loaded":
            ours.train()
            continue
        with pytest.raises(ValueError, match="outside of autocast in the middle of a training step"):
            ours.train()


class Selfish(nn.Module):
    """A linear layer's reader: it computes with the layer's weight in fp32, whatever autocast says."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            return x.float() @ self.inner.weight.float().T


def test_a_model_that_reads_its_weights_elsewhere_is_left_as_it_is(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """It would compute another number without a word, so it is tried before."""

    def policy() -> nn.Module:
        model = tiny_model()
        model.requires_grad_(False)
        model.model.layers[1].mlp.down_proj.weight.requires_grad_(True)
        model.model.layers[0].mlp.up_proj = Selfish(model.model.layers[0].mlp.up_proj)
        return model

    both = []
    for dtype in ("as_loaded", "auto"):
        args = config(tmp_path / dtype, bf16=True, frozen_weights_dtype=dtype, reference="snapshot")
        ours = trainer(policy(), args)
        seen = Seen(ours.model)
        ours.add_callback(seen)
        with caplog.at_level(logging.WARNING):
            ours.train()
        assert min(seen.num_left) > 0
        both.append(logged(ours))
    assert both[0] == both[1]
    assert "Frozen weights stay as loaded in 1 of the run's models" in caplog.text


# --- where nothing is held --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "dtype"),
    [
        ({"bf16": False}, torch.float32),
        ({"bf16": True}, BF16),
        ({"bf16": True, "frozen_weights_dtype": "as_loaded"}, None),
    ],
    ids=["no autocast", "bf16 weights", "opt-out"],
)
def test_nothing_is_held(options: dict[str, Any], dtype: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = KINDS["lora_sft"]()
    model = model.to(dtype) if dtype is not None else model
    dtypes: set[torch.dtype] = set()

    class Looks(TrainerCallback):
        def on_step_end(self, *_: Any, model: Any = None, **__: Any) -> None:
            dtypes.update(p.dtype for p in model.parameters())

    ours = trainer(model, config(tmp_path, **options))
    ours.add_callback(Looks())
    with caplog.at_level(logging.WARNING):
        ours.train()
    assert dtypes == {dtype or torch.float32}
    assert "Frozen weights" not in caplog.text


def test_what_is_held_is_said_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The 15 weights of linear layers: 18,464 numbers."""
    ours = run("lora_sft", "auto", tmp_path)
    with caplog.at_level(logging.WARNING):
        ours.train()
        ours.evaluate()
        ours.train()
    lines = [record.message for record in caplog.records if record.message.startswith("Frozen weights")]
    assert lines == [
        "Frozen weights: 15 of linear layers are held in bfloat16 while the run computes, which saves 36,928 bytes of "
        f"73,856 and changes no number; the fp32 values of 15 are kept in {tmp_path / '_reference'} meanwhile "
        "(frozen_weights_dtype='as_loaded' leaves them as they are)."
    ]


def test_an_unknown_way_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="frozen_weights_dtype='bf16' was asked for; it is 'auto' or 'as_loaded'"):
        config(tmp_path, frozen_weights_dtype="bf16")


def test_a_digest_is_of_the_original_weights(tmp_path: Path) -> None:
    """Asked in the middle of a run, as a sync with a store does."""
    ours = run("partly_frozen", "snapshot", tmp_path)
    before = ours.reference.fingerprint(), digest(ours.model.named_parameters())
    found: list[str] = []

    class Asks(TrainerCallback):
        def on_step_begin(self, *_: Any, model: Any = None, **__: Any) -> None:
            with ours.null_ref_context():
                found.append(ours.reference.fingerprint())
                half_weights.as_loaded(model)
                found.append(digest(model.named_parameters()))

    ours.add_callback(Asks())
    ours.train()
    assert set(found) == set(before)


def test_a_trainer_that_is_gone_leaves_no_model_behind(tmp_path: Path) -> None:
    ours = run("lora_sft", "model", tmp_path)
    ours.train()
    models = [weakref.ref(model) for model in (ours.model, ours.reference.module)]
    del ours
    gc.collect()
    assert [model() for model in models] == [None, None]
    assert not (tmp_path / "_reference").exists()
