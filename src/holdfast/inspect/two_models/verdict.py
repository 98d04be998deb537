"""What the comparison of two models comes to: the same or not, why, and in a sentence.

Two models are the same where their tensors and settings are equal to the bit, or where an adapter on one side is
merged on the other and nothing but rounding is between them; and where either tokenizer makes the same of the rows. A
`tolerance` in nats replaces what is asked of tensors and settings by what is asked of log-probs.
"""

from dataclasses import dataclass
from enum import StrEnum
from typing import final

from holdfast.inspect.two_models.gaps import Gaps
from holdfast.inspect.two_models.settings import Setting, Settings
from holdfast.inspect.two_models.sides import Facts
from holdfast.inspect.two_models.tokenizers import Tokenizers
from holdfast.inspect.two_models.weights import TensorDifference, Weights

ROUNDING, ROUNDING_HALF = 1e-5, 5e-3
"""A relative distance of tensors that rounding explains where an adapter is merged, in fp32 and below."""
_MOST_NAMED = 3
_OTHER_MODEL = 0.2
"""Below this median cosine of their matrices, two models have nothing in common but their shape."""


class Kind(StrEnum):
    """What two models are to each other."""

    IDENTICAL = "identical"
    MERGED = "merged"
    WITHIN_TOLERANCE = "within_tolerance"
    BASE_OF_MODEL = "base_of_model"
    BASE_OF_REFERENCE = "base_of_reference"
    OTHER_ADAPTER = "other_adapter"
    ROUNDED = "rounded"
    QUANTISED = "quantised"
    RESIZED = "resized"
    OTHER_DTYPE = "other_dtype"
    UNTIED = "untied"
    SETTINGS = "settings"
    NUMERICS = "numerics"
    OTHER_ARCHITECTURE = "other_architecture"
    OTHER_SHAPE = "other_shape"
    TRAINED = "trained"
    OTHER_MODEL = "other_model"
    TOKENIZER = "tokenizer"


SAME, DIFFERS = "same", "differs"


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """`outcome` is "same" or "differs", `sentence` says it to a person, and `remarks` are what to know beside it."""

    outcome: str
    kind: Kind
    sentence: str
    remarks: tuple[str, ...] = ()


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Evidence:
    """All that a verdict is made from. `gaps` is None where no model was run, or where the reference cannot score the
    model's ids, which `unscored` explains. `tolerance` is the user's; None where none was named."""

    model: Facts
    reference: Facts
    weights: Weights
    settings: Settings
    gaps: Gaps | None
    unscored: str | None
    tokenizers: Tokenizers | None
    is_half_precision: bool
    is_same_to_rounding: bool
    tolerance: float | None


def verdict_of(evidence: Evidence) -> Verdict:
    """The verdict on two models."""
    kind, sentence = _of_models(evidence)
    is_same = kind in (Kind.IDENTICAL, Kind.MERGED, Kind.WITHIN_TOLERANCE)
    tokenizers = evidence.tokenizers
    remarks = _remarks(evidence, kind)
    if tokenizers is not None and tokenizers.rows_differ:
        if is_same:
            lead = (
                "The same weights, read through another tokenizer: " if kind is Kind.IDENTICAL else f"{sentence} But "
            )
            return Verdict(outcome=DIFFERS, kind=Kind.TOKENIZER, sentence=f"{lead}{_of_rows(tokenizers)}",
                           remarks=remarks)  # fmt: skip
        remarks = (*remarks, f"The tokenizers differ too: {_of_rows(tokenizers)}")
    return Verdict(outcome=SAME if is_same else DIFFERS, kind=kind, sentence=sentence, remarks=remarks)


def _of_rows(tokenizers: Tokenizers) -> str:
    what = "the chat template" if tokenizers.template_diff and not tokenizers.counting else "the tokenizer"
    if tokenizers.refusal is not None:
        return f"{what} of REF cannot read these rows ({tokenizers.refusal})"
    return (
        f"{what} of REF makes other tokens of {tokenizers.num_differing:,} of {tokenizers.num_rows:,} rows. Training "
        "reads all rows by MODEL's, so REF would be asked about texts that it was not trained to read."
    )


