"""`python dev/attacks --number 3000 --seed 0`: so many attacks, and what failed, as a table and as JSON lines."""

import argparse
import contextlib
import encodings.latin_1
import encodings.utf_8_sig
import encodings.utf_16  # noqa: F401  # a command without rights could not import them
import itertools
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import holdfast.cli.assembly
import holdfast.inspect.page  # noqa: F401  # everything is imported once, before the forks
from attacks import data_files, disks, ends, folders, run_files
from attacks.arena import run
from attacks.attack import Attack, fault, weights
from attacks.place import fresh, make_place

KINDS = {
    "values": (run_files.odd_values, 8),
    "yaml": (run_files.odd_yaml, 5),
    "data": (data_files.named, 5),
    "models": (folders.model_folders, 3),
    "checkpoints": (folders.checkpoints, 4),
    "stores": (folders.stores, 4),
    "disks": (disks.full_disks, 1),
    "signals": (ends.signals, 1),
}
"""The generators, and the share of each in a run of all kinds."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--number", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", nargs="*", choices=list(KINDS), default=list(KINDS))
    parser.add_argument("--failures", type=Path, default=Path("attacks.jsonl"))
    parser.add_argument("--match", default="", help="only attacks whose name has this text")
    parser.add_argument("--list", action="store_true", help="print every outcome")
    options = parser.parse_args()
    root = Path(tempfile.mkdtemp(prefix="holdfast-attacks-"))
    place = make_place(root / "place")
    control = weights(place)
    counts, failures, began = Counter[str](), 0, time.monotonic()
    with options.failures.open("w") as report:
        for attack in itertools.islice(_drawn(options, place, control), options.number):
            folder = fresh(place, root / "try")
            attack.prepare(folder)
            outcome = run(
                attack.argv, folder=folder, file_bytes=attack.file_bytes, user=attack.user, meanwhile=attack.meanwhile
            )
            wrong = fault(attack, folder, outcome)
            with contextlib.suppress(OSError):
                if os.path.ismount(folder / "out"):
                    subprocess.run(["umount", str(folder / "out")], check=False)
            counts[attack.kind] += 1
            if wrong or options.list:
                found = {"kind": attack.kind, "name": attack.name, "wrong": wrong, "code": outcome.code}
                found |= {"seconds": round(outcome.seconds, 2), "text": outcome.text[-1500:]}
                report.write(json.dumps(found) + "\n")
                report.flush()
            if wrong:
                failures += 1
                print(f"{attack.kind} | {attack.name}: {wrong}", flush=True)
    print(f"{sum(counts.values())} attacks ({dict(counts)}) in {time.monotonic() - began:.0f} s, {failures} failures")
    return min(failures, 1)


def _drawn(options: argparse.Namespace, place: Path, control: object) -> Iterator[Attack]:
    """Attacks of the chosen kinds by their shares."""
    draw = random.Random(options.seed)
    generators = {name: KINDS[name][0](place, random.Random(draw.random()), control) for name in options.kinds}
    shares = [KINDS[name][1] for name in generators]
    while True:
        attack = next(generators[draw.choices(list(generators), shares)[0]])
        if options.match in attack.name:
            yield attack


if __name__ == "__main__":
    sys.exit(main())
