"""What a checkpoint holds besides what transformers writes, and how it is read again."""
