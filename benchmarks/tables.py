"""The tables of docs/benchmarks.md, made from the result files.

    python benchmarks/tables.py

Replaces the text between `<!-- table: NAME -->` and `<!-- end of table -->` by the tables of that benchmark. Each
of its result files gives one table, since a file holds the results of one environment.
"""

import json
import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
PAGE = Path(__file__).parent.parent / "docs" / "benchmarks.md"

_BLOCK = re.compile(r"(<!-- table: (\w+) -->\n).*?(<!-- end of table -->)", re.DOTALL)

Row = list[str]


def _times(value: Any) -> str:
    return "" if value is None else f"{value:.1f} x"


def _step(results: Mapping[str, Any]) -> list[Row]:
    speed, peak = ["pairs/s", "TRL's", "faster", "than padded"], ["peak MiB", "TRL's", "share", "resident MiB", "TRL's"]
    rows = [["model", "lengths", "mode", "recomputing", *speed, *peak]]
    for r in results.values():
        sides = r["sides"]
        peer = sides.get("peer", {})
        rows.append([
            r["size"], r["profile"], r["mode"], "yes" if r["checkpointing"] else "no",
            f"{sides['ours']['pairs_per_second']:.2f}", _number(peer.get("pairs_per_second"), 2),
            _times(r.get("speed_over_peer")), _times(r.get("speed_over_ours_padded")),
            f"{sides['ours']['peak_mib']:.0f}", _number(peer.get("peak_mib"), 0), _number(r.get("peak_over_peer"), 2),
            _number(sides["ours"].get("resident_mib"), 0), _number(peer.get("resident_mib"), 0),
        ])  # fmt: skip
    return rows


def _number(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def _fill(results: Mapping[str, Any]) -> list[Row]:
    rows = [["model", "data", "pairs/s", "TRL's", "faster", "than padded pairs", "tokens of padded pairs"]]
    for r in results.values():
        sides = r["sides"]
        rows.append([
            r["size"], r["profile"], f"{sides['ours']['pairs_per_second']:.2f}",
            _number(sides.get("peer", {}).get("pairs_per_second"), 2), _times(r.get("speed_over_peer")),
            _times(r.get("speed_over_padded_pairs")), _number(r.get("tokens_over_padded_pairs"), 2),
        ])  # fmt: skip
    return rows


def _prepare(results: Mapping[str, Any]) -> list[Row]:
    rows = [["data", "rows", "rows per CPU second", "TRL's", "faster", "own memory, MiB"]]
    for name, r in results.items():
        memory = ", ".join(f"{point['own_mib']:.0f}" for point in r["memory"])
        rows.append([
            name, f"{r['rows']:,}", f"{r['ours_rows_per_cpu_second']:,.0f}", f"{r['peer_rows_per_cpu_second']:,.0f}",
            _times(r["cpu_ratio"]), memory,
        ])  # fmt: skip
    return rows


def _share(results: Mapping[str, Any]) -> list[Row]:
    rows = [["model", "reference", "GFLOP a step", "seconds", "GFLOP/s of products", "share", "of what is computed"]]
    for name, r in results.items():
        size, part, reference = name.split("/")
        if part in ("share", "dialogue"):
            rate = f"{r['gflop_per_second_of_products']:.0f}"
            shares = [f"{r['share']:.1%}", "" if "share_computed" not in r else f"{r['share_computed']:.1%}"]
            rows.append([size, reference, f"{r['gflop']:.0f}", f"{r['seconds']:.2f}", rate, *shares])
    return rows


def _growth(results: Mapping[str, Any]) -> list[Row]:
    found = {tuple(name.split("/")): r for name, r in results.items() if "/growth/" in name}
    rows = [["model", "longer by", "exponent", "us per token, by tokens of the row"]]
    for (size, _, kind), r in found.items():
        points = ", ".join(f"{p['tokens']:,}: {p['microseconds_per_token']:.0f}" for p in r["points"])
        rows.append([size, kind, f"{r['exponent']:.2f}", points])
    return rows


def _memory(results: Mapping[str, Any]) -> list[Row]:
    rows = [["reference", "peak MiB", "of a run without one", "growth in weights"]]
    for name, r in results.items():
        rows.append(
            [name, f"{r['peak_mib']:.0f}", f"{r['ratio']:.2f}", f"{round(r['growth_in_weights'], 2) + 0.0:.2f}"]
        )
    return rows


def _head(results: Mapping[str, Any]) -> list[Row]:
    rows = [["head", "way", "seconds", "of dense", "temporaries MiB"]]
    for kind, ways in results.items():
        for way, r in ways.items():
            seconds, part = f"{r['median_seconds']:.2f}", f"{r['over_dense']:.2f}"
            rows.append([kind, way, seconds, part, f"{r['temporaries_mib']:.0f}"])
    return rows


TABLES: dict[str, tuple[str, Callable[[Mapping[str, Any]], list[Row]]]] = {
    "step": ("step", _step),
    "fill": ("fill", _fill),
    "prepare": ("prepare", _prepare),
    "share": ("limit", _share),
    "growth": ("limit", _growth),
    "memory": ("memory", _memory),
    "head": ("head", _head),
}
"""By name: the benchmark (`bench_<name>.py`, whose result files begin with that name) and the rows of its table."""


def table(name: str, folder: Path = RESULTS) -> str:
    """The tables of that name in Markdown, one for each result file that has rows for it, with its environment."""
    benchmark, rows_of = TABLES[name]
    parts = []
    for path in sorted(folder.glob(f"{benchmark}*.json")):
        document = json.loads(path.read_text(encoding="utf-8"))
        rows = rows_of(document["results"])
        if len(rows) > 1:
            parts.append(f"{_described(document['environment'])}\n\n{_markdown(rows)}")
    if not parts:
        return f"Not measured yet: `python benchmarks/bench_{benchmark}.py`.\n"
    return "\n\n".join(parts) + "\n"


def _described(environment: Mapping[str, Any]) -> str:
    packages = [
        f"{name} {environment[name]}" for name in ("torch", "transformers", "trl", "peft") if name in environment
    ]
    device = environment.get("accelerator") or environment.get("cpu") or environment["system"]
    threads = f"{environment['num_threads']} threads" if environment["num_threads"] > 1 else "1 thread"
    return ", ".join([device, threads, *packages, *([environment["date"]] if "date" in environment else [])]) + ":"


def _markdown(rows: list[Row]) -> str:
    lines = [f"| {' | '.join(row)} |" for row in rows]
    lines.insert(1, f"|{'---|' * len(rows[0])}")
    return "\n".join(lines)


def updated(page: str, folder: Path = RESULTS) -> str:
    """The page with the tables of the results in `folder`."""
    return _BLOCK.sub(lambda block: f"{block[1]}\n{table(block[2], folder)}\n{block[3]}", page)


def main() -> None:
    """Rewrites the page."""
    page = PAGE.read_text(encoding="utf-8")
    new = updated(page)
    PAGE.write_text(new, encoding="utf-8")
    sys.stdout.write(f"{PAGE}: {'rewritten' if new != page else 'as it was'}\n")


if __name__ == "__main__":
    main()
