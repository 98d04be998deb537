"""Pieces of a model's body computed by few operations, for rows that hold several sequences.

- `norms`: RMS norms.
- `rotary`: rotary position embeddings.
- `lora`: LoRA layers.
- `body`: which of them a model has, and their replacement for the length of one forward pass.
"""
