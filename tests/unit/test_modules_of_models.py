"""What is asked of all modules of a model in each step: in the order of torch's own answers, and no less."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook

from families import CONFIGS, tiny_model
from holdfast.internals.moved import MovedError
from holdfast.internals.torch import (
    cast_at_once,
    has_global_hooks,
    is_bare,
    is_wrapper,
    modules_of,
    own_parameters,
    set_training,
    version_of,
)
from policies import POLICIES


def _odd() -> nn.Module:
    """A module that is there twice, one that is None, and one that has itself in it."""
    inner, outer = nn.Linear(2, 2), nn.Module()
    outer.first, outer.second = nn.Sequential(inner, nn.ReLU()), nn.ModuleDict({"again": inner})
    outer.register_module("left_out", None)
    inner.add_module("back", outer)
    return outer


MODELS = {
    "odd": _odd,
    **{family: lambda family=family: tiny_model(family) for family in ("llama", "gpt2", "mixtral", "llama_tied")},
    **{
        name: POLICIES[name]
        for name in ("lora_sft", "lora_modules_to_save", "lora_embeddings", "dora", "prompt_tuning")
    },
}


@pytest.mark.parametrize("name", MODELS)
def test_modules_and_parameters_are_those_of_torch(name: str) -> None:
    model = MODELS[name]()
    assert modules_of(model) == list(model.modules())
    for module in model.modules():
        found, expected = own_parameters(module), list(module.parameters(recurse=False))
        assert list(map(id, found)) == list(map(id, expected))


def test_the_mode_of_a_module_alone() -> None:
    model = tiny_model(next(iter(CONFIGS))).train()
    set_training(model, False)
    assert [module.training for module in model.modules()] == [module is not model for module in model.modules()]
    set_training(model, True)
    assert all(module.training for module in model.modules())


@pytest.mark.parametrize(
    "register",
    [
        "register_forward_hook",
        "register_forward_pre_hook",
        "register_full_backward_hook",
        "register_full_backward_pre_hook",
    ],
)
def test_a_module_with_a_hook_is_not_bare(register: str) -> None:
    module = nn.Linear(2, 2)
    assert is_bare(module)
    hook = getattr(module, register)(lambda *_: None)
    assert not is_bare(module)
    hook.remove()
    assert is_bare(module)


def test_a_module_with_a_forward_of_its_own_is_not_bare() -> None:
    module = nn.Linear(2, 2)
    vars(module)["forward"] = lambda x: x
    assert not is_bare(module)


def test_tables_of_hooks_that_moved() -> None:
    module = nn.Linear(2, 2)
    del module._backward_hooks
    with pytest.raises(MovedError, match=r"nn\.Module\._backward_hooks moved"):
        is_bare(module)


def test_hooks_on_every_module() -> None:
    assert not has_global_hooks()
    hook = register_module_forward_pre_hook(lambda module, given: None)
    try:
        assert has_global_hooks()
    finally:
        hook.remove()
    assert not has_global_hooks()


def test_changes_in_place_are_counted() -> None:
    tensor = torch.zeros(2)
    before = version_of(tensor)
    assert before is not None
    tensor.add_(1)
    assert version_of(tensor) == before + 1
    with torch.inference_mode():
        assert version_of(torch.zeros(2)) is None


def test_tensors_cast_at_once() -> None:
    tensors = [torch.randn(3, 4), torch.randn(5), torch.randn(4, 3).T]
    casts = cast_at_once(tensors, torch.bfloat16)
    assert all(torch.equal(cast, tensor.bfloat16()) for cast, tensor in zip(casts, tensors, strict=True))


def test_tensors_made_of_others() -> None:
    class Wrapper(Tensor):
        def __tensor_flatten__(self) -> tuple[list[str], None]:
            return [], None

        @staticmethod
        def __tensor_unflatten__(*_: object) -> None: ...

    assert not is_wrapper(nn.Parameter(torch.zeros(2)))
    assert is_wrapper(torch.zeros(2).as_subclass(Wrapper))
