"""Pairs that are read as they come, from files that need not fit into memory. There is no end to score ahead to.

So the reference is asked batch by batch, or, where it has to be moved into place, a window of batches at a time. A run
that is resumed goes on at the row where it was.

Usage: python examples/streaming.py MODEL PAIRS.jsonl OUTPUT
"""

import sys

from datasets import load_dataset

from holdfast import DPOConfig, DPOTrainer

LEARNING_RATE = 1e-4  # for the quickstart's small model; 5e-7 to 5e-6 is usual for all weights of a large one

model, pairs, output = sys.argv[1:]
trainer = DPOTrainer(
    model=model,
    args=DPOConfig(
        output_dir=output,
        beta=0.1,
        learning_rate=LEARNING_RATE,
        max_steps=60,  # of a stream nobody knows the length
        per_device_train_batch_size=16,
        save_steps=20,
        reference="precomputed",  # of a stream: a window at a time
        reference_window=10,
    ),
    train_dataset=load_dataset("json", data_files=pairs, split="train", streaming=True).shuffle(
        seed=0, buffer_size=1000
    ),
)
print(trainer.reference.describe())
trainer.train()
trainer.save_model()
