"""Tiny models of the families that log-probs must be right for, made from their configs: the table of contract tests.

Each has what its family does differently at the head or in attention: logit soft-capping, scaling, sliding windows
shorter than the rows, attention sinks, routers, convolutions.
"""

from collections.abc import Callable

import torch
import transformers as tf
from transformers import PretrainedConfig, PreTrainedModel

VOCABULARY = 97

_SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_NO_GROUPS = {name: value for name, value in _SHAPE.items() if name != "num_key_value_heads"}
_GPT2 = {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128}
_EXPERTS = {"num_experts_per_tok": 2}
_ROPE = {"rope_type": "default", "rope_theta": 10_000.0}

CONFIGS: dict[str, Callable[..., PretrainedConfig]] = {
    "llama": lambda **k: tf.LlamaConfig(**_SHAPE | k),
    "llama_tied": lambda **k: tf.LlamaConfig(**_SHAPE | {"tie_word_embeddings": True} | k),
    "qwen2": lambda **k: tf.Qwen2Config(**_SHAPE | k),
    "qwen3": lambda **k: tf.Qwen3Config(**_SHAPE | {"head_dim": 8} | k),
    "mistral": lambda **k: tf.MistralConfig(**_SHAPE | {"sliding_window": 5} | k),
    "gemma2": lambda **k: tf.Gemma2Config(
        **_SHAPE | {"head_dim": 8, "sliding_window": 5, "final_logit_softcapping": 3.0} | k
    ),
    "gemma3": lambda **k: tf.Gemma3TextConfig(
        **_SHAPE | {"head_dim": 8, "sliding_window": 5, "final_logit_softcapping": 3.0} | k
    ),
    "gpt_neox": lambda **k: tf.GPTNeoXConfig(**_NO_GROUPS | k),
    "gpt2": lambda **k: tf.GPT2Config(**_GPT2 | {"bos_token_id": 1, "eos_token_id": 2} | k),
    "phi3": lambda **k: tf.Phi3Config(**_SHAPE | k),
    "cohere2": lambda **k: tf.Cohere2Config(**_SHAPE | {"logit_scale": 0.25, "sliding_window": 5} | k),
    "granite": lambda **k: tf.GraniteConfig(**_SHAPE | {"logits_scaling": 4.0} | k),
    "mixtral": lambda **k: tf.MixtralConfig(**_SHAPE | _EXPERTS | {"num_local_experts": 4} | k),
    "qwen3_moe": lambda **k: tf.Qwen3MoeConfig(
        **_SHAPE | _EXPERTS | {"head_dim": 8, "num_experts": 4, "moe_intermediate_size": 16} | k
    ),
    "gpt_oss": lambda **k: tf.GptOssConfig(
        **_SHAPE | _EXPERTS
        | {"head_dim": 8, "num_local_experts": 4, "sliding_window": 5, "rope_parameters": _ROPE} | k
    ),
    "lfm2": lambda **k: tf.Lfm2Config(**_SHAPE | {"layer_types": ["conv", "full_attention"]} | k),
    "opt": lambda **k: tf.OPTConfig(
        vocab_size=VOCABULARY, hidden_size=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=128, word_embed_proj_dim=32, **k,
    ),
    "falcon_h1": lambda **k: tf.FalconH1Config(
        **_SHAPE | {"lm_head_multiplier": 0.5, "mamba_d_ssm": 64, "mamba_n_heads": 4, "mamba_d_head": 16}
        | {"mamba_d_state": 16, "mamba_chunk_size": 16} | k
    ),
}  # fmt: skip


def tiny_model(family: str = "llama", seed: int = 0, **overrides: object) -> PreTrainedModel:
    """A tiny fp32 causal LM of the family, in eval mode; weights drawn with `seed`, at a scale where heads matter."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = tf.AutoModelForCausalLM.from_config(CONFIGS[family](**overrides)).float().eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model
