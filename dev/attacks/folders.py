"""Attacks on files that a run reads: the model's, a checkpoint's, the store's."""

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from attacks.arena import Outcome
from attacks.attack import FAULTS, NOBODY, Attack, damage, hand_over, has_trained, remove, same_weights


def _faulty(kind: str, file: str, fault_name: str, draw: random.Random, **rest: Any) -> Attack:
    seed = draw.random()

    def prepare(folder: Path) -> None:
        target = folder / file
        if target.is_file():
            damage(target, fault_name, random.Random(seed))
        if fault_name == "unreadable":
            hand_over(folder)

    user = NOBODY if fault_name == "unreadable" else None
    name = f"{file} {fault_name} | {' '.join(rest.get('argv', ['train']))}"
    return Attack(kind=kind, name=name, prepare=prepare, user=user, **rest)


def _files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def model_folders(place: Path, draw: random.Random, control: Any) -> Iterator[Attack]:
    """Each file of the model's folder x what may happen to it."""
    files = _files(place / "model")
    while True:
        file, fault_name = draw.choice(files), draw.choice(FAULTS)
        judge = has_trained if file.endswith((".json", ".jinja", ".safetensors")) else same_weights(control)
        argv = draw.choice(
            [
                ("train", "run.yaml"),
                ("train", "run.yaml", "--set", "reference={kind: model, model: model}"),
                ("data", "run.yaml", "--html", "x.html"),
            ]
        )
        if argv[0] == "data":
            judge = _has_page
        yield _faulty("model folder", f"model/{file}", fault_name, draw, judge=judge, argv=argv)


def _has_page(folder: Path, outcome: Outcome) -> str | None:
    return None if outcome.code != 0 or (folder / "x.html").is_file() else "exit 0 without a page"


def checkpoints(place: Path, draw: random.Random, control: Any) -> Iterator[Attack]:
    """Each file of a checkpoint x what may happen to it; the run is resumed, and equals the uninterrupted one or
    ends in a message."""
    files = _files(place / "out" / "checkpoint-2")
    while True:
        file, fault_name = draw.choice(files), draw.choice(FAULTS)
        is_named = draw.random() < 0.5
        value = "out/checkpoint-2" if is_named else "true"
        attack = _faulty(
            "checkpoint", f"out/checkpoint-2/{file}", fault_name, draw,
            argv=("train", "run.yaml", "--set", f"training.resume_from_checkpoint={value}"),
            judge=same_weights(control),
        )  # fmt: skip
        damaged = attack.prepare

        def prepare(folder: Path, damaged: Any = damaged) -> None:
            remove(folder / "out" / "checkpoint-4")
            for path in (folder / "out").iterdir():
                if path.is_file():
                    path.unlink()
            damaged(folder)

        yield Attack(
            kind=attack.kind, name=attack.name, prepare=prepare, argv=attack.argv, judge=attack.judge, user=attack.user
        )  # fmt: skip


STORE_COMMANDS: tuple[tuple[str, ...], ...] = (
    ("store", "list"),
    ("store", "verify"),
    ("store", "gc", "--yes"),
    ("store", "gc", "--yes", "--max-size", "1B"),
    ("store", "export", "{key}", "x.parquet"),
    ("train", "run.yaml", "--set", "reference=precomputed"),
    ("precompute", "run.yaml"),
)


def stores(place: Path, draw: random.Random, control: Any) -> Iterator[Attack]:
    """Each file of a store x what may happen to it x each command."""
    files = _files(place / "home" / "store")
    key = next((place / "home" / "store").iterdir()).name
    while True:
        command = tuple(part.replace("{key}", key[:12]) for part in draw.choice(STORE_COMMANDS))
        judge = same_weights(control) if command[0] == "train" else (lambda folder, outcome: None)
        yield _faulty("store", f"home/store/{draw.choice(files)}", draw.choice(FAULTS), draw, argv=command, judge=judge)
