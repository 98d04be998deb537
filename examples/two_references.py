"""Two references as one: the model that trains as it was, and another that was tuned on the preferred answers alone.

Their log-probs are mixed, 0.7 of the first and 0.3 of the second: the reference of a reward under a weighted sum of
reverse KL divergences (Aminian et al. 2025, arXiv:2502.01203).

Usage: python examples/two_references.py MODEL PAIRS.jsonl OUTPUT
"""

import sys

from datasets import load_dataset

from holdfast import DPOConfig, DPOTrainer

LEARNING_RATE = 1e-4  # for the quickstart's small model; 5e-7 to 5e-6 is usual for all weights of a large one

model, pairs, output = sys.argv[1:]
rows = load_dataset("json", data_files=pairs, split="train")
common = {"learning_rate": LEARNING_RATE, "per_device_train_batch_size": 16, "save_strategy": "no"}

other = DPOTrainer(model, args=DPOConfig(output_dir=f"{output}/other", loss_type="sft", **common), train_dataset=rows)
other.train()
other.save_model()

trainer = DPOTrainer(
    model=model,
    ref_model=[None, f"{output}/other"],  # None: the policy as it starts to train
    args=DPOConfig(output_dir=f"{output}/policy", beta=0.1, ref_model_weights=[0.7, 0.3], **common),
    train_dataset=rows,
)
print(trainer.reference.describe())
trainer.train()
trainer.save_model()
