"""To which part of a step an operation belongs, by the functions that called it, innermost first."""

from types import FrameType

from pretend.places import frames

OTHER = "other"

_BY_FILE = (
    ("holdfast/scoring/fused/lora", "LoRA"),
    ("holdfast/scoring/attention", "attention"),
    ("holdfast/scoring/flex", "attention"),
    ("holdfast/scoring/routes", "attention"),
    ("holdfast/scoring/varlen", "attention"),
    ("holdfast/scoring/segments", "attention"),
    ("holdfast/scoring/fused/norms", "norms"),
    ("holdfast/scoring/fused/rotary", "rotary"),
    ("holdfast/scoring/last_layer", "last layer"),
    ("holdfast/scoring/head", "head"),
    ("holdfast/scoring/completion_head", "head"),
    ("holdfast/scoring/score", "head"),
    ("holdfast/scoring/transform", "head"),
    ("holdfast/scoring/softmax", "head"),
    ("holdfast/scoring/weight_gradient", "head"),
    ("holdfast/losses/", "loss and metrics"),
    ("holdfast/metrics", "loss and metrics"),
    ("holdfast/batch", "loss and metrics"),
    ("holdfast/training/", "loss and metrics"),
    ("holdfast/trainer", "loss and metrics"),
    ("holdfast/reference/", "reference"),
    ("peft/", "LoRA"),
    ("torch/optim/", "optimizer"),
    ("torch/nn/utils/clip_grad", "optimizer"),
    ("transformers/integrations/", "attention"),
    ("transformers/masking_utils", "attention"),
)
_BY_FUNCTION = (
    ("Norm.forward", "norms"),
    ("rotary", "rotary"),
    ("rotate_half", "rotary"),
    ("Rotary", "rotary"),
    ("Attention.forward", "attention"),
    ("eager_attention", "attention"),
    ("Embedding.forward", "embeddings"),
    ("MLP.forward", "gated activation"),
    ("DecoderLayer.forward", "residuals"),
    ("Block.forward", "residuals"),
)
_LINEAR = {"aten::mm", "aten::addmm", "aten::bmm", "aten::linear", "aten::_grouped_mm"}


def group_of(start: FrameType | None, name: str) -> str | None:
    """The group of an operation called `name`; None where no call tells it, as in a backward pass."""
    is_linear = False
    for frame in frames(start):
        code = frame.f_code
        file, function = code.co_filename, code.co_qualname
        if function in ("Linear.forward", "Conv1D.forward") and "/peft/" not in file:
            is_linear = True
        for part, group in _BY_FILE:
            if part in file:
                return "linear maps" if is_linear and name in _LINEAR and group == "attention" else group
        for part, group in _BY_FUNCTION:
            if part in function:
                return "linear maps" if is_linear or name in _LINEAR else group
        if "/transformers/" in file or "/accelerate/" in file:
            return OTHER
    return None
