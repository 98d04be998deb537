"""Attacks on run files: every key x odd values, and odd YAML."""

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from attacks.attack import Attack, has_trained

VALUES = (
    "-3", "0", "-1", "1e30", "-1e30", ".nan", ".inf", "-.inf", "1e400", "9" * 320, "9" * 5000, '""', '" "', "x", "[]",
    "[x]", "{}", "{a: 1}", "null", "true", "false", "0.5", "1e-320", "-0.0", '"\\x1b]0;t\\x07"', '"a\\0b"', "~/x/y",
    "$NO_SUCH_VARIABLE/x", "!!python/name:os.system", "!!int abc", "!!float x", "!!bool x", "!!binary x", "2024-01-01",
    "[[[]]]", "[.nan]", "{a: {b: .inf}}", "../../..", "/dev/null", "/dev/zero", "1000000000000", "18446744073709551616",
    '"1"', "'null'", "&a [*a]", "|\n  text\n", "\u202ex", "caf\u00e9", "no", "all", "steps", "epoch", "best", "auto",
)  # fmt: skip
"""Texts of YAML values."""


def _keys() -> list[str]:
    from peft import LoraConfig

    from holdfast.cli.runfile import KEYS
    from holdfast.cli.yaml_document import field_hints
    from holdfast.config import DPOConfig

    keys = [key.name for key in KEYS]
    keys += [f"training.{name}" for name in field_hints(DPOConfig)]
    keys += [f"peft.{name}" for name in field_hints(LoraConfig)]
    parts = (
        "path",
        "revision",
        "subfolder",
        "dtype",
        "attn_implementation",
        "device_map",
        "cache_dir",
        "split",
        "name",
    )
    keys += [
        f"{section}.{part}" for section in ("model", "tokenizer", "data.train", "reference.model") for part in parts
    ]
    return [
        *keys,
        "training",
        "data",
        "peft",
        "reference",
        "",
        "training..x",
        "training.beta.x",
        "data.eval.a.b",
        "1",
        "x",
    ]


def odd_values(place: Path, draw: random.Random, control: Any) -> Iterator[Attack]:
    """A key and a value, by `--set` or in the file."""
    keys = _keys()
    while True:
        key, value = draw.choice(keys), draw.choice(VALUES)
        command = draw.choice(("train", "train", "precompute", "data"))
        sets = ["--set", f"{key}={value}"]
        if key.startswith("peft.") and key != "peft.r":
            sets = ["--set", "peft.r=2", *sets]
        yield Attack(
            kind="key x value",
            name=f"{command} {key}={value[:40]}",
            prepare=lambda folder: None,
            argv=(command, "run.yaml", *sets),
            judge=_judge(key) if command == "train" else (lambda folder, outcome: None),
        )


def _judge(key: str) -> Any:
    if key.startswith(("training.output_dir", "peft", "training.learning_rate", "training.run_name")):
        return lambda folder, outcome: None
    return has_trained


def _bomb(levels: int) -> str:
    lines = ["a0: &a0 {x: 1}"]
    for level in range(1, levels):
        uses = ", ".join(f"k{i}: *a{level - 1}" for i in range(9))
        lines.append(f"a{level}: &a{level} {{{uses}}}")
    return "\n".join(lines) + "\n"


