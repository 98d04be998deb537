"""What the demo found, as plain records: what the table, the plot, the checks and the JSON file are made from."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from holdfast.demo.frontier import Frontier, Optimum
from holdfast.demo.policy import Estimate, Measurement
from holdfast.store.files import write_durably


@dataclass(frozen=True, slots=True, kw_only=True)
class Waypoint:
    """Where a policy was after `step` optimizer steps."""

    step: int
    measurement: Measurement


@dataclass(frozen=True, slots=True, kw_only=True)
class ArmResult:
    """One training run.

    `seconds` is construction plus training, measurements taken on the way not counted; `accuracy` the share of held-out
    pairs whose implicit reward agrees with the label; `losses` every logged training loss, the first one before any
    update; `held_out_logps` the final `log pi(y)` of the held-out texts, chosen then rejected.
    """

    name: str
    label: str
    measurement: Measurement
    accuracy: Estimate
    num_reference_bytes: int
    seconds: float
    losses: tuple[float, ...]
    waypoints: tuple[Waypoint, ...]
    held_out_logps: tuple[float, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """Something expected, and what was found. A gate that is not met makes the demo fail; anything else is reported."""

    expected: str
    found: str
    is_met: bool
    is_gate: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class DemoResult:
    """Everything the demo found.

    `start` is the start policy, which is the reference of all arms; `best_accuracy` the held-out accuracy of the true
    reward, which no policy is expected to beat; `source_fluency` minus the entropy rate of the source, as sampled.
    """

    seed: int
    beta: float
    start: Measurement
    source_fluency: Estimate
    best_accuracy: Estimate
    arms: tuple[ArmResult, ...]
    target: Optimum
    frontier: Frontier
    checks: tuple[Check, ...]
    seconds: float
    output_dir: Path

    def arm(self, name: str) -> ArmResult:
        """The arm of that name."""
        return next(arm for arm in self.arms if arm.name == name)

    @property
    def exit_code(self) -> int:
        """0, or 1 when a gate is not met."""
        return int(any(check.is_gate and not check.is_met for check in self.checks))

    def write_json(self, path: Path) -> None:
        """Writes every number as JSON, except for the log-probs of single texts."""
        content = asdict(self) | {"output_dir": str(self.output_dir), "exit_code": self.exit_code}
        for arm in content["arms"]:
            del arm["held_out_logps"]
        write_durably(path, f"{json.dumps(content, indent=1)}\n".encode())
