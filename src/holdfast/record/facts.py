"""What a run was made of: `facts.json`, as frozen records whose fields are the keys of the file.

A field that was not known when the file was written is None. Keys that this version does not know are ignored, so a
later version may add some.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, final

FORMAT = 1
OUTCOMES = ("running", "finished", "interrupted", "failed")


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Resumption:
    """A run was taken up from the checkpoint of `step` at `time` (ISO 8601, UTC)."""

    step: int
    time: str


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """The policy. `dtype` is that of most of its parameters; `adapter` describes what peft trains, None without."""

    name: str
    class_name: str = field(metadata={"key": "class"})
    num_parameters: int
    num_trainable: int
    dtype: str
    adapter: str | None = None


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Reference:
    """The reference and where it is held.

    `kind` is the way (`model`, `adapter`, `snapshot`, `precomputed`, ...), `held_bytes` what it takes beside the policy
    on this process. One that `moves` is synced every `sync_steps` steps by `mixup_alpha`. `is_users_choice`: it was
    named; else it is the policy as it starts to train.
    """

    description: str
    kind: str
    weights_digest: str | None = None
    held_bytes: int | None = None
    moves: bool = False
    mixup_alpha: float | None = None
    sync_steps: int | None = None
    is_users_choice: bool = False


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Audit:
    """How far reference and policy were apart before the first step, in nats per token (per completion where the
    user's log-probs are sums). None: not measured."""

    line: str
    mean_gap_nats: float | None = None
    largest_gap_nats: float | None = None


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """How sequences lie in rows: the layout's name and a line about it."""

    name: str
    line: str = ""


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Dataset:
    """The pairs of one dataset: rows read, pairs used, and rows left out by reason. None for a stream, whose numbers
    are not known. `sources` counts the used pairs by source, None where rows have none."""

    num_rows: int | None = None
    num_used: int | None = None
    left_out: Mapping[str, int] | None = None
    sources: Mapping[str, int] | None = None


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """Bytes on this process by part: the policy's weights, the reference beside them, gradients, and the optimizer's
    state, worked out from shapes and dtypes. None where a part cannot be told."""

    weights: int | None = None
    reference: int | None = None
    gradients: int | None = None
    optimizer: int | None = None


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """A run. `data` has the training set as `train` and the evaluation sets by name. `options` are those that differ
    from their defaults, without secrets. Times are ISO 8601, UTC; `finished` is None while the run goes on."""

    format: int = FORMAT
    versions: Mapping[str, str]
    started: str
    resumed: tuple[Resumption, ...] = ()
    finished: str | None = None
    outcome: str = "running"
    command: tuple[str, ...] | None = None
    model: Model
    reference: Reference | None = None
    audit: Audit | None = None
    layout: Layout
    data: Mapping[str, Dataset]
    memory: Memory
    loss_types: tuple[str, ...]
    beta: float
    options: Mapping[str, Any]
    num_processes: int
    device: str
    max_steps: int
    num_epochs: float
