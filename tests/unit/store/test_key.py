"""`StoreKey`: every fact changes the digest, and nothing else does."""

import hashlib
from typing import Any

import pytest
import torch

from holdfast.store.key import StoreKey
from stores import KEY


def test_the_key_s_digest_is_that_of_its_facts():
    numerics = '{"attention": "sdpa", "autocast": null, "dtype": "torch.bfloat16", "is_tf32": false}'
    config, weights = KEY.config_digest, KEY.weights_digest
    text = f'{{"config": "{config}", "numerics": {numerics}, "version": null, "weights": "{weights}"}}'
    assert KEY.digest() == hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def test_every_fact_changes_the_key_and_nothing_else_does():
    facts: dict[str, Any] = {"weights_digest": "w", "config_digest": "c", "numerics": {"a": 1, "b": "x"}}
    key = StoreKey(**facts)
    others = [
        facts | {"weights_digest": "v"},
        facts | {"config_digest": "d"},
        facts | {"version": 0},
        facts | {"version": 1},
        *(facts | {"numerics": numerics} for numerics in ({"a": 1}, {"a": 2, "b": "x"}, {"a": True, "b": "x"})),
        facts | {"numerics": {"a": 1, "b": None}},
    ]
    digests = {StoreKey(**other).digest() for other in others}
    assert len(digests) == len(others)
    assert key.digest() not in digests
    same_facts = facts | {"numerics": {"b": "x", "a": 1}, "description": "in words"}
    assert StoreKey(**same_facts).digest() == key.digest()
    assert StoreKey(**same_facts) == key


def test_numerics_that_are_no_text_or_number_are_refused():
    key = StoreKey(weights_digest="w", config_digest="c", numerics={"dtype": torch.float32})  # type: ignore[dict-item]
    with pytest.raises(TypeError, match=r"must be text, numbers.*found \{'dtype': torch\.float32\}.*Write"):
        key.digest()
