"""A LoRA, evaluated on pairs that were kept apart. Its reference takes no memory: it is the model with the adapter off.

Usage: python examples/lora.py MODEL PAIRS.jsonl OUTPUT
"""

import sys

from datasets import load_dataset
from peft import LoraConfig

from holdfast import DPOConfig, DPOTrainer

LEARNING_RATE = 1e-3  # for the quickstart's small model; 5e-6 to 5e-5 is usual for a LoRA of a large one

model, pairs, output = sys.argv[1:]
rows = load_dataset("json", data_files=pairs, split="train").train_test_split(test_size=0.1, seed=0)

trainer = DPOTrainer(
    model=model,
    args=DPOConfig(
        output_dir=output,
        beta=0.1,
        learning_rate=LEARNING_RATE,
        num_train_epochs=2,
        per_device_train_batch_size=16,
        eval_strategy="epoch",
    ),
    train_dataset=rows["train"],
    eval_dataset=rows["test"],
    peft_config=LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM"),
)
print(trainer.reference.describe())
before = trainer.evaluate()
trainer.train()
trainer.save_model()
after = trainer.evaluate()
for name in ("eval_loss", "eval_rewards/accuracies", "eval_rewards/margins", "eval_reference/kl_chosen"):
    print(f"{name:28} {before[name]:8.4f} -> {after[name]:8.4f}")
