"""Full fine-tuning without a second model in memory: the first values of the weights wait in a file.

They are exchanged with the policy's once for each window of batches, which are then scored together. The result is that
of `reference="model"`, which holds all weights twice.

Usage: python examples/full_snapshot_on_disk.py MODEL PAIRS.jsonl OUTPUT
"""

import sys

from datasets import load_dataset

from holdfast import DPOConfig, DPOTrainer
from holdfast.reference.base import num_bytes

LEARNING_RATE = 1e-4  # for the quickstart's small model; 5e-7 to 5e-6 is usual for all weights of a large one

model, pairs, output = sys.argv[1:]
trainer = DPOTrainer(
    model=model,
    args=DPOConfig(
        output_dir=output,
        beta=0.1,
        learning_rate=LEARNING_RATE,
        num_train_epochs=2,
        per_device_train_batch_size=16,
        reference="snapshot",
        snapshot_device="disk",
        reference_window=8,  # optimizer steps; without it the length is measured in the first step
    ),
    train_dataset=load_dataset("json", data_files=pairs, split="train"),
)
print(trainer.reference.describe())
print(f"weights of the policy: {sum(weight.nbytes for weight in trainer.model.parameters()) / 1e6:.1f} MB in memory")
print(f"of the reference: {num_bytes(trainer.reference) / 1e6:.1f} MB in memory, the rest in {output}/_reference")
trainer.train()
trainer.save_model()
