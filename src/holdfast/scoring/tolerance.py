"""How much two log-probs of the same token may differ by rounding alone.

The audit, the choice of a layout and the check of a model's independence all compare by these numbers. In fp32 the same
forward pass gives the same number twice, and another batch shape moves a token by about 1e-5 nats. Below fp32 another
batch shape alone moves single tokens by 0.1 nats, so only the mean over tokens is compared. Given up: finding a wrong
setting whose effect is smaller than rounding.
"""

TOLERANCE_NATS = 1e-3
"""Largest gap of one token's log-prob in fp32."""

TOLERANCE_NATS_MEAN = 5e-5
"""Largest mean gap per token in fp32."""

TOLERANCE_NATS_HALF = 0.05
"""Largest mean gap per token in bf16 or fp16."""
