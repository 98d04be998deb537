"""The inspection of a run's pairs, from the numbers of its datasets and the options of its losses."""

from collections.abc import Sequence

from holdfast.config import DPOConfig
from holdfast.inspect.ranking.flipping import Objective
from holdfast.inspect.ranking.inspection import RankingInspection, ScoredDataset, inspect_ranking
from holdfast.inspect.ranking.texts import TextReader
from holdfast.inspect.run_numbers import DatasetNumbers, RunNumbers
from holdfast.losses.modifiers import ModifierOptions


def inspect_run(
    numbers: RunNumbers,
    args: DPOConfig,
    *,
    only: str | None = None,
    num_shown: int = 5,
    notes: Sequence[str] = (),
) -> RankingInspection:
    """The inspection of these numbers under the losses of `args`. `only` is "train", "eval" for all evaluation data, or
    the name of one evaluation set; None shows all. `num_shown` pairs of each kind are shown with their text, and
    `notes` are said before those of the numbers. ValueError where there is no such dataset."""
    return inspect_ranking(
        [_scored(each, numbers) for each in _asked(numbers.datasets, only)],
        reference=f"{numbers.reference} (digest {numbers.reference_digest})",
        policy=numbers.policy,
        loss_types=args.loss_types,
        objective=objective_of(args),
        num_shown=num_shown,
        notes=(*notes, *numbers.notes),
        not_read=numbers.not_read,
    )


def objective_of(args: DPOConfig) -> Objective | None:
    """What a run with these options minimises; None where its losses compare with no reference."""
    if not args.needs_reference:
        return None
    modifiers = ModifierOptions(ld_alpha=args.ld_alpha, use_weighting=args.use_weighting)
    return Objective.of(args.loss_options, args.loss_types, args.loss_weights, modifiers)


def _asked(datasets: Sequence[DatasetNumbers], only: str | None) -> list[DatasetNumbers]:
    asked = [
        each for each in datasets if only is None or only == each.name or (only == "eval" and each.name != "train")
    ]
    if not asked:
        names = ", ".join(each.name for each in datasets)
        raise ValueError(f"the dataset {only!r} was asked for; there are numbers of {names}. Name one of them.")
    return asked


def _scored(dataset: DatasetNumbers, numbers: RunNumbers) -> ScoredDataset:
    texts = TextReader(
        dataset=dataset.rows, cutting=numbers.cutting, tokenizer=numbers.tokenizer, places=dataset.places
    )
    return ScoredDataset(name=dataset.name, reference=dataset.reference, policy=dataset.policy, texts=texts)
