"""Attacks on data files: named faults in every format, and random changes of good files."""

import dataclasses
import io
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from attacks.attack import FAULTS, NOBODY, Attack, damage, hand_over, has_trained
from attacks.place import jsonl, text_rows

ROWS = text_rows(12)
REFUSED = frozenset({1, 2})

_deep = '{"prompt": ' + "[" * 6000 + "]" * 6000 + ', "chosen": "a", "rejected": "b"}\n'
_csv = "prompt,chosen,rejected\n" + "".join(f'"{r["prompt"]}","{r["chosen"]}","{r["rejected"]}"\n' for r in ROWS)
_row = '{"prompt": "p q", "chosen": "a b", "rejected": "c d"}\n'

NAMED: tuple[tuple[str, str, bytes | str, bool], ...] = (
    ("csv too few", "x.csv", _csv + "t1,t2\n", True),
    ("csv one field", "x.csv", _csv + "t1\n", True),
    ("csv too many", "x.csv", _csv + "a,b,c,d\n", True),
    ("csv column twice", "x.csv", _csv.replace("prompt,chosen,rejected", "prompt,chosen,prompt", 1), True),
    ("csv four, twice", "x.csv", "prompt,chosen,rejected,prompt\na,b,c,d\n", True),
    ("csv empty name", "x.csv", "prompt,chosen,rejected,\na,b,c,d\n", False),
    ("csv latin-1", "x.csv", (_csv + "caf\u00e9,a,b\n").encode("latin-1"), True),
    ("csv utf-16", "x.csv", _csv.encode("utf-16"), True),
    ("csv nul", "x.csv", _csv + "a\0b,c,d\n", False),
    ("csv unclosed", "x.csv", _csv + '"abc,d,e\n', True),
    ("csv header only", "x.csv", "prompt,chosen,rejected\n", True),
    ("csv blank", "x.csv", "\n\n", True),
    ("csv huge field", "x.csv", _csv + "x" * 300_000 + ",b,c\n", False),
    ("csv bom", "x.csv", b"\xef\xbb\xbf" + _csv.encode(), False),
    ("csv cr", "x.csv", _csv.replace("\n", "\r"), False),
    ("json deep", "x.jsonl", jsonl(ROWS) + _deep, True),
    ("json deep value", "x.jsonl", jsonl(ROWS) + "[" * 100_000, True),
    ("json surrogate", "x.jsonl", jsonl(ROWS) + _row.replace("a b", "a \\ud800 b"), True),
    ("json key twice", "x.jsonl", jsonl(ROWS) + _row.replace('"chosen"', '"prompt": "z", "chosen"'), True),
    ("json nan", "x.jsonl", jsonl(ROWS) + _row.replace('"a b"', "NaN"), True),
    ("json digits", "x.jsonl", jsonl(ROWS) + _row.replace('"a b"', "9" * 6000), True),
    ("json utf-16", "x.jsonl", jsonl(ROWS).encode("utf-16"), True),
    ("json latin-1", "x.jsonl", (jsonl(ROWS) + _row.replace("a b", "caf\u00e9")).encode("latin-1"), True),
    ("json cut", "x.jsonl", jsonl(ROWS)[:-20], True),
    ("json number line", "x.jsonl", jsonl(ROWS) + "3\n", True),
    ("json null line", "x.jsonl", jsonl(ROWS) + "null\n", True),
    ("json missing key", "x.jsonl", jsonl(ROWS) + '{"prompt": "a"}\n', False),
    ("json null value", "x.jsonl", jsonl(ROWS) + _row.replace('"a b"', "null"), False),
    ("json types", "x.jsonl", jsonl(ROWS) + _row.replace('"a b"', "[1, 2]"), True),
    ("json number text", "x.jsonl", jsonl(ROWS) + _row.replace('"a b"', "7"), True),
    ("json blank", "x.jsonl", "\n \n", True),
    ("json empty array", "x.json", "[]", True),
    ("json array of numbers", "x.json", "[1, 2]", True),
    ("json empty object", "x.jsonl", "{}\n", True),
    ("json nul", "x.jsonl", jsonl(ROWS) + _row.replace("a b", "a\\u0000b"), False),
    ("gzip named jsonl", "x.jsonl", b"\x1f\x8b\x08\x00" + bytes(60), True),
    ("unknown suffix", "x.txt", "abc\n", True),
    ("no suffix", "x", _row, True),
    ("not parquet", "x.parquet", "PAR1" + "x" * 50 + "PAR1", True),
)


def _parquet(**columns: Any) -> bytes:
    sink = io.BytesIO()
    pq.write_table(pa.table(columns), sink)
    return sink.getvalue()


def _tables() -> list[tuple[str, str, bytes | str, bool]]:
    good = {name: [row[name] for row in ROWS] for name in ("prompt", "chosen", "rejected")}
    return [
        ("parquet no rows", "x.parquet", _parquet(**{n: pa.array([], pa.string()) for n in good}), True),
        ("parquet cut", "x.parquet", _parquet(**good)[:-30], True),
        ("parquet numbers", "x.parquet", _parquet(**good | {"chosen": list(range(12))}), True),
        ("parquet bytes", "x.parquet", _parquet(**good | {"chosen": [b"a"] * 12}), True),
        ("parquet no columns", "x.parquet", _parquet(), True),
        ("parquet nulls", "x.parquet", _parquet(**good | {"chosen": pa.array([None] * 12, pa.string())}), True),
        ("parquet other columns", "x.parquet", _parquet(a=[1], b=[2]), True),
    ]


