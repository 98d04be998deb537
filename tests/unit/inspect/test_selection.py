"""Pairs chosen by a margin: the eight pairs of `ranked_pairs` by hand, laws on drawn numbers, and the file of rows.

With D = log p(chosen) - log p(rejected):

    place                   0       1     2     3       4     5      6      7
    D of the reference      2      -8    -4     5       0   -20     12     -2
    D of the policy        -1       3    -1    15      -1     5   15.7     -2
    the difference         -3      11     3    10      -1    25    3.7      0
"""

import datetime
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st

from holdfast.data.load import load_preferences
from holdfast.inspect.run_numbers import DatasetNumbers, RunNumbers
from holdfast.inspect.selection.choice import chosen, num_chosen
from holdfast.inspect.selection.file import check_column, check_output, write_rows
from holdfast.inspect.selection.margins import are_one_model, margins_by
from holdfast.inspect.selection.request import By, Keep, Request
from holdfast.inspect.selection.selection import select, selection_lines
from ranked_pairs import AFTER_CHOSEN, AFTER_REJECTED, eight_pairs

BEFORE, AFTER = eight_pairs(), eight_pairs(AFTER_CHOSEN, AFTER_REJECTED)
IMPLICIT = [-0.3, 1.1, 0.3, 1.0, -0.1, 2.5, 0.37, 0.0]
TIES = [1.0, 1.0, 1.0, 0.0]


@pytest.mark.parametrize(
    ("by", "per_token", "expected"),
    [
        (By.IMPLICIT, False, IMPLICIT),
        (By.REFERENCE, False, [2, -8, -4, 5, 0, -20, 12, -2]),
        (By.POLICY, False, [-1, 3, -1, 15, -1, 5, 15.7, -2]),
        (By.REFERENCE, True, [0, 1, -1, 1, 2, -2, 2, -1]),
        # place 3 of the policy: -4 / 2 + 19 / 3 = 4.33333; of the reference 1; 0.1 * 3.33333
        (By.IMPLICIT, True, [0.1 * (-2.4 + 11 / 6), 0.2, 0.2, 1 / 3, 0.0, 0.25, 0.11, 0.005]),
    ],
)
def test_margins_by_hand(by, per_token, expected):
    found = margins_by(by, BEFORE, AFTER, beta=0.1, per_token=per_token)
    assert found.tolist() == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize(
    ("values", "share", "keep", "expected"),
    [
        (IMPLICIT, 0.5, Keep.SMALLEST, [0, 2, 4, 7]),
        (IMPLICIT, 0.5, Keep.LARGEST, [1, 3, 5, 6]),
        (IMPLICIT, 0.5, Keep.MIDDLE, [2, 3, 6, 7]),  # in order 0 4 | 7 2 6 3 | 1 5
        (IMPLICIT, 0.375, Keep.MIDDLE, [2, 6, 7]),  # 0 4 | 7 2 6 | 3 1 5
        (np.abs(IMPLICIT), 0.25, Keep.SMALLEST, [4, 7]),
        (IMPLICIT, 1.0, Keep.SMALLEST, [*range(8)]),
        (IMPLICIT, 0.001, Keep.LARGEST, [5]),
        (TIES, 0.5, Keep.SMALLEST, [0, 3]),
        (TIES, 0.5, Keep.LARGEST, [0, 1]),
        ([7.0] * 100, 0.3, Keep.SMALLEST, [*range(30)]),
        ([7.0] * 100, 0.3, Keep.LARGEST, [*range(30)]),
    ],
)
def test_choices_by_hand(values, share, keep, expected):
    assert chosen(np.array(values, dtype=float), share, keep).tolist() == expected


@pytest.mark.parametrize(
    ("share", "num_pairs", "expected"), [(0.5, 3, 2), (0.25, 10, 3), (0.3, 10, 3), (0.001, 8, 1), (1.0, 7, 7)]
)
def test_how_many_a_share_is(share, num_pairs, expected):
    assert num_chosen(share, num_pairs) == expected