def _of_models(evidence: Evidence) -> tuple[Kind, str]:
    """The kind and the sentence, leaving the tokenizers aside."""
    weights, settings, gaps = evidence.weights, evidence.settings, evidence.gaps
    is_identical = weights.are_equal and not settings.counting and gaps is not None and gaps.largest == 0
    if evidence.tolerance is not None and gaps is not None and gaps.largest <= evidence.tolerance and not is_identical:
        return Kind.WITHIN_TOLERANCE, (
            f"The same within the tolerance of {evidence.tolerance:g} nats: no log-prob of {gaps.num_tokens:,} "
            f"tokens differs by more than {gaps.largest:.3g}."
        )
    if weights.are_equal and not settings.counting:
        return _of_equal_weights(evidence)
    if _is_merged(evidence):
        return Kind.MERGED, (
            f"The same model, held in another way: {_held(evidence)}, and nothing but rounding is between them "
            f"({_gap(gaps)})."
        )
    return _of_other_weights(evidence)


def _of_equal_weights(evidence: Evidence) -> tuple[Kind, str]:
    gaps, weights = evidence.gaps, evidence.weights
    if gaps is not None and not evidence.is_same_to_rounding:
        reasons = _listed(evidence.settings.numerics)
        return Kind.NUMERICS, (
            "The same tensors and settings, but other log-probs "
            f"({_gap(gaps)}): {f'they were computed otherwise here ({reasons})' if reasons else _RANDOM}."
        )
    if gaps is not None and gaps.largest > 0:
        return Kind.MERGED, (
            f"The same model, held in another way: {_held(evidence)}, and nothing but rounding is between their "
            f"log-probs ({_gap(gaps)})."
        )
    logps = "" if gaps is None else f", and so are the log-probs of {gaps.num_tokens:,} tokens"
    return Kind.IDENTICAL, (
        f"The same model to the bit: all {weights.num_common:,} tensors and every setting that changes a number are "
        f"equal{logps}."
    )


_RANDOM = "look for a forward pass that is random, or keeps state, in eval mode"


def _is_merged(evidence: Evidence) -> bool:
    """Whether an adapter of one side may be merged in the other, and no tensor is further away than rounding."""
    weights = evidence.weights
    if (evidence.model.adapter is None) == (evidence.reference.adapter is None) and evidence.model.adapter is None:
        return False
    if weights.only_model or weights.only_reference or evidence.settings.counting or not evidence.is_same_to_rounding:
        return False
    most = ROUNDING_HALF if evidence.is_half_precision else ROUNDING
    return all(each.rounded or (each.relative or 0.0) <= most for each in weights.differing) and (
        all(each.relative is not None for each in weights.differing)
    )


def _held(evidence: Evidence) -> str:
    """How the two are held, where one has an adapter."""
    names = {"MODEL": evidence.model.adapter, "REF": evidence.reference.adapter}
    adapted = [label for label, adapter in names.items() if adapter is not None]
    if len(adapted) == 1:
        other = "REF" if adapted == ["MODEL"] else "MODEL"
        return f"what {adapted[0]} has as an adapter ({names[adapted[0]]}) is merged in {other}"
    return "both have an adapter that adds the same" if adapted else "their modules compute in another order"


def _of_other_weights(evidence: Evidence) -> tuple[Kind, str]:
    weights, gap = evidence.weights, _gap(evidence.gaps)
    model, reference = evidence.model, evidence.reference
    if weights.base_is_reference:
        return Kind.BASE_OF_MODEL, (
            f"REF is the base of MODEL, without what MODEL's adapter ({model.adapter}) has learnt ({gap}). As a "
            "reference it is where that adapter began, and not MODEL as it is now."
        )
    if weights.model_is_base:
        return Kind.BASE_OF_REFERENCE, (
            f"MODEL is the base of REF, without what REF's adapter ({reference.adapter}) has learnt ({gap})."
        )
    if weights.same_base:
        return Kind.OTHER_ADAPTER, (
            f"Two adapters over the same base: MODEL has {model.adapter}, REF {reference.adapter}, and they add other "
            f"weights ({gap})."
        )
    if model.kind != reference.kind or weights.num_common == 0:
        return Kind.OTHER_ARCHITECTURE, (
            f"Other architectures: MODEL is a {model.kind}, REF a {reference.kind} ({gap}); {weights.num_common:,} of "
            "their tensors have the same names."
        )
    return _of_same_architecture(evidence)


