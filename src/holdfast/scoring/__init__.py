"""Log-probs of completion tokens: one forward pass of any causal language model, without its logits in memory."""
