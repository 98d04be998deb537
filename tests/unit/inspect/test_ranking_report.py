"""How inspections of pairs are shown: the same numbers in lines of any width, on a page, in JSON and in CSV."""

import csv
import html
import json
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import Dataset
from rich.cells import cell_len

import tiny
from browser import opened
from holdfast.inspect.pair_numbers import PairNumbers
from holdfast.inspect.pairs import Cutting
from holdfast.inspect.ranking.flipping import Objective
from holdfast.inspect.ranking.inspection import RankingInspection, ScoredDataset, inspect_ranking
from holdfast.inspect.ranking.lines import report_lines
from holdfast.inspect.ranking.numbers_file import as_json, write_csv, write_json
from holdfast.inspect.ranking.page import write_page
from holdfast.inspect.ranking.texts import PairText, TextReader
from holdfast.inspect.ranking.written import number, percent, table
from holdfast.losses.objective import LossOptions
from ranked_pairs import AFTER_CHOSEN, AFTER_REJECTED, eight_pairs

EVIL = "\x1b[2J\u202e<script>alert(1)</script>"


class Texts:
    """Texts for tests: each says its row, and tries to steer what shows it."""

    def text(self, index: int, row: int) -> PairText:
        said = f"{row} {EVIL} " + "word " * 60
        return PairText(place=None, prompt=said, chosen=said, rejected=f"{said}!", num_shared=len(said))


def inspection(
    losses: Sequence[str] = ("sigmoid",),
    policy: PairNumbers | None = None,
    reference: PairNumbers | None = None,
    **options: Any,
) -> RankingInspection:
    scored = ScoredDataset(
        name="train",
        reference=eight_pairs() if reference is None else reference,
        policy=policy,
        texts=Texts(),  # pyright: ignore[reportArgumentType]
    )
    return inspect_ranking(
        [scored],
        reference="model (digest 01)",
        policy=None if policy is None else "out",
        loss_types=losses,
        objective=None if losses == ("simpo",) else Objective.of(LossOptions(**options), losses),
        notes=["something to know"],
        not_read={"eval": "it is a stream"},
    )


def after(**others: Any) -> PairNumbers:
    return eight_pairs(AFTER_CHOSEN, AFTER_REJECTED, **others)


def lines(shown: RankingInspection, width: int | None = None) -> list[str]:
    return ["".join(span.text for span in line) for line in report_lines(shown, width)]


# Lines ---------------------------------------------------------------------------------------------------------------


def test_the_lines_before_training():
    """The numbers are those worked out in `test_ranking`."""
    text = "\n".join(lines(inspection()))
    for expected in (
        "reference: model (digest 01)",
        "loss: sigmoid, beta 0.1",
        "The eval dataset is not shown: it is a stream.",
        "train: 8 pairs",
        "by the sum of log-probs: 4 of 8 (50.0 ± 17.7 %). Per token: 3 of 8 (37.5 ± 17.1 %).",
        "Ties, which count as right: 1 by sum, 1 per token.",
        "since the chosen completion is longer: 1 of 8",
        "Half of the 4 wrong pairs flip only at a loss of 0.442 or less. Below 0.5: 2 of 4 (50.0 ± 25.0 %).",
        "chosen 5.12, rejected 4.62 (+0.50)",
        "prefers the shorter completion in 5 of 7 (71.4 ± 17.1 %), per token the longer one in 3 of 7",
        "Above 0: 4 of 7 (57.1 ± 18.7 %). It is known of 7 of 8 pairs.",
        "row 50, source prose, 10 and 10 tokens, margin -20.00 nats, -2.00 per token, flips at a loss of 0.127",
    ):
        assert expected in text
    assert "What flipped" not in text


def test_the_lines_after_training():
    text = "\n".join(lines(inspection(policy=after())))
    for expected in (
        "policy: out",
        "by the sum of log-probs: 50.0 ± 17.7 % before training, 50.0 ± 17.7 % after",
        "2 of 4 (50.0 ± 25.0 %) flipped. The margin of 1 more rose without flipping. 2 were right and are wrong now.",
        "The margin rose in 5 of 8 (62.5 ± 17.1 %)",
        "lost log-prob: 3 of 8 (37.5 ± 17.1 %); its margin rose all the same in 1 of 8",
        "and had less: 1 of 8 (12.5 ± 11.7 %)",
        "row 50, source prose, 10 and 10 tokens, margin -20.00 to 5.00 nats, chosen -30.00 to -25.00",
    ):
        assert expected in text
    assert "usual squeeze" not in text


def test_the_usual_squeeze_is_named():
    fallen = eight_pairs([each - 1 for each in eight_pairs().chosen_logps], eight_pairs().rejected_logps - 5)
    assert "usual squeeze" in "\n".join(lines(inspection(policy=fallen)))


