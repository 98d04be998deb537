"""Attacks by a disk that is full: no file may grow beyond a size, or a file system of so many bytes."""

import random
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from attacks.arena import Outcome, run
from attacks.attack import IS_ROOT, Attack, same_weights

COMMANDS: tuple[tuple[str, ...], ...] = (
    ("train", "run.yaml"),
    ("train", "run.yaml", "--set", "reference={kind: snapshot}", "--set", "training.snapshot_device=disk"),
    ("train", "run.yaml", "--set", "reference=precomputed"),
    ("precompute", "run.yaml"),
    ("store", "export", "{key}", "out/x.parquet"),
)


def full_disks(place: Path, draw: random.Random, control: Any) -> Iterator[Attack]:
    """`out` and `home` on a small file system, or a limit on each file. Then the same again with room: the run goes on,
    and equals one that was never interrupted."""
    key = next((place / "home" / "store").iterdir()).name[:12]
    while True:
        argv = tuple(part.replace("{key}", key) for part in draw.choice(COMMANDS))
        is_limit = draw.random() < 0.5 or not IS_ROOT
        size = draw.randrange(6_000, 60_000) if is_limit else draw.randrange(8, 900) * 1024
        keeps_store = argv[0] == "store"

        def prepare(folder: Path, size: int = size, is_limit: bool = is_limit, keeps_store: bool = keeps_store) -> None:
            shutil.rmtree(folder / "out")
            (folder / "out").mkdir()
            if not keeps_store:
                shutil.rmtree(folder / "home")
            if not is_limit:
                mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder / "out")]
                subprocess.run(mount, check=True)
                if not keeps_store:
                    (folder / "out" / "home").mkdir()
                    (folder / "home").symlink_to("out/home")

        yield Attack(
            kind="full disk",
            name=f"{' '.join(argv)} {'file' if is_limit else 'disk'} of {size}",
            prepare=prepare,
            argv=argv,
            codes=frozenset({0, 1}),
            file_bytes=size if is_limit else None,
            judge=_judge(argv, control, is_limit),
        )


def _judge(argv: tuple[str, ...], control: Any, is_limit: bool) -> Any:
    def judge(folder: Path, outcome: Outcome) -> str | None:
        out = folder / "out"
        if outcome.code == 0:
            return same_weights(control)(folder, outcome) if argv[0] == "train" else None
        left = [
            str(path.relative_to(folder)) for path in out.rglob("*") if "tmp" in path.name or "partial" in path.name
        ]
        left = [name for name in left if not name.endswith(".lock")]
        if argv[0] == "train":
            half = [
                path.name for path in out.glob("checkpoint-*") if not (path / "reference" / "manifest.json").is_file()
            ]
            if half:
                return f"half a checkpoint stays: {half}"
            if (out / "model.safetensors").exists() and same_weights(control)(
                folder, Outcome(code=0, text="", seconds=0)
            ):
                return "a model that is not the final one stays in `out`"
        if argv[0] == "store" and (out / "x.parquet").exists():
            return "half an export stays"
        if left:
            return f"temporary files stay: {left[:3]}"
        if argv[0] == "store":
            return None
        if not is_limit:
            copy = folder / "copy"
            shutil.copytree(out, copy)
            subprocess.run(["umount", str(out)], check=True)
            shutil.rmtree(out)
            shutil.move(copy, out)
        more = ["--set", "training.resume_from_checkpoint=true"] if any(out.glob("checkpoint-*")) else []
        again = run([*argv, *(more if argv[0] == "train" else [])], folder=folder)
        if again.code != 0:
            return f"cannot go on ({again.code}): {again.text[-300:]}"
        return same_weights(control)(folder, again) if argv[0] == "train" else None

    return judge
