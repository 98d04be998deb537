"""A loss of your own: a function from the log-probs of pairs to one number per pair, entered into the table of losses.

This one is the squared hinge, `max(0, 1 - m)^2` with `m` the margin of the rewards. It is compared with `sigmoid`. A
loss that others should have too goes into the package: docs/howto/loss.md.

Usage: python examples/own_loss.py MODEL PAIRS.jsonl OUTPUT
"""

import sys

from datasets import load_dataset
from peft import LoraConfig
from torch import Tensor

from holdfast import DPOConfig, DPOTrainer
from holdfast.losses import LossInputs
from holdfast.losses.options import BetaOptions
from holdfast.losses.table import loss

LEARNING_RATE = 1e-3  # for the quickstart's small model; 5e-6 to 5e-5 is usual for a LoRA of a large one


@loss("of my own", BetaOptions)
def squared_hinge(inputs: LossInputs[BetaOptions]) -> Tensor:
    """max(0, 1 - m)^2, with m = beta (r_w - r_l) and r = log pi_theta - log pi_ref."""
    chosen, rejected = inputs.log_ratios()
    margin = inputs.options.beta * (chosen - rejected)
    return (1.0 - margin).clamp(min=0.0) ** 2


model, pairs, output = sys.argv[1:]
rows = load_dataset("json", data_files=pairs, split="train").train_test_split(test_size=0.1, seed=0)
for name in ("sigmoid", "squared_hinge"):
    trainer = DPOTrainer(
        model=model,
        args=DPOConfig(
            output_dir=f"{output}/{name}",
            loss_type=name,
            beta=0.1,
            learning_rate=LEARNING_RATE,
            per_device_train_batch_size=16,
            logging_first_step=True,
            save_strategy="no",
        ),
        train_dataset=rows["train"],
        eval_dataset=rows["test"],
        peft_config=LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    trainer.train()
    found = trainer.evaluate()
    print(f"{name:14} first loss {trainer.state.log_history[0]['loss']:.4f}", end="  ")
    print(f"held-out accuracy {found['eval_rewards/accuracies']:.3f}  margin {found['eval_rewards/margins']:.3f}")
