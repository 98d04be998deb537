"""How much two log-probs of the same token may differ by rounding alone.

The audit, the choice of a layout and the check of a model's independence all compare by these numbers. In fp32 the same
forward pass gives the same number twice, and another batch shape moves a token by about 1e-5 nats. Below fp32 another
batch shape alone moves single tokens by 0.1 nats, so only the mean over tokens is compared. How much rounding moves it
depends on the model: two layouts are compared by what rounding does to this model on this batch. Given up: finding a
wrong setting whose effect is smaller than rounding.
"""

TOLERANCE_NATS = 1e-3
"""Largest gap of one token's log-prob in fp32."""

TOLERANCE_NATS_MEAN = 5e-5
"""Largest mean gap per token in fp32."""

TOLERANCE_NATS_HALF = 0.05
"""Largest mean gap per token in bf16 or fp16."""

TIMES_NOISE, TIMES_ROUNDED_INPUTS = 3.0, 1.5
"""In half precision: largest mean gap between two layouts, as a multiple of what another padding and order of padded
rows changes, and of what inputs that are rounded once more change. Right models stayed below 2.6 and 1.1 times."""

LEAST_NOISE_NATS, MOST_NOISE_NATS = 1e-3, 0.1
"""A mean gap per token between two layouts in half precision that is always accepted, and one that never is."""
