"""A process that makes training runs in forks of itself and kills them with SIGKILL when asked, a JSON object per line.

`end_to_end/test_kills.py` starts it. A fork has everything imported, so a run of tens of steps costs little more than
its steps, and ten kills of every kind of reference fit into a test. The process itself only builds models before it
forks: no threads, no gradients. With a folder as its argument it is `neighbour` there instead.

Asked: `{"kind", "folder", "seconds", "ends"}`. The run in `folder` is taken up from its last complete checkpoint, else
begun, and killed after so many seconds (null: never) or at one of the `ends`, `{place: [step, number]}`. Places are
`save`, `sync` and `window` (the scoring of one). There, once the run has made so many steps, it ends at the tensor
operation or file event of that number (null: never; they are counted).
Answered: `{"killed", "resumed", "seconds", "result", "events", "output"}`: whether it was killed, the step it was
resumed from (0: none), how long it lived, what it came to (null where it was killed or failed), what was counted at
each place, `[[step, number], ...]`, and what it said.
"""

import gc
import json
import os
import select
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from families import tiny_model
from holdfast.reference.identity.digests import digest
from policies import POLICIES, config, logged, rows, trainer

NUM_STEPS = 18
SAVING = {
    "save_strategy": "steps", "save_steps": 2, "save_total_limit": 2, "optim": "adamw_torch", "learning_rate": 0.01,
    "max_steps": NUM_STEPS,
}  # fmt: skip
SOFT = {"sync_ref_model": True, "ref_model_mixup_alpha": 0.3, "ref_model_sync_steps": 3}
WINDOWED = {"reference_window": 3, "ref_model_sync_steps": 5}


def snapshot(place: str) -> dict[str, str]:
    """The options of a snapshot held at `place`."""
    return {"reference": "snapshot", "snapshot_device": place}


KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "model": ("full", {"reference": "model"}),
    "model, synced": ("full", {"reference": "model"} | SOFT),
    "snapshot on the device": ("full", snapshot("device")),
    "snapshot in host memory, windowed": ("full", snapshot("cpu") | {"reference_window": 4}),
    "snapshot on disk": ("full", snapshot("disk")),
    "snapshot in host memory, synced": ("full", snapshot("cpu") | SOFT),
    "snapshot on disk, synced, windowed": ("full", snapshot("disk") | SOFT | WINDOWED),
    "snapshot on disk, synced, windowed, streamed": ("full", snapshot("disk") | SOFT | WINDOWED),
    "LoRA after SFT, with dropout": ("lora_sft", {"disable_dropout": False}),
    "LoRA, synced": ("lora_fresh", SOFT),
    "DoRA, synced": ("dora", SOFT),
    "precomputed": ("full", {"reference": "precomputed"}),
    "precomputed, synced, windowed": ("full", {"reference": "precomputed"} | SOFT | {"ref_model_sync_steps": 5}),
}
"""Policy (a name of `policies.POLICIES`) and options; `windowed` are those whose windows have a length known before."""


