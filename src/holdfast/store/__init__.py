"""Log-probs on disk, found by content. Knows no model."""
