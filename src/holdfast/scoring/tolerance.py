"""How far apart two log-probs of the same token may be for rounding to explain it."""

TOLERANCE_NATS = 1e-3


TOLERANCE_NATS_MEAN = 5e-5
"""Largest gap of one token's log-prob in fp32, and of the mean over tokens: rounding makes 1e-5 and less."""


TOLERANCE_NATS_HALF = 0.05
"""Largest mean gap per token under bf16 or fp16."""
