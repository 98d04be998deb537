"""The benchmarks: what they count, what they cut, what they refuse to compare, and that their tables are up to date."""

import json
import math
import random
import statistics
import sys
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaForCausalLM

import tiny
from holdfast.batch import PairBatch
from holdfast.data.layouts.prefix_shared import SharedLayout
from holdfast.scoring.score import score

ROOT = Path(__file__).parent.parent
sys.path.append(str(ROOT / "benchmarks"))

import bench_fill  # noqa: E402
import bench_limit  # noqa: E402
import bench_step  # noqa: E402
import gpu_acceptance  # noqa: E402
import gpu_numbers  # noqa: E402
import gpu_runs  # noqa: E402
import measure  # noqa: E402
import tables  # noqa: E402
import workload  # noqa: E402

linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


# --- tables -----------------------------------------------------------------------------------------------------------


def test_the_tables_are_those_of_the_results():
    page = tables.PAGE.read_text(encoding="utf-8")
    assert page == tables.updated(page), "run `python benchmarks/tables.py`"
    assert all(f"<!-- table: {name} -->" in page for name in tables.TABLES)


def test_a_table_has_the_numbers_of_the_file(tmp_path):
    environment = {"cpu": "a processor", "num_threads": 2, "torch": "2.13", "date": "2026-01-02"}
    result = {
        "size": "small", "profile": "dialogue", "mode": "lora", "checkpointing": True, "speed_over_peer": 9.51,
        "peak_over_peer": 0.113, "speed_over_ours_padded": 2.31,
        "sides": {
            "ours": {"pairs_per_second": 9.5, "peak_mib": 113.0, "resident_mib": 700.0},
            "peer": {"pairs_per_second": 1.0, "peak_mib": 1000.0, "resident_mib": 2000.0},
        },
    }  # fmt: skip
    document = {"environment": environment, "results": {"small/dialogue/lora/checkpointing": result}}
    (tmp_path / "step.json").write_text(json.dumps(document))
    page = tables.updated("above\n<!-- table: step -->\nold\n<!-- end of table -->\nbelow\n", tmp_path)
    assert "a processor, 2 threads, torch 2.13, 2026-01-02:" in page
    row = "| small | dialogue | lora | yes | 9.50 | 1.00 | 9.5 x | 2.3 x | 113 | 1000 | 0.11 | 700 | 2000 |"
    assert row in page
    assert "old" not in page
    assert page == tables.updated(page, tmp_path)


# --- the formula ------------------------------------------------------------------------------------------------------


def test_pairs_of_positions_that_see_each_other():
    prompt, completions = 3, (2, 1, 4)
    pieces = [("prompt", n) for n in range(prompt)]
    pieces += [(f"completion {c}", n) for c, length in enumerate(completions) for n in range(length)]
    seen = sum(
        key[1] <= query[1] if query[0] == key[0] else key[0] == "prompt" for query, key in product(pieces, pieces)
    )
    assert bench_limit.seen_pairs(prompt, completions) == seen