def _attack(name: str, file: str, text: bytes | str, is_refused: bool, *, streams: bool = False) -> Attack:
    data = text.encode("utf-8", "surrogatepass") if isinstance(text, str) else text
    source = f"{{path: {file}, streaming: true}}" if streams else file
    return Attack(
        kind="data file",
        name=f"{name}{', streamed' if streams else ''}",
        prepare=lambda folder: (folder / file).write_bytes(data) and None,
        argv=("train", "run.yaml", "--set", f"data.train={source}", "--set", "training.max_steps=8"),  # every row
        codes=REFUSED if is_refused else frozenset({0, 1, 2}),
        judge=lambda folder, outcome: has_trained(folder, outcome) or _names(file, outcome),
    )


def _names(file: str, outcome: Any) -> str | None:
    return None if outcome.code == 0 or file in outcome.text else f"{file} is not named: {outcome.text[-300:]}"


def named(place: Path, draw: random.Random, control: Any) -> Iterator[Attack]:
    """The named faults, read at once and streamed; then folders, places and changes at random."""
    for fault in (*NAMED, *_tables()):
        yield _attack(*fault)
        yield _attack(*fault, streams=True)
        yield _shown(_attack(*fault))
    yield from _folders()
    while True:
        attack = _random(draw)
        yield attack if draw.random() < 0.7 else _shown(attack)


def _shown(attack: Attack) -> Attack:
    """The same data, of a run that is only to be shown."""
    argv = ("data", *attack.argv[1:])
    return dataclasses.replace(attack, name=f"{attack.name}, shown", argv=argv, judge=lambda folder, outcome: None)


def _random(draw: random.Random) -> Attack:
    kind = draw.choice(("jsonl", "csv", "parquet", "place"))
    if kind == "place":
        fault_name, seed = draw.choice(FAULTS), draw.random()

        def prepare(folder: Path) -> None:
            damage(folder / "pairs.jsonl", fault_name, random.Random(seed))
            if fault_name == "unreadable":
                hand_over(folder)

        return Attack(
            kind="data file", name=f"pairs.jsonl {fault_name}", prepare=prepare, judge=has_trained,
            user=NOBODY if fault_name == "unreadable" else None,
        )  # fmt: skip
    data = {"jsonl": jsonl(ROWS).encode(), "csv": _csv.encode()}.get(kind) or _parquet(
        **{name: [row[name] for row in ROWS] for name in ("prompt", "chosen", "rejected")}
    )
    for _ in range(draw.choice((1, 1, 3))):
        position = draw.randrange(len(data))
        way = draw.randrange(4)
        if way == 0:
            data = data[:position] + bytes([draw.randrange(256)]) + data[position + 1 :]
        elif way == 1:
            data = data[:position] + data[position + draw.randrange(1, 40) :]
        elif way == 2:
            data = (
                data[:position]
                + draw.choice((b"\n", b'"', b",", b"\x00", b"{", b"}", b"\xed\xa0\x80"))
                + data[position:]
            )
        else:
            data = data[:position]
    return _attack(f"{kind} changed", f"x.{kind}", data, False, streams=draw.random() < 0.3)


def _folders() -> Iterator[Attack]:
    secret = jsonl(text_rows(5, seed=9))
    for name, yaml in (
        ("above", "configs:\n- config_name: default\n  data_files: ../secret.jsonl\n"),
        ("absolute", "configs:\n- config_name: default\n  data_files: {folder}/secret.jsonl\n"),
        ("glob above", "configs:\n- config_name: default\n  data_files: '../sec*.jsonl'\n"),
        ("mapping", "configs:\n- config_name: default\n  data_files:\n  - split: train\n    path: ../secret.jsonl\n"),
        ("data_dir", "configs:\n- config_name: default\n  data_dir: ..\n"),
        ("url", "configs:\n- config_name: default\n  data_files: http://127.0.0.1:9/x.jsonl\n"),
        ("file url", "configs:\n- config_name: default\n  data_files: file://{folder}/secret.jsonl\n"),
        ("odd", "configs: 3\n"),
        ("odd files", "configs:\n- config_name: default\n  data_files: [1, {a: b}]\n"),
        ("bad yaml", "configs: [\n"),
        ("dataset_info", "dataset_info:\n  features: x\n"),
    ):

        def prepare(folder: Path, yaml: str = yaml) -> None:
            (folder / "d").mkdir()
            (folder / "secret.jsonl").write_text(secret)
            (folder / "d" / "a.jsonl").write_text(jsonl(ROWS))
            (folder / "d" / "README.md").write_text("---\n" + yaml.replace("{folder}", str(folder)) + "---\n")

        yield Attack(
            kind="data file",
            name=f"README {name}",
            prepare=prepare,
            argv=("train", "run.yaml", "--set", "data.train=d"),
            judge=lambda folder, outcome: (
                "another folder's rows are named as read" if outcome.code == 0 and _num_rows(folder) == 5 else None
            ),
        )


def _num_rows(folder: Path) -> int:
    """The number of pairs of an epoch that the run saw."""
    state = json.loads((folder / "out" / "trainer_state.json").read_text())
    epoch, steps = state["epoch"], state["global_step"]
    return round(2 * steps / epoch) if epoch else 0
