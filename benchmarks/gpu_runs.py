"""What `gpu_acceptance.py` runs, and the rows that its parts return: small models, pairs, a quiet trainer."""

import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

Row = dict[str, Any]

SHAPE = {
    "vocab_size": 2048, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 2048, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {}),
    "qwen3": ("Qwen3Config", {"head_dim": 64}),
    "mistral, window 64": ("MistralConfig", {"sliding_window": 64}),
    "gemma2, soft-caps, window 64": (
        "Gemma2Config",
        {"head_dim": 64, "sliding_window": 64, "tie_word_embeddings": False},
    ),
}
LAYOUTS = ("padded", "packed", "prefix_shared")


def row(part: str, asked: str, found: str, bound: str, *, is_ok: bool | None) -> Row:
    """One line of the table; `is_ok` is None for what is no verdict."""
    return {"part": part, "asked": asked, "found": found, "bound": bound, "is_ok": is_ok}


def needs_gpu(part: str, asked: str) -> Row:
    """The row of what only a GPU can show."""
    return row(part, asked, "needs a GPU", "", is_ok=None)


def model_of(family: str, *, seed: int = 0) -> Any:
    """A small fp32 model of a family, with weights at a scale where attention matters."""
    import torch
    import transformers

    name, more = FAMILIES[family]
    torch.manual_seed(seed)
    config = getattr(transformers, name)(**SHAPE | {"initializer_range": 0.08} | more)
    return transformers.AutoModelForCausalLM.from_config(config).float().eval()


def pairs(count: int, *, seed: int = 0, vocabulary: int = 2048, longest: int = 120) -> list[dict[str, list[int]]]:
    """Tokenized pairs of random ids and unlike lengths; each second one shares its prompt with the one before."""
    draw = random.Random(seed)

    def ids(low: int, high: int) -> list[int]:
        return [draw.randrange(3, vocabulary) for _ in range(draw.randint(low, high))]

    made: list[dict[str, list[int]]] = []
    for number in range(count):
        prompt = made[-1]["prompt_ids"] if number % 2 else ids(longest // 3, longest)
        made.append({"prompt_ids": prompt, "chosen_ids": ids(5, longest // 2), "rejected_ids": ids(5, longest // 2)})
    return made


def trainer_of(model: Any, rows: Sequence[dict[str, Any]], folder: str, **options: Any) -> Any:
    """A trainer of `model` on tokenized pairs, quiet and short."""
    import torch
    from datasets import Dataset
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    from holdfast import DPOConfig, DPOTrainer

    words = {f"w{number}": number for number in range(model.get_input_embeddings().weight.shape[0])}
    backend = Tokenizer(models.WordLevel(words, unk_token="w0"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="w0", bos_token="w1", eos_token="w2")
    peft_config = options.pop("peft_config", None)
    defaults = {
        "output_dir": str(Path(folder) / "run"), "per_device_train_batch_size": 4, "max_steps": 1, "logging_steps": 1,
        "learning_rate": 1e-4, "save_strategy": "no", "report_to": "none", "disable_tqdm": True, "beta": 0.1,
        "gradient_checkpointing": False, "use_cpu": not torch.cuda.is_available(),
    }  # fmt: skip
    return DPOTrainer(
        model,
        args=DPOConfig(**defaults | options),
        train_dataset=Dataset.from_list(list(rows)),
        processing_class=tokenizer,
        peft_config=peft_config,
    )


def lora() -> Any:
    """LoRA of rank 16 on every linear layer."""
    from peft import LoraConfig

    return LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM")


def device_name() -> str:
    """The kind of device that is measured."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def after_each_step(trainer: Any, read: Callable[[], Any]) -> list[Any]:
    """Trains, and returns what `read` returns after each step."""
    from transformers import TrainerCallback

    found: list[Any] = []

    class After(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            found.append(read())

    trainer.add_callback(After())
    trainer.train()
    return found
