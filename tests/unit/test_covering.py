"""A covering array holds what it promises, needs each of its rows, and is the same in every run."""

import itertools
from dataclasses import astuple
from typing import Any

import pytest

from covering import covered, covering, mark_nightly
from table import CELLS, COVERING

TABLES = {
    "references": [astuple(cell) for cell in CELLS],
    "three switches": list(itertools.product([False, True], repeat=3)),
    "with holes": [row for row in itertools.product("abc", range(4), range(3)) if row[:2] != ("b", 2)],
    "one factor": [(1,), (2,), (3,)],
}


@pytest.mark.parametrize("strength", [1, 2, 3])
@pytest.mark.parametrize("name", TABLES)
def test_every_combination_is_covered(name: str, strength: int) -> None:
    rows = TABLES[name]
    chosen = covering(rows, strength)
    assert covered(chosen, strength) == covered(rows, strength)
    assert set(chosen) <= set(rows)
    assert len(chosen) == len(set(chosen))


def test_pairs_of_three_switches_need_four_rows() -> None:
    """Two switches have four pairs of values, and four of the eight rows suffice for all three pairs of switches."""
    assert len(covering(TABLES["three switches"], 2)) == 4


def test_each_value_once_needs_as_many_rows_as_the_longest_factor() -> None:
    assert len(covering(TABLES["with holes"], 1)) == 4


@pytest.mark.parametrize("strength", [1, 2, 3])
@pytest.mark.parametrize("name", TABLES)
def test_each_row_is_needed(name: str, strength: int) -> None:
    rows = TABLES[name]
    chosen = covering(rows, strength)
    for dropped in chosen:
        assert covered([row for row in chosen if row != dropped], strength) < covered(rows, strength)


def test_the_chosen_references_are_about_a_quarter() -> None:
    """7 kinds x 6 ways x 3 motions = 126 triples of the three longest factors, so no array has fewer cells."""
    chosen = [astuple(cell) for cell in COVERING]
    assert covered(chosen, 3) == covered(TABLES["references"], 3)
    assert 126 <= len(chosen) < 130 < len(CELLS) / 3


class _Item:
    """What `mark_nightly` asks of one of pytest's items."""

    def __init__(self, function: str, strength: int | None, **params: Any) -> None:
        self.function = function
        self.callspec = type("CallSpec", (), {"params": params})
        self._strength = strength
        self.marks: list[str] = []

    def get_closest_marker(self, name: str) -> Any:
        assert name == "covering"
        return None if self._strength is None else pytest.mark.covering(self._strength).mark

    def add_marker(self, marker: Any) -> None:
        self.marks.append(marker.name)


def _chosen(items: list[_Item]) -> list[tuple[int, ...]]:
    mark_nightly(items)
    assert all(item.marks in ([], ["nightly"]) for item in items)
    return [tuple(item.callspec.params.values()) for item in items if not item.marks]


def test_rows_of_a_marked_test_that_are_not_needed_become_nightly() -> None:
    product = [*itertools.product(range(3), range(2))]
    chosen = _chosen([_Item("f", 1, kind=kind, way=way) for kind, way in product])
    assert len(chosen) == 3
    assert {kind for kind, _ in chosen} == {0, 1, 2}
    assert {way for _, way in chosen} == {0, 1}
    assert _chosen([_Item("f", 2, kind=kind, way=way) for kind, way in product]) == product


def test_rows_of_other_tests_stay() -> None:
    unmarked, alone = _Item("g", None, kind=0), _Item("f", 1, kind=5, way=7)
    assert _chosen([unmarked, alone]) == [(0,), (5, 7)]
    mark_nightly(items := [_Item("f", 1, kind=0), _Item("g", 1, kind=0), _Item("g", 1, kind=0)])
    assert [item.marks for item in items] == [[], [], []], "each test has a table of its own"


@pytest.mark.covering(1)
@pytest.mark.parametrize("first", ["a", "b", "c"])
@pytest.mark.parametrize("second", [1, 2])
def test_pytest_chooses_by_these_marks(first: str, second: int, request: pytest.FixtureRequest) -> None:
    """Of these six rows three hold every value, and more run only where nightly rows were asked for."""
    ran = [item for item in request.session.items if getattr(item, "function", None) is request.function]
    assert len(ran) <= (3 if "not nightly" in request.config.option.markexpr else 6)
