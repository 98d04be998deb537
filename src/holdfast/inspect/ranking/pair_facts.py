"""What is written of a single pair beside its text."""

import math

import numpy as np

from holdfast.inspect.ranking.flipping import Objective, loss_to_flip
from holdfast.inspect.ranking.inspection import DatasetRanking
from holdfast.inspect.ranking.margins import margins, margins_per_token
from holdfast.inspect.ranking.written import number


def facts_of_pair(dataset: DatasetRanking, place: int, objective: Objective | None) -> tuple[str, ...]:
    """Short statements on the pair at this place: which row it is, its lengths, its margins, and how they changed."""
    one = dataset.reference.where(np.array([place]))
    said = [f"row {int(one.row[0]):,}"]
    if (file := dataset.texts[place].place) is not None:
        said.append(file)
    if (code := int(one.source[0])) >= 0:
        said.append(f"source {one.sources[code]}")
    said.append(f"{int(one.chosen_tokens[0]):,} and {int(one.rejected_tokens[0]):,} tokens")
    margin, per_token = float(margins(one)[0]), float(margins_per_token(one)[0])
    if dataset.policy is None:
        said.append(f"margin {number(margin)} nats, {number(per_token)} per token")
        if objective is not None and margin < 0:
            said.append(f"flips at a loss of {number(float(loss_to_flip(margins(one), objective.options.beta)[0]))}")
    else:
        now = dataset.policy.where(np.array([place]))
        said.append(f"margin {number(margin)} to {number(float(margins(now)[0]))} nats")
        said.append(f"chosen {number(float(one.chosen_logps[0]))} to {number(float(now.chosen_logps[0]))}")
        said.append(f"rejected {number(float(one.rejected_logps[0]))} to {number(float(now.rejected_logps[0]))}")
    if math.isfinite(ches := float(one.normalised_ches[0])):
        said.append(f"normalised CHES {number(ches)}")
    return tuple(said)
