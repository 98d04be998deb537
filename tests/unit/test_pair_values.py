"""Numbers of pairs in columns of the data: every kind of value, in datasets and in rows as a collator gets them."""

import decimal
import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from datasets import Dataset

from holdfast.batch import PAIR_MARGINS, PAIR_WEIGHTS
from holdfast.data import pair_values
from holdfast.data.pair_values import check_pair_values, pair_value_columns, with_pair_values

INF, NAN = math.inf, math.nan
WEIGHT = "weight_column='w' says how much each pair counts, as a finite number of at least 0, at most 1e15, such as 1; "
MARGIN = (
    "margin_column='m' says the margin that each pair is to reach, as a finite number of at most 1e15 in size, such as "
    "0; "
)
REMEDY = ". Correct these rows, or leave the option out."


def naming(weight: str | None = None, margin: str | None = None) -> Any:
    return SimpleNamespace(weight_column=weight, margin_column=margin)


def collate(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """A collator that shows which columns it got."""
    return {"columns": [sorted(row) for row in rows]}


def collated(values: list[Any], *, column: str = "w", is_training: bool = True) -> Any:
    options = naming("w") if column == "w" else naming(margin="m")
    return with_pair_values(collate, options, is_training=is_training)([{"ids": [1], column: each} for each in values])


def test_the_columns_of_a_run() -> None:
    assert pair_value_columns(naming()) == []
    assert pair_value_columns(naming(margin="m")) == ["m"]
    assert pair_value_columns(naming("w", "m")) == ["w", "m"]
    assert with_pair_values(collate, naming(), is_training=True) is collate


def test_a_batch_with_both_columns() -> None:
    """The run's own collator does not see them; the numbers follow the rows, in fp32."""
    rows = [{"ids": [1], "w": 2.0, "m": -0.5}, {"ids": [2], "w": 0, "m": 3}]
    batch = with_pair_values(collate, naming("w", "m"), is_training=True)(rows)
    assert batch["columns"] == [["ids"], ["ids"]]
    for key, expected in ((PAIR_WEIGHTS, [2.0, 0.0]), (PAIR_MARGINS, [-0.5, 3.0])):
        assert batch[key].tolist() == expected
        assert batch[key].dtype == torch.float32


def test_whole_numbers_are_numbers() -> None:
    found = collated([1, 2])[PAIR_WEIGHTS]
    assert (found.tolist(), found.dtype) == ([1.0, 2.0], torch.float32)


def test_one_column_may_be_both() -> None:
    batch = with_pair_values(collate, naming("w", "w"), is_training=True)([{"w": 1.5}])
    assert batch[PAIR_WEIGHTS].tolist() == batch[PAIR_MARGINS].tolist() == [1.5]


@pytest.mark.parametrize(
    "value",
    [
        1.5,
        np.float32(1.5),
        np.float16(1.5),
        np.float64(1.5),
        np.array(1.5),
        torch.tensor(1.5),
        torch.tensor(1.5).half(),
    ],
    ids=str,
)
def test_numbers_of_a_formatted_stream(value: Any) -> None:
    assert collated([value, 2, np.int64(3)])[PAIR_WEIGHTS].tolist() == [1.5, 2.0, 3.0]


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (-1.0, "-1.0"), (-1e-30, "-1e-30"), (NAN, "nan"), (INF, "inf"), (-INF, "-inf"), (1.1e15, "1100000000000000.0"),
        (10**400, "1" + "0" * 59 + "..."), (None, "None"), (True, "True"), (np.True_, "True"),
        (torch.tensor(True), "True"), ("1", "'1'"), ("a\u202eb\x1b", r"'a\\u202eb\\x1b'"), ([1.0], "[1.0]"),
        (np.array([1.0]), "array([1.])"), (torch.tensor([1.0]), "tensor([1.])"), (1j, "1j"), ({}, "{}"),
        (decimal.Decimal("1.5"), "Decimal('1.5')"), (np.float32("nan"), "nan"), (b"1", "b'1'"),
    ],
    ids=repr,
)  # fmt: skip
def test_values_that_no_pair_may_have(value: Any, shown: str) -> None:
    """Whatever stands before it; a margin may be negative, and nothing else that a weight may not be."""
    shown = shown.replace("\\\\", "\\")
    with pytest.raises(ValueError) as raised:
        collated([1.0, value])
    assert str(raised.value) == f"{WEIGHT}a row has {shown}{REMEDY}"
    if shown.startswith("-1"):
        assert collated([value], column="m")[PAIR_MARGINS].tolist() == [pytest.approx(value)]
    else:
        with pytest.raises(ValueError) as raised:
            collated([1.0, value], column="m")
        assert str(raised.value) == f"{MARGIN}a row has {shown}{REMEDY}"


def test_the_largest_numbers() -> None:
    assert collated([1e15, 0.0])[PAIR_WEIGHTS].tolist() == pytest.approx([1e15, 0.0])
    assert collated([1e15, -1e15], column="m")[PAIR_MARGINS].tolist() == pytest.approx([1e15, -1e15])