def _of_same_architecture(evidence: Evidence) -> tuple[Kind, str]:
    weights, settings, gap = evidence.weights, evidence.settings, _gap(evidence.gaps)
    model, reference = evidence.model, evidence.reference
    quantised = [(label, f.quantisation) for label, f in (("MODEL", model), ("REF", reference)) if f.quantisation]
    if len(quantised) == 1:
        label, how = quantised[0]
        return Kind.QUANTISED, (
            f"{label} is quantised ({how}), the other is not; turned back into numbers, {_num_differing(weights)} "
            f"differ, by up to {weights.most_relative:.2g} of their norm ({gap})."
        )
    if weights.are_equal or (settings.counting and _only_of_settings(weights)):
        return Kind.SETTINGS, (f"The same weights, computed with other settings: {_listed(settings.counting)} ({gap}).")
    if weights.is_resized:
        names = ", ".join(f"{d.name} {d.shapes[0][0]:,} and {d.shapes[1][0]:,}" for d in weights.differing)
        return Kind.RESIZED, (
            f"The same weights, with another number of embeddings ({names}): all rows that both have are equal ({gap})."
        )
    if weights.is_of_other_dtype and not settings.counting:
        first = weights.differing[0]
        return Kind.OTHER_DTYPE, (
            f"The same values, computed in other dtypes: `{first.name}` is {first.dtypes[0]} in MODEL and "
            f"{first.dtypes[1]} in REF ({gap})."
        )
    if weights.rounded is not None and not settings.counting:
        whose, dtype = weights.rounded
        first, second = ("REF", "MODEL") if whose == "reference" else ("MODEL", "REF")
        return Kind.ROUNDED, (
            f"{first} is {second}{_merged(evidence, second)}, rounded to {dtype}: {_num_differing(weights)} differ, by "
            f"this rounding alone ({gap})."
        )
    if untied := _untied(evidence):
        return Kind.UNTIED, untied
    if weights.is_of_other_shape:
        return _of_shapes(evidence)
    return _of_training(evidence)


def _merged(evidence: Evidence, label: str) -> str:
    adapter = (evidence.model if label == "MODEL" else evidence.reference).adapter
    return "" if adapter is None else " with its adapter merged"


def _of_shapes(evidence: Evidence) -> tuple[Kind, str]:
    weights = evidence.weights
    other = [each for each in weights.differing if each.relative is None]
    found = [f"`{other[0].name}` is {list(other[0].shapes[0])} and {list(other[0].shapes[1])}"] if other else []
    for label, names in (("MODEL", weights.only_model), ("REF", weights.only_reference)):
        found += [f"{len(names):,} tensors are in {label} only, such as `{names[0]}`"] if names else []
    what = f"{len(other):,} tensors have other shapes; " if other else ""
    return Kind.OTHER_SHAPE, f"Models of other shapes: {what}{', '.join(found)} ({_gap(evidence.gaps)})."


def _of_training(evidence: Evidence) -> tuple[Kind, str]:
    weights, gap = evidence.weights, _gap(evidence.gaps)
    cosine = weights.median_cosine
    if cosine is not None and cosine < _OTHER_MODEL:
        return Kind.OTHER_MODEL, (
            f"Another model of the same architecture: {_num_differing(weights)} differ, and their directions have "
            f"nothing in common (median cosine {cosine:.2f}): neither was trained from the other ({gap})."
        )
    if len(weights.differing) <= _MOST_NAMED:
        each_of = ", ".join(_of_tensor(each) for each in weights.differing)
        return Kind.TRAINED, f"Other weights in {each_of}; all else is equal ({gap})."
    return Kind.TRAINED, (
        f"Other weights: {_num_differing(weights)} differ, as after training (matrices by "
        f"{_median_relative(weights):.2g} of their norm) ({gap})."
    )


def _of_tensor(each: TensorDifference) -> str:
    return f"`{each.name}` ({each.num_differing:,} of {each.num_values:,} values, by up to {each.largest or 0:.3g})"


