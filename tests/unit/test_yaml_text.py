"""YAML text -> values: the core schema of YAML 1.2 and nothing beside it, in bounded time; refusals have a line."""

import pytest

from holdfast.cli.yaml_text import MAX_DEPTH, MAX_VALUES, NotReadableError, parsed, plain_scalar

NINES = "9" * 309


def chained(link: str, length: int = 40) -> str:
    """Anchors `a0`, `a1`, ...; each one's value is `link` of the one before it."""
    return "a0: &a0 {x: 1}\n" + "".join(f"a{i}: &a{i} {link.replace('@', f'*a{i - 1}')}\n" for i in range(1, length))


REFUSED = {
    "a whole number that is none": ("\na: !!int abc", 2, "'abc' is not a value of the tag `!!int`"),
    "a truth value that is none": ("a: !!bool x", 1, "'x' is not a value of the tag `!!bool`"),
    "nothing that is something": ("a: !!null x", 1, "'x' is not a value of the tag `!!null`"),
    "a date": ("a: !!timestamp 2020-99-99", 1, "the tag `!!timestamp` cannot be used"),
    "bytes": ("a: !!binary '###'", 1, "the tag `!!binary` cannot be used"),
    "a set": ("a: !!set {x}", 1, "the tag `!!set` cannot be used"),
    "an ordered mapping": ("a: !!omap [x: 1]", 1, "the tag `!!omap` cannot be used"),
    "pairs": ("a: !!pairs [x: 1]", 1, "the tag `!!pairs` cannot be used"),
    "a list that is called a mapping": ("a: !!map [1]", 1, "the tag `!!map` cannot be used"),
    "a list that is called text": ("a: !!str [1]", 1, "the tag `!!str` cannot be used"),
    "a tag of one's own": ("a: !mine x", 1, "the tag `!mine` cannot be used"),
    "code": ("a: !!python/object/apply:os.system [x]", 1, "the tag `!!python/object/apply:os.system` cannot be used"),
    "309 digits": (f"a: {NINES}", 1, r"the number 99.*\(309 characters\) is too large"),
    "5000 digits": (f"a: -{'9' * 5000}", 1, r"the number -99.*\(5,001 characters\) is too large"),
    "309 digits and a fraction": (f"a: {NINES}.5", 1, "is too large"),
    "an exponent beyond the range": ("a: 1e400", 1, "the number 1e400 is too large: the largest is 1.8e308"),
    "a long exponent": (f"a: 1e{'9' * 5000}", 1, "is too large"),
    "an exponent below the range": ("a: 1e-400", 1, "the number 1e-400 is too small to differ from 0"),
    "NUL": ("a: 1\nb: \0", 2, r"the character '\\x00' is not allowed in YAML"),
    "an escape sequence": ("a: \x1b[31m", 1, r"the character '\\x1b' is not allowed in YAML"),
    "half of a surrogate pair": ('a: "\\ud800"', 1, r"text cannot hold the character '\\ud800'"),
    "beyond Unicode": ('a: "\\U00110000"', 1, "not in range"),
    "a version of 5000 digits": (f"%YAML 1.{'9' * 5000}\n---\na: 1", 1, "digits"),
    "deep lists": (f"a: {'[' * 3000}", 1, f"values are nested more than {MAX_DEPTH} deep"),
    "deep mappings": ("{a: " * 3000, 1, f"values are nested more than {MAX_DEPTH} deep"),
    "deep blocks": ("- " * 3000, 1, f"values are nested more than {MAX_DEPTH} deep"),
    "deep keys": ("? " * 3000, 1, f"values are nested more than {MAX_DEPTH} deep"),
    "deep by aliases": (chained("[@]", 3000), 63, f"values are nested more than {MAX_DEPTH} deep"),
    "many by aliases": (chained("{p: @, q: @}"), 16, f"there are more than {MAX_VALUES:,} values"),
    "many by merges": (chained("{<<: [@, @]}"), 16, f"there are more than {MAX_VALUES:,} values"),
    "itself in a list": ("a: &a [*a]", 1, "an alias stands inside of what it names"),
    "itself in a mapping": ("a: &a\n  b: {<<: *a}", 2, "an alias stands inside of what it names"),
    "an alias of nothing": ("a: *a", 1, "undefined alias"),
    "no key": ("null: x", 1, "the key `null` is read as None, and a key is text; put it in quotes"),
    "a truth value as key": ("true: x", 1, "the key `true` is read as True"),
    "a fraction as key": ("1.5: x", 1, "the key `1.5` is read as 1.5"),
    "a list as key": ("[a]: x", 1, "found unhashable key: it is a list"),
    "a mapping as key": ("{a: 1}: x", 1, "found unhashable key: it is a mapping"),
    "a key in two spellings": ("{1: a, +1: b}", 1, "the key `1` is given twice"),
    "a number and its text as keys": ("1: a\n'1': b", 2, "the key `1` is given twice"),
    "a merge of a number": ("<<: 3", 1, "`<<` takes a mapping"),
    "a merge of numbers": ("<<: [3]", 1, "`<<` takes a mapping"),
    "two documents": ("a: 1\n---\nb: 2", 2, "another document"),
    "a tab": ("\ta: 1", 1, "cannot start any token"),
    "no end": ("a: [1", 1, "expected"),
    "a megabyte": ("#" * 1_000_001, None, "it has 1,000,001 bytes, and at most 1,000,000 are read"),
}


