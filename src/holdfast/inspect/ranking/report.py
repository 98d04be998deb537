"""What a report says, in order: of the whole inspection, and of each dataset in sections."""

from collections.abc import Mapping

from holdfast.inspect.ranking.inspection import DatasetRanking, RankingInspection
from holdfast.inspect.ranking.movement import Movement
from holdfast.inspect.ranking.reference_sections import reference_sections
from holdfast.inspect.ranking.sections import Section
from holdfast.inspect.ranking.training_sections import training_sections
from holdfast.inspect.ranking.written import with_error

_WIDE = 0.1
_MANY_ERRORS = 3.0
"""A gap between training and evaluation is spoken of where it is at least `_WIDE` and so many standard errors."""


def about(inspection: RankingInspection) -> Mapping[str, str]:
    """Which models and which loss the report is about."""
    objective = inspection.objective
    beta = "" if objective is None else f", beta {objective.options.beta:g}"
    models = {"reference": inspection.reference, "policy": inspection.policy}
    named = {name: text for name, text in models.items() if text is not None}
    return {**named, "loss": f"{losses_of(inspection)}{beta}"}


def remarks(inspection: RankingInspection) -> tuple[str, ...]:
    """What is to be said of the inspection as a whole."""
    not_read = (f"The {name} dataset is not shown: {reason}." for name, reason in inspection.not_read.items())
    return (*inspection.notes, *not_read, *_gaps(inspection))


def losses_of(inspection: RankingInspection) -> str:
    """The names of the run's losses."""
    return " + ".join(inspection.loss_types)


def sections_of(dataset: DatasetRanking, inspection: RankingInspection) -> tuple[Section, ...]:
    """All sections of a dataset: those of training first, where there was one."""
    groups = dataset.whole, dataset.by_source, dataset.by_length
    return (
        *training_sections(*groups),
        *reference_sections(*groups, inspection.objective, losses_of(inspection)),
    )


def _gaps(inspection: RankingInspection) -> list[str]:
    """Evaluation sets whose margins rise less often than those of training."""
    moved = {each.name: each.whole.movement for each in inspection.datasets if each.whole.movement is not None}
    trained = moved.pop("train", None)
    return [] if trained is None else [_gap(trained, name, other) for name, other in moved.items()]


def _gap(trained: Movement, name: str, other: Movement) -> str:
    said = (
        f"The margin rose in {with_error(trained.rose)} of the training pairs, in {with_error(other.rose)} of {name}."
    )
    shares, errors = (
        tuple(getattr(each.rose, field) or 0.0 for each in (trained, other)) for field in ("share", "standard_error")
    )
    gap, error = shares[0] - shares[1], (errors[0] ** 2 + errors[1] ** 2) ** 0.5
    is_wide = gap >= _WIDE and gap >= _MANY_ERRORS * error
    return f"{said} The pairs are being learnt by heart: fewer epochs, or a lower learning rate." if is_wide else said