def test_products_are_those_that_torch_counts():
    """The formula without attention, against torch's own count of the matrix products of a forward pass."""
    size = workload.Size(hidden=32, layers=2, heads=4, key_heads=2, intermediate=48, vocabulary=96)
    model = LlamaForCausalLM(size.config())
    trees = [(5, (3, 4)), (2, (6, 1))]
    rows = [
        {f"{side}_ids": bench_limit.ids(n, 96, n) for side, n in zip(workload.SIDES, (p, c, r), strict=True)}
        for p, (c, r) in trees
    ]
    batch = PairBatch.from_tensors(SharedLayout(0, row_tokens=64)(rows))
    score(model, batch)  # the first pass also looks at what follows the head
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        score(model, batch)
    counts = counter.get_flop_counts()["Global"]
    counted = sum(
        count for operation, count in counts.items() if operation in (torch.ops.aten.mm, torch.ops.aten.addmm)
    )
    attention = 4 * 32 * 2 * sum(bench_limit.seen_pairs(*tree) for tree in trees)
    products = bench_limit.forward_flops(size, trees) - attention
    asked = 4 * 32 * (5 * 4 // 2 + 2 * 1 // 2)  # by prompts in the last layer, which torch counts elsewhere
    assert counted == products - (bench_limit.unread_flops(size, trees) - asked)
    listed = sum(2 * m * k * n * count for m, k, n, count in bench_limit.products(size, 5 + 7 + 2 + 7, 7 + 7))
    assert listed == products


def test_a_step_is_three_or_four_forward_passes():
    size, trees = workload.SIZES["tiny"], [(7, (2, 3))]
    forward = bench_limit.forward_flops(size, trees)
    assert bench_limit.step_flops(size, trees, "stored") == 3 * forward
    assert bench_limit.step_flops(size, trees, "live") == 4 * forward


def test_the_exponent_of_a_power_law():
    assert bench_limit.exponent([(n, 3e-4 * n**1.25) for n in (100, 700, 5000)]) == pytest.approx(1.25)


def test_dialogue_lengths():
    """Their means are those of dialogue, and the logarithms spread as said; all timed steps are of unlike cost."""
    lengths = bench_limit.dialogue_lengths(4000)
    for side, mean in workload.DIALOGUE_MEANS.items():
        found = [pair[side] for pair in lengths]
        assert statistics.mean(found) == pytest.approx(mean, rel=0.05)
        assert statistics.stdev(map(math.log, found)) == pytest.approx(workload.DIALOGUE_SPREAD, rel=0.05)
    steps = bench_limit.step_lengths("dialogue", 3)
    assert [len(step) for step in steps] == [bench_limit.BATCH] * 3
    size = workload.SIZES["tiny"]
    assert len({bench_limit.forward_flops(size, bench_limit.trees_of(step)) for step in steps}) == 3


def test_long_rows_are_one_row():
    pairs = bench_limit.long_row("pairs", 1024, 300, "cpu")
    assert pairs.inputs["input_ids"].shape == (1, 5 * 202)
    assert len(pairs.target) == 5 * 86
    tree = bench_limit.long_row("completions", 1024, 300, "cpu")
    assert tree.inputs["input_ids"].shape == (1, 512 + 2 * 6 * 40)


def test_growth_counts_each_token_once():
    """A shared prompt once, whatever its mask says: 512 and two completions of 40 for each of 6 or 14 pairs."""
    work = {
        "kind": "completions",
        "size": "tiny",
        "rows": [1024, 1640],
        "repeats": 1,
        "threads": torch.get_num_threads(),
    }
    points = bench_limit.measured_growth(work)["points"]
    assert [(point["tokens"], point["rows"]) for point in points] == [(512 + 80 * 6, 1), (512 + 80 * 14, 1)]
    assert all(len(point["seconds"]) == 1 for point in points)


# --- the pairs --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pairs() -> list[workload.Pair]:
    """Sixty conversations with texts of 60 to 600 words."""
    draw, words = random.Random(0), tiny.PROSE.split()

    def message(role: str) -> dict[str, str]:
        return {"role": role, "content": " ".join(draw.choices(words, k=draw.randint(60, 600)))}

    return [{side: [message(role)] for side, role in workload.ROLES.items()} for _ in range(60)]


@pytest.fixture(scope="module")
def tokenizer(pairs):
    return workload.make_tokenizer(pairs, 1000)


def test_dialogue_has_its_means_and_spread(pairs, tokenizer):
    made = workload.sample(pairs, "dialogue", 40, tokenizer, 1024)
    found = workload.lengths(made, tokenizer)
    for side, mean in {"prompt": 116, "chosen": 37, "rejected": 49}.items():
        assert statistics.mean(found[side]) == pytest.approx(mean, rel=0.03), side
    ratio = sorted(found["prompt"])[30] / sorted(found["prompt"])[10]
    assert 2 < ratio < 4.5  # exp(2 * 0.67 * 0.8) = 2.9, and a template of some tokens
    texts = [pair["prompt"][0]["content"] for pair in pairs]
    assert all(any(text.startswith(pair["prompt"][0]["content"]) for text in texts) for pair in made)


def test_a_sample_has_the_lengths_of_the_whole(pairs, tokenizer):
    made = workload.sample(pairs, "as_is", 20, tokenizer, 10_000)
    assert all(pair in pairs for pair in made)
    whole, part = (workload.lengths(rows, tokenizer) for rows in (pairs, made))
    total, total_of_part = (statistics.mean(map(sum, zip(*each.values(), strict=True))) for each in (whole, part))
    assert total_of_part == pytest.approx(total, rel=0.03)


def test_a_sample_of_more_than_there_are(pairs, tokenizer):
    with pytest.raises(ValueError, match=r"61 pairs were asked for, and the data have 60. Ask for fewer"):
        workload.sample(pairs, "dialogue", 61, tokenizer, 1024)


def test_six_pairs_of_four_completions(pairs):
    made = workload.four_completions(pairs[:3])
    assert len(made) == 18
    for start, own in zip((0, 6, 12), pairs, strict=False):
        six = made[start : start + 6]
        assert {pair["prompt"][0]["content"] for pair in six} == {own["prompt"][0]["content"]}
        completions = {pair[side][0]["content"] for pair in six for side in ("chosen", "rejected")}
        assert len(completions) == 4
        assert len({frozenset((p["chosen"][0]["content"], p["rejected"][0]["content"])) for p in six}) == 6


def test_facts_count_padding(tokenizer):
    """Two pairs of which one is the other twice over: the padded batch has 4 rows as long as the longest."""

    def pair(times: int) -> workload.Pair:
        text = {"user": "sea " * 10 * times, "assistant": "tide " * 5 * times}
        chosen, rejected = ({"role": "assistant", "content": f"{word} {text['assistant']}"} for word in ("A", "B"))
        return {"prompt": [{"role": "user", "content": text["user"]}], "chosen": [chosen], "rejected": [rejected]}

    both = [pair(1), pair(2)]
    found = workload.lengths(both, tokenizer)
    longest = found["prompt"][1] + max(found["chosen"][1], found["rejected"][1])
    needed = sum(map(sum, found.values()))
    facts = workload.facts(both, tokenizer, 2, 1024)
    assert facts["padded_tokens_over_needed"] == round(4 * longest / needed, 2)


def test_data_that_is_not_there_or_not_conversations(tmp_path):
    with pytest.raises(ValueError, match=r"none.jsonl, which is not a file. Name a JSONL file .* with --data"):
        workload.read_pairs(tmp_path / "none.jsonl")
    path = tmp_path / "text.jsonl"
    path.write_text('{"prompt": "Hello", "chosen": "Hi", "rejected": "No"}\n')
    with pytest.raises(ValueError, match=r"line 1 has not .* found \['chosen', 'prompt', 'rejected'\]. Give conv"):
        workload.read_pairs(path)


# --- comparing and measuring ------------------------------------------------------------------------------------------


def run_with(loss: float, chosen: float) -> dict:
    log = {"loss": loss, "logps/chosen": chosen, "logps/rejected": -9.0, "rewards/margins": 0.0}
    return {"first": log, "last": log}


def test_sides_must_do_the_same_work():
    bench_step.check_same_work({"ours": run_with(0.69, -50), "peer": run_with(0.69005, -50.001)}, "x", is_half=False)
    with pytest.raises(ValueError, match=r"same work, but peer logged loss 0.6902 where ours logged 0.69 \(first log"):
        bench_step.check_same_work({"ours": run_with(0.69, -50), "peer": run_with(0.6902, -50)}, "x", is_half=False)
    with pytest.raises(ValueError, match=r"peer logged logps/chosen -50.1 where ours logged -50"):
        bench_step.check_same_work({"ours": run_with(0.69, -50), "peer": run_with(0.69, -50.1)}, "x", is_half=False)


def test_sides_must_score_the_same_pairs():
    runs = {
        side: {"logps": {"chosen": -1e4, "rejected": value}} for side, value in (("ours", -2e4), ("peer", -2.001e4))
    }
    with pytest.raises(ValueError, match=r"peer found log-probs of -20010.0 in all \(rejected\) where ours found -2"):
        bench_fill.check_same_logps(runs, "x", is_half=False)
    bench_fill.check_same_logps(runs, "x", is_half=True)


def test_ratios_are_of_runs_that_followed_each_other():
    """Speeds 4 pairs / seconds. Ratios 2, 2 and 6, whose median is 2; the ratio of the medians would be 3."""

    def side(seconds: float, peak: float) -> dict:
        return {"seconds": [seconds, seconds], "peaks": [1.0, peak], "resident": 9.0, "idle_before": 1.0} | run_with(
            0.69, -50
        )

    runs = [{"ours": side(a, 2), "peer": side(b, 8)} for a, b in ((1, 2), (2, 4), (1, 6))]
    found = bench_step.summary(runs)
    assert found["speed_over_peer"] == 2
    assert found["peak_over_peer"] == 0.25
    assert found["sides"]["ours"]["pairs_per_second"] == 4
    assert found["sides"]["peer"]["pairs_per_second"] == 1


def test_results_of_another_environment_are_not_mixed(tmp_path):
    path = tmp_path / "step.json"
    measure.Results(path, "step", 2).add("one", {"value": 1})
    measure.Results(path, "step", 2).add("other", {"value": 2})
    assert json.loads(path.read_text())["results"] == {"one": {"value": 1}, "other": {"value": 2}}
    measure.Results(None, "step", 2).add("nowhere", {})
    with pytest.raises(ValueError, match=r"another environment .*num_threads 2, now 1.* name another with --output"):
        measure.Results(path, "step", 1)
    with pytest.raises(ValueError, match=r"another environment or benchmark \('step'\)"):
        measure.Results(path, "fill", 2)


@linux
def test_a_peak_is_what_was_held_for_a_while():
    peak = measure.Peak()
    peak.begin()
    held = torch.ones(48 * 2**20 // 4)
    del held
    first = peak.end()
    peak.begin()
    assert first == pytest.approx(48, abs=4)
    assert peak.end() < 4


def test_steps_are_timed_from_the_end_of_the_one_before(monkeypatch):
    """Steps end at 10, 12, 15, 19, 24: after one to warm up, two are timed, and the others' peaks are measured."""
    times = iter([10, 10, 12, 12, 15, 15, 19, 19, 24, 24])
    peaks = iter([70.0, 90.0])
    monkeypatch.setattr(measure, "clock", lambda: next(times))
    monkeypatch.setattr(measure, "hand_freed_memory_back", lambda: None)
    monkeypatch.setattr(measure.Peak, "begin", lambda self: None)
    monkeypatch.setattr(measure.Peak, "end", lambda self: next(peaks))
    watch = measure.watch(1, 2)
    for step in range(1, 6):
        watch.on_step_end(None, SimpleNamespace(global_step=step), None)
    assert watch.seconds == [2, 3]
    assert watch.peaks == [70.0, 90.0]


# --- acceptance on a GPU ----------------------------------------------------------------------------------------------


def test_a_cuda_device_is_refused_where_there_is_none(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(
        SystemExit, match=r"device cuda was asked for, but torch .* finds no GPU here. Use --device cpu"
    ):
        measure.choose_device("cuda")


@pytest.mark.parametrize(
    ("part", "seconds", "found"),
    [("no such part", 60, "exit code 1: KeyError: 'no such part'"), ("layouts", 0.1, "not after 0 s")],
)
def test_a_part_that_fails_or_hangs_is_a_row_that_failed(part, seconds, found, tmp_path, capfd):
    (row,) = gpu_acceptance.run_part(part, is_dry=True, seconds=seconds, folder=tmp_path)
    assert (row["found"], row["is_ok"]) == (found, False)
    capfd.readouterr()


def test_the_table_has_a_line_for_each_row():
    rows = [
        gpu_runs.row("margins", "full, model", "margin 0", "0", is_ok=True),
        gpu_runs.row("speed", "tiny", "1 pair/s", "", is_ok=False),
        gpu_runs.needs_gpu("waits", "waits"),
    ]
    lines = [line.split("  ") for line in gpu_acceptance.table(rows).splitlines()]
    assert [line[0].strip() for line in lines] == ["part", "margins", "speed", "waits"]
    assert [line[-1].strip() for line in lines[1:]] == ["ok", "FAILED", "-"]


def test_layouts_are_judged_by_the_error_of_padded_rows(monkeypatch):
    """A model whose packed rows are another model's numbers fails, in every precision; the others pass."""
    monkeypatch.setattr(gpu_numbers, "FAMILIES", {"llama": gpu_numbers.FAMILIES["llama"]})
    assert all(row["is_ok"] for row in gpu_numbers.layouts({}))
    right = gpu_numbers.logps

    def wrong(model, layout, **options):
        return right(model, layout, **options | ({"prompt": 9} if layout == "packed" else {}))

    def by_order(expected, found):
        pairs = zip(expected.values(), found.values(), strict=True)
        return float(torch.cat([(one - other).abs() for one, other in pairs]).mean())

    monkeypatch.setattr(gpu_numbers, "logps", wrong)
    monkeypatch.setattr(gpu_numbers, "gap", by_order)
    failed = [row["asked"] for row in gpu_numbers.layouts({}) if not row["is_ok"]]
    assert len(failed) == 3
    assert all("packed" in asked for asked in failed)
