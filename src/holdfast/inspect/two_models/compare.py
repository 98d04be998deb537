"""`compare_models`: two models loaded, and all that tells them apart."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, final

import torch
from accelerate import PartialState

from holdfast.data.dates import date_of_run
from holdfast.data.progress import bars
from holdfast.inspect.said import warnings_collected
from holdfast.inspect.two_models.gaps import Gaps, compare_gaps, logps_of, worst_completion
from holdfast.inspect.two_models.parting import Parting, compare_states, record
from holdfast.inspect.two_models.recorded import RecordedReference, recorded_reference
from holdfast.inspect.two_models.rows import Rows, draw_rows, read_rows
from holdfast.inspect.two_models.settings import Settings, compare_settings
from holdfast.inspect.two_models.sides import BASE, Facts, Loading, Place, Side, load_side, place_of_base
from holdfast.inspect.two_models.tokenizers import Tokenizers, compare_tokenizers
from holdfast.inspect.two_models.verdict import Evidence, Verdict, verdict_of
from holdfast.inspect.two_models.weights import Weights, compare_weights
from holdfast.policy.placement import move_to_device
from holdfast.reference.identity.identity import Identity
from holdfast.scoring.precision import is_half_precision
from holdfast.scoring.tolerance import TOLERANCE_NATS, TOLERANCE_NATS_HALF

_ROUNDED_STATES, _ROUNDED_STATES_HALF = 1e-4, 3e-2
"""A relative distance of hidden states that rounding explains, in fp32 and below."""


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What is compared and how. `reference` may have `BASE` as its path.

    At most `limit` pairs are compared on, drawn with `seed`. `tolerance` is the largest gap of a token, in nats, that
    is no difference (see `verdict`). With `weights_only` no model is run and no row is read; without `with_tokenizers`
    the reference's tokenizer is left aside.
    """

    model: Place
    reference: Place
    loading: Loading = field(default_factory=Loading)
    limit: int = 64
    seed: int = 0
    max_length: int = 1024
    template_date: str | None = None
    beta: float = 0.1
    tolerance: float | None = None
    weights_only: bool = False
    with_tokenizers: bool = True


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """Two models, compared. `gaps` and `parting` are None where no model was run, or where the reference cannot score
    the model's token ids; `tokenizers` is None where they were left aside. `said` are warnings about data and models.
    """

    verdict: Verdict
    model: Facts
    reference: Facts
    gaps: Gaps | None
    parting: Parting | None
    weights: Weights
    settings: Settings
    tokenizers: Tokenizers | None
    recorded: RecordedReference | None
    said: tuple[str, ...]


def compare_models(request: Request, dataset: Any) -> Comparison:
    """Two models compared on pairs of `dataset`, which is not read with `weights_only`. ValueError where one cannot be
    loaded, where no row is usable, and where a log-prob is not a number."""
    with warnings_collected() as said, bars(are_shown=not request.loading.disable_tqdm):
        place = request.reference
        place = place_of_base(request.model) if place.path == BASE else place
        model = load_side("MODEL", request.model, request.loading)
        reference = load_side("REF", place, request.loading)
        device = torch.device(PartialState().device or "cpu")
        rows, other = (None, None) if request.weights_only else _rows(request, model, reference, dataset)
        unscored = None if rows is None else _unscored(rows, reference)
        gaps, parting = None, None
        if rows is not None and unscored is None:
            gaps, parting = _computed(request, model, reference, rows, device)
        identities = Identity.of(model.model), Identity.of(reference.model)
        weights = compare_weights(model, reference)
        settings = compare_settings(model, reference, identities, device)
    tokenizers = None if rows is None else _tokenizers(request, model, reference, rows, other)
    is_half = any(is_half_precision(each.model, nullcontext) for each in (model, reference))
    evidence = Evidence(
        model=model.facts, reference=reference.facts, weights=weights, settings=settings, gaps=gaps, unscored=unscored,
        tokenizers=tokenizers, is_half_precision=is_half, tolerance=request.tolerance,
        is_same_to_rounding=gaps is None or _is_rounding(gaps, is_half),
    )  # fmt: skip
    return Comparison(
        verdict=verdict_of(evidence),
        model=model.facts,
        reference=reference.facts,
        gaps=gaps,
        parting=parting,
        weights=weights,
        settings=settings,
        tokenizers=tokenizers,
        recorded=recorded_reference(request.model.path, identities[1]),
        said=tuple(dict.fromkeys(said)),
    )


