"""The names of the metrics that an evaluation gives, by which a run may choose its best model.

A data set with a column `source` gives a metric for each source too, named after it: `eval_rewards/accuracies/maths`.
"""

import re
from typing import Any, NamedTuple

METRICS_BY_SOURCE = (
    "loss", "rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins", "logps/chosen",
    "logps/rejected", "entropy", "logits/chosen", "logits/rejected", "mean_token_accuracy", "reference/kl_chosen",
    "reference/kl_rejected", "aux_loss",
)  # fmt: skip
"""What it gives for each source."""

LOSS_TERM = "loss_term/"
"""What the metric of one term of the loss begins with, where the loss has several. It is no `loss/`, since what comes
after that is a source."""

MARGIN_QUANTILES = ("rewards/margins_p10", "rewards/margins_p50", "rewards/margins_p90")
"""Margins that a tenth, half and nine tenths of the pairs are below."""

EVAL_METRICS = (
    *METRICS_BY_SOURCE, *MARGIN_QUANTILES, "num_tokens", "runtime", "samples_per_second", "steps_per_second",
)  # fmt: skip
"""What an evaluation gives, after the prefix `eval_`. `aux_loss` is a router's; `reference/*` need a reference."""

_OF_SOURCE = re.compile(
    rf"(?P<part>.*?)(?:^|(?<=_))(?P<metric>{'|'.join(METRICS_BY_SOURCE)})/(?P<source>.+)", re.DOTALL
)


class MetricOfSource(NamedTuple):
    """A metric of one source: `part` is the name of the evaluation set, where there are several, `source` what comes
    after the metric's own name."""

    part: str
    metric: str
    source: str


def metric_of_source(name: str) -> MetricOfSource | None:
    """What the metric of that name is of; None for a metric of a whole data set, and for none of ours."""
    found = _OF_SOURCE.fullmatch(name.removeprefix("eval_"))
    if found is None:
        return None
    return MetricOfSource(found["part"].removesuffix("_"), found["metric"], found["source"])


def heed_direction(args: Any) -> None:
    """Sets `greater_is_better` for the metric of a source. transformers goes by the end of a metric's name, which is
    that of the source here: more of `loss/maths` is worse, and more of `rewards/margins/weight_loss` better."""
    of_source = metric_of_source(args.metric_for_best_model) if isinstance(args.metric_for_best_model, str) else None
    if of_source is not None and args.greater_is_better is None:
        args.greater_is_better = not of_source.metric.endswith("loss")
