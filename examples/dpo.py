"""DPO in ten lines: a LoRA on any causal language model. Usage: python dpo.py MODEL PAIRS.jsonl OUTPUT"""

import sys

from datasets import load_dataset
from peft import LoraConfig

from holdfast import DPOConfig, DPOTrainer

model, pairs, output = sys.argv[1:]
trainer = DPOTrainer(
    model=model,
    args=DPOConfig(output_dir=output, beta=0.1, learning_rate=5e-6),
    train_dataset=load_dataset("json", data_files=pairs, split="train"),
    peft_config=LoraConfig(r=16, task_type="CAUSAL_LM"),
)
trainer.train()
trainer.save_model()