def test_rows_without_the_column() -> None:
    """In training every row has it. In an evaluation either all rows have it, or none."""
    rows = [{"ids": [1], "w": 1.0}, {"ids": [2], "v": 1.0}]
    for is_training, some in ((True, rows), (True, rows[1:]), (False, rows)):
        with pytest.raises(ValueError) as raised:
            with_pair_values(collate, naming("w"), is_training=is_training)(some)
        assert str(raised.value) == f"{WEIGHT}a row has no such column, but ['ids', 'v']{REMEDY}"
    assert PAIR_WEIGHTS not in with_pair_values(collate, naming("w"), is_training=False)(rows[1:])
    both = with_pair_values(collate, naming("w", "m"), is_training=False)([{"m": 0.5}])
    assert PAIR_WEIGHTS not in both
    assert both[PAIR_MARGINS].tolist() == [0.5]


# --- datasets ---------------------------------------------------------------------------------------------------------


def of(values: Any, name: str = "train") -> dict[str, Dataset]:
    column = values if isinstance(values, pa.Array) else pa.array(values)
    return {name: Dataset(pa.table({"w": column}))}


@pytest.mark.parametrize(
    "values",
    [
        pa.array([1, 0, 3], pa.int8()), pa.array([1, 0, 3], pa.uint64()), pa.array([1.5, 0, 3], pa.float32()),
        pa.array(np.array([1.5, 0, 3], np.float16)), pa.array([0.0, 1e-37]), pa.array([1.0, 2.0]).dictionary_encode(),
        pa.array([1e15]),
    ],
    ids=lambda values: str(values.type),
)  # fmt: skip
def test_columns_that_are_numbers(values: pa.Array) -> None:
    check_pair_values(naming("w"), of(values))
    check_pair_values(naming("w"), {"train": of(values)["train"].with_format("torch")})


@pytest.mark.parametrize(
    ("values", "found"),
    [
        (pa.array([True, False]), "row 0 of the train dataset has True"),
        (pa.array(["1"]), "row 0 of the train dataset has '1'"),
        (pa.nulls(2), "row 0 of the train dataset has None"),
        (pa.array([1.0, None]), "row 1 of the train dataset has None"),
        (pa.array([1.0, NAN]), "row 1 of the train dataset has nan"),
        (pa.array([1.0, INF]), "row 1 of the train dataset has inf"),
        (pa.array([[1.0]]), "row 0 of the train dataset has [1.0]"),
        (pa.array([decimal.Decimal("1.5")]), "row 0 of the train dataset has Decimal('1.5')"),
        (pa.array([1.0, -0.5]), "row 1 of the train dataset has -0.5"),
        (pa.array([2**62]), f"row 0 of the train dataset has {2**62}"),
        (
            pa.array([0.0, 0.0]),
            "all rows of the train dataset have 0, so nothing would count (in fp32 less than 1e-45 is 0)",
        ),
        (
            pa.array([1e-50]),
            "all rows of the train dataset have 0, so nothing would count (in fp32 less than 1e-45 is 0)",
        ),
        (pa.array(["x" * 58]), f"row 0 of the train dataset has '{'x' * 58}'"),
        (pa.array(["x" * 100]), f"row 0 of the train dataset has '{'x' * 59}..."),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_columns_that_are_refused(values: pa.Array, found: str) -> None:
    with pytest.raises(ValueError) as raised:
        check_pair_values(naming("w"), of(values))
    assert str(raised.value) == f"{WEIGHT}{found}{REMEDY}"


def test_margins_may_all_be_zero_or_negative() -> None:
    for values in ([0.0, 0.0], [-2.0, 1e15]):
        check_pair_values(naming(margin="w"), of(values))


def test_a_row_beyond_the_first_part_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pair_values, "_ROWS_AT_A_TIME", 2)
    with pytest.raises(ValueError, match=r"row 4 of the train dataset has -1\.0"):
        check_pair_values(naming("w"), of([1.0, 1.0, 1.0, 1.0, -1.0]))
    check_pair_values(naming("w"), of([0.0, 0.0, 1.0, 0.0, 0.0]))  # not all rows have 0


def test_only_the_training_set_must_have_the_column() -> None:
    other = Dataset.from_dict({"v": [1.0]})
    check_pair_values(naming("w"), of([1.0]) | {"eval": other, "stream": other.to_iterable_dataset()})
    check_pair_values(naming(), {"train": other})
    with pytest.raises(ValueError, match=r"row 0 of the eval dataset has -1\.0"):
        check_pair_values(naming("w"), of([1.0]) | of([-1.0], "eval"))
    message = (
        r"margin_column='w' was asked for; found no such column in the train dataset, but \['v'\]\. Add it, with a"
    )
    with pytest.raises(ValueError, match=message):
        check_pair_values(naming(margin="w"), {"train": other})
