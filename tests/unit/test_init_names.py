"""Older names of the keyword arguments with which models are loaded: each is heeded or refused."""

from pathlib import Path
from typing import Any

import pytest
import torch

from families import tiny_model
from holdfast.policy.init_names import present_names
from policies import config, trainer


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"torch_dtype": "bfloat16"}, {"dtype": "bfloat16"}),
        ({"torch_dtype": torch.bfloat16}, {"dtype": torch.bfloat16}),
        ({"torch_dtype": "auto"}, {"dtype": "auto"}),
        ({"torch_dtype": None}, {}),
        ({"torch_dtype": "torch.bfloat16", "dtype": torch.bfloat16}, {"dtype": "torch.bfloat16"}),
        ({"use_auth_token": "secret"}, {"token": "secret"}),
        ({"use_auth_token": True, "token": True}, {"token": True}),
        ({"load_in_4bit": False, "load_in_8bit": None, "use_flash_attention_2": False}, {}),
        ({"from_tf": False, "_fast_init": False, "resume_download": True}, {}),
        ({"attn_implementation": "eager", "revision": "x"}, {"attn_implementation": "eager", "revision": "x"}),
        ({}, {}),
    ],
)
def test_what_is_heeded(given: dict[str, Any], expected: dict[str, Any]) -> None:
    assert present_names(given, "model_init_kwargs") == expected


REFUSED = [
    ({"torch_dtype": "float16", "dtype": "bfloat16"}, "dtype='bfloat16' and its older name torch_dtype='float16'"),
    ({"torch_dtype": "auto", "dtype": torch.float32}, "dtype=torch.float32 and its older name torch_dtype='auto'"),
    ({"use_auth_token": "secret", "token": "other"}, r"token=\(not shown\) and its older name use_auth_token=\(not"),
    ({"load_in_4bit": True}, r"load_in_4bit=True, .* quantization_config=BitsAndBytesConfig"),
    ({"load_in_8bit": True}, r"load_in_8bit=True, .* quantization_config=BitsAndBytesConfig"),
    ({"bnb_4bit_quant_type": "nf4"}, "bnb_4bit_quant_type='nf4', .*=BitsAndBytesConfig"),
    ({"llm_int8_threshold": 6.0}, r"llm_int8_threshold=6\.0, .*=BitsAndBytesConfig"),
    ({"use_flash_attention_2": True}, "write attn_implementation='flash_attention_2'"),
    ({"from_tf": True}, "convert the weights to safetensors"),
    ({"bf16": True}, "write dtype='bfloat16'"),
    ({"device": "cpu"}, "write device_map"),
    ({"output_loading_info": True}, "leave it out"),
]


@pytest.mark.parametrize("option", ["model_init_kwargs", "ref_model_init_kwargs"])
@pytest.mark.parametrize(("given", "message"), REFUSED)
def test_what_is_refused_when_options_are_made(
    option: str, given: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=f"{option} has .*{message}"):
        config(tmp_path, **{option: given})


@pytest.mark.parametrize("dtype", ["bfloat16", torch.bfloat16, "auto"])
def test_models_have_the_dtype_that_the_older_name_asks_for(dtype: Any, tmp_path: Path) -> None:
    path = str(tmp_path / "model")
    tiny_model().bfloat16().save_pretrained(path)
    for option in ({"model_init_kwargs": {"torch_dtype": dtype}}, {"ref_model_init_kwargs": {"torch_dtype": dtype}}):
        ours = trainer(path, config(tmp_path, reference_audit=False, **option), ref_model=path)
        is_shared = "model_init_kwargs" in option  # the reference is loaded as the policy is
        assert ours.model.dtype == (torch.bfloat16 if is_shared else torch.float32)
        assert ours.ref_model is not None
        assert ours.ref_model.dtype == torch.bfloat16