def _rows(request: Request, model: Side, reference: Side, dataset: Any) -> tuple[Rows, Rows | str | None]:
    """The rows by the model's tokenizer, and by the reference's, or why that makes none; None where it has none."""
    if model.tokenizer is None:
        raise ValueError(
            f"rows were to be tokenized by the tokenizer of {request.model.path!r}, and there is none. Save it there, "
            "or name a model that has one."
        )
    numbers, raw = draw_rows(dataset, request.limit, request.seed)
    date = date_of_run(model.tokenizer, request.template_date, None, (raw,))
    length = request.max_length
    rows = read_rows(model, numbers, raw, date=date, models=[model, reference], max_length=length, name="compared")
    if not request.with_tokenizers or reference.tokenizer is None:
        return rows, None
    try:
        return rows, read_rows(reference, numbers, raw, date=date, models=[], max_length=length, name=_BY_REF)
    except ValueError as error:
        return rows, str(error)


_BY_REF = "compared (by REF's tokenizer)"


def _unscored(rows: Rows, reference: Side) -> str | None:
    """Why the reference cannot score the rows' ids, in a sentence; None where it can."""
    num_ids = reference.facts.num_embeddings
    if rows.largest_id < num_ids:
        return None
    return (
        f"REF has {num_ids:,} embeddings, and MODEL's tokenizer makes ids up to {rows.largest_id:,} of these rows: REF "
        "cannot score them, so it cannot be MODEL's reference as it is."
    )


def _computed(
    request: Request, model: Side, reference: Side, rows: Rows, device: torch.device
) -> tuple[Gaps, Parting | None]:
    """The gaps of log-probs, and where hidden states part. Each model is on the device while it computes."""
    with _on(device, model):
        ours = logps_of(model, rows, device)
    with _on(device, reference):
        theirs = logps_of(reference, rows, device)
        completion, position = worst_completion(rows, ours, theirs)
        states = record(reference, rows, completion, position, device)
    assert model.tokenizer is not None
    tolerance = TOLERANCE_NATS if request.tolerance is None else request.tolerance
    gaps = compare_gaps(rows, ours, theirs, tokenizer=model.tokenizer, tolerance=tolerance, beta=request.beta)
    is_half = any(is_half_precision(each.model, nullcontext) for each in (model, reference))
    with _on(device, model):
        recorded = record(model, rows, completion, position, device)
    rounding = _ROUNDED_STATES_HALF if is_half else _ROUNDED_STATES
    return gaps, compare_states(recorded, states, completion, rounding)


@contextmanager
def _on(device: torch.device, side: Side) -> Iterator[None]:
    """A context in which a model is on the device; after it, the model is in host memory again."""
    move_to_device(side.model, device)
    try:
        yield
    finally:
        if device.type != "cpu":
            move_to_device(side.model, torch.device("cpu"))


def _is_rounding(gaps: Gaps, is_half: bool) -> bool:
    """Whether rounding explains the gaps, by the audit's tolerances."""
    return gaps.mean <= TOLERANCE_NATS_HALF if is_half else gaps.largest <= TOLERANCE_NATS


def _tokenizers(
    request: Request, model: Side, reference: Side, rows: Rows, other: Rows | str | None
) -> Tokenizers | None:
    if not request.with_tokenizers:
        return None
    if other is None or model.tokenizer is None or reference.tokenizer is None:
        return Tokenizers(num_rows=len(rows.numbers), missing="REF")
    return compare_tokenizers(model.tokenizer, reference.tokenizer, rows, other)
