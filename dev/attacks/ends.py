"""Attacks by signals at random instants of each long command."""

import os
import random
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from attacks.arena import Outcome, run
from attacks.attack import Attack, same_weights
from attacks.place import jsonl, tiny

SLOW = ("--set", "training.max_steps=80", "--set", "training.save_steps=7")
COMMANDS: tuple[tuple[str, ...], ...] = (
    ("train", "run.yaml", *SLOW),
    ("train", "run.yaml", *SLOW, "--set", "reference=precomputed"),
    ("train", "run.yaml", *SLOW, "--set", "reference={kind: snapshot}", "--set", "training.sync_ref_model=true",
     "--set", "training.ref_model_sync_steps=3"),
    ("train", "run.yaml", *SLOW, "--set", "training.save_strategy=no"),
    ("precompute", "run.yaml"),
)  # fmt: skip
CODES = {signal.SIGTERM: 143, signal.SIGINT: 130, signal.SIGUSR1: 138, signal.SIGKILL: -9}


def _prepare(folder: Path) -> None:
    (folder / "pairs.jsonl").write_text(jsonl(tiny.preference_rows(400)))
    shutil.rmtree(folder / "out")
    shutil.rmtree(folder / "home")


def signals(place: Path, draw: random.Random, control: Any) -> Iterator[Attack]:
    """A signal after so many seconds, then the command again: nothing is lost, and the end is the same."""
    controls: dict[tuple[str, ...], Any] = {}
    while True:
        argv, number = draw.choice(COMMANDS), draw.choice(list(CODES))
        seconds = draw.uniform(0.02, 1.5)
        is_sent: list[bool] = []

        def meanwhile(
            child: int, began: float, seconds: float = seconds, number: int = number, is_sent: list[bool] = is_sent
        ) -> None:
            if not is_sent and time.monotonic() - began > seconds:
                is_sent.append(True)
                os.kill(child, number)

        yield Attack(
            kind="signal",
            name=f"{' '.join(argv)} {signal.Signals(number).name} after {seconds:.3f} s",
            prepare=_prepare,
            argv=argv,
            codes=frozenset({0, CODES[number]} | ({-number} if seconds < 0.1 else set())),
            meanwhile=meanwhile,
            judge=_judge(argv, number, controls, place),
        )


def _judge(argv: tuple[str, ...], number: int, controls: dict[tuple[str, ...], Any], place: Path) -> Any:
    def judge(folder: Path, outcome: Outcome) -> str | None:
        out = folder / "out"
        if outcome.code != 0:
            if any((out / name).exists() for name in ("model.safetensors", "run.yaml")):
                return "a final model that is not final"
            if number != signal.SIGKILL and any(folder.glob("home/store/*/*.claim")):
                return "a claim stays"
            if number != signal.SIGKILL and outcome.code > 0 and not outcome.text.strip():
                return "no message"
        if argv not in controls:
            from attacks.place import fresh

            uncut = fresh(place, folder.parent / "control")
            _prepare(uncut)
            whole = run(argv, folder=uncut)
            assert whole.code == 0, whole.text
            from attacks.attack import weights

            controls[argv] = weights(uncut)
            shutil.rmtree(uncut)
        if argv[0] == "precompute":
            again = run(argv, folder=folder)
            return None if again.code == 0 else f"cannot go on ({again.code}): {again.text[-300:]}"
        if outcome.code != 0:
            more = (
                ["--set", "training.resume_from_checkpoint=true"]
                if any(out.glob("checkpoint-*/reference/manifest.json"))
                else []
            )
            again = run([*argv, *more], folder=folder)
            if again.code != 0:
                return f"cannot go on ({again.code}): {again.text[-300:]}"
        return same_weights(controls[argv])(folder, Outcome(code=0, text="", seconds=0))

    return judge
