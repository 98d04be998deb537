"""The longest row against the models' positions: a table has an end, and rotary embeddings are said to go beyond it."""

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from datasets import Dataset

from families import tiny_model
from holdfast.policy.positions import check_positions, table_length
from policies import config, rows, tiny_tokenizer, trainer

SMALL = {"vocab_size": 97, "num_hidden_layers": 1, "num_attention_heads": 2, "hidden_size": 16}
GPT = {"vocab_size": 97, "n_positions": 16, "n_embd": 16, "n_layer": 1, "n_head": 2}
TABLES: dict[str, Any] = {
    "gpt2": tf.GPT2Config(**GPT),
    "gpt_bigcode": tf.GPTBigCodeConfig(**GPT),
    "gptj": tf.GPTJConfig(**GPT, rotary_dim=4, bos_token_id=1, eos_token_id=2),
    "openai-gpt": tf.OpenAIGPTConfig(**GPT),
    "ctrl": tf.CTRLConfig(**GPT, dff=16),
    "opt": tf.OPTConfig(**SMALL, ffn_dim=16, word_embed_proj_dim=16, max_position_embeddings=16),
    "gpt_neo": tf.GPTNeoConfig(
        vocab_size=97, hidden_size=16, num_layers=1, num_heads=2, attention_types=[[["global"], 1]],
        max_position_embeddings=16, bos_token_id=1, eos_token_id=2,
    ),
    "mpt": tf.MptConfig(vocab_size=97, d_model=16, n_layers=1, n_heads=2, max_seq_len=16),
    "biogpt": tf.BioGptConfig(**SMALL, intermediate_size=16, max_position_embeddings=16),
    "llama": tf.LlamaConfig(**SMALL, intermediate_size=16, max_position_embeddings=16),
    "bloom": tf.BloomConfig(vocab_size=97, hidden_size=16, n_layer=1, n_head=2),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")  # of older GPTBigCode
@pytest.mark.parametrize("family", TABLES)
def test_a_table_ends_where_the_model_fails(family: str) -> None:
    model = tf.AutoModelForCausalLM.from_config(TABLES[family]).eval()
    length = table_length(model)
    assert length == (None if family in ("llama", "bloom") else 16)
    with torch.no_grad():
        model(torch.ones(1, 16, dtype=torch.long))
        if length is None:
            model(torch.ones(1, 17, dtype=torch.long))
            return
        with pytest.raises((IndexError, RuntimeError)):
            model(torch.ones(1, 17, dtype=torch.long))


def long_rows(length: int) -> Dataset:
    return Dataset.from_list([{"prompt_ids": [5, 6], "chosen_ids": [7] * (length - 2), "rejected_ids": [8]}] * 3)


def test_a_row_beyond_a_table_is_refused_before_anything_is_computed(tmp_path: Path) -> None:
    policy = tiny_model("gpt2")
    policy.register_forward_pre_hook(lambda *_: pytest.fail("a forward pass"))
    message = (
        r"the policy \(GPT2LMHeadModel\) has a table of 128 positions, and the longest row of the train data has 130"
    )
    with pytest.raises(ValueError, match=message):
        trainer(policy, config(tmp_path), train_dataset=long_rows(130))
    with pytest.raises(ValueError, match=r"the longest row of the eval data has 130 tokens.*max_length to at most 128"):
        trainer(policy, config(tmp_path), eval_dataset=long_rows(130))
    with pytest.raises(ValueError, match=r"reference 1 \(GPT2LMHeadModel\) has a table of 16 positions"):
        trainer(
            tiny_model(), config(tmp_path), ref_model=tiny_model("gpt2", n_positions=16), train_dataset=long_rows(20)
        )
    with pytest.raises(ValueError, match=r"with max_length=1024 the rows of a stream may have any length up to that"):
        trainer(policy, config(tmp_path), train_dataset=rows().to_iterable_dataset())


def test_rows_that_fit_are_trained_on(tmp_path: Path) -> None:
    """As long as the table; longer, and truncated."""
    policy = tiny_model("gpt2", n_positions=20)
    for length, options in ((20, {}), (30, {"max_length": 20})):
        ours = trainer(policy, config(tmp_path, max_steps=1, **options), train_dataset=long_rows(length))
        ours.train()
        assert ours.state.global_step == 1


@pytest.mark.parametrize(
    ("scaling", "length", "limit"),
    [
        (None, 129, 128), (None, 128, None), ({"rope_type": "linear", "factor": 2.0}, 256, None),
        ({"rope_type": "linear", "factor": 2.0}, 257, 256),
        ({"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 128}, 250, None),
        ({"rope_type": "dynamic", "factor": 2.0}, 300, 256),
    ],
)  # fmt: skip
def test_rotary_embeddings_beyond_their_length_are_said(
    scaling: dict[str, Any] | None, length: int, limit: int | None, caplog: pytest.LogCaptureFixture
) -> None:
    given = {} if scaling is None else {"rope_parameters": {"rope_theta": 10_000.0, **scaling}}
    with caplog.at_level(logging.WARNING, logger="holdfast.policy.positions"):
        check_positions([tiny_model(**given), None], {"train": long_rows(length)}, None)
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == (limit is not None)
    assert all(f"made for {limit} positions" in line and f"has {length} tokens" in line for line in said)
    assert tiny_tokenizer().pad_token_id == 0