@pytest.mark.parametrize("width", [40, 80, 200, None])
@pytest.mark.parametrize("is_trained", [False, True])
def test_no_line_is_too_wide_or_steers_a_terminal(width, is_trained):
    names = ("a" * 90, f"b {EVIL} \u5bbd\u5bbd")
    numbers = eight_pairs(sources=names)
    shown = lines(inspection(reference=numbers, policy=after(sources=names) if is_trained else None), width)
    assert not [line for line in shown if not line.isprintable()]
    assert width is None or max(map(cell_len, shown)) <= width
    assert "\\x1b[2J\\u202e" in "".join(shown)


def test_a_text_stands_behind_its_name():
    """So that no text looks like a line of the report."""
    for line in lines(inspection(), 80):
        if "word" in line or "script" in line:
            assert re.match(r"      (prompt  |chosen  |rejected|        ) \| ", line) or "source" in line


def test_tables_drop_what_is_expendable_and_go_on_below():
    head, rows = ["name", "first", "second", "third"], [["x", "1", "2", "3"]]
    wide = ["".join(span.text for span in line) for line in table(head, rows, 80, "  ")]
    assert wide == ["  name  first  second  third", "  x         1       2      3"]
    dropped = ["".join(span.text for span in line) for line in table(head, rows, 24, "  ", (2,))]
    assert dropped == ["  name  first  third", "  x         1      3", "  (no room for: second)"]
    below = ["".join(span.text for span in line) for line in table(head, rows, 24, "  ")]
    assert below == ["  name  first  second", "  x         1       2", "  name  third", "  x         3"]


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, "-"), (0.0, "0"), (12345.6, "12,346"), (-123.45, "-123.5"), (1.005, "1.00"), (0.4567, "0.457"),
     (0.00672, "0.0067"), (3e-7, "3.0e-07"), (-2e8, "-2.00e+08"), (float("inf"), "inf")],
)  # fmt: skip
def test_numbers_are_written_with_few_digits(value, text):
    assert number(value) == text
    assert percent(0.125) == "12.5 %"


SAID_OF_LOSSES = {
    "another loss": (
        ("hinge",),
        {"beta": 0.2},
        "Out of reach: hinge stops pulling once beta times the margin (of sums)",
    ),
    "per token": (("sigmoid_norm",), {}, "Of sigmoid_norm, with margins of means over tokens, no wrong pair is out of"),
    "no function of margins": (("aot",), {}, "cannot be stated: aot is no function of the two margins of one pair"),
    "no reference": (("simpo",), {}, "Nothing is said of it: simpo compares with no reference"),
}


@pytest.mark.parametrize("case", SAID_OF_LOSSES.values(), ids=SAID_OF_LOSSES.keys())
def test_what_is_said_of_other_losses(case):
    losses, options, said = case
    assert said in "\n".join(lines(inspection(losses, **options)))


def test_nothing_is_wrong():
    right = eight_pairs(chosen=[-1] * 8, rejected=[-50] * 8)
    text = "\n".join(lines(inspection(reference=right)))
    assert "No pair is ranked wrongly by the sum" in text
    assert "ranked wrongly by the most" not in text


def test_a_gap_between_training_and_evaluation_is_said():
    """Margins rise in all of training's 8 pairs, and in 2 of the 8 of evaluation."""
    texts: Any = Texts()
    learnt = eight_pairs(eight_pairs().chosen_logps + 1)
    other = eight_pairs(eight_pairs().chosen_logps + np.array([1, 1, -1, -1, -1, -1, -1, -1]))
    sets = [
        ScoredDataset(name=name, reference=eight_pairs(), policy=policy, texts=texts)
        for name, policy in (("train", learnt), ("eval", other))
    ]
    text = "\n".join(lines(inspect_ranking(sets, reference="r", policy="p")))
    assert "rose in 100.0 ± 0.0 % of the training pairs, in 25.0 ± 15.3 % of eval. The pairs are being learnt" in text


