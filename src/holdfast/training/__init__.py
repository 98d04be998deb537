"""The base classes of `DPOTrainer`. Each overrides the hooks of `transformers.Trainer` that concern one thing: batches of
pairs (`pair_trainer`), and checkpoints (`resumable_trainer`). `startup` is what happens before the first step.
"""
