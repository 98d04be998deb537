"""Which weights may be held in half precision, and that holding them and putting them back changes no bit."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from families import CONFIGS, tiny_model
from holdfast.policy.frozen_linears import frozen_linears
from holdfast.policy.half_weights import HalfWeights, checksum
from holdfast.reference.originals import OriginalFiles
from policies import POLICIES

IDS = torch.tensor([[5, 6, 7, 8, 9], [11, 12, 13, 14, 15]])


def frozen(model: Any, *, but: str = "layers.1") -> Any:
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(but in name)
    return model


def names(model: nn.Module) -> set[str]:
    return {name.partition(".")[2] for name in frozen_linears([model])}


def layer(number: int, *parts: str) -> set[str]:
    return {f"model.layers.{number}.{part}.weight" for part in parts}


ATTENTION = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
MLP = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
ALL = layer(0, *ATTENTION, *MLP) | layer(1, *ATTENTION, *MLP) | {"lm_head.weight"}


def in_peft(weights: set[str], *adapted: str, below: str = "base_layer") -> set[str]:
    def wrapped(name: str) -> str:
        path, _, attribute = name.rpartition(".")
        return f"{path}.{below}.{attribute}" if path.rpartition(".")[2] in adapted else name

    return {f"base_model.model.{wrapped(name)}" for name in weights}


WEIGHTS: dict[str, tuple[Callable[[], nn.Module], set[str]]] = {
    "trains whole": (POLICIES["full"], set()),
    "partly frozen": (POLICIES["partly_frozen"], layer(0, *ATTENTION, *MLP) | {"lm_head.weight"}),
    "lora": (POLICIES["lora_fresh"], in_peft(ALL, "q_proj", "v_proj")),
    "dora reads its base": (
        POLICIES["dora"],
        in_peft({name for name in ALL if "q_proj" not in name and "v_proj" not in name}),
    ),
    "a head with a copy": (
        POLICIES["lora_modules_to_save"],
        in_peft(ALL - {"lm_head.weight"}, "q_proj", "v_proj") | {"base_model.model.lm_head.original_module.weight"},
    ),
    "a head tied to an embedding": (
        lambda: frozen(tiny_model("llama_tied"), but="norm"),
        {name for name in ALL if name != "lm_head.weight"},
    ),
    "biases": (
        lambda: frozen(tiny_model("qwen2"), but="norm"),
        ALL | {f"model.layers.{n}.self_attn.{p}_proj.bias" for n in (0, 1) for p in "qkv"},
    ),
    "gpt2": (
        lambda: frozen(tiny_model("gpt2"), but="ln_"),
        {
            f"transformer.h.{n}.{part}.{kind}"
            for n in (0, 1)
            for part in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
            for kind in ("weight", "bias")
        },
    ),
    "bf16 weights": (lambda: POLICIES["partly_frozen"]().to(torch.bfloat16), set()),
    "of another class": (lambda: _with(lambda m: setattr(m.lm_head, "__class__", _Other)), ALL - {"lm_head.weight"}),
    "another forward": (lambda: _with(lambda m: setattr(m.lm_head, "forward", lambda x: x)), ALL - {"lm_head.weight"}),
    "one memory": (lambda: _with(_sharing_memory), ALL - layer(0, "mlp.up_proj", "mlp.gate_proj")),
    "quantised": (lambda: _with(_quantised), set()),
}


class _Other(nn.Linear):
    pass


def _with(change: Callable[[Any], object]) -> Any:
    model = frozen(tiny_model(), but="norm")
    change(model)
    return model


def _sharing_memory(model: Any) -> None:
    mlp = model.model.layers[0].mlp
    mlp.up_proj.weight = nn.Parameter(mlp.gate_proj.weight.data, requires_grad=False)


def _quantised(model: Any) -> None:
    weight = torch.zeros(4, dtype=torch.uint8)
    model.model.layers[0].mlp.up_proj.weight = nn.Parameter(weight, requires_grad=False)


@pytest.mark.parametrize("kind", WEIGHTS)
def test_the_weights_that_are_held(kind: str) -> None:
    make, expected = WEIGHTS[kind]
    assert names(make()) == expected


def test_a_weight_of_two_models_is_found_once() -> None:
    first = frozen(tiny_model(), but="norm")
    second = copy.deepcopy(first)
    second.lm_head = first.lm_head
    assert len(frozen_linears([first, second])) == 2 * 15 - 1
    assert not any("lm_head" in name for name in frozen_linears([first, second], unfit=[second]))


def numbers(dtype: torch.dtype | None = torch.bfloat16) -> Callable[[nn.Module], list[Tensor]]:
    """The logits of a model under autocast and the gradients of their sum of squares, by its own forward pass."""

    def of(model: nn.Module) -> list[Tensor]:
        with torch.autocast("cpu", dtype=dtype, enabled=dtype is not None):
            logits: Any = model(input_ids=IDS, use_cache=False).logits
        trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
        found = torch.autograd.grad(logits.float().square().mean(), trainable, allow_unused=True)
        return [logits.detach(), *(gradient for gradient in found if gradient is not None)]

    return of


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", CONFIGS)
def test_every_family_computes_the_same(family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """Logits and the gradients of a LoRA, bit for bit; the weights come back bit for bit."""
    modules = ["q_proj"] if family not in ("gpt2", "gpt_neox", "phi3") else "all-linear"
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model: Any = get_peft_model(
            tiny_model(family),
            LoraConfig(r=4, target_modules=modules, init_lora_weights=False, fan_in_fan_out=family == "gpt2"),
        ).eval()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    expected = numbers(dtype)(model)
    half = HalfWeights(dtype, numbers(dtype))
    half.hold([model], OriginalFiles(tmp_path))
    held = half.holding([model])
    found = numbers(dtype)(model)
    half.close()
    assert held.num_models_left == 0
    assert held.num_weights >= 8
    assert held.bytes_loaded == 2 * held.bytes_held
    assert all(map(torch.equal, expected, found))
    after = dict(model.named_parameters())
    assert all(after[name].dtype == torch.float32 and torch.equal(value, after[name]) for name, value in before.items())
    assert not model._state_dict_pre_hooks


def test_without_originals_only_what_a_cast_restores_is_held() -> None:
    model = frozen(tiny_model(), but="norm")
    model.lm_head.weight.data = model.lm_head.weight.data.bfloat16().float()
    half = HalfWeights(torch.bfloat16, numbers())
    half.hold([model], None)
    assert half.holding([model]).num_weights == 1
    assert model.lm_head.weight.dtype == torch.bfloat16
    half.close()
    assert model.lm_head.weight.dtype == torch.float32


def test_weights_that_come_to_be_held_later_are_tried_then(tmp_path: Path) -> None:
    """At first the head alone can be held; the layer that computes with its weight in fp32 is tried with the rest."""
    model = frozen(tiny_model(), but="norm")
    model.lm_head.weight.data = model.lm_head.weight.data.bfloat16().float()

    def add_what_bf16_loses(layer: nn.Module, _args: Any, output: Tensor) -> Tensor:
        weight: Any = layer.weight
        return output + (weight.float() - weight.bfloat16().float()).abs().sum()

    model.model.layers[0].mlp.up_proj.register_forward_hook(add_what_bf16_loses)
    half = HalfWeights(torch.bfloat16, numbers())
    half.hold([model], None)
    assert half.holding([model]).num_models_left == 0
    half.close()
    half.hold([model], OriginalFiles(tmp_path))
    assert half.holding([model]).num_models_left == 1
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_what_half_precision_cannot_hold_at_all_stays(tmp_path: Path) -> None:
    """1e6 is infinite in fp16."""
    model = frozen(tiny_model(), but="norm")
    model.lm_head.weight.data[0, 0] = 1e6
    half = HalfWeights(torch.float16, lambda model: [])
    half.hold([model], OriginalFiles(tmp_path))
    assert model.lm_head.weight.dtype == torch.float32
    assert half.holding([model]).num_weights == 14
    half.close()


def test_a_state_dict_has_the_original_values(tmp_path: Path) -> None:
    """Of the model, of a part of it, and of a copy that was made before."""
    model = frozen(tiny_model(), but="norm")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    half = HalfWeights(torch.bfloat16, numbers())
    for part, prefix in ((model, ""), (model.model.layers[1], "model.layers.1."), (model.lm_head, "lm_head.")):
        half.hold([model], OriginalFiles(tmp_path))
        assert model.lm_head.weight.dtype == torch.bfloat16
        state = part.state_dict()
        assert all(torch.equal(before[f"{prefix}{name}"], value) for name, value in state.items())
        assert model.lm_head.weight.dtype == torch.float32
    half.close()


def test_what_is_put_back_twice_is_written_once(tmp_path: Path) -> None:
    files = OriginalFiles(tmp_path)
    value = torch.tensor([1.0, 2**-30])
    files.keep("a", value)
    (first,) = tmp_path.rglob("frozen-*")
    written = first.stat().st_mtime_ns
    files.keep("a", value.clone())
    assert [f.stat().st_mtime_ns for f in tmp_path.rglob("frozen-*")] == [written]
    files.keep("a", value + 1)
    assert torch.equal(files.read("a"), value + 1)
    files.remove()
    assert not list(tmp_path.rglob("frozen-*"))


def test_a_damaged_file_is_an_error(tmp_path: Path) -> None:
    files = OriginalFiles(tmp_path)
    files.keep("a", torch.ones(8))
    (file,) = tmp_path.rglob("frozen-*")
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(ValueError, match="is another than was written there"):
        files.read("a")


def test_a_checksum_is_of_every_bit_and_place() -> None:
    values = torch.randn(1000)
    flipped = values.clone()
    flipped.view(torch.int32)[700] ^= 1
    swapped = values[[1, 0, *range(2, 1000)]]
    assert torch.equal(checksum(values), checksum(values.clone()))
    assert not torch.equal(checksum(values), checksum(flipped))
    assert not torch.equal(checksum(values), checksum(swapped))
