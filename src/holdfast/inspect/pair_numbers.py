"""What a model says of each pair of a dataset: log-probs of both completions, their lengths, and how alike they are.

All that is counted of a reference or of a trained policy (`holdfast inspect`) is computed from these arrays. A pair
takes 80 bytes here, so hundreds of thousands fit; its tokens and its text are read again where a row is shown.
"""

from dataclasses import dataclass, fields
from typing import final

import numpy as np
from numpy.typing import NDArray


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class PairNumbers:
    """Arrays `[P]` over the pairs of a dataset that are used, in the dataset's order.

    `row` is a pair's row in the dataset as it was loaded, counted from 0. `chosen_logps` and `rejected_logps` are sums
    of log-probs over scored tokens, in nats, and `chosen_tokens` and `rejected_tokens` the numbers of those tokens.
    `prompt_tokens` are the tokens of the prompt that the model is shown. `source` is the pair's place in `sources`, -1
    without one. `ches` and `normalised_ches` say how alike a pair's completions are to the model; NaN where that is not
    known. For hidden states s of the chosen and r of the rejected completion, each summed over its n or m scored
    tokens, they are (Razin et al. 2024, Definition 2 and its length-normalised form, arXiv:2410.08847):

        ches = <s, r> - <s, s>        normalised_ches = <s, r> / (n m) - <s, s> / n^2
    """

    row: NDArray[np.int64]
    chosen_logps: NDArray[np.float64]
    rejected_logps: NDArray[np.float64]
    chosen_tokens: NDArray[np.int64]
    rejected_tokens: NDArray[np.int64]
    prompt_tokens: NDArray[np.int64]
    source: NDArray[np.int64]
    sources: tuple[str, ...]
    ches: NDArray[np.float64]
    normalised_ches: NDArray[np.float64]

    def __len__(self) -> int:
        return len(self.row)

    def where(self, is_meant: NDArray[np.bool_] | NDArray[np.int64]) -> "PairNumbers":
        """The pairs for which the array holds; or, of an array of places, the pairs at them in that order."""
        arrays = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "sources"}
        return PairNumbers(sources=self.sources, **{name: values[is_meant] for name, values in arrays.items()})
