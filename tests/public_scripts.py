"""Scripts as people have them for the common DPO trainer, with only the import changed: shapes of 2023 to 2026.

Each was rebuilt from the options, the classes and the command line that a public script uses. Names of models and data,
sizes and what the hardware forces are tiny here (`SMALL`, which the test hands in). `changes` of a shape are the lines
that its error must have, in their order, without their ends; where there are none, it runs as it is. `options` are
those of the run that it means, as `DPOConfig` has them today.
"""

from dataclasses import dataclass, field
from typing import Any, final

HEAD = """
import copy
from datasets import load_dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, HfArgumentParser, TrainingArguments
{imports}
model = AutoModelForCausalLM.from_pretrained("model")
tokenizer = AutoTokenizer.from_pretrained("model")
train_dataset = load_dataset("json", data_files="pairs.jsonl", split="train")
LORA = dict(r=4, lora_alpha=8, lora_dropout=0.0, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
"""
IMPORTS = "from holdfast import DPOConfig, DPOTrainer"


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """A script, its command line, the changes that its error asks for, and the run that it means."""

    source: str
    words: tuple[str, ...] = ()
    changes: tuple[str, ...] = ()
    options: dict[str, Any] = field(default_factory=dict)
    lora: bool = False
    """Whether a fresh adapter trains."""
    ref_adapter: bool = False
    """Whether the reference is the adapter in the folder `adapter`."""
    imports: str = IMPORTS


