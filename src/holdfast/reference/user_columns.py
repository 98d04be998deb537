"""Reference log-probs in a dataset's columns: whether a run can use them, and making them a source of its reference.

Columns that a run would ignore or misread are an error, never dropped in silence."""

from collections.abc import Mapping
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from torch import nn

from holdfast.data.columns import REFERENCE_COLUMNS
from holdfast.reference.reference import Reference
from holdfast.reference.sources.user_logps import UserLogps
from holdfast.scoring.precision import is_half_precision


class UserLogpsOptions(Protocol):
    """The options of a run (`DPOConfig`) with which sums of a fixed reference cannot be used."""

    ld_alpha: float | None
    sync_ref_model: bool


def all_bring_logps(datasets: Mapping[str, Any]) -> bool:
    """Whether every dataset has the reference's log-probs in its columns."""
    return all(set(REFERENCE_COLUMNS) <= set(data.column_names or ()) for data in datasets.values())


def use_user_columns(
    reference: Reference | None,
    datasets: Mapping[str, Any],
    policy: nn.Module,
    options: UserLogpsOptions,
    accelerator: Accelerator,
) -> None:
    """Makes the user's log-probs a source of `reference` where a dataset has them in its columns.

    ValueError where the run cannot use them: no log-probs are computed ahead, the reference moves, or LD-DPO needs
    log-probs of single tokens.
    """
    names = [name for name, data in datasets.items() if set(REFERENCE_COLUMNS) & set(data.column_names or ())]
    if not names:
        return
    if options.ld_alpha is not None:
        obstacle, way_out = f"ld_alpha={options.ld_alpha} needs the log-prob of every token, and these are sums", ""
    elif options.sync_ref_model:
        obstacle, way_out = "sync_ref_model=True moves the reference, and these are of weights that stay", ""
    elif reference is None or not reference.is_precomputed:
        reason = "no loss compares with a reference" if reference is None else reference.describe()
        obstacle = f"this run has no log-probs computed ahead ({reason}), so these would be ignored"
        way_out = (
            "" if reference is None else ", or set precompute_ref_log_probs=True (on data with an end) to use them"
        )
    else:
        is_fp32 = all(parameter.dtype == torch.float32 for parameter in policy.parameters())
        is_half = not is_fp32 or is_half_precision(policy, accelerator.autocast)
        if reference.user_logps is None:
            reference.user_logps = UserLogps(is_half=is_half, is_main=accelerator.is_main_process)
        return
    raise ValueError(
        f"the {names[0]} dataset brings reference log-probs along, in the columns {list(REFERENCE_COLUMNS)}, but "
        f"{obstacle}. Drop the columns{way_out}."
    )


def columns_read(reference: Reference | None) -> tuple[str, ...]:
    """The columns of log-prob sums that `reference` has read from the dataset, which batches need no more."""
    return REFERENCE_COLUMNS if reference is not None and reference.user_logps is not None else ()


def without_user_columns(tensors: Mapping[str, Any], reference: Reference | None) -> dict[str, Any]:
    """A collated batch without the columns of log-prob sums, where `reference` has read them from the dataset."""
    columns = columns_read(reference)
    return {name: tensor for name, tensor in tensors.items() if name not in columns}
