"""The logistic loss of a margin, which most losses of pairs end in."""

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor


def smoothed_logistic(margin: Float[Tensor, "P"], smoothing: float) -> Float[Tensor, "P"]:
    """-(1 - eps) log sigma(margin) - eps log sigma(-margin)."""
    return -(1.0 - smoothing) * F.logsigmoid(margin) - smoothing * F.logsigmoid(-margin)