TEXTS: tuple[tuple[str, bytes], ...] = tuple(
    (name, text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass"))
    for name, text in (
        ("empty", ""),
        ("alias bomb", _bomb(12)),
        (
            "list bomb",
            "a: &a [x]\n"
            + "".join(f"{chr(98 + i)}: &{chr(98 + i)} [{', '.join([f'*{chr(97 + i)}'] * 9)}]\n" for i in range(10)),
        ),
        ("nested lists", "training: " + "[" * 5000 + "]" * 5000),
        ("nested mappings", "training: " + "{a: " * 3000 + "1" + "}" * 3000),
        ("block nesting", "".join("  " * i + f"k{i}:\n" for i in range(800))),
        ("recursive", "training: &a {b: *a}\n"),
        ("recursive key", "? &a {*a : 1}\n: 2\n"),
        ("unknown alias", "training: *nobody\n"),
        ("latin-1", "model: caf\u00e9\n".encode("latin-1")),
        ("utf-16", "model: x\n".encode("utf-16")),
        ("utf-16 no bom", "model: x\n".encode("utf-16-le")),
        (
            "utf-8 bom",
            b"\xef\xbb\xbf"
            + b"model: model\ndata: {train: pairs.jsonl}\ntraining: {output_dir: out, max_steps: 1, use_cpu: true, "
            b"report_to: none, optim: adamw_torch}\n",
        ),
        ("nul", b"model: a\x00b\n"),
        ("control", b"model: a\x07b\n"),
        ("tab", "model:\tmodel\n\tdata: x\n"),
        ("two documents", "model: a\n---\nmodel: b\n"),
        ("directive", "%YAML 9.9\n---\nmodel: a\n"),
        ("tag directive", "%TAG ! tag:evil,2000:\n---\nmodel: !x a\n"),
        ("complex key", "? [a, b]\n: 1\n"),
        ("mapping key", "? {a: b}\n: 1\n"),
        ("null key", "null: 1\n"),
        ("number key", "1: 2\n"),
        ("merge of a number", "<<: 3\nmodel: x\n"),
        ("merge of a list", "<<: [1, 2]\nmodel: x\n"),
        ("merge", "base: &b {train: pairs.jsonl}\ndata: {<<: *b}\n"),
        ("binary", "model: !!binary //8=\n"),
        ("set", "training: !!set {a, b}\n"),
        ("omap", "training: !!omap [a: 1]\n"),
        ("pairs", "training: !!pairs [a: 1]\n"),
        ("timestamp", "model: !!timestamp x\n"),
        ("bad timestamp", "model: !!timestamp 2024-13-45\n"),
        ("python object", "model: !!python/object/apply:os.system [echo]\n"),
        ("a string", "hello\n"),
        ("a list", "- a\n- b\n"),
        ("a number", "3\n"),
        ("surrogate", 'model: "\\ud800"\n'),
        ("escape", 'model: "\\x1b]0;title\\x07"\n'),
        ("long line", "model: " + "x" * 2_000_000 + "\n"),
        ("long key", "k" * 100_000 + ": 1\n"),
        ("many keys", "".join(f"k{i}: 1\n" for i in range(50_000))),
        ("unclosed", "training: {a: [1, 2\n"),
        ("unclosed quote", 'model: "abc\n'),
        ("bad escape", 'model: "\\q"\n'),
        ("bad anchor", "model: & x\n"),
        ("training a number", "model: model\ndata: {train: pairs.jsonl}\ntraining: 3\n"),
        ("training a list", "model: model\ndata: {train: pairs.jsonl}\ntraining: [beta, 1]\n"),
        ("data a list", "model: model\ndata: [pairs.jsonl]\n"),
        ("data train a list", "model: model\ndata: {train: [pairs.jsonl]}\n"),
        ("data train empty", 'model: model\ndata: {train: ""}\n'),
        ("model a list", "model: [model]\ndata: {train: pairs.jsonl}\n"),
        ("model path a number", "model: {path: 3}\ndata: {train: pairs.jsonl}\n"),
        ("model empty", 'model: ""\ndata: {train: pairs.jsonl}\n'),
        ("peft a list", "model: model\ndata: {train: pairs.jsonl}\npeft: [LORA]\n"),
        ("peft type a list", "model: model\ndata: {train: pairs.jsonl}\npeft: {peft_type: [LORA]}\n"),
        ("peft type a mapping", "model: model\ndata: {train: pairs.jsonl}\npeft: {peft_type: {a: 1}}\n"),
        ("reference a list", "model: model\ndata: {train: pairs.jsonl}\nreference: [model]\n"),
        ("crlf", b"model: model\r\ndata: {train: pairs.jsonl}\r\ntraining: 3\r\n"),
        ("nel", "model: model\u0085data: 3\n"),
        ("sexagesimal", "training: {seed: 1:30}\n"),
        ("octal", "training: {seed: 0o17}\n"),
        ("5000 digits", "training: {seed: " + "9" * 5000 + "}\n"),
        ("309 digits", "training: {beta: " + "9" * 309 + "}\n"),
    )
)


def odd_yaml(place: Path, draw: random.Random, control: Any) -> Iterator[Attack]:
    """Run files by name, then random changes of a good one."""
    for name, text in TEXTS:
        yield _text(name, text)
    good = (place / "run.yaml").read_bytes()
    while True:
        text = good
        for _ in range(draw.choice((1, 1, 2, 5))):
            text = _mutated(text, draw)
        yield _text(f"mutated {text[:0]!r}", text)


def _text(name: str, text: bytes) -> Attack:
    return Attack(
        kind="YAML text",
        name=name,
        prepare=lambda folder: (folder / "run.yaml").write_bytes(text) and None,
        codes=frozenset({0, 1, 2}),
        judge=lambda folder, outcome: None,
    )


TOKENS = [
    token.encode("latin-1")
    for token in (
        "&a ",
        "*a",
        "!!int ",
        "!!str ",
        "- ",
        ": ",
        "{",
        "}",
        "[",
        "]",
        "\x00",
        "\xff",
        "\t",
        "#",
        "'",
        '"',
        "|",
        ">",
        "%",
        "@",
        "`",
        "\n",
        "  ",
        "null",
        ".nan",
        "1e999",
        "<<: ",
        "? ",
        "---\n",
        "...\n",
    )
]


def _mutated(text: bytes, draw: random.Random) -> bytes:
    """`text` after one random change."""
    position = draw.randrange(len(text) + 1)
    way = draw.randrange(5)
    if way == 0:
        return text[:position] + draw.choice(TOKENS) + text[position:]
    if way == 1:
        return text[:position] + text[position + draw.randrange(1, 6) :]
    if way == 2:
        return text[:position] + bytes([draw.randrange(256)]) + text[position + 1 :]
    lines = text.splitlines(keepends=True)
    if not lines:
        return text
    index = draw.randrange(len(lines))
    if way == 3:
        lines.insert(draw.randrange(len(lines) + 1), lines[index])
    else:
        lines[index] = b"  " * draw.randrange(3) + lines[index].lstrip()
    return b"".join(lines)


def dumped(values: dict[str, Any]) -> str:
    return yaml.safe_dump(values)