def run(kind: str, folder: Path, *, is_resumed: bool, ends: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """What a run comes to (digests of all weights and of the reference, and all that was logged but times), and what
    was counted at the places of `ends`."""
    os.environ["HOLDFAST_HOME"] = str(folder / "home")  # each run finds what it stored itself, and nothing else
    policy, options = KINDS[kind]
    data: Any = rows(36)  # more than one pass
    if "streamed" in kind:
        data = data.to_iterable_dataset()
    ours = trainer(POLICIES[policy](), config(folder, **SAVING | options), train_dataset=data)
    counted = {place: deadly(place, ours, *ends[place]) for place in ends}
    ours.train(resume_from_checkpoint=is_resumed)
    result = {
        "weights": digest(ours.model.named_parameters()),
        "reference": digest(ours.reference.tensors()),
        "state": digest(ours.reference.state_dict().items()),
        "version": ours.reference.version,
        "drift": ours.reference.drift,
        "log": [entry for entry in ours.state.log_history if "train_runtime" not in entry],
    }
    return result, {place: counts for place, counts in counted.items() if counts}


def neighbour(folder: Path) -> None:
    """Another run in `folder`, again and again until nothing more is asked: of other weights, with references on disk
    that stay and that move, and without checkpoints. Each round comes to the same, and is told of by a line."""
    told, sys.stdout = sys.stdout, sys.stderr  # logs go elsewhere
    options = [snapshot("disk"), snapshot("disk") | SOFT | {"reference_window": 2}]
    expected: list[Any] = [None] * len(options)
    while True:
        for number, option in enumerate(options):
            args = config(folder, **option | {"optim": "adamw_torch", "learning_rate": 0.01, "max_steps": 6})
            ours = trainer(tiny_model(seed=9), args, train_dataset=rows(12, seed=3))
            ours.train()
            found = digest(ours.model.named_parameters()), ours.reference.identity().weights_digest, logged(ours)
            assert expected[number] in (None, found), f"{option}: {expected[number]} became {found}"
            expected[number] = found
        told.write("round\n")
        told.flush()
        if select.select([sys.stdin], [], [], 0)[0]:
            return


# --- an end at a chosen place -----------------------------------------------------------------------------------------


class Events(TorchDispatchMode):
    """Counts what happens within it, tensor operations and file events; at number `last` the process is killed."""

    def __init__(self, last: float) -> None:
        super().__init__()
        self.last = last
        self.num_events = 0
        self.is_on = True
        sys.addaudithook(self._heard)

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """The operation itself, counted."""
        self._count()
        return operation(*args, **kwargs or {})

    def _heard(self, event: str, args: Any) -> None:
        if self.is_on and event.split(".")[0] in ("open", "os", "shutil"):
            self._count()

    def _count(self) -> None:
        self.num_events += 1
        if self.num_events >= self.last:
            self.is_on = False  # the kill is an event as well
            os.kill(os.getpid(), signal.SIGKILL)


def deadly(place: str, ours: Any, step: int, number: int | None) -> list[tuple[int, int]]:
    """Ends the run of trainer `ours` at `place` after `step` steps, at event `number` there. Returns the list that
    takes (step, number of events) where it does not end; it stays empty where no such place is."""
    counts: list[tuple[int, int]] = []
    owner = ours if place == "save" else ours.reference
    name = {"save": "_save_checkpoint", "sync": "sync", "window": "score_window"}[place]
    method = getattr(owner, name, None)

    def called(*args: Any, **kwargs: Any) -> Any:
        assert method is not None
        is_due = number is not None and ours.state.global_step >= step
        with Events(number if is_due else float("inf")) as events:
            returned = method(*args, **kwargs)
        events.is_on = False
        counts.append((ours.state.global_step, events.num_events))
        return returned

    if method is not None:
        setattr(owner, name, called)
    return counts


# --- the process ------------------------------------------------------------------------------------------------------


def live(asked: dict[str, Any], answers: int) -> None:
    """Runs in the fork, and ends it."""
    folder = Path(asked["folder"])
    lived = run(asked["kind"], folder, is_resumed=bool(last_checkpoint(folder)), ends=asked["ends"])
    with open(answers, "w") as stream:
        json.dump(lived, stream)


def last_checkpoint(folder: Path) -> int:
    """The step of the last complete checkpoint; 0 where there is none."""
    found = folder.glob("checkpoint-*/reference/manifest.json")
    return max((int(path.parent.parent.name.split("-")[1]) for path in found), default=0)


def answer(asked: dict[str, Any]) -> dict[str, Any]:
    """Forks, waits or kills."""
    folder = Path(asked["folder"])
    said = folder.with_suffix(".txt")
    resumed = last_checkpoint(folder)
    reading, writing = os.pipe()
    begin = time.perf_counter()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            os.close(reading)
            output = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(output, 1)
            os.dup2(output, 2)
            live(asked, writing)
            code = 0
        except BaseException:
            import traceback

            traceback.print_exc()
            sys.stderr.flush()
        finally:
            os._exit(code)
    os.close(writing)
    readable, _, _ = select.select([reading], [], [], asked["seconds"])
    if not readable:
        os.kill(child, signal.SIGKILL)
    with open(reading) as stream:
        content = stream.read()
    _, status = os.waitpid(child, 0)
    killed = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
    result, events = json.loads(content) if status == 0 else (None, None)
    return {
        "killed": killed,
        "resumed": resumed,
        "seconds": time.perf_counter() - begin,
        "result": result,
        "events": events,
        "output": said.read_text(errors="replace")[-4000:],
    }


def main() -> None:
    """Answers until nothing more is asked."""
    torch.set_num_threads(1)
    for make in POLICIES.values():
        make()  # imports what is imported at first use
    gc.collect()
    gc.freeze()
    for line in sys.stdin:
        sys.stdout.write(json.dumps(answer(json.loads(line))) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main() if len(sys.argv) == 1 else neighbour(Path(sys.argv[1]))
