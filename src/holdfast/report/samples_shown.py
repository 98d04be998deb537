"""Sample completions on held-out prompts: the policy's beside the reference's, and those of the data below."""

from collections.abc import Sequence

from holdfast.pages.markup import Html, element, html, joined
from holdfast.record.entries import Sample
from holdfast.report.run import Run
from holdfast.visible import visible

_MOST_STEPS, _MOST_PROMPTS = 5, 20
_MOST_LETTERS = 4000


def samples(runs: Sequence[Run]) -> Html:
    """The samples of each run: those of the last evaluations, the newest open, of a bounded number of prompts."""
    parts = []
    for run in runs:
        if not run.samples:
            continue
        if len(runs) > 1:
            parts.append(element("h3", run.name))
        steps = sorted({sample.step for sample in run.samples}, reverse=True)
        for step in steps[:_MOST_STEPS]:
            of_step = [sample for sample in run.samples if sample.step == step]
            shown = [_sample(sample) for sample in of_step[:_MOST_PROMPTS]]
            hidden = f", the first {len(shown)} of {len(of_step)}" if len(shown) < len(of_step) else ""
            summary = element("summary", f"step {step:,}: {len(of_step)} prompts{hidden}")
            parts.append(element("details", summary, *shown, open=step == steps[0]))
        if len(steps) > _MOST_STEPS:
            parts.append(element("p", f"{len(steps) - _MOST_STEPS} earlier evaluations are not shown.", kind="faint"))
    return joined([element("h2", "Samples"), *parts]) if parts else Html("")


def _sample(sample: Sample) -> Html:
    version = "" if not sample.reference_version else f" (after {sample.reference_version} syncs)"
    policy = _text("policy", sample.policy, "policy")
    reference = Html("") if sample.reference is None else _text(f"reference{version}", sample.reference, "reference")
    of_data = [
        _text(name, text)
        for name, text in (("chosen", sample.chosen), ("rejected", sample.rejected))
        if text is not None
    ]
    data = [
        element(
            "details", element("summary", "chosen and rejected of the data"), element("div", *of_data, kind="sides")
        )
    ]
    return element(
        "div",
        _text(f"{sample.dataset}, row {sample.row}: prompt", sample.prompt),
        element("div", policy, reference, kind="sides"),
        *(data if of_data else []),
        kind="sample",
    )


def _text(title: str, text: str, kind: str = "") -> Html:
    shown = visible(text[:_MOST_LETTERS], keeps_lines=True)
    rest = f" ... ({len(text):,} characters)" if len(text) > _MOST_LETTERS else ""
    lines = Html("\n".join(map(html, shown.split("\n")))) if shown else element("i", "(nothing)")
    return element("div", element("div", title, kind="part"), element("div", lines, rest, kind=f"text {kind}".strip()))
