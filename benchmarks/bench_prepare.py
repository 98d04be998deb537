"""How many rows a second are made ready for training, ours and TRL's, and what memory that takes as rows grow.

    python benchmarks/bench_prepare.py

Conversations on disk become token ids beside them, and rows that train nothing are left out: ours is `prepare_dataset`,
which also judges every row and reports; TRL's is `DPOTrainer._prepare_dataset`. Both have the same rows, the same
tokenizer and template, and must return the same ids. Sides take turns, each in a process of its own with one thread and
an empty cache. The measure is CPU time, since that is less disturbed by others than the clock; `wall` stands beside it.

The rows are the real pairs over and over, every message varied by words of its own, so that no message comes twice. In
the profile `turns` completions have three turns of the assistant; ours also says which of their tokens are scored.
The tokenizer cuts words as that of Qwen 2.5 does. `memory` is the peak of the process's own memory (RssAnon: pages of
files that are mapped, such as the dataset itself, can be dropped at any time) for a quarter, half and all of the rows.

Adds to results/prepare.json.
"""

import argparse
import hashlib
import json
import os
import shutil
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import measure
import workload

MAX_LENGTH = 1024
VOCABULARY = 16_384
IDS = ("prompt_ids", "chosen_ids", "rejected_ids")
SYLLABLES = ("ba", "ce", "di", "fo", "gu", "ha", "je", "ki", "lo", "mu", "na", "pe", "ri", "so", "tu", "va")


# --- rows -------------------------------------------------------------------------------------------------------------


def name_of(number: int) -> str:
    """A word for a number, which no other number has."""
    word = ""
    while True:
        number, digit = divmod(number, len(SYLLABLES))
        word = SYLLABLES[digit] + word
        if number == 0:
            return word.capitalize()


