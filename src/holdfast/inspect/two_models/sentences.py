"""What a comparison says in words, for the terminal and for the page alike."""

from holdfast.inspect.two_models.compare import Comparison
from holdfast.inspect.two_models.gaps import Gaps
from holdfast.inspect.two_models.parting import Event, Parting
from holdfast.inspect.two_models.recorded import RecordedReference
from holdfast.inspect.two_models.sides import Facts
from holdfast.inspect.two_models.weights import Weights

LN_2 = 0.6931


def facts_of(facts: Facts) -> dict[str, str]:
    """What is known of one model, by what it is."""
    stored = ", ".join(f"{dtype} {count:,}" for dtype, count in facts.stored.items())
    values = {
        "path": facts.path + (f" at revision {facts.revision}" if facts.revision else ""),
        "class": facts.kind,
        "parameters": f"{facts.num_parameters:,}, in {facts.dtype}" + (f" (in files: {stored})" if stored else ""),
        "embeddings": f"{facts.num_embeddings:,}",
        "adapter": facts.adapter or "",
        "base of the adapter": facts.adapter_base or "",
        "quantised": facts.quantisation or "",
        "tied": "; ".join(" = ".join(group) for group in facts.tied),
        "tokenizer": facts.tokenizer or "none",
    }
    return {name: value for name, value in values.items() if value}


def parting_sentence(comparison: Comparison) -> str:
    """Where hidden states part, and whether a tensor there differs."""
    parting = comparison.parting
    if parting is None:
        return "Hidden states were not compared: no model was run on these rows."
    if not parting.layers:
        return "Their modules have other names, so hidden states cannot be laid beside each other."
    found = parting.beyond_rounding
    if found is None:
        if parting.first is None:
            return _after_all_modules(comparison)
        size = _relative(parting.first.relative)
        return f"They part by no more than rounding, first in what {_place(parting.first.event)} ({size})."
    return (
        f"They part first in what {_place(found.event)} ({_relative(found.relative)}): "
        f"{_cause(found.event, comparison.weights)}."
    )


def _after_all_modules(comparison: Comparison) -> str:
    """What is said where every module before the head gives the same."""
    if comparison.gaps is None or comparison.gaps.largest == 0:
        return "No module gives another number."
    names = [each.name for each in comparison.weights.differing]
    why = f"{', '.join(names[:3])} differs" if names else "a setting or the head's code differs"
    return f"They are equal up to the head; log-probs part in the head, or in what follows it: {why}."


def _place(event: Event) -> str:
    if event.when == "returned":
        return f"{event.module} returns"
    argument = "" if event.what.isdigit() else f" as {event.what}"
    return f"{event.module} is given{argument}"


def _relative(distance: float | None) -> str:
    return "of another shape" if distance is None else f"relative distance {distance:.2g}"


def _cause(event: Event, weights: Weights) -> str:
    """Why a module may give other numbers where all before gave the same."""
    if any("|prompt" in name for name in (*weights.only_model, *weights.only_reference)):
        return "an adapter's virtual tokens stand before each row of one of the two"
    within = event.module if event.when == "returned" else event.module.rpartition(".")[0]
    names = [each.name for each in weights.differing if each.name.startswith(f"{within}.")]
    only = (*weights.only_model, *weights.only_reference)
    names += [name for name in only if name.startswith((f"{within}.", f"{within}|"))]
    if event.when == "returned" and names:
        return f"its {', '.join(name.removeprefix(f'{within}.') for name in names[:3])} differs"
    if event.when == "returned":
        return "its tensors are equal, so a setting or its code differs"
    between = f"what {within or 'the model'} computes between them differs (attention, or a setting)"
    return f"all modules before give the same, so {between}"


def where_of(parting: Parting) -> str:
    """On what the hidden states were compared."""
    return f"on {parting.side} of row {parting.row}, which has the largest gap ({parting.num_tokens:,} tokens)"


def start_sentence(gaps: Gaps) -> str:
    """What a run with this reference would begin with."""
    return (
        f"With REF as its reference, MODEL would begin DPO (beta {gaps.beta:g}) at a loss of {gaps.first_loss:.4f} and "
        f"an accuracy of {gaps.first_accuracy:.2f}; with itself at {LN_2} and 0.50."
    )


def recorded_sentence(recorded: RecordedReference) -> str:
    """Whether REF is what the run that wrote MODEL recorded."""
    what = f"{recorded.checkpoint} records the reference of its run: {recorded.description}"
    moved = f" It had moved {recorded.num_syncs} times since." if recorded.num_syncs else ""
    if recorded.is_it:
        return f"REF is the reference that MODEL's run began with, by its digest. {what}.{moved}"
    if recorded.is_it is None:
        return f"Whether REF is the reference of MODEL's run cannot be told: {recorded.why}. {what}.{moved}"
    return f"REF is not the reference that MODEL's run began with: the digests differ. {what}.{moved}"


def num_equal(weights: Weights) -> str:
    """How many tensors are equal."""
    only = {"MODEL": weights.only_model, "REF": weights.only_reference}
    beside = [f"{len(names):,} in {label} only" for label, names in only.items() if names]
    return ", ".join([f"{weights.num_equal:,} of {weights.num_common:,} tensors are equal to the bit", *beside])
