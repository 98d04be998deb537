"""Tiny policies of every kind whose reference differs in how it can be held, and a small run over them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from torch import Tensor, nn

from families import VOCABULARY, tiny_model
from holdfast import DPOConfig, DPOTrainer
from recomputation import renamed


def _lora(**options: Any) -> LoraConfig:
    return LoraConfig(**{"r": 4, "target_modules": ["q_proj", "v_proj"], "lora_dropout": 0.1} | options)


def _full() -> nn.Module:
    return tiny_model()


def _partly_frozen() -> nn.Module:
    model = tiny_model()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("layers.1" in name)
    return model


def _adapted(model: nn.Module | None = None, name: str = "default", **options: Any) -> PeftModel:
    with torch.random.fork_rng():
        torch.manual_seed(7)
        return get_peft_model(model or tiny_model(), _lora(**options), adapter_name=name)


def sft_lora(name: str = "default", **options: Any) -> PeftModel:
    """A policy with a LoRA that has been trained."""
    model = _adapted(name=name, **options)
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(8)
        for parameter_name, parameter in model.named_parameters():
            if "lora_B" in parameter_name:
                parameter.normal_(std=0.2)
    return model


def _fresh_over_sft() -> PeftModel:
    """An active fresh adapter beside an inactive trained one: the policy computes as the bare base."""
    model = sft_lora()
    with torch.random.fork_rng():
        torch.manual_seed(6)
        model.add_adapter("dpo", _lora())
    model.set_adapter("dpo")
    return model


def _unfrozen_norm() -> PeftModel:
    model = _adapted()
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.requires_grad_(True)
    return model


def _frozen_factor() -> PeftModel:
    model = _adapted()
    for name, parameter in model.named_parameters():
        if "lora_A" in name:
            parameter.requires_grad_(False)
    return model


def _prompt_tuned() -> PeftModel:
    with torch.random.fork_rng():
        torch.manual_seed(9)
        return get_peft_model(tiny_model(), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))


def _prefix_tuned() -> PeftModel:
    with torch.random.fork_rng():
        torch.manual_seed(9)
        return get_peft_model(tiny_model(), PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))


POLICIES: dict[str, Callable[[], nn.Module]] = {
    "full": _full,
    "partly_frozen": _partly_frozen,
    "lora_fresh": _adapted,
    "lora_sft": sft_lora,
    "lora_sft_named_ref": lambda: sft_lora("ref"),
    "lora_fresh_over_sft": _fresh_over_sft,
    "lora_modules_to_save": lambda: _adapted(modules_to_save=["lm_head"]),
    "lora_head": lambda: _adapted(target_modules=["q_proj", "lm_head"]),
    "lora_embeddings": lambda: _adapted(target_modules=["q_proj", "embed_tokens"]),
    "trainable_tokens": lambda: _adapted(model=tiny_model("llama_tied"), trainable_token_indices=[5, 6]),
    "lora_bias_all": lambda: _adapted(bias="all", model=tiny_model("qwen2")),
    "lora_unfrozen_norm": _unfrozen_norm,
    "lora_frozen_factor": _frozen_factor,
    "lora_random_init": lambda: _adapted(init_lora_weights=False),
    "dora": lambda: _adapted(use_dora=True),
    "rslora": lambda: _adapted(use_rslora=True),
    "pissa": lambda: _adapted(init_lora_weights="pissa"),
    "olora": lambda: _adapted(init_lora_weights="olora"),
    "prompt_tuning": _prompt_tuned,
    "prefix_tuning": _prefix_tuned,
}


def rows(num_pairs: int = 12, seed: int = 0) -> Dataset:
    """Tokenized pairs of random ids; rows 0 and 1 share their prompt and chosen completion."""
    draw = torch.Generator().manual_seed(seed)

    def ids(low: int, high: int) -> list[int]:
        length = int(torch.randint(low, high + 1, (), generator=draw))
        return torch.randint(3, VOCABULARY, (length,), generator=draw).tolist()

    table = [{"prompt_ids": ids(3, 9), "chosen_ids": ids(2, 8), "rejected_ids": ids(2, 8)} for _ in range(num_pairs)]
    table[1] |= {"prompt_ids": table[0]["prompt_ids"], "chosen_ids": table[0]["chosen_ids"]}
    return Dataset.from_list(table)


def tiny_tokenizer() -> Any:
    """A tokenizer that fits the tiny models' vocabulary; the rows are token ids already."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = {"<pad>": 0, "<bos>": 1, "<eos>": 2} | {f"w{i}": i for i in range(3, VOCABULARY)}
    backend = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>")


def config(folder: Path, **options: Any) -> DPOConfig:
    """Options of a short, deterministic run: plain SGD without clipping, so that a naive loop can repeat it."""
    defaults: dict[str, Any] = {
        "output_dir": str(folder),
        "use_cpu": True,
        "per_device_train_batch_size": 3,
        "max_steps": 4,
        "logging_steps": 1,
        "learning_rate": 0.5,
        "beta": 0.2,
        "lr_scheduler_type": "constant",
        "optim": "sgd",
        "max_grad_norm": 0.0,
        "activation_checkpointing": False,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }
    return DPOConfig(**renamed(defaults | options))


def trainer(policy: nn.Module | str, args: DPOConfig, **options: Any) -> DPOTrainer:
    """A trainer of `policy` on `rows()`."""
    defaults: dict[str, Any] = {"train_dataset": rows(), "processing_class": tiny_tokenizer()}
    return DPOTrainer(policy, args=args, **defaults | options)


def logged(trainer: DPOTrainer, name: str = "loss") -> list[float]:
    """The logged values of a metric, step by step."""
    return [entry[name] for entry in trainer.state.log_history if name in entry and "train_runtime" not in entry]


def sums_of_pairs(trainer: DPOTrainer, rows: list[dict[str, Any]]) -> Tensor:
    """What the trainer's reference says of the chosen completions of `rows`, then of the rejected ones, nats [2P]."""
    batch = trainer._collated(rows)
    return trainer.reference.logps(batch).sums()[torch.cat([batch.chosen, batch.rejected])]
