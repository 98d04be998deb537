"""What `DPOTrainer` stands on: the hooks of `transformers.Trainer`, by what they are about, and the start of a run."""