def varied(pair: workload.Pair, number: int) -> workload.Pair:
    """The pair with words of its own in each message."""
    made: workload.Pair = {}
    for side, messages in pair.items():
        made[side] = []
        for place, message in enumerate(messages):
            words = message["content"].split(" ")
            words.insert(len(words) // 2, f"{name_of(number)} {name_of(number * 7 + place)}")
            made[side].append({**message, "content": " ".join([name_of(number * 3 + place), *words])})
    return made


def rows_of(pairs: list[workload.Pair], count: int) -> Iterator[workload.Pair]:
    """So many rows."""
    return (varied(pairs[number % len(pairs)], number) for number in range(count))


def make_tokenizer(pairs: list[workload.Pair]) -> Any:
    """The tokenizer of the other benchmarks, but with words cut as in Qwen 2.5."""
    from tokenizers import Regex, normalizers, pre_tokenizers

    pattern = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
        r"\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    tokenizer = workload.make_tokenizer(pairs, VOCABULARY)
    tokenizer.backend_tokenizer.normalizer = normalizers.NFC()
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    return tokenizer


def write_rows(folder: Path, pairs: list[workload.Pair], count: int) -> None:
    """The rows as a dataset on disk, and the tokenizer, in `folder`."""
    from datasets import Dataset

    file = folder / "rows.jsonl"
    with file.open("w", encoding="utf-8") as lines:
        lines.writelines(json.dumps(row) + "\n" for row in rows_of(pairs, count))
    rows: Any = Dataset.from_json(str(file), cache_dir=str(folder / "json"))
    rows.save_to_disk(str(folder / "rows"))
    make_tokenizer(pairs).save_pretrained(str(folder / "tokenizer"))


# --- one measurement --------------------------------------------------------------------------------------------------


class OwnMemory(threading.Thread):
    """Looks at this process's own memory every few milliseconds; `peak` and `before` in MiB."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.before = self.peak = measure.resident("RssAnon")
        self._is_done = threading.Event()

    def run(self) -> None:
        while not self._is_done.wait(0.02):
            self.peak = max(self.peak, measure.resident("RssAnon"))

    def stop(self) -> None:
        """Looks a last time."""
        self._is_done.set()
        self.join()
        self.peak = max(self.peak, measure.resident("RssAnon"))


def prepared(side: str, rows: Any, tokenizer: Any, num_proc: int | None) -> Any:
    """The rows as one side prepares them."""
    if side == "ours":
        from holdfast.data.prepare import prepare_dataset

        return prepare_dataset(rows, tokenizer, max_length=MAX_LENGTH, num_proc=num_proc)
    from types import SimpleNamespace

    from trl.trainer.dpo_trainer import DPOTrainer

    options: Any = SimpleNamespace(dataset_num_proc=num_proc, max_length=MAX_LENGTH, truncation_mode="keep_start")
    trainer: Any = SimpleNamespace(_tokenizer=tokenizer)
    return DPOTrainer._prepare_dataset(trainer, rows, tokenizer, options, "train")


def digest(rows: Any) -> str:
    """Of all token ids, but for rows in which both completions are the same up to `MAX_LENGTH`: TRL keeps those."""
    found = hashlib.blake2b()
    for row in rows.select_columns(list(IDS)):
        room = MAX_LENGTH - len(row["prompt_ids"])
        if row["chosen_ids"][:room] != row["rejected_ids"][:room]:
            found.update(json.dumps([row[column] for column in IDS]).encode())
    return found.hexdigest()


def cpu_seconds() -> float:
    """Of this process and of those that it has started and that have ended."""
    return sum(os.times()[:4])


def measured(work: dict[str, Any]) -> dict[str, Any]:
    """Seconds, memory and a digest of the token ids of one side on the first `rows` rows."""
    from datasets import load_from_disk
    from transformers import AutoTokenizer

    folder = Path(work["inputs"])
    tokenizer = AutoTokenizer.from_pretrained(str(folder / "tokenizer"))
    own = Path(work["folder"]) / "rows"  # `datasets` keeps what a map made beside the rows
    shutil.copytree(folder / "rows", own)
    rows: Any = load_from_disk(str(own))
    few = rows.select(range(8))
    prepared(work["side"], few, tokenizer, None)  # imports, and compiles the template
    rows = rows.select(range(work["rows"]))
    memory = OwnMemory()
    if work["watches"]:
        memory.start()
    cpu, wall = cpu_seconds(), time.perf_counter()
    done = prepared(work["side"], rows, tokenizer, work["num_proc"])
    cpu, wall = cpu_seconds() - cpu, time.perf_counter() - wall
    if work["watches"]:
        memory.stop()
    return {
        "cpu_seconds": round(cpu, 3), "wall_seconds": round(wall, 3), "rows_left": len(done),
        "own_mib": round(memory.peak, 1), "own_mib_before": round(memory.before, 1),
        "ids": digest(done) if work["checks"] else None,
    }  # fmt: skip


# --- all measurements -------------------------------------------------------------------------------------------------


def run(side: str, options: argparse.Namespace, inputs: Path, **work: Any) -> dict[str, Any]:
    """One measurement in a process of its own."""
    asked = {"side": side, "inputs": str(inputs), "num_proc": options.num_proc, "checks": False, "watches": False}
    with tempfile.TemporaryDirectory(dir=inputs) as own:
        return measure.in_a_process(__file__, {**asked, **work}, threads=1, folder=Path(own))


def speed(options: argparse.Namespace, inputs: Path) -> dict[str, Any]:
    """The summary of both sides in turn. ValueError where they make other ids of the rows."""
    runs: list[dict[str, Any]] = []
    for repeat in range(options.repeats):
        sides = ("ours", "peer") if repeat % 2 == 0 else ("peer", "ours")
        both = {s: run(s, options, inputs, rows=options.rows // options.share[s], checks=False) for s in sides}
        rates = {s: options.rows // options.share[s] / both[s]["cpu_seconds"] for s in sides}
        runs.append(both)
        measure.say(f"{repeat + 1}/{options.repeats}  ours {rates['ours']:,.0f} rows/s, TRL {rates['peer']:,.0f}")
    checked = {
        s: run(s, options, inputs, rows=min(options.rows, options.checked), checks=True) for s in ("ours", "peer")
    }
    if checked["ours"]["ids"] != checked["peer"]["ids"]:
        raise ValueError("both sides must make the same token ids of the rows, and they differ. Look into one row.")

    def rate(one: dict[str, Any], side: str, clock: str) -> float:
        return options.rows // options.share[side] / one[side][f"{clock}_seconds"]

    found: dict[str, Any] = {"rows": options.rows, "num_proc": options.num_proc}
    for clock in ("cpu", "wall"):
        for side in ("ours", "peer"):
            found[f"{side}_rows_per_{clock}_second"] = round(statistics.median(rate(r, side, clock) for r in runs), 1)
        ratios = [rate(r, "ours", clock) / rate(r, "peer", clock) for r in runs]
        found[f"{clock}_ratio"] = round(statistics.median(ratios), 2)
    return {**found, "rows_with_equal_ids": min(options.rows, options.checked), "runs": runs}


def memory(options: argparse.Namespace, inputs: Path) -> list[dict[str, Any]]:
    """The peak of our own memory for a quarter, half and all of the rows."""
    found = []
    for share in (4, 2, 1):
        one = run("ours", options, inputs, rows=options.rows // share, watches=True)
        found.append(
            {
                "rows": options.rows // share,
                "own_mib": one["own_mib"],
                "above": round(one["own_mib"] - one["own_mib_before"], 1),
            }
        )
        measure.say(f"{found[-1]['rows']:,} rows  {one['own_mib']:.0f} MiB, {found[-1]['above']:.0f} above the start")
    return found


def parsed() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--one", help="measure here, and print it as JSON")
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--peer-share", type=int, default=10, help="TRL gets one of so many rows, since it is slower")
    parser.add_argument("--checked", type=int, default=600, help="rows whose token ids are compared")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--num-proc", type=int)
    parser.add_argument(
        "--profiles", nargs="+", choices=workload.PREPARED_PROFILES, default=list(workload.PREPARED_PROFILES)
    )
    parser.add_argument("--data", type=Path, default=workload.DATA, help="JSONL file of conversations")
    parser.add_argument("--output", type=Path, default=measure.RESULTS / "prepare.json")
    options = parser.parse_args()
    options.share = {"ours": 1, "peer": options.peer_share}
    return options


def main() -> None:
    """Measures one side and prints it as JSON (`--one`), or both in both profiles and writes the results."""
    options = parsed()
    if options.one:
        sys.stdout.write("\n" + json.dumps(measured(json.loads(options.one))) + "\n")
        return
    results = measure.Results(options.output, "prepare", 1)
    pairs = workload.read_pairs(options.data)
    for profile in options.profiles:
        with tempfile.TemporaryDirectory() as name:
            in_profile = workload.in_profile(pairs, profile, make_tokenizer(pairs))
            write_rows(Path(name), in_profile, options.rows)
            found = speed(options, Path(name))
            found["memory"] = memory(options, Path(name))
        suffix = "" if options.num_proc is None else f"/{options.num_proc} processes"
        results.add(f"{profile}{suffix}", found)
        sys.stdout.write(f"{profile}: {found['cpu_ratio']} x the rows of TRL per CPU second\n")


if __name__ == "__main__":
    main()
