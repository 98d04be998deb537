"""The text of pairs as a model sees them: the prompt, and each completion, decoded from their token ids."""

from dataclasses import dataclass
from typing import Any, final

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from holdfast.data.columns import SOURCE, SOURCE_ROW
from holdfast.data.files.places import Places
from holdfast.inspect.pairs import Cutting, pair_at

_BEFORE_THE_DIFFERENCE = 30
"""So many characters that both completions share are left before the first difference, in an excerpt."""
_MOST_IDS = 4_000
_FARTHEST = 50_000
"""A row beyond so many is named by its number alone: to find its line, the file is read up to it."""


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class PairText:
    """The texts of a pair, without special tokens and after truncation. `num_shared` is the number of characters with
    which both completions begin. `place` is the file and line it comes from, None where that is not known."""

    place: str | None
    prompt: str
    chosen: str
    rejected: str
    num_shared: int

    def excerpts(self, most: int) -> tuple[str, str, str]:
        """At most so many characters of each on one line: the end of the prompt, and both completions from shortly
        before they differ."""
        start = max(0, self.num_shared - _BEFORE_THE_DIFFERENCE)
        start = 0 if start < _BEFORE_THE_DIFFERENCE else start
        chosen, rejected = (_beginning(text[start:], most, is_cut=start > 0) for text in (self.chosen, self.rejected))
        prompt = " ".join(self.prompt.split())
        return prompt if len(prompt) <= most else f"...{prompt[3 - most :]}", chosen, rejected


def _beginning(text: str, most: int, *, is_cut: bool) -> str:
    text = f"{'...' if is_cut else ''}{' '.join(text.split())}"
    return text if len(text) <= most else f"{text[: most - 3]}..."


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class TextReader:
    """Reads the text of the pairs of one dataset, which has token ids: a row for each used pair. `places` says where a
    row of the dataset as it was loaded comes from."""

    dataset: Dataset
    cutting: Cutting
    tokenizer: PreTrainedTokenizerBase
    places: Places | None = None

    def text(self, index: int, row: int) -> PairText:
        """The text of the pair with this index among the used ones, whose row was loaded with that number."""
        pair = pair_at(self.dataset, index, self.cutting)
        prompt = self._decoded(pair.chosen.prompt[pair.chosen.seen_prompt][-_MOST_IDS:])
        chosen, rejected = (
            self._decoded(side.completion[side.seen_completion][:_MOST_IDS]) for side in (pair.chosen, pair.rejected)
        )
        return PairText(
            place=self.places.of(row, self._source_of(index)) if self.places is not None and row < _FARTHEST else None,
            prompt=prompt,
            chosen=chosen,
            rejected=rejected,
            num_shared=_num_shared(chosen, rejected),
        )

    def _source_of(self, index: int) -> dict[str, Any]:
        """The columns of a row that say where it comes from."""
        names = [name for name in (SOURCE, SOURCE_ROW) if name in self.dataset.column_names]
        rows: Any = self.dataset.select_columns(names)[index : index + 1] if names else {}
        return {name: values[0] for name, values in rows.items()}

    def _decoded(self, ids: Any) -> str:
        return str(self.tokenizer.decode(list(map(int, ids)), skip_special_tokens=True))


def _num_shared(first: str, second: str) -> int:
    """With how many characters both texts begin."""
    differs = (number for number, (left, right) in enumerate(zip(first, second, strict=False)) if left != right)
    return next(differs, min(len(first), len(second)))
