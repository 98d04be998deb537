"""Losses by names that are none here: those of other trainers and of papers, each with what to write."""

from collections.abc import Collection, Mapping
from types import MappingProxyType

from holdfast.losses.options import require_known

_SMOOTHED = 'loss_type="sigmoid" with label_smoothing, the probability that a label is flipped'
_WITH_LIKELIHOOD = 'loss_type=["sigmoid", "sft"] with loss_weights=[1.0, alpha]'
_UNPAIRED = 'it compares no pairs; the nearest that do are "bco_pair" and "apo_zero"'

INSTEAD: Mapping[str, str] = MappingProxyType(
    {
        "dpo": 'loss_type="sigmoid"',
        "dpo_loss": 'loss_type="sigmoid"',
        "vanilla": 'loss_type="sigmoid"',
        "kto_pair": _UNPAIRED,
        "kto": _UNPAIRED,
        "aot_pair": 'loss_type="aot_unpaired", its name today',
        "cdpo": _SMOOTHED,
        "conservative": _SMOOTHED,
        "conservative_dpo": _SMOOTHED,
        "robust_dpo": 'loss_type="robust" with label_smoothing',
        "rdpo": 'loss_type="robust" with label_smoothing, if its paper is that of provably robust DPO',
        "rpo": _WITH_LIKELIHOOD,
        "dpo_sft": _WITH_LIKELIHOOD,
        "mpo": 'loss_type=["sigmoid", "bco_pair", "sft"] with loss_weights=[0.8, 0.2, 1.0]',
        "slic": 'loss_type="hinge"',
        "slic_hf": 'loss_type="hinge"',
        "rso": 'loss_type="hinge"',
        "exo": 'loss_type="exo_pair" with label_smoothing=1e-3',
        "nca": 'loss_type="nca_pair"',
        "bco": 'loss_type="bco_pair"',
        "sppo": 'loss_type="sppo_hard"',
        "apo": 'loss_type="apo_zero" or "apo_down"',
        "dpo_norm": 'loss_type="sigmoid_norm"',
        "ln_dpo": 'loss_type="sigmoid_norm"',
        "nll": 'loss_type="sft"',
        "cpo_simpo": 'loss_type=["simpo", "sft"] with loss_weights=[1.0, cpo_alpha]',
        "wpo": 'loss_type="sigmoid" with use_weighting=True',
        "ld_dpo": 'loss_type="sigmoid" with ld_alpha',
        "tr_dpo": 'loss_type="sigmoid" with sync_ref_model=True',
        "smaug": 'loss_type="dpop"',
        "dpo_positive": 'loss_type="dpop"',
        "hybrid_dpo": 'loss_type="hypo"',
        "rainbowpo": 'loss_type="rainbow"',
        "alphadpo": 'loss_type="alpha_dpo"',
        "betadpo": 'loss_type="beta_dpo"',
        "odpo": 'loss_type="sigmoid" with margin_column',
        "f_dpo": 'loss_type="sigmoid" with f_divergence_type',
        "reference_free": 'loss_type="cpo" with cpo_alpha=0',
    }
)
"""What to write instead of a name."""


def require_loss(name: str, losses: Collection[str]) -> None:
    """ValueError where `name` is none of the `losses`; the message says what to write instead, or names the nearest."""
    if name in losses:
        return
    key = str(name).lower().replace("-", "_")
    advice = f'loss_type="{key}"' if key in losses else INSTEAD.get(key)
    if advice is not None:
        write = advice if advice is _UNPAIRED else f"Write {advice}"
        raise ValueError(
            f"loss_type '{name}' is unknown. {write[0].upper()}{write[1:]}. There are {', '.join(losses)}."
        )
    require_known("loss_type", name, losses)