SHAPES: dict[str, Shape] = {
    "trl 0.7.2 dpo.py (2023)": Shape(
        source="""
model_ref = AutoModelForCausalLM.from_pretrained("model")
training_args = TrainingArguments(
    remove_unused_columns=False, gradient_accumulation_steps=1, logging_first_step=True, optim="rmsprop", **SMALL
)
dpo_trainer = DPOTrainer(
    model, model_ref, args=training_args, beta=0.2, train_dataset=train_dataset, eval_dataset=train_dataset,
    tokenizer=tokenizer, max_length=512, max_target_length=128, max_prompt_length=128, generate_during_eval=True,
)
dpo_trainer.train()
""",
        changes=(
            "beta=0.2: move it into DPOConfig(beta=0.2)",
            "tokenizer: write processing_class=...",
            "max_length=512: move it into DPOConfig(max_length=512)",
            "max_target_length=128: drop it",
            "max_prompt_length=128: drop it",
            "generate_during_eval=True: write generate_samples=16 (prompts of each evaluation set) in DPOConfig",
            "`args` is a TrainingArguments; pass a `holdfast.DPOConfig`",
        ),
        options={
            "beta": 0.2, "max_length": 512, "optim": "rmsprop", "gradient_accumulation_steps": 1, "generate_samples": 16
        },
    ),
    "stack_llama_2 dpo_llama2.py (2023)": Shape(
        source="""
training_args = TrainingArguments(
    lr_scheduler_type="cosine", warmup_steps=1, optim="adamw_torch", remove_unused_columns=False, run_name="dpo_llama2",
    gradient_checkpointing=True, **SMALL
)
peft_config = LoraConfig(bias="none", **LORA)
dpo_trainer = DPOTrainer(
    model, None, args=training_args, beta=0.1, train_dataset=train_dataset, tokenizer=tokenizer,
    peft_config=peft_config, max_prompt_length=512, max_length=1024,
)
dpo_trainer.train()
dpo_trainer.save_model("saved")
dpo_trainer.model.save_pretrained("final_checkpoint")
""",
        changes=(
            "beta=0.1: move it into DPOConfig(beta=0.1)",
            "tokenizer: write processing_class=...",
            "max_prompt_length=512: drop it",
            "max_length=1024: move it into DPOConfig(max_length=1024)",
            "`args` is a TrainingArguments; pass a `holdfast.DPOConfig`",
        ),
        options={"lr_scheduler_type": "cosine", "warmup_steps": 1, "optim": "adamw_torch"},
        lora=True,
    ),
    "trl 0.9.6 dpo.py (2024)": Shape(
        source="""
parser = TrlParser((DPOScriptArguments, DPOConfig, ModelConfig))
args, training_args, model_config = parser.parse_args_and_config()
peft_config = get_peft_config(model_config)
model_ref = None
trainer = DPOTrainer(
    model, model_ref, args=training_args, train_dataset=train_dataset, tokenizer=tokenizer, peft_config=peft_config,
    callbacks=None,
)
trainer.train()
trainer.save_model(training_args.output_dir)
""",
        words=("--beta", "0.3", "--max_prompt_length", "64", "--evaluation_strategy", "no", "--warmup_ratio", "0.5",
               "--gradient_checkpointing", "--no_remove_unused_columns", "--rpo_alpha", "0.5"),
        changes=(
            "max_prompt_length=64: drop it",
            'evaluation_strategy="no": write eval_strategy="no"',
            "warmup_ratio=0.5: write warmup_steps=0.5",
            'rpo_alpha=0.5: write loss_type=["sigmoid", "sft"], loss_weights=[1.0, 0.5]',
            "tokenizer=tokenizer: write processing_class=tokenizer",
        ),
        options={"beta": 0.3, "warmup_steps": 0.5, "loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.5]},
        imports=f"{IMPORTS}, DPOScriptArguments, ModelConfig, TrlParser, get_peft_config",
    ),
    "trl 0.12.2 dpo.py (2024)": Shape(
        source="""
parser = TrlParser((ScriptArguments, DPOConfig, ModelConfig))
script_args, training_args, model_config = parser.parse_args_and_config()
peft_config = get_peft_config(model_config)
trainer = DPOTrainer(
    model, None, args=training_args, train_dataset=train_dataset,
    eval_dataset=train_dataset if training_args.eval_strategy != "no" else None,
    processing_class=tokenizer, peft_config=peft_config,
)
trainer.train()
metrics = trainer.evaluate()
trainer.log_metrics("eval", metrics)
trainer.save_metrics("eval", metrics)
trainer.save_model(training_args.output_dir)
""",
        words=("--eval_strategy", "steps", "--eval_steps", "1", "--use_peft", "--logging_steps", "1"),
        options={"eval_strategy": "steps", "eval_steps": 1},
        lora=True,
        imports=f"{IMPORTS}, ModelConfig, ScriptArguments, TrlParser, get_peft_config",
    ),
    "trl HEAD scripts/dpo.py (2026)": Shape(
        source="""
(training_args,) = HfArgumentParser(DPOConfig).parse_dict(
    {"loss_type": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.0], "model_init_kwargs": {}, **SMALL}
)
trainer = DPOTrainer(model="model", args=training_args, train_dataset=train_dataset, peft_config=LoraConfig(**LORA))
trainer.train()
trainer.save_model(training_args.output_dir)
""",
        options={"loss_type": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.0]},
        lora=True,
    ),
    "alignment-handbook run_dpo.py with a recipe (2024)": Shape(
        source="""
from dataclasses import dataclass, field

@dataclass
class OwnConfig(DPOConfig):
    hub_model_revision: str | None = field(default="main", metadata={"help": "The branch to push to."})

(training_args,) = HfArgumentParser(OwnConfig).parse_dict(
    {"beta": 0.01, "evaluation_strategy": "no", "max_prompt_length": 512, "warmup_ratio": 0.5,
     "hub_model_revision": "a", "logging_dir": None, "lr_scheduler_type": "cosine", "optim": "adamw_torch",
     "max_length": 1024, **SMALL}
)
trainer = DPOTrainer(
    "model", ref_model="model", args=training_args, train_dataset=train_dataset, tokenizer=tokenizer, beta=0.01,
    max_length=training_args.max_length, max_prompt_length=512, loss_type="sigmoid",
)
result = trainer.train()
trainer.log_metrics("train", result.metrics)
trainer.save_metrics("train", result.metrics)
trainer.save_state()
trainer.create_model_card(dataset_name="ultrafeedback", tags=["alignment-handbook"])
""",
        changes=(
            'evaluation_strategy="no": write eval_strategy="no"',
            "max_prompt_length=512: drop it",
            "warmup_ratio=0.5: write warmup_steps=0.5",
            "logging_dir=None: drop it",
            "tokenizer=tokenizer: write processing_class=tokenizer",
            "beta=0.01: move it into DPOConfig(beta=0.01)",
            "max_length=training_args.max_length: move it into DPOConfig(max_length=training_args.max_length)",
            "max_prompt_length=512: drop it",
            'loss_type="sigmoid": move it into DPOConfig(loss_type="sigmoid")',
        ),
        options={"beta": 0.01, "warmup_steps": 0.5, "lr_scheduler_type": "cosine", "optim": "adamw_torch"},
    ),
    "MedicalGPT dpo_training.py (2026)": Shape(
        source="""
training_args = DPOConfig(
    max_length=512, remove_unused_columns=False, run_name="dpo_v1", warmup_steps=1, lr_scheduler_type="cosine",
    eval_strategy="no", gradient_checkpointing=False, **SMALL
)
trainer = DPOTrainer(
    model, ref_model=copy.deepcopy(model), args=training_args, train_dataset=train_dataset, processing_class=tokenizer,
)
trainer.train()
trainer.save_model("saved")
tokenizer.save_pretrained("saved")
trainer.model.save_pretrained("saved")
""",
        options={"max_length": 512, "warmup_steps": 1, "lr_scheduler_type": "cosine"},
    ),
    "philschmid dpo-align-llms-in-2024-with-trl.ipynb (2024)": Shape(
        source="""
args = TrainingArguments(
    gradient_checkpointing=True, optim="adamw_torch", max_grad_norm=0.3, lr_scheduler_type="constant", **SMALL
)
dpo_args = {"beta": 0.1, "loss_type": "sigmoid"}
trainer = DPOTrainer(
    model, ref_model=None, peft_config=LoraConfig(**LORA), args=args, train_dataset=train_dataset, tokenizer=tokenizer,
    max_length=1512, max_prompt_length=1024, beta=dpo_args["beta"], loss_type=dpo_args["loss_type"],
)
trainer.train()
""",
        changes=(
            "tokenizer: write processing_class=...",
            "max_length=1512: move it into DPOConfig(max_length=1512)",
            "max_prompt_length=1024: drop it",
            "beta=0.1: move it into DPOConfig(beta=0.1)",
            'loss_type="sigmoid": move it into DPOConfig(loss_type="sigmoid")',
            "`args` is a TrainingArguments; pass a `holdfast.DPOConfig`",
        ),
        options={
            "optim": "adamw_torch", "max_grad_norm": 0.3, "lr_scheduler_type": "constant", "max_length": 1512,
        },
        lora=True,
    ),
    "smol-course dpo_finetuning_example.ipynb (2025)": Shape(
        source="""
training_args = DPOConfig(
    use_mps_device=True, max_prompt_length=1024, max_length=1536, remove_unused_columns=False, warmup_steps=1,
    lr_scheduler_type="cosine", group_by_length=True, overwrite_output_dir=True, **SMALL
)
trainer = DPOTrainer(model=model, args=training_args, train_dataset=train_dataset, processing_class=tokenizer)
trainer.train()
""",
        changes=(
            "use_mps_device=True: drop it",
            "max_prompt_length=1024: drop it",
            'group_by_length=True: write train_sampling_strategy="group_by_length"',
            "overwrite_output_dir=True: drop it",
        ),
        options={
            "max_length": 1536, "warmup_steps": 1, "lr_scheduler_type": "cosine",
            "train_sampling_strategy": "group_by_length",
        },
    ),
    "unsloth Zephyr_(7B)-DPO.ipynb (2026)": Shape(
        source="""
model = get_peft_model(model, LoraConfig(**LORA))
dpo_trainer = DPOTrainer(
    model=model, ref_model=None,
    args=DPOConfig(
        warmup_ratio=0.1, optim="adamw_torch", weight_decay=0.0, lr_scheduler_type="linear", seed=42, **SMALL
    ),
    beta=0.1, train_dataset=train_dataset, tokenizer=tokenizer, max_length=1024, max_prompt_length=512,
)
dpo_trainer.train()
""",
        changes=(
            "warmup_ratio=0.1: write warmup_steps=0.1",
            "beta=0.1: move it into DPOConfig(beta=0.1)",
            "tokenizer=tokenizer: write processing_class=tokenizer",
            "max_length=1024: move it into DPOConfig(max_length=1024)",
            "max_prompt_length=512: drop it",
        ),
        options={"warmup_steps": 0.1, "optim": "adamw_torch", "weight_decay": 0.0},
        lora=True,
    ),
    "autotrain-advanced train_clm_dpo.py (2025)": Shape(
        source="""
args = dict(
    gradient_checkpointing=True, lr_scheduler_type="linear", warmup_ratio=0.5, max_length=1024, max_prompt_length=128,
    max_target_length=None, beta=0.1, evaluation_strategy="no", optim="adamw_torch", save_safetensors=True, **SMALL
)
trainer = DPOTrainer(
    model=model, ref_model=None, args=DPOConfig(**args), train_dataset=train_dataset, processing_class=tokenizer,
    peft_config=None,
)
trainer.train()
""",
        changes=("warmup_ratio=0.5: write warmup_steps=0.5", "max_prompt_length=128: drop it"),
        options={"warmup_steps": 0.5, "optim": "adamw_torch"},
    ),
    "bagel dpo.py (2024)": Shape(
        source="""
model = get_peft_model(model, LoraConfig(**LORA), adapter_name="policy")
model.load_adapter("adapter", adapter_name="reference")
trainer = DPOTrainer(
    model, model_adapter_name="policy", ref_adapter_name="reference", args=DPOConfig(beta=0.1, **SMALL),
    train_dataset=train_dataset, tokenizer=tokenizer, max_length=512,
)
trainer.train()
""",
        changes=(
            'model_adapter_name="policy": move it into DPOConfig(model_adapter_name="policy")',
            'ref_adapter_name="reference": move it into DPOConfig(ref_adapter_name="reference")',
            "tokenizer: write processing_class=...",
            "max_length=512: move it into DPOConfig(max_length=512)",
        ),
        options={"max_length": 512},
        lora=True,
        ref_adapter=True,
    ),
    "gp-1108 dpo_finetuning.py (2025)": Shape(
        source="""
training_args = DPOConfig(rpo_alpha=0.2, label_pad_token_id=0, precompute_ref_log_probs=True, max_prompt_length=64,
                          torch_dtype="float32", max_length=96.0, loss_type="ipo", **SMALL)
trainer = DPOTrainer("model", args=training_args, train_dataset=train_dataset, processing_class=tokenizer)
trainer.train()
""",
        changes=(
            'rpo_alpha=0.2: write loss_type=["ipo", "sft"], loss_weights=[1.0, 0.2]',
            "label_pad_token_id=0: drop it",
            "max_prompt_length=64: drop it",
            'torch_dtype="float32": write model_init_kwargs={"dtype": "float32"}',
        ),
        options={
            "loss_type": ["ipo", "sft"], "loss_weights": [1.0, 0.2], "precompute_ref_log_probs": True, "max_length": 96,
        },
    ),
    "biosharp18 train_DPO.py (2025)": Shape(
        source="""
training_args = DPOConfig(**SMALL)
setattr(training_args, "beta", 0.25)
setattr(training_args, "max_prompt_length", 128)
setattr(training_args, "generate_during_eval", False)
trainer = DPOTrainer(model, args=training_args, train_dataset=train_dataset, processing_class=tokenizer)
trainer.train()
""",
        changes=("max_prompt_length=128: drop it",),
        options={"beta": 0.25},
    ),
    "oumi and axolotl: subclasses with hooks of their own (2026)": Shape(
        source="""
class OwnTrainer(DPOTrainer):
    _tag_names = ["own", "dpo"]

    def _prepare_dataset(self, dataset, *args, **kwargs):
        return dataset

    @staticmethod
    def _tokenize(features, processing_class):
        return features

    def training_step(self, model, inputs, num_items_in_batch=None):
        loss = super().training_step(model, inputs, num_items_in_batch)
        self._metrics["train"]["own/number"].append(3.0)
        return loss

trainer = OwnTrainer(
    model=model, args=DPOConfig(max_prompt_length=3, **SMALL), train_dataset=train_dataset, tokenizer=tokenizer
)
trainer.train()
""",
        changes=(
            "_tokenize: nothing calls it",
            "_prepare_dataset: nothing calls it",
            "max_prompt_length=3: drop it",
            "tokenizer=tokenizer: write processing_class=tokenizer",
        ),
    ),
    "LLaMA-Factory trainer.py (2026)": Shape(
        source="""
from transformers import Trainer

class CustomDPOTrainer(DPOTrainer):
    def __init__(self, model, ref_model, pref_beta, **kwargs):
        self.f_divergence_type = "reverse_kl"
        self.reference_free = False
        self.generate_during_eval = False
        self.label_pad_token_id = -100
        self.padding_value = 0
        self.is_encoder_decoder = False
        self.precompute_ref_log_probs = False
        self.ref_model = ref_model
        self.beta = pref_beta
        self.loss_type = "sigmoid"
        self.label_smoothing = 0.0
        Trainer.__init__(self, model=model, **kwargs)

trainer = CustomDPOTrainer(
    model, AutoModelForCausalLM.from_pretrained("model"), 0.4, args=DPOConfig(**SMALL), train_dataset=train_dataset,
    processing_class=tokenizer,
)
trainer.train()
""",
        changes=("CustomDPOTrainer calls `Trainer.__init__` instead of the constructor of DPOTrainer",),
        options={"beta": 0.4},
    ),
}  # fmt: skip
"""By source and age."""