# What cannot be shown ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        (replace(eight_pairs(), chosen_logps=np.array([-1, -1, -np.inf, -1, -1, -1, np.nan, -1])),
         "2 of 8 pairs have none that are finite. The first is row 20: chosen -inf, rejected -2.0"),
        (replace(eight_pairs(), rejected_tokens=np.zeros(8, dtype=np.int64)), "8 of 8 pairs"),
        (eight_pairs().where(np.zeros(8, dtype=bool)), "it has no usable pair"),
    ],
)  # fmt: skip
def test_what_cannot_be_ranked(numbers, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        inspection(reference=numbers)


# Files ---------------------------------------------------------------------------------------------------------------


def test_the_json_has_every_number(tmp_path):
    shown = inspection(policy=after(), losses=("hinge",), beta=0.2)
    write_json(shown, tmp_path / "numbers.json")
    text = (tmp_path / "numbers.json").read_text(encoding="utf-8")
    assert text.isascii()
    found = json.loads(text)
    assert found == as_json(shown)
    train = found["datasets"]["train"]
    assert found["objective"] == {"losses": {"hinge": 1.0}, "is_per_token": False, "rest": 1.0, "obstacle": None}
    assert train["reference"]["by_sum"]["wrong"] == {
        "count": 4, "num_pairs": 8, "share": 0.5, "standard_error": pytest.approx(0.1767767)
    }  # fmt: skip
    assert train["reference"]["by_sum"]["margins"]["quantiles"]["0.5"] == -1
    assert train["movement"]["by_sum"]["flipped"]["count"] == 2
    assert train["by_source"]["prose"]["reference"]["by_sum"]["wrong"]["count"] == 3
    assert train["by_length"]["8 to 15"]["policy"]["num_pairs"] == 2
    assert {each["title"]: [pair["row"] for pair in each["pairs"]] for each in train["pairs_to_look_at"]}[
        "unflipped"
    ] == [0, 40]


def test_the_json_of_a_loss_that_never_rests_is_plain():
    assert as_json(inspection())["objective"]["rest"] is None
    assert as_json(inspection(("simpo",)))["objective"] is None


def test_the_csv_has_every_pair(tmp_path):
    names = ("=1+1", "a\x1bb")
    shown = inspection(reference=eight_pairs(sources=names), policy=after(sources=names))
    write_csv(shown, tmp_path / "pairs.csv")
    with (tmp_path / "pairs.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["row"]) for row in rows] == [0, 10, 20, 30, 40, 50, 60, 70]
    assert [row["source"] for row in rows[:2]] == ["'=1+1", "a\\x1bb"]
    assert [float(row["reference_margin"]) for row in rows] == [2, -8, -4, 5, 0, -20, 12, -2]
    assert [float(row["policy_margin"]) for row in rows] == pytest.approx([-1, 3, -1, 15, -1, 5, 15.7, -2])
    assert [float(row["loss_to_flip"]) for row in rows][1] == pytest.approx(0.371100, abs=1e-6)
    assert [row["ches"] for row in rows][4] == ""
    assert [row["flipped"] + row["unflipped"] + row["memorised"] for row in rows] == [
        "010", "100", "000", "000", "010", "100", "001", "000"
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("width", "scheme", "is_trained", "num_plots"),
    [(400, "dark", True, 10), (1600, "light", True, 10), (400, "light", False, 7)],
)
def test_the_page_opens_in_a_browser(tmp_path, width, scheme, is_trained, num_plots):
    path = tmp_path / "pairs.html"
    names = ("a" * 90, f"b {EVIL}")
    numbers = eight_pairs(sources=names)
    write_page(inspection(reference=numbers, policy=after(sources=names) if is_trained else None), path)
    page = opened(path, width=width, scheme=scheme)
    assert (page.complaints, page.requests, page.too_wide, page.overlapping) == ((), (), (), ())
    assert len(page.plots) == num_plots
    assert page.faintest[0] >= 4.5
    assert "4 of 8 (50.0 ± 17.7 %)" in page.text


def test_the_page_escapes_what_it_shows(tmp_path: Path):
    write_page(inspection(policy=after(sources=("maths", EVIL))), tmp_path / "pairs.html")
    text = (tmp_path / "pairs.html").read_text(encoding="utf-8")
    assert "<script" not in text
    assert html.escape("\\x1b[2J\\u202e<script>") in text
    assert not [each for each in text if not each.isprintable() and each != "\n"]


# Texts ---------------------------------------------------------------------------------------------------------------


def test_texts_are_what_the_model_sees():
    """`max_length` 8 leaves two of the chosen completion's three words."""
    tokenizer = tiny.tokenizer()
    ids = {name: tokenizer(text)["input_ids"] for name, text in
           (("prompt", "where is"), ("chosen", " the dog"), ("rejected", " the cat"))}  # fmt: skip
    data = Dataset.from_dict({f"{name}_ids": [value] for name, value in ids.items()})
    whole = Cutting(max_length=None, truncation_mode="keep_start")
    text = TextReader(dataset=data, cutting=whole, tokenizer=tokenizer).text(0, 0)
    assert (text.prompt, text.chosen, text.rejected, text.place) == ("where is", " the dog", " the cat", None)
    assert text.num_shared == len(" the ")
    short = Cutting(max_length=len(ids["prompt"]) + 1, truncation_mode="keep_start")
    cut = TextReader(dataset=data, cutting=short, tokenizer=tokenizer).text(0, 0)
    assert cut.chosen == tokenizer.decode(ids["chosen"][:1])


def test_excerpts_show_where_completions_differ():
    same = "the same beginning, " * 10
    text = PairText(place=None, prompt="a " * 200, chosen=f"{same}good", rejected=f"{same}bad", num_shared=len(same))
    prompt, chosen, rejected = text.excerpts(60)
    assert (len(prompt), prompt[:5]) == (60, "...a ")
    assert chosen == "...eginning, the same beginning, good"
    assert rejected.endswith("bad")
    assert text.excerpts(30)[1] == "...eginning, the same begin..."
