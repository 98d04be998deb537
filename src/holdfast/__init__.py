"""holdfast: Direct Preference Optimization with the reference model as a first-class part.

Nothing heavy is imported until a name is used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOMES = {
    "DPOTrainer": "holdfast.trainer",
    "DPOConfig": "holdfast.config",
    "DataCollatorForPreference": "holdfast.data.layouts",
    "Reference": "holdfast.reference.reference",
    "ModelReference": "holdfast.reference.scorers.model",
    "AdapterReference": "holdfast.reference.scorers.adapter",
    "PrecomputedReference": "holdfast.reference.sources.stored",
    "WinRateCallback": "holdfast.samples.win_rate",
}

__all__ = ["__version__", *_HOMES]

if TYPE_CHECKING:
    from holdfast.config import DPOConfig as DPOConfig
    from holdfast.data.layouts.preference_collator import DataCollatorForPreference as DataCollatorForPreference
    from holdfast.reference.reference import Reference as Reference
    from holdfast.reference.scorers.adapter import AdapterReference as AdapterReference
    from holdfast.reference.scorers.model import ModelReference as ModelReference
    from holdfast.reference.sources.stored import PrecomputedReference as PrecomputedReference
    from holdfast.samples.win_rate import WinRateCallback as WinRateCallback
    from holdfast.trainer import DPOTrainer as DPOTrainer


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        other_names = import_module("holdfast.passed_through")
        if name in other_names.NAMES:
            return other_names.from_other_package(name, __all__)
        raise AttributeError(f"module 'holdfast' has no attribute {name!r}; it has {sorted(_HOMES)}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
