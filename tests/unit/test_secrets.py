"""Which options are secrets, and that files and texts made of options have none of them."""

import copy
import io
import pickle

import pytest
import torch

from holdfast.config import DPOConfig
from holdfast.secrets import MASK, is_mask, is_secret, masked, secrets_in, without_secrets_on_disk

SECRETS = (
    "token", "hub_token", "push_to_hub_token", "HF_TOKEN", "accessToken", "use_auth_token", "password", "passwd",
    "db-password", "passphrase", "secret", "client_secret", "api_key", "apikey", "WANDB_API_KEY", "secret_key",
    "access_key", "private_key", "credentials", "auth", "bearer_token",
)  # fmt: skip
NO_SECRETS = (
    "pad_token", "eos_token", "image_token", "mask_token", "num_virtual_tokens", "tokens_per_batch", "tokenizer",
    "include_num_input_tokens_seen", "token_dim", "key", "keyword", "author", "model", "beta", "secretary",
    "reference_store", 7, None,
)  # fmt: skip


@pytest.mark.parametrize("name", SECRETS)
def test_a_secret_by_its_name(name):
    assert is_secret(name)


@pytest.mark.parametrize("name", NO_SECRETS)
def test_names_of_no_secret(name):
    assert not is_secret(name)


def test_no_option_but_the_token_of_the_hub_is_a_secret():
    assert {name for name in DPOConfig.__dataclass_fields__ if is_secret(name)} == {"hub_token"}


@pytest.mark.parametrize(
    ("value", "without", "secrets"),
    [
        ({"hub_token": "abc"}, {"hub_token": MASK}, ["abc"]),
        ({"hub_token": None, "use_auth_token": True, "token": ""},) * 2 + ([],),
        ({"a": {"b": [{"password": "p1"}]}}, {"a": {"b": [{"password": MASK}]}}, ["p1"]),
        ({"api_key": 12345}, {"api_key": MASK}, ["12345"]),
        ({"token": ["t1", "t2"]}, {"token": [MASK, MASK]}, ["t1", "t2"]),
        ({"auth": {"user": "u", "x": "y"}}, {"auth": {"user": MASK, "x": MASK}}, ["u", "y"]),
        ({"kwargs": '{"token": "abc", "a": 1}'}, {"kwargs": f'{{"token": "{MASK}", "a": 1}}'}, ["abc"]),
        ({"token": MASK},) * 2 + ([],),
        ({"kwargs": '{"a":1}', "beta": 0.1, "pad_token": "x"},) * 2 + ([],),
    ],
)
def test_masked(value, without, secrets):
    before = copy.deepcopy(value)
    assert masked(value) == without
    assert value == before
    assert list(secrets_in(value)) == secrets


@pytest.mark.parametrize(("value", "expected"), [(MASK, True), ("<HUB_TOKEN>", True), ("hf_abc", False), (None, False)])
def test_masks(value, expected):
    assert is_mask(value) is expected


@pytest.fixture
def args(tmp_path) -> DPOConfig:
    return DPOConfig(
        output_dir=str(tmp_path), use_cpu=True, hub_token="hf_outer", model_init_kwargs={"token": "hf_inner", "a": 1}
    )


def test_what_trackers_and_logs_are_given_has_no_secrets(args):
    for text in (str(args), repr(args), args.to_json_string(), str(args.to_dict()), str(args.to_sanitized_dict())):
        assert "hf_outer" not in text
        assert "hf_inner" not in text
    assert args.to_dict()["model_init_kwargs"] == {"token": MASK, "a": 1}
    assert args.hub_token == "hf_outer"
    assert args.model_init_kwargs == {"token": "hf_inner", "a": 1}


def test_what_is_saved_has_no_secrets_and_what_is_sent_to_another_process_has(args):
    for other in (copy.copy(args), copy.deepcopy(args), pickle.loads(pickle.dumps(args))):
        assert (other.hub_token, other.model_init_kwargs["token"]) == ("hf_outer", "hf_inner")
    file = io.BytesIO()
    with without_secrets_on_disk(args):
        torch.save(args, file)
    assert b"hf_outer" not in file.getvalue()
    assert b"hf_inner" not in file.getvalue()
    read = torch.load(io.BytesIO(file.getvalue()), weights_only=False)
    assert (read.hub_token, read.model_init_kwargs) == (None, {"token": MASK, "a": 1})
    assert vars(read).keys() == vars(args).keys()
    assert args.hub_token == "hf_outer"
