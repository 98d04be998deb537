"""Checkpoints over every engine: what is taken up is what was saved, on the same processes and on others.

The runs are those of `engine_resumes`. A run that was taken up is the uninterrupted one, bit for bit, and the run of
one process, up to rounding.
"""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from test_engines import faults

from differences import differences

pytestmark = pytest.mark.slow


def resume_faults(one: dict[str, Any], several: dict[str, Any], name: str) -> Iterator[str]:
    """What differs between a run that was taken up, the uninterrupted one, and that of one process."""
    if errors := several.get("errors") or one.get("errors"):
        yield f"it failed: {errors}"
        return
    yield from faults(_without_totals(one), _without_totals(several), name)
    facts = several["facts of each_process"]
    if "uninterrupted" not in facts:  # another launch has saved
        return
    before, after = _without_totals(facts["uninterrupted"]), _without_totals(several)
    for key in ("logs", "evaluation", "version", "drift"):
        if before[key] != after[key]:
            yield f"{key} of the run that was taken up: {next(differences(before[key], after[key]), 'rounding')}"
    ours, theirs = load_file(before["weights"]), load_file(after["weights"])
    if unlike := [name for name in ours if not torch.equal(ours[name], theirs[name])]:
        yield f"tensors of the run that was taken up are not the same bit for bit: {unlike[:3]} of {len(unlike)}"
    if not facts["final model"]:
        yield "the saved model is not the trained one"
    if any(facts["restored"]):
        yield f"evaluated otherwise when restored: {facts['restored']}"
    if not all("differs in the weights of the reference" in said for said in facts["other base"]):
        yield f"another base was not refused on each process: {facts['other base']}"


def _without_totals(outcome: dict[str, Any]) -> dict[str, Any]:
    """The outcome without the mean loss over all steps, which a run that was taken up has of its own steps only."""
    return outcome | {"logs": [entry for entry in outcome["logs"] if "train_loss" not in entry]}
