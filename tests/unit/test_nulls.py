"""A None that was written stays; one that Arrow has added, or that means nothing, goes."""

import datetime
import decimal
import json
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

from holdfast.data.formats import Preference, read_preference
from holdfast.data.load import load_preferences

USER, GOOD, BAD = ({"role": role, "content": text} for role, text in [("user", "a"), ("assistant", "b"), ("tool", "c")])


def tool(name: str = "tides", required: Any = None, **parameters: Any) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "object", "properties": parameters}
    if required is not None:
        schema["required"] = required
    return {"type": "function", "function": {"name": name, "parameters": schema}}


def row(tools: Any = None, arguments: Any = None, name: str = "tides") -> dict[str, Any]:
    chosen: dict[str, Any] = GOOD
    if arguments is not None:
        function = {"name": name, "arguments": arguments}
        chosen = {"role": "assistant", "content": "b", "tool_calls": [{"type": "function", "function": function}]}
    return {"prompt": [USER], "chosen": [chosen], "rejected": [BAD], **({} if tools is None else {"tools": tools})}


def properties(read: Preference) -> Any:
    assert read.tools is not None
    return read.tools[0]["function"]["parameters"]["properties"]


def arguments(read: Preference) -> Any:
    return read.chosen[0]["tool_calls"][0]["function"]["arguments"]  # type: ignore[index]


def from_arrow(*rows: dict[str, Any]) -> list[Preference]:
    data = Dataset.from_list(list(rows))
    return [read_preference(each, data.features) for each in data]  # type: ignore[arg-type]


TEXT, MAYBE = {"type": "string"}, {"type": ["string", "null"]}
SCHEMAS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "a type": (MAYBE, MAYBE),
    "nullable": ({**TEXT, "nullable": True}, {**TEXT, "nullable": True}),
    "any of": ({"anyOf": [TEXT, {"type": "null"}]}, {"anyOf": [TEXT, {"type": "null"}]}),
    "one of": ({"oneOf": [TEXT, {"type": "null"}]}, {"oneOf": [TEXT, {"type": "null"}]}),
    "among values": ({"enum": ["a", None]}, {"enum": ["a", None]}),
}


@pytest.mark.parametrize(("schema", "expected"), SCHEMAS.values(), ids=SCHEMAS)
def test_a_default_that_the_schema_allows_stays(schema: dict[str, Any], expected: dict[str, Any]) -> None:
    """Whatever is known of the column; a description that is None is no description."""
    given = {**schema, "default": None, "description": None}
    read = read_preference(row([tool(day=given)]))
    assert properties(read) == {"day": {**expected, "default": None}}


def test_a_default_that_no_row_has_otherwise_was_written() -> None:
    (read,) = from_arrow(row([tool(day={**TEXT, "default": None})]))
    assert properties(read) == {"day": {**TEXT, "default": None}}


def test_a_default_that_other_tools_have_was_added() -> None:
    first, second = from_arrow(
        row([tool(day={**TEXT, "default": "Monday", "enum": ["Monday"]})]), row([tool(day=TEXT), tool("x", hour=TEXT)])
    )
    assert properties(first) == {"day": {**TEXT, "default": "Monday", "enum": ["Monday"]}}
    assert second.tools == [tool(day=TEXT), tool("x", hour=TEXT)]


ARGUMENTS: dict[str, tuple[Any, dict[str, Any], dict[str, Any]]] = {
    "required": ([tool(hour=TEXT, required=["hour"])], {"hour": None}, {"hour": None}),
    "allowed": ([tool(hour=MAYBE)], {"hour": None}, {"hour": None}),
    "neither": ([tool(hour=TEXT)], {"day": "x", "hour": None}, {"day": "x"}),
    "of another tool": ([tool(day=TEXT), tool("x", hour=MAYBE)], {"day": "x", "hour": None}, {"day": "x"}),
    "without tools": (None, {"day": "x", "hour": None}, {"day": "x"}),
    "in a list": (None, {"days": ["x", None]}, {"days": ["x", None]}),
}


@pytest.mark.parametrize(("tools", "given", "expected"), ARGUMENTS.values(), ids=ARGUMENTS)
def test_arguments_of_which_nothing_else_is_known(tools: Any, given: dict[str, Any], expected: dict[str, Any]) -> None:
    assert arguments(read_preference(row(tools, given))) == expected


def test_arguments_in_a_column() -> None:
    """`hour` is None wherever it stands, so somebody has written it; `day` stands in one row alone."""
    first, second = from_arrow(row(None, {"hour": None, "day": "x"}), row(None, {"hour": None}))
    assert (arguments(first), arguments(second)) == ({"hour": None, "day": "x"}, {"hour": None})
    tools = [tool(day=TEXT), tool("x", hour=TEXT)]
    first, second = from_arrow(row(tools, {"day": "x"}), row(tools, {"hour": None}, name="x"))
    assert (arguments(first), arguments(second)) == ({"day": "x"}, {"hour": None})


@pytest.mark.parametrize("others", [{"hour": "x"}, {"day": 1}, {"hour": {"a": None}}])
def test_a_file_of_json_keeps_what_is_written(others: dict[str, Any], tmp_path: Path) -> None:
    """In whatever way other rows differ."""
    rows = [
        row([tool(hour={**TEXT, "default": None})], {"hour": None}),
        row([tool(hour={**TEXT, "default": "x"})], others),
    ]
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    loaded: Any = load_preferences(file)
    for given, each in zip(rows, loaded, strict=True):
        read = read_preference(each, loaded.features)
        assert read.tools == given["tools"]
        assert read.chosen == given["chosen"]


def test_keys_of_messages_go_in_files_too(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps({**row(), "prompt": [{**USER, "name": None, "tool_calls": None}]}))
    loaded: Any = load_preferences(file)
    assert read_preference(loaded[0], loaded.features).prompt == [USER]


def test_dates_and_decimals_are_written_as_json_has_them() -> None:
    given = {
        "day": datetime.date(2026, 11, 29),
        "at": datetime.datetime(2026, 11, 29, 6, 30),
        "hour": datetime.time(6, 30),
        "price": decimal.Decimal("1.50"),
        "count": decimal.Decimal("2"),
    }
    assert arguments(read_preference(row(None, given))) == {
        "day": "2026-11-29",
        "at": "2026-11-29T06:30:00",
        "hour": "06:30:00",
        "price": 1.5,
        "count": 2,
    }