@given(st.lists(st.floats(-50, 50), min_size=1, max_size=40), st.floats(0.01, 1.0), st.sampled_from(Keep))
def test_laws_of_a_choice(numbers, share, keep):
    """As many as the share says, each once and in order; those left out of the smallest are no smaller, and so on."""
    values = np.array(numbers)
    places = chosen(values, share, keep, seed=3)
    assert len(places) == num_chosen(share, len(values))
    assert (np.diff(places) > 0).all()
    rest = np.delete(values, places)
    if len(rest) and keep is Keep.SMALLEST:
        assert values[places].max() <= rest.min()
    if len(rest) and keep is Keep.LARGEST:
        assert values[places].min() >= rest.max()
    if keep is Keep.MIDDLE:
        below, above = (rest <= values[places].min()).sum(), (rest >= values[places].max()).sum()
        assert below + above >= len(rest)
    assert places.tolist() == chosen(values, share, keep, seed=3).tolist()


def test_drawn_pairs_depend_on_the_seed_alone():
    drawn = [
        chosen(np.full(100, value), 0.2, Keep.RANDOM, seed=seed).tolist() for value, seed in ((0, 1), (5, 1), (0, 2))
    ]
    assert drawn[0] == drawn[1] != drawn[2]


# What is said --------------------------------------------------------------------------------------------------------


def numbers_of(policy: Any = AFTER) -> tuple[RunNumbers, DatasetNumbers]:
    """The numbers of a run with these pairs in every tenth of 80 rows."""
    loaded = Dataset.from_dict({"id": [*range(80)]})
    dataset = DatasetNumbers(
        name="train", reference=BEFORE, policy=policy, rows=loaded.select(range(8)), loaded=loaded, places=None
    )
    nothing: Any = None
    run = RunNumbers(
        model="model", reference="model, as it starts to train", reference_digest="0", policy="out", beta=0.1,
        datasets=(dataset,), not_read={}, notes=(), cutting=nothing, tokenizer=nothing,
    )  # fmt: skip
    return run, dataset


def test_what_is_said_of_a_selection():
    """Places 0, 2, 4, 7: -0.3, 0.3, -0.1, 0; rows 0, 20, 40, 70. Maths has the places 0, 2, 4, 6, prose the others."""
    selection = select(*numbers_of(), Request(share=0.5, keep=Keep.SMALLEST))
    assert selection.rows.tolist() == [0, 20, 40, 70]
    lines = ["".join(span.text for span in line) for line in selection_lines(selection, ("A note.",), None)]
    assert lines == [
        "A note.",
        "train: 4 of 8 pairs, smallest",
        "  implicit reward margin (beta 0.100): -0.300 to 2.50, median 0.335; of the chosen ones -0.300 to 0.300, "
        "median -0.0500",
        "  72 of 80 rows are not used by the run, and not chosen",
        "  source  pairs  chosen   share  least margin   most",
        "  maths       4       3  75.0 %        -0.300  0.300",
        "  prose       4       1  25.0 %             0      0",
    ]


def test_the_text_of_the_page_is_what_is_said():
    """The page's run uses all its rows and has no note."""
    page = (Path(__file__).parents[3] / "docs" / "howto" / "select.md").read_text("utf-8")
    shown = page.split("```text\n")[1].split("```")[0].splitlines()
    selection = replace(select(*numbers_of(), Request(share=0.5, keep=Keep.SMALLEST)), num_rows=8)
    lines = ["".join(span.text for span in line).rstrip() for line in selection_lines(selection, (), 115)]
    assert lines == shown


def test_the_absolute_margin_is_what_is_gone_by():
    """Absolute values 0.3 1.1 0.3 1.0 0.1 2.5 0.37 0: the smallest two are at 4 and 7, their median is 0.05."""
    selection = select(*numbers_of(), Request(share=0.25, keep=Keep.SMALLEST, is_absolute=True))
    assert selection.places.tolist() == [4, 7]
    assert selection.margins.tolist() == pytest.approx(IMPLICIT)
    line = "".join(span.text for span in [*selection_lines(selection, (), None)][1])
    assert line.startswith("  absolute implicit reward margin (beta 0.100): 0 to 2.50, median 0.335;")
    assert line.endswith("of the chosen ones 0 to 0.100, median 0.0500")


