"""Four runs that pay for the reference once: the first one scores the pairs, and the others find the log-probs.

The reference is not in memory while a run trains. Its log-probs are kept in a store, which serves other losses, betas,
learning rates and seeds.

Usage: python examples/sweep.py MODEL PAIRS.jsonl OUTPUT
"""

import sys
import time

from datasets import load_dataset
from peft import LoraConfig

from holdfast import DPOConfig, DPOTrainer

LEARNING_RATE = 1e-3  # for the quickstart's small model; 5e-6 to 5e-5 is usual for a LoRA of a large one

model, pairs, output = sys.argv[1:]
rows = load_dataset("json", data_files=pairs, split="train").train_test_split(test_size=0.1, seed=0)

print("loss      beta  seconds before training  accuracy  KL of chosen")
for loss_type in ("sigmoid", "hinge"):
    for beta in (0.1, 0.3):
        started = time.perf_counter()
        trainer = DPOTrainer(
            model=model,
            args=DPOConfig(
                output_dir=f"{output}/{loss_type}-{beta}",
                loss_type=loss_type,
                beta=beta,
                learning_rate=LEARNING_RATE,
                per_device_train_batch_size=16,
                precompute_ref_log_probs=True,
                reference_store=f"{output}/store",
                save_strategy="no",
                disable_tqdm=True,
                report_to="none",
            ),
            train_dataset=rows["train"],
            eval_dataset=rows["test"],
            peft_config=LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM"),
        )
        seconds = time.perf_counter() - started
        trainer.train()
        found = trainer.evaluate()
        accuracy, kl = found["eval_rewards/accuracies"], found["eval_reference/kl_chosen"]
        print(f"{loss_type:9} {beta:4}  {seconds:23.2f}  {accuracy:8.3f}  {kl:12.3f}")
