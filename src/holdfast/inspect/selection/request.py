"""What to choose of a run's pairs: `Request`. Nothing heavy is imported, so a command line can be read with it."""

from dataclasses import dataclass
from enum import StrEnum
from typing import final


class By(StrEnum):
    """Whose margin. `IMPLICIT` is that of a trained policy's implicit rewards; the others are of one model alone."""

    IMPLICIT = "implicit_margin"
    REFERENCE = "reference_margin"
    POLICY = "policy_margin"


class Keep(StrEnum):
    """Which pairs by their margins. `RANDOM` draws them whatever those are: what any other choice has to beat."""

    SMALLEST = "smallest"
    LARGEST = "largest"
    MIDDLE = "middle"
    RANDOM = "random"


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """The `share` of the pairs whose margin `by` is what `keep` says; of its absolute value where `is_absolute`, and of
    mean log-probs of tokens where `per_token`. `seed` draws the pairs where they are drawn."""

    share: float
    keep: Keep
    by: By = By.IMPLICIT
    is_absolute: bool = False
    per_token: bool = False
    seed: int = 0

    @property
    def title(self) -> str:
        """The margin in words."""
        of = {By.IMPLICIT: "implicit reward margin", By.REFERENCE: "margin of the reference"}
        words = [of.get(self.by, "margin of the policy"), *(["per token"] if self.per_token else [])]
        return " ".join([*(["absolute"] if self.is_absolute else []), *words])