def test_margins_in_words():
    assert (
        Request(share=1, keep=Keep.LARGEST, by=By.REFERENCE, per_token=True).title
        == "margin of the reference per token"
    )
    assert Request(share=1, keep=Keep.LARGEST, by=By.POLICY).title == "margin of the policy"


def test_a_policy_that_is_the_reference_is_refused():
    same = replace(BEFORE, chosen_logps=BEFORE.chosen_logps + 1e-5)
    assert are_one_model(BEFORE, same)
    assert not are_one_model(BEFORE, replace(BEFORE, rejected_logps=BEFORE.rejected_logps + 0.1))
    with pytest.raises(ValueError, match=r"both give the same log-probs.*Name the output folder"):
        select(*numbers_of(same), Request(share=0.5, keep=Keep.SMALLEST))
    assert len(select(*numbers_of(same), Request(share=0.5, keep=Keep.RANDOM)).places) == 4


# The file ------------------------------------------------------------------------------------------------------------

ROWS: list[dict[str, Any]] = [
    {
        "prompt": [{"role": "user", "content": "Wie geht's? \u202e"}],
        "chosen": [
            {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": {"a": 1}}}]},
            {"role": "tool", "content": "1"},
        ],
        "rejected": [{"role": "assistant", "content": "gut\n"}],
        "score": 0.1,
        "tags": ["a", "b"],
    },
    {
        "prompt": [{"role": "user", "content": "x"}],
        "chosen": [{"role": "assistant", "content": "y"}],
        "rejected": [{"role": "assistant", "content": "z"}],
        "score": 1e-17,
        "tags": [],
    },
    {
        "prompt": [{"role": "user", "content": "u"}],
        "chosen": [{"role": "assistant", "content": "v"}],
        "rejected": [{"role": "assistant", "content": "w"}],
        "score": -3.0,
        "tags": ["c"],
    },
]


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.parquet"])
def test_rows_are_read_back_as_they_were(tmp_path, name):
    source = tmp_path / "all.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-8")
    dataset: Any = load_preferences(source)
    write_rows(dataset, np.array([0, 2]), tmp_path / name, column="margin", values=np.array([0.1, -2.5]))
    found: Any = load_preferences(tmp_path / name)
    assert found["margin"][:] == [0.1, -2.5]
    assert [*found.remove_columns("margin")] == [dataset[0], dataset[2]]
    if name == "rows.jsonl":
        lines = [json.loads(line) for line in (tmp_path / name).read_text("utf-8").splitlines()]
        assert lines == [{**ROWS[0], "margin": 0.1}, {**ROWS[2], "margin": -2.5}]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(["all.jsonl", name])


def test_what_json_has_no_word_for_is_refused(tmp_path):
    dataset = Dataset.from_dict({"when": [datetime.datetime(2026, 1, 1)], "x": [1]})
    with pytest.raises(ValueError, match=r"the column 'when'.*ends in \.parquet"):
        write_rows(dataset, np.array([0]), tmp_path / "rows.jsonl")
    with pytest.raises(ValueError, match=r"the column 'x'.*ends in \.parquet"):
        write_rows(Dataset.from_dict({"x": [1.0, math.nan]}), np.array([0, 1]), tmp_path / "rows.jsonl")
    assert not any(tmp_path.iterdir())
    write_rows(dataset, np.array([0]), tmp_path / "rows.parquet")
    assert load_preferences(tmp_path / "rows.parquet")["when"][0] == datetime.datetime(2026, 1, 1)


def test_files_and_columns_that_cannot_be(tmp_path):
    (tmp_path / "there.jsonl").write_text("")
    (tmp_path / "link.parquet").symlink_to("nowhere")
    for name, message in (
        ("there.jsonl", "there already"), ("link.parquet", "there already"), ("rows.csv", r"\.jsonl or \.parquet"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            check_output(tmp_path / name)
    check_output(tmp_path / "rows.parquet")
    dataset = Dataset.from_dict({"prompt": ["a"], "id": [1]})
    for name, message in (("id", "is a column of the data"), (" ", "is empty")):
        with pytest.raises(ValueError, match=message):
            check_column(name, dataset)
    check_column("margin", dataset)