def _median_relative(weights: Weights) -> float:
    found = sorted(d.relative for d in weights.differing if d.relative is not None)
    return found[len(found) // 2] if found else float("inf")


def _num_differing(weights: Weights) -> str:
    num_other = len(weights.only_model) + len(weights.only_reference)
    beside = f" and {num_other:,} that one of them lacks" if num_other else ""
    return f"{len(weights.differing):,} of {weights.num_common:,} tensors{beside}"


def _only_of_settings(weights: Weights) -> bool:
    """Whether no tensor differs but buffers that a config decides, such as rotary frequencies."""
    names = (*(each.name for each in weights.differing), *weights.only_model, *weights.only_reference)
    return all(name.endswith("inv_freq") for name in names)


def _untied(evidence: Evidence) -> str | None:
    """The sentence on a head that is tied to the embeddings on one side alone, where nothing else differs."""
    weights = evidence.weights
    if bool(evidence.model.tied) == bool(evidence.reference.tied) or weights.only_model or weights.only_reference:
        return None
    label, tied = ("MODEL", evidence.model.tied) if evidence.model.tied else ("REF", evidence.reference.tied)
    if {each.name for each in weights.differing} - {name for group in tied for name in group}:
        return None
    names = " and ".join(tied[0])
    return (
        f"In {label} {names} are one tensor (tie_word_embeddings), in the other they are two with other values; "
        f"nothing else differs ({_gap(evidence.gaps)})."
    )


def _gap(gaps: Gaps | None) -> str:
    if gaps is None:
        return "no log-probs were compared"
    if gaps.largest == 0:
        return f"no log-prob of {gaps.num_tokens:,} tokens differs"
    return f"gap {gaps.mean:.3g} nats per token on average, {gaps.largest:.3g} at most"


def _listed(settings: tuple[Setting, ...], most: int = 3) -> str:
    """The settings by name and value: those of the config, or where there is none those of modules."""
    of_config = [each for each in settings if each.name.startswith("config.")] or list(settings)
    shown = [f"{_name(each)} {each.model} and {each.reference}" for each in of_config[:most]]
    return ", ".join([*shown, *([f"{len(of_config) - most} more"] if len(of_config) > most else [])])


def _name(setting: Setting) -> str:
    return setting.name.removeprefix("config.")


def _remarks(evidence: Evidence, kind: Kind) -> tuple[str, ...]:
    remarks = []
    weights, settings, tokenizers = evidence.weights, evidence.settings, evidence.tokenizers
    if evidence.unscored is not None:
        remarks.append(evidence.unscored)
    if bool(evidence.model.tied) != bool(evidence.reference.tied):
        label = "MODEL" if evidence.model.tied else "REF"
        remarks.append(f"Only {label} ties its head to its embeddings; the other would train them apart.")
    if weights.are_equal and weights.base_is_reference:
        remarks.append("MODEL's adapter adds nothing yet.")
    if weights.are_equal and weights.model_is_base:
        remarks.append("REF's adapter adds nothing.")
    if settings.counting and kind not in (Kind.SETTINGS, Kind.OTHER_ARCHITECTURE, Kind.QUANTISED):
        remarks.append(f"Settings that change log-probs differ: {_listed(settings.counting)}.")
    is_merged_lora = kind is Kind.TRAINED and not (evidence.model.adapter or evidence.reference.adapter)
    if weights.rank is not None and is_merged_lora and len(weights.differing) > 1:
        remarks.append(f"The difference of {weights.rank_of} has rank {weights.rank}, as after merging a LoRA.")
    if kind in (Kind.TRAINED, Kind.OTHER_MODEL) and weights.base_is_reference is False:
        remarks.append("REF is not the base of MODEL's adapter either.")
    if evidence.model.adapter and evidence.reference.adapter and weights.same_base is False:
        remarks.append("The two adapters stand over other bases.")
    if settings.without_effect:
        names = ", ".join(each.name for each in settings.without_effect[:6])
        remarks.append(f"Entries of the configs that differ and change no log-prob: {names}.")
    if tokenizers is not None and tokenizers.missing is not None:
        remarks.append(f"{tokenizers.missing} has no tokenizer, so tokenizers were not compared.")
    elif tokenizers is not None and not tokenizers.rows_differ and not tokenizers.are_same:
        remarks.append("The tokenizers differ, but make the same tokens of all these rows.")
    return tuple(remarks)
