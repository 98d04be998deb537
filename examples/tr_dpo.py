"""TR-DPO with a LoRA: every few steps the reference moves towards the policy, so that the policy may go further.

The reference stays inside the policy: a sync mixes the products of the LoRA's factors, not the factors.
Gorbatovski et al. 2024, arXiv:2404.09656.

Usage: python examples/tr_dpo.py MODEL PAIRS.jsonl OUTPUT
"""

import sys

from datasets import load_dataset
from peft import LoraConfig

from holdfast import DPOConfig, DPOTrainer

LEARNING_RATE = 1e-3  # for the quickstart's small model; 5e-6 to 5e-5 is usual for a LoRA of a large one

model, pairs, output = sys.argv[1:]
trainer = DPOTrainer(
    model=model,
    args=DPOConfig(
        output_dir=output,
        beta=0.1,
        learning_rate=LEARNING_RATE,
        num_train_epochs=2,
        per_device_train_batch_size=16,
        logging_steps=5,
        sync_ref_model=True,
        ref_model_mixup_alpha=0.6,  # ref <- 0.6 policy + 0.4 ref
        ref_model_sync_steps=25,  # the default, 512, is for runs of thousands of steps
    ),
    train_dataset=load_dataset("json", data_files=pairs, split="train"),
    peft_config=LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM"),
)
print(trainer.reference.describe())
trainer.train()
trainer.save_model()
for entry in trainer.state.log_history:
    if "loss" in entry:
        print(
            f"step {entry['step']:4}  syncs {entry['reference/version']:3.0f}  loss {entry['loss']:.4f}  "
            f"chosen, policy less reference {entry['reference/kl_chosen']:7.3f} nats"
        )