@pytest.mark.parametrize(("text", "line", "problem"), REFUSED.values(), ids=REFUSED.keys())
def test_what_is_refused_has_its_line(text, line, problem):
    with pytest.raises(NotReadableError, match=problem) as error:
        parsed(text)
    assert error.value.line == line


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("", None),
        ("# nothing", None),
        ("a: !!int '5'", {"a": 5}),
        ("a: !!float 1", {"a": 1.0}),
        ("a: !!str 5", {"a": "5"}),
        ("a: !!null ''", {"a": None}),
        ("a: !!seq [!!bool true]", {"a": [True]}),
        ("a: 0e999999999", {"a": 0.0}),
        (f"a: {'9' * 308}", {"a": int("9" * 308)}),
        ("0: x\ncpu: y", {0: "x", "cpu": "y"}),
        ('"<<": 1', {"<<": 1}),
        ("a: &a [1]\nb: [*a, *a]", {"a": [1], "b": [[1], [1]]}),
        ("- &b {p: 1}\n- &t {<<: *b, p: 2}\n- {<<: *t, q: 3}", [{"p": 1}, {"p": 2}, {"p": 2, "q": 3}]),
        ("{<<: [{p: 1, q: 1}, {p: 2, r: 2}], q: 3}", {"p": 1, "q": 3, "r": 2}),
    ],
)
def test_what_is_read(text, value):
    assert parsed(text).value == value


def test_the_deepest_value():
    value = parsed("[" * MAX_DEPTH + "]" * MAX_DEPTH).value
    for _ in range(MAX_DEPTH - 1):
        (value,) = value
    assert value == []


def test_aliases_are_values_of_their_own():
    first, second = parsed("[&a {x: 1}, *a]").value
    assert first == second
    assert first is not second


def test_each_key_has_the_line_on_which_it_was_written():
    text = "a: &a\n  x: 1\n  y: 2\nb:\n  <<: *a\n  y: 3\nc:\n- 1\n- z: 2\n"
    assert parsed(text).lines == {
        "a": 1, "a.x": 2, "a.y": 3, "b": 4, "b.x": 2, "b.y": 6, "c": 7, "c.0": 8, "c.1": 9, "c.1.z": 9,
    }  # fmt: skip


@pytest.mark.parametrize(("text", "value"), [("1e-6", 1e-6), ("no", "no"), ("~", None), ("[1", "[1"), ("010", 10.0)])
def test_a_scalar_without_quotes(text, value):
    assert plain_scalar(text) == value
