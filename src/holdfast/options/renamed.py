"""Options that scripts pass and that `DPOConfig` or `DPOTrainer` do not have: what to write instead of each.

They are of earlier versions of the common DPO trainer and of `transformers`, of its sibling trainers, and of packages
around them. `RENAMED` is about options of a config, `RENAMED_ARGUMENTS` about arguments of the trainer; a name that is
an option today, in whatever version of `transformers` is installed, is never looked up here. A value that asks for
nothing, such as the default that the option had, is taken in silence where leaving it out changes nothing
(`asks_nothing`), so that a config which was written out by an old version can be read. Any other value is an error.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, final

Options = Mapping[str, Any]


class Expression(str):
    """The text of an expression whose value is not known; it is shown as it stands, without quotes."""

    __slots__ = ()
    __repr__ = str.__str__


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Renamed:
    """What became of an option.

    `instead(value, others)` are the options to write in its place, `others` being those beside it; none where it is to
    be dropped. `reason` is a clause without a full stop. `asks_nothing` are values that are taken in silence.
    """

    instead: Callable[[Any, Options], Options] = lambda value, others: {}
    reason: str = ""
    asks_nothing: tuple[Any, ...] = (None,)
    owner: str = "DPOConfig"
    """Whose option it is that is to be written instead."""

    def is_asked(self, value: Any) -> bool:
        """Whether the value asks for anything."""
        return not any(value is each or (type(value) is type(each) and value == each) for each in self.asks_nothing)

    def advice(self, value: Any, others: Options) -> str:
        """What to write, as the end of a sentence: `write eval_strategy='steps'`, `drop it: ...`."""
        instead = self.instead(value, others)
        options = ", ".join(f"{name}={spelled(option)}" for name, option in instead.items())
        if instead and self.owner == "DPOTrainer":
            options = f"{options} in the call of DPOTrainer"
        if instead:
            return f"write {options}{f' ({self.reason})' if self.reason else ''}"
        return f"drop it: {self.reason}"


def spelled(value: Any) -> str:
    """The value as it is written in a script, with double quotes; `...` for an object or a long one."""
    if isinstance(value, Expression):
        return str(value) if len(value) <= 60 else "..."
    if isinstance(value, str):
        return f'"{value}"' if '"' not in value and value.isprintable() and len(value) <= 80 else "..."
    if isinstance(value, list | tuple):
        text = f"[{', '.join(map(spelled, value))}]"
    elif isinstance(value, Mapping):
        text = f"{{{', '.join(f'{spelled(key)}: {spelled(item)}' for key, item in value.items())}}}"
    else:
        text = repr(value) if isinstance(value, bool | int | float | None) else str(value)
    return text if len(text) <= 120 and isinstance(value, _PLAIN) else "..."


_PLAIN = (bool, int, float, type(None), list, tuple, Mapping, Expression)


def _to(name: str, reason: str = "", *asks_nothing: Any) -> Renamed:
    """The same value under another name."""
    return Renamed(instead=lambda value, others: {name: value}, reason=reason, asks_nothing=(None, *asks_nothing))


def _becomes(options: Options, reason: str = "", *asks_nothing: Any) -> Renamed:
    """Other options, whatever the value is."""
    return Renamed(instead=lambda value, others: options, reason=reason, asks_nothing=(None, *asks_nothing))


def _drop(reason: str, *asks_nothing: Any) -> Renamed:
    return Renamed(reason=reason, asks_nothing=(None, *asks_nothing))


def _into(option: str, key: str, *asks_nothing: Any, reason: str = "") -> Renamed:
    """A key of an option that is a mapping."""

    def instead(value: Any, others: Options) -> Options:
        beside = others.get(option)
        return {option: {**(beside if isinstance(beside, Mapping) else {}), key: value}}

    return Renamed(instead=instead, reason=reason, asks_nothing=(None, *asks_nothing))


def _with_likelihood(value: Any, others: Options) -> Options:
    """The losses of the run and `sft`, weighed by the value."""
    losses = others.get("loss_type") or ["sigmoid"]
    losses = [losses] if isinstance(losses, str) else [*losses]
    weights = [*(others.get("loss_weights") or [1.0] * len(losses))]
    return {"loss_type": [*losses, "sft"], "loss_weights": [*weights, value]}


def _of_trainer(name: str, text: str) -> Renamed:
    return Renamed(
        instead=lambda value, others: {name: Expression(text)}, asks_nothing=(None, False), owner="DPOTrainer"
    )


def _warmup(value: Any, others: Options) -> Options:
    """A number of steps wins over a share of the run, as it did."""
    return {"warmup_steps": others.get("warmup_steps") or value}


_LENGTHS = _drop(
    'max_length bounds prompt and completion together, and truncation_mode="keep_end" keeps a longer row\'s end', -1
)
_QUANTISED = "BitsAndBytesConfig({}=True)"
_ADAPTER = _of_trainer("peft_config", "LoraConfig(...)")

_OF_TRL: Mapping[str, Renamed] = {
    "max_prompt_length": _LENGTHS,
    "max_completion_length": _LENGTHS,
    "max_target_length": _LENGTHS,
    "rpo_alpha": Renamed(instead=_with_likelihood),
    "reference_free": _becomes(
        {"loss_type": "cpo", "cpo_alpha": 0.0}, "the sigmoid loss under a uniform reference", False
    ),
    "force_use_ref_model": _drop("a `ref_model` beside `peft_config` is used", False),
    "generate_during_eval": _becomes({"generate_samples": 16}, "prompts of each evaluation set", False),
    "label_pad_token_id": _drop("batches have no labels to pad", -100),
    "padding_value": _drop("filled positions are neither attended to nor scored; pad_token chooses the token", 0),
    "is_encoder_decoder": _drop("only causal language models are trained", False),
    "use_logits_to_keep": _drop("logits are computed of completion tokens alone, always", False),
    "use_num_logits_to_keep": _drop("logits are computed of completion tokens alone, always", False),
    "base_model_attribute_name": _drop("the model's body is found without it", "model"),
    "use_liger_loss": _drop("logits of completion tokens alone are computed; tokens_per_batch bounds memory", False),
    "tools": _drop("put the tools into a column `tools` of the dataset"),
    "f_divergence_params": _drop("its keys are the options f_divergence_type and f_alpha_divergence_coef"),
    "model_kwargs": _to("model_init_kwargs"),
    "ref_model_kwargs": _to("ref_model_init_kwargs"),
    "max_seq_length": _to("max_length"),
    "gamma_beta_ratio": Renamed(
        instead=lambda value, others: (
            {"simpo_gamma": value * others.get("beta", 0.1)}
            if isinstance(value, int | float)
            else {"simpo_gamma": Expression(f"{value} * beta")}
        ),
    ),
    "sft_weight": Renamed(instead=_with_likelihood, asks_nothing=(None, 0, 0.0)),
    "simpo_loss_gamma": _to("simpo_gamma"),
}

_OF_MODELS: Mapping[str, Renamed] = {
    "torch_dtype": _into("model_init_kwargs", "dtype", reason="dtype in a ModelConfig"),
    "dtype": _into("model_init_kwargs", "dtype"),
    "attn_implementation": _into("model_init_kwargs", "attn_implementation"),
    "model_revision": _into("model_init_kwargs", "revision"),
    "device_map": _into("model_init_kwargs", "device_map"),
    "low_cpu_mem_usage": _into("model_init_kwargs", "low_cpu_mem_usage"),
    "use_flash_attention_2": _becomes({"model_init_kwargs": {"attn_implementation": "flash_attention_2"}}, "", False),
    "use_flash_attn": _becomes({"model_init_kwargs": {"attn_implementation": "flash_attention_2"}}, "", False),
    "load_in_4bit": _of_trainer("quantization_config", _QUANTISED.format("load_in_4bit")),
    "load_in_8bit": _of_trainer("quantization_config", _QUANTISED.format("load_in_8bit")),
    "use_peft": _ADAPTER,
    "lora_r": _ADAPTER,
    "lora_alpha": _ADAPTER,
    "lora_dropout": _ADAPTER,
    "lora_target_modules": _ADAPTER,
    "lora_task_type": _ADAPTER,
    "model_name_or_path": Renamed(instead=lambda value, others: {"model": value}, owner="DPOTrainer"),
    "ref_model_name_or_path": Renamed(instead=lambda value, others: {"ref_model": value}, owner="DPOTrainer"),
    "ref_model_path": Renamed(instead=lambda value, others: {"ref_model": value}, owner="DPOTrainer"),
    "reference_model": Renamed(instead=lambda value, others: {"ref_model": value}, owner="DPOTrainer"),
}

_OF_TRANSFORMERS: Mapping[str, Renamed] = {
    "evaluation_strategy": _to("eval_strategy", "", "no"),
    "evaluate_during_training": _becomes({"eval_strategy": "steps"}, "", False),
    "warmup_ratio": Renamed(
        instead=_warmup, reason="a number below 1 is a share of the run", asks_nothing=(None, 0, 0.0)
    ),
    "logging_dir": _drop("logs are in `runs` in output_dir; the variable TENSORBOARD_LOGGING_DIR names another folder"),
    "overwrite_output_dir": _drop("nothing in output_dir is deleted, and a run is resumed only when asked", False),
    "save_safetensors": _drop("weights are saved as safetensors, always", True),
    "no_cuda": _becomes({"use_cpu": True}, "", False),
    "use_mps_device": _drop("an MPS device is used where there is one", False),
    "group_by_length": _becomes({"train_sampling_strategy": "group_by_length"}, "", False),
    "per_gpu_train_batch_size": _to("per_device_train_batch_size"),
    "per_gpu_eval_batch_size": _to("per_device_eval_batch_size"),
    "adafactor": _becomes({"optim": "adafactor"}, "", False),
    "fp16_opt_level": _drop("it was an option of apex; fp16=True is autocast", "O1"),
    "fp16_backend": _drop("fp16=True is autocast, always", "auto"),
    "half_precision_backend": _drop("half precision is autocast, always", "auto"),
    "use_ipex": _drop("that extension is no longer used", False),
    "jit_mode_eval": _drop("evaluations run as training does; see torch_compile", False),
    "past_index": _drop("pairs have no past states", -1),
    "mp_parameters": _drop("it was an option of SageMaker's model parallelism", ""),
    "ray_scope": _drop("the variable RAY_SCOPE says it", "last"),
    "tpu_num_cores": _drop("the launcher sets the number of processes"),
    "tpu_metrics_debug": _drop("nothing is printed of TPUs", False),
    "xpu_backend": _to("ddp_backend"),
    "sharded_ddp": _drop("use fsdp or deepspeed", "", False),
    "fsdp_min_num_params": _into("fsdp_config", "min_num_params", 0),
    "fsdp_transformer_layer_cls_to_wrap": _into("fsdp_config", "transformer_layer_cls_to_wrap"),
    "torchdynamo": _to("torch_compile_backend"),
    "dispatch_batches": _drop("batches of pairs are not cut by their first dimension", False),
    "split_batches": _into("accelerator_config", "split_batches", False),
    "include_inputs_for_metrics": _drop("`compute_metrics` gets the input ids as `label_ids`", False),
    "include_tokens_per_second": _drop("num_tokens is logged beside the times", False),
    "use_legacy_prediction_loop": _drop("there is one loop", False),
    "push_to_hub_model_id": _to("hub_model_id"),
    "push_to_hub_organization": _drop("write it into hub_model_id, as in organization/name"),
    "push_to_hub_token": _to("hub_token"),
    "predict_with_generate": _becomes({"generate_samples": 16}, "prompts of each evaluation set", False),
    "prediction_strategy": _to("eval_strategy"),
    "tp_size": _drop("a row is on one device; use data parallelism or FSDP", 0, 1),
}

_OF_OTHERS: Mapping[str, Renamed] = {
    "lr": _to("learning_rate"),
    "batch_size": _to("per_device_train_batch_size"),
    "train_batch_size": _to("per_device_train_batch_size"),
    "eval_batch_size": _to("per_device_eval_batch_size"),
    "epochs": _to("num_train_epochs"),
    "num_epochs": _to("num_train_epochs"),
    "gradient_accumulation": _to("gradient_accumulation_steps"),
    "scheduler": _to("lr_scheduler_type"),
    "optimizer": _to("optim"),
    "pref_beta": _to("beta"),
    "dpo_beta": _to("beta"),
    "rl_beta": _to("beta"),
    "pref_loss": _to("loss_type"),
    "dpo_loss_type": _to("loss_type"),
    "pref_ftx": Renamed(instead=_with_likelihood, asks_nothing=(None, 0, 0.0)),
    "dpo_ftx": Renamed(instead=_with_likelihood, asks_nothing=(None, 0, 0.0)),
    "dpo_label_smoothing": _to("label_smoothing", "", 0, 0.0),
    "cutoff_len": _to("max_length"),
    "sequence_len": _to("max_length"),
    "dataset_num_workers": _to("dataset_num_proc"),
    "preprocessing_num_workers": _to("dataset_num_proc"),
}

RENAMED: Mapping[str, Renamed] = MappingProxyType({**_OF_TRL, **_OF_MODELS, **_OF_TRANSFORMERS, **_OF_OTHERS})
"""Options of a config that are none of `DPOConfig`."""

RENAMED_ARGUMENTS: Mapping[str, Renamed] = MappingProxyType(
    {
        **dict.fromkeys(
            ("tokenizer", "processor", "image_processor", "feature_extractor"),
            Renamed(instead=lambda value, others: {"processing_class": value}, owner="DPOTrainer"),
        ),
        **{
            name: Renamed(instead=lambda value, others, to=to: {to: value}, owner="DPOTrainer")
            for name, to in {
                "config": "args", "training_args": "args", "dataset": "train_dataset", "model_ref": "ref_model",
                "reference_model": "ref_model", "collator": "data_collator", "collate_fn": "data_collator",
            }.items()
        },
        **{
            name: Renamed(reason=reason, asks_nothing=())
            for name, reason in {
                "optimizer_cls_and_kwargs": "pass optimizers=(optimizer, schedule), or set optim and optim_args",
                "compute_loss_func": "override `compute_loss` in a subclass",
                "formatting_func": "make the columns prompt, chosen and rejected with `dataset.map`",
            }.items()
        },
    }
)  # fmt: skip
"""Arguments of a trainer that are none of `DPOTrainer`."""

ARGUMENTS = (
    "model", "ref_model", "args", "data_collator", "train_dataset", "eval_dataset", "processing_class",
    "compute_metrics", "callbacks", "optimizers", "quantization_config", "peft_config", "model_init",
    "preprocess_logits_for_metrics",
)  # fmt: skip
"""The arguments of `DPOTrainer`, which a config has no options for."""
