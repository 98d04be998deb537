"""The tiny runs whose numbers `same_runs.py` compares: models, data and options, all made in memory.

The product of all ways, layouts, motions, kinds of data and windows is not run whole. Every way to hold the reference
meets every layout, every motion, and both kinds of data with both windows; so does every layout with every motion. What
is refused is recorded with its message; a way that refuses to move meets every layout once more without motion. Losses,
kinds of adapters, model families, resumes and the rest have runs of their own.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import transformers as tf
from peft import LoraConfig, PeftModel, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers

VOCABULARY = 64

# --- models -----------------------------------------------------------------------------------------------------------

SHAPE = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "max_position_embeddings": 128, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
SLIDING = {"num_key_value_heads": 2, "head_dim": 8, "sliding_window": 5}
FAMILIES: dict[str, tuple[type[tf.PretrainedConfig], dict[str, Any]]] = {
    "llama": (tf.LlamaConfig, {"num_key_value_heads": 2}),
    "llama_tied": (tf.LlamaConfig, {"num_key_value_heads": 2, "tie_word_embeddings": True, "attention_dropout": 0.1}),
    "qwen3": (tf.Qwen3Config, {"num_key_value_heads": 2, "head_dim": 8}),
    "mistral": (tf.MistralConfig, {"num_key_value_heads": 2, "sliding_window": 5}),
    "gemma2": (tf.Gemma2Config, SLIDING | {"final_logit_softcapping": 3.0}),
    "cohere2": (tf.Cohere2Config, {"num_key_value_heads": 2, "logit_scale": 0.25, "sliding_window": 5}),
    "granite": (tf.GraniteConfig, {"num_key_value_heads": 2, "logits_scaling": 4.0}),
    "gpt_neox": (tf.GPTNeoXConfig, {}),
    "opt": (tf.OPTConfig, {"ffn_dim": 48, "word_embed_proj_dim": 32}),
    "lfm2": (tf.Lfm2Config, {"num_key_value_heads": 2, "layer_types": ["conv", "full_attention"]}),
    "mixtral": (tf.MixtralConfig, {"num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen3_moe": (
        tf.Qwen3MoeConfig,
        {
            "num_key_value_heads": 2,
            "head_dim": 8,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 16,
        },
    ),
    "gpt_oss": (tf.GptOssConfig, SLIDING | {"num_local_experts": 4, "num_experts_per_tok": 2}),
}


def model(family: str = "llama", seed: int = 0) -> Any:
    """A tiny fp32 causal LM, its weights drawn with `seed`."""
    torch.manual_seed(seed)
    config, options = FAMILIES[family]
    made = tf.AutoModelForCausalLM.from_config(config(**SHAPE | options)).float().eval()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return made


def partly_frozen() -> Any:
    """A model of which the last layer trains."""
    made = model()
    for name, parameter in made.named_parameters():
        parameter.requires_grad_("layers.1" in name)
    return made


def lora(is_trained: bool = False, name: str = "default", **options: Any) -> PeftModel:
    """A LoRA over the tiny model; a trained one has values in the factor that a fresh one has zero."""
    torch.manual_seed(7)
    defaults = {"r": 4, "target_modules": ["q_proj", "v_proj"], "lora_dropout": 0.1}
    made: Any = get_peft_model(model(), LoraConfig(**defaults | options), adapter_name=name)
    with torch.no_grad():
        for parameter_name, parameter in made.named_parameters():
            if is_trained and "lora_B" in parameter_name:
                parameter.normal_(std=0.2)
    return made


def two_adapters() -> PeftModel:
    """A fresh adapter `dpo` that trains, beside a trained one called `sft`."""
    made = lora(is_trained=True, name="sft")
    made.add_adapter("dpo", LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    made.set_adapter("dpo")
    return made


def prompted(config: Any) -> PeftModel:
    """Prompt or prefix tuning."""
    torch.manual_seed(9)
    return get_peft_model(model(), config(task_type="CAUSAL_LM", num_virtual_tokens=3))


def by_path(seed: int) -> str:
    """The path of a saved model with its tokenizer."""
    folder = f"model-{seed}"
    model(seed=seed).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


# --- data -------------------------------------------------------------------------------------------------------------

TEMPLATE = (
    "{% for m in messages %}<bos> {{ m['role'] }} {{ m['content'] }} <eos> {% endfor %}"
    "{% if add_generation_prompt %}<bos> assistant {% endif %}"
)


def tokenizer(template: str = TEMPLATE) -> Any:
    """One word, one token."""
    names = ["<pad>", "<bos>", "<eos>", "user", "assistant", *(f"w{i}" for i in range(5, VOCABULARY))]
    backend = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>"}
    made = tf.PreTrainedTokenizerFast(tokenizer_object=backend, **special)
    made.chat_template = template
    return made


def pairs(num_pairs: int = 12, seed: int = 0) -> list[dict[str, list[int]]]:
    """Pairs of random token ids; the first two share their prompt and chosen completion."""
    draw = torch.Generator().manual_seed(seed)

    def ids(low: int, high: int) -> list[int]:
        length = int(torch.randint(low, high + 1, (), generator=draw))
        return torch.randint(5, VOCABULARY, (length,), generator=draw).tolist()

    rows = [{"prompt_ids": ids(3, 9), "chosen_ids": ids(2, 8), "rejected_ids": ids(2, 8)} for _ in range(num_pairs)]
    rows[1] |= {"prompt_ids": rows[0]["prompt_ids"], "chosen_ids": rows[0]["chosen_ids"]}
    return rows


def as_text(row: dict[str, list[int]]) -> dict[str, Any]:
    """A row of token ids as words."""
    return {name.removesuffix("_ids"): " ".join(f"w{i}" for i in ids) for name, ids in row.items()}


def as_messages(row: dict[str, list[int]]) -> dict[str, Any]:
    """A row of token ids as messages, all of them whole conversations."""
    text = as_text(row)
    prompt = {"role": "user", "content": text.pop("prompt")}
    return {side: [prompt, {"role": "assistant", "content": words}] for side, words in text.items()}


@torch.no_grad()
def with_sums(row: dict[str, list[int]]) -> dict[str, Any]:
    """The row with the log-probs of its completions under the tiny model, computed naively."""
    reference, sums = model(), {}
    for side in ("chosen", "rejected"):
        prompt, completion = row["prompt_ids"], row[f"{side}_ids"]
        logits = reference(input_ids=torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1]
        picked = logits.log_softmax(-1).gather(1, torch.tensor(completion)[:, None])
        sums[f"ref_{side}_logps"] = float(picked.sum())
    return row | sums


FORMS: dict[str, Callable[[dict[str, list[int]]], dict[str, Any]]] = {
    "ids": dict, "text": as_text, "messages": as_messages, "sums": with_sums,
}  # fmt: skip

# --- the runs ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Run:
    """One run: what it trains, with which options and data, and what is done `after` it."""

    policy: Callable[[], Any] = model
    options: dict[str, Any] = field(default_factory=dict)
    ref_model: Callable[[], Any] = lambda: None
    form: str = "ids"
    is_stream: bool = False
    is_collated: bool = False
    eval_sets: tuple[str, ...] = ()
    template: str = TEMPLATE
    more: dict[str, Any] = field(default_factory=dict)
    after: str = ""


other = partial(model, seed=5)
trained = partial(lora, is_trained=True)
AHEAD = {"reference": "precomputed"}
SNAPSHOT = {"reference": "snapshot"}
DISK = SNAPSHOT | {"snapshot_device": "disk"}
WAYS: dict[str, dict[str, Any]] = {
    "model": {"options": {"reference": "model"}},
    "other_model": {"ref_model": other},
    "adapter": {"policy": lora, "options": {"reference": "adapter"}},
    "trained_adapter": {"policy": trained, "options": {"reference": "adapter"}},
    "other_adapter": {"policy": two_adapters, "options": {"ref_adapter_name": "sft"}},
    "bare_base": {"policy": trained, "options": {"ref_adapter_name": "__base__"}},
    "snapshot": {"policy": partly_frozen, "options": SNAPSHOT},
    "snapshot_lora": {"policy": trained, "options": SNAPSHOT},
    "snapshot_cpu": {"options": SNAPSHOT | {"snapshot_device": "cpu"}},
    "snapshot_disk": {"policy": lora, "options": DISK},
    "precomputed": {"options": AHEAD},
    "precomputed_adapter": {"policy": trained, "options": AHEAD},
    "mixture": {"ref_model": lambda: [None, other()], "options": {"ref_model_weights": [0.3, 0.7]}},
    "sums": {"form": "sums", "options": {"precompute_ref_log_probs": True}},
    "none": {"options": {"reference": "none", "loss_type": "simpo"}},
}
STILL = ("other_adapter", "bare_base", "mixture", "sums", "none")
"""Ways that refuse to move."""
LAYOUTS = ("prefix_shared", "packed", "padded", "collator")
MOTIONS = {"fixed": 0.0, "hard": 1.0, "soft": 0.3}
SYNCED = {"sync_ref_model": True, "ref_model_mixup_alpha": 0.3, "ref_model_sync_steps": 3}
DATA = (("map", 1), ("map", 2), ("stream", 1), ("stream", 2))
LOSSES: dict[str, dict[str, Any]] = {
    "sigmoid": {"label_smoothing": 0.1}, "hinge": {}, "ipo": {}, "exo_pair": {"label_smoothing": 0.01}, "nca_pair": {},
    "robust": {"label_smoothing": 0.1}, "bco_pair": {}, "sppo_hard": {}, "aot": {"label_smoothing": 0.1},
    "aot_unpaired": {"label_smoothing": 0.1}, "apo_zero": {}, "apo_down": {}, "discopop": {"discopop_tau": 0.2},
    "sft": {}, "sigmoid_norm": {}, "simpo": {"simpo_gamma": 0.7}, "orpo": {}, "cpo": {"cpo_alpha": 0.4},
}  # fmt: skip
REFUSED: list[dict[str, Any]] = [
    {"beta": 0.0}, {"label_smoothing": 0.5}, {"loss_type": "discopop", "discopop_tau": 0.0}, {"loss_type": "sigmiod"},
    {"loss_type": "simpo", "simpo_gamma": -1.0}, {"loss_type": "cpo", "cpo_alpha": -1.0}, {"loss_type": []},
    {"loss_weights": [1.0, 2.0]}, {"f_divergence_type": "kl"}, {"f_alpha_divergence_coef": 0.3}, {"ld_alpha": 2.0},
    {"loss_type": "exo_pair"}, {"loss_type": "aot", "use_weighting": True}, {"loss_type": "sft", "ld_alpha": 0.5},
    {"loss_type": "ipo", "label_smoothing": 0.1}, {"loss_type": "bco_pair", "f_divergence_type": "forward_kl"},
    {"reference": "modle"}, {"reference": "adapter"}, {"reference": "none"}, {"snapshot_device": "cpu"},
    {"reference": "snapshot", "snapshot_device": "tape"}, {"layout": "rows"},
    {"layout": "padded", "padding_free": True},
    {"truncation_mode": "middle"}, {"max_length": 1}, {"ref_model_mixup_alpha": 0.0}, {"ref_adapter_name": "no such"},
    {"ref_model_weights": [0.5, 0.6]}, {"reference_store": "store"}, {"reference_store_versions": True},
    {"template_date": "today"}, {"loss_type": "simpo", "reference_window": 2}, {"label_smoothing_factor": 0.1},
]  # fmt: skip
SOME = {"loss_type": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.0]}
EVALUATED = {"eval_strategy": "steps", "eval_steps": 2, "per_device_eval_batch_size": 4}
HALVES = {"save_steps": 2}


def product() -> Iterator[tuple[str, Run]]:
    """Each way with each layout; motion, data and window change so that all pairs with ways and layouts come up."""
    for number, (way, parts) in enumerate(WAYS.items()):
        for index, layout in enumerate(LAYOUTS):
            motion, (data, window) = list(MOTIONS)[(number + index) % 3], DATA[(number + index) % 4]
            options = dict(parts.get("options", {}))
            if layout != "collator":
                options["layout"] = layout
            if way != "none" and not ("precomputed" in way and window == 1):
                options["reference_window"] = window
            if motion != "fixed":
                options |= SYNCED | {"ref_model_mixup_alpha": MOTIONS[motion]}
            run = parts | {"options": options, "is_stream": data == "stream", "is_collated": layout == "collator"}
            yield f"{way}-{layout}-{motion}-{data}-{window}", Run(**run)
            if way in STILL:
                still = {name: value for name, value in options.items() if name not in (*SYNCED, "reference_window")}
                if way in ("other_adapter", "bare_base", "mixture"):
                    still["reference_window"] = 1 + index % 2
                run |= {"options": still, "is_stream": index > 1 and way != "sums"}
                yield f"{way}-{layout}-still", Run(**run)


def losses() -> Iterator[tuple[str, Run]]:
    """Each loss with the options that it reads, and what modifies losses."""
    for name, read in LOSSES.items():
        yield (
            f"loss-{name}",
            Run(options={"loss_type": name, "beta": 0.3, "learning_rate": 0.05} | read, form="messages"),
        )
    for divergence in ("forward_kl", "js_divergence", "alpha_divergence"):
        coef = {"f_alpha_divergence_coef": 0.3} if divergence == "alpha_divergence" else {}
        yield f"loss-{divergence}", Run(options={"f_divergence_type": divergence, "beta": 0.3} | coef)
    for layout in LAYOUTS[:3]:
        yield f"loss-several-{layout}", Run(options=SOME | {"layout": layout}, form="text")
        yield f"loss-ld-{layout}", Run(options={"ld_alpha": 0.5, "layout": layout})
        yield f"loss-weighting-{layout}", Run(options={"use_weighting": True, "layout": layout})
        yield f"parts-{layout}", Run(options={"tokens_per_batch": 30, "layout": layout}, policy=trained)
    yield "parts-several", Run(options=SOME | {"tokens_per_batch": 30, "use_weighting": True, "ld_alpha": 0.4})


def kinds() -> Iterator[tuple[str, Run]]:
    """Model families and kinds of adapters."""
    for family in FAMILIES:
        yield f"family-{family}", Run(policy=partial(model, family))
        yield f"family-{family}-padded", Run(policy=partial(model, family), options={"layout": "padded"} | AHEAD)
    for family in ("mixtral", "qwen3_moe"):
        yield f"router-{family}", Run(policy=partial(model, family), options={"router_aux_loss_coef": 0.05})
    for name, options in {
        "dora": {"use_dora": True}, "rslora": {"use_rslora": True}, "pissa": {"init_lora_weights": "pissa"},
        "olora": {"init_lora_weights": "olora"}, "saved_head": {"modules_to_save": ["lm_head"]},
        "lora_head": {"target_modules": ["q_proj", "lm_head"]}, "tokens": {"trainable_token_indices": [5, 6]},
    }.items():  # fmt: skip
        yield f"kind-{name}", Run(policy=partial(lora, **options))
        yield f"kind-{name}-soft", Run(policy=partial(lora, **options), options=SNAPSHOT | SYNCED)
        yield f"kind-{name}-ahead", Run(policy=partial(lora, **options), options=AHEAD)
    for config in (PromptTuningConfig, PrefixTuningConfig):
        yield f"kind-{config.__name__}", Run(policy=partial(prompted, config))
    yield "kind-peft_config", Run(more={"peft_config": LoraConfig(r=4, target_modules=["q_proj"])})


def training() -> Iterator[tuple[str, Run]]:
    """What concerns batches, the optimizer, evaluation, checkpoints, the store, texts, and refused options."""
    dated = TEMPLATE.replace("<eos>", "<eos> w{{ strftime_now('%d') }}", 1)
    for name, options in {
        "accumulated": {"gradient_accumulation_steps": 2, "max_grad_norm": 0.1, "optim": "adamw_torch"},
        "grouped": {"train_sampling_strategy": "group_by_length"}, "recomputed": {"gradient_checkpointing": True},
        "offloaded": {"activation_offloading": True}, "bf16": {"bf16": True}, "kept_start": {"max_length": 9},
        "kept_end": {"max_length": 9, "truncation_mode": "keep_end"}, "multiples": {"pad_to_multiple_of": 8},
        "pruned": {"save_total_limit": 1, "save_steps": 1}, "unaudited": {"reference_audit": False},
        "epochs": {"max_steps": -1, "num_train_epochs": 2, "lr_scheduler_type": "cosine"},
        "ragged": {"per_device_train_batch_size": 5}, "versions": AHEAD | SYNCED | {"reference_store_versions": True},
    }.items():  # fmt: skip
        yield f"train-{name}", Run(options=options)
    yield "train-dropout", Run(policy=partial(model, "llama_tied"), options={"disable_dropout": False})
    yield "train-dropout-lora", Run(policy=lora, options=SNAPSHOT | {"disable_dropout": False})
    yield "train-paths", Run(policy=partial(by_path, 0), ref_model=partial(by_path, 5), form="messages")
    yield "train-date", Run(form="messages", template=dated, options={"template_date": "2026-01-31"})
    two = ("one", "two")
    for name, options in {
        "model": {}, "ahead": AHEAD, "disk": DISK, "synced": SYNCED, "simpo": WAYS["none"]["options"],
        "bf16": {"bf16_full_eval": True}, "accumulated": {"eval_accumulation_steps": 1},
    }.items():  # fmt: skip
        yield f"eval-{name}", Run(options=options | EVALUATED, eval_sets=two, after="evaluate")
    best = EVALUATED | SYNCED | HALVES | {"load_best_model_at_end": True, "metric_for_best_model": "eval_one_loss"}
    yield "eval-best", Run(options=best, eval_sets=two)
    yield "eval-best-disk", Run(options=best | DISK, eval_sets=two, policy=trained)
    yield "eval-predict", Run(options={"layout": "prefix_shared"}, after="predict")
    for way, parts in WAYS.items():
        once = parts | {"options": parts.get("options", {}) | HALVES}
        yield f"resume-{way}", Run(**once, after="resume")
        yield f"restore-{way}", Run(**once, after="restore")
        if way in STILL:
            continue
        moved = parts | {"options": once["options"] | SYNCED | {"ref_model_sync_steps": 1}}
        yield f"resume-{way}-synced", Run(**moved, after="resume")
        yield f"resume-{way}-stream", Run(**moved, after="resume", is_stream=True)
    yield "store-again", Run(options=AHEAD, after="again")
    yield "store-other", Run(options=AHEAD, ref_model=other, policy=lora, after="again")

    for options in REFUSED:
        yield f"refused-{options}", Run(options=options)


RUNS: dict[str, Run] = dict([*product(), *losses(), *kinds(), *training()])
