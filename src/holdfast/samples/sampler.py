"""What the policy and its reference make of the held-out prompts of a run, each generated once.

A reference that stays as it is completes its prompts once, whichever way it is held. One that moves does so anew after
syncs, once for each version. A resumed run takes from its record what was generated before.

Where weights are spread over processes, all processes complete all prompts together; else each completes its share.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import final

from torch import nn

from holdfast.agreement import num_processes, of_all, process, raised_together
from holdfast.record.entries import Sample
from holdfast.reference.base import Share
from holdfast.reference.reference import Reference
from holdfast.samples.prompts import Prompt

Complete = Callable[[Sequence[Share], Sequence[Prompt]], list[str]]
"""Completes prompts by a model, or by a mixture of several."""


@final
class Sampler:
    """Completes `prompts`, which are of evaluation sets by name, by `complete`.

    `reference` is None in a run without one. `in_lockstep` says that weights are spread over processes.
    `max_new_tokens` is the longest that `complete` generates. All processes must ask together.
    """

    def __init__(
        self,
        prompts: Mapping[str, Sequence[Prompt]],
        reference: Reference | None,
        complete: Complete,
        *,
        max_new_tokens: int,
        in_lockstep: bool,
    ) -> None:
        self.prompts = prompts
        self._reference = reference
        self._complete = complete
        self._max_new_tokens = max_new_tokens
        self._in_lockstep = in_lockstep
        self._of_reference: dict[tuple[str, int], list[str]] = {}  # by dataset and version
        self._of_step: dict[tuple[str, int], list[Sample]] = {}  # by dataset and step, of a run that was interrupted

    def recall(self, recorded: Iterable[Sample], step: int) -> None:
        """Takes what an interrupted run has recorded: completions of its reference, and all of `step`, from which the
        run goes on."""
        found: dict[tuple[str, int | None, int], dict[int, Sample]] = {}
        for sample in recorded:
            if sample.max_new_tokens == self._max_new_tokens:
                found.setdefault((sample.dataset, sample.reference_version, sample.step), {})[sample.row] = sample
        for (name, version, at), by_row in found.items():
            own = self.prompts.get(name, ())
            samples = [by_row[prompt.row] for prompt in own if prompt.row in by_row]
            if [sample.prompt for sample in samples] != [prompt.text for prompt in own]:
                continue
            of_reference = [sample.reference for sample in samples if sample.reference is not None]
            if version is not None and len(of_reference) == len(own):
                self._of_reference[name, version] = of_reference
            if at == step and (version is None) == (self._reference is None):
                self._of_step[name, step] = samples

    def complete_by_reference(self) -> None:
        """Generates what the reference, as it is now, makes of all prompts."""
        for name in self.prompts:
            self._reference_completions(name)

    def samples(self, name: str, step: int, policy: nn.Module) -> tuple[list[Sample], bool]:
        """The samples of the evaluation set `name` at `step`, and whether any was generated now."""
        if (recorded := self._of_step.pop((name, step), None)) is not None:
            return recorded, False
        prompts = self.prompts[name]
        of_reference = self._reference_completions(name)
        of_policy = self._completed([(1.0, policy)], prompts)
        version = None if self._reference is None or of_reference is None else self._reference.version
        samples = [
            Sample(
                step=step, dataset=name, row=prompt.row, prompt=prompt.text, policy=of_policy[number],
                reference=None if of_reference is None else of_reference[number],
                chosen=prompt.chosen, rejected=prompt.rejected, reference_version=version,
                max_new_tokens=self._max_new_tokens,
            )
            for number, prompt in enumerate(prompts)
        ]  # fmt: skip
        return samples, True

    def _reference_completions(self, name: str) -> list[str] | None:
        """What the reference makes of the prompts; None without one, and where no model computes it any more."""
        if self._reference is None:
            return None
        key = name, self._reference.version
        if key not in self._of_reference:
            with self._reference.computing() as models:
                if not models:
                    return None
                self._of_reference[key] = self._completed(models, self.prompts[name])
        return self._of_reference[key]

    def _completed(self, models: Sequence[Share], prompts: Sequence[Prompt]) -> list[str]:
        if self._in_lockstep or num_processes() == 1:
            return self._complete(models, prompts)
        own: list[str] = []
        with raised_together():
            own = self._complete(models, prompts[process() :: num_processes()])
        parts = of_all(own)
        return [parts[number % len(parts)][number // len(parts)] for number in range(len(prompts))]
