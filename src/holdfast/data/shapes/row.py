"""A row of another shape -> the columns that holdfast reads: `RowConverter`, made of a `Plan`.

What a row cannot say for itself is not guessed here: texts stay texts unless the plan makes messages of them, and
messages stay as they are, since `holdfast.data.formats` reads the ways in which they are written.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, final

from holdfast.data.shapes.answers import NoPairError, by_best, by_preference, by_scores
from holdfast.data.shapes.dialogues import is_dialogue, messages_of
from holdfast.data.shapes.mapping import PASSED_ON, ColumnMapping, Plan, plan
from holdfast.data.shapes.paths import name_of, value_at

_ROLES = {"prompt": "user", "chosen": "assistant", "rejected": "assistant"}


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class ConvertedRow:
    """The columns of a row as holdfast reads them. `no_pair` says why there is no pair in it; `chosen` and `rejected`
    are then the same."""

    columns: dict[str, Any]
    no_pair: str | None


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class RowConverter:
    """Converts rows by a plan. ValueError for a row that does not hold what the plan names."""

    plan: Plan

    @property
    def columns(self) -> list[str]:
        """The columns that a converted row has."""
        sides = {"prompt"} & self.plan.where.keys() | {"chosen", "rejected"} & self.plan.where.keys()
        if "responses" in self.plan.where or "prompt_and_chosen" in self.plan.where:
            sides |= {"chosen", "rejected"}
        if "prompt_and_chosen" in self.plan.where:
            sides |= {"prompt"}
        return [side for side in _ROLES if side in sides] + [key for key in PASSED_ON if key in self.plan.where]

    def __call__(self, row: Mapping[str, Any]) -> ConvertedRow:
        values, no_pair = self._sides(row)
        if self.plan.dialogues:
            values = {key: _as_dialogue(key, value, has_prompt="prompt" in values) for key, value in values.items()}
        if self.plan.as_messages:
            values = {key: _as_messages(key, value) for key, value in values.items()}
            values = self._with_system(self._with_history(values, row), row)
        passed_on = {key: self._value(row, key) for key in PASSED_ON if key in self.plan.where}
        return ConvertedRow(columns=values | passed_on, no_pair=no_pair)

    def _sides(self, row: Mapping[str, Any]) -> tuple[dict[str, Any], str | None]:
        where = self.plan.where
        values = {key: self._value(row, key) for key in ("chosen", "rejected") if key in where}
        if "prompt" in where:
            values = {"prompt": self._prompt(row)} | values
        if "prompt_and_chosen" in where:
            messages = self._value(row, "prompt_and_chosen")
            if not isinstance(messages, list) or len(messages) < 2:
                raise ValueError(
                    f"{self._name('prompt_and_chosen')!r} must hold the prompt's messages and the chosen one after "
                    f"them; found {messages!r:.200}. Correct the row or drop it."
                )
            values = {"prompt": messages[:-1], "chosen": messages[-1:]} | values
        if "responses" not in where:
            return values, None
        answers = self._answers(row)
        try:
            chosen, rejected = self._judged(row, answers)
        except NoPairError as error:
            same = answers[0] if answers else ""
            return values | {"chosen": same, "rejected": same}, str(error)
        return values | {"chosen": chosen, "rejected": rejected}, None

    def _judged(self, row: Mapping[str, Any], answers: list[Any]) -> tuple[Any, Any]:
        where = self.plan.where
        if "best" in where:
            names = [name_of(steps) for steps in where["responses"]]
            names = names if len(names) > 1 else [str(number) for number in range(len(answers))]
            return by_best(answers, names, self._value(row, "best"))
        if "preference" in where:
            return by_preference(answers, self._value(row, "preference"))
        key = "scores" if "scores" in where else "ranks"
        scores = self._values(row, key)
        return by_scores(answers, scores, less_is_better=key == "ranks")

    def _answers(self, row: Mapping[str, Any]) -> list[Any]:
        return self._values(row, "responses")

    def _values(self, row: Mapping[str, Any], key: str) -> list[Any]:
        """The values of several columns, or of one that holds a list."""
        steps = self.plan.where[key]
        if key in self.plan.is_several:
            return [value_at(row, each) for each in steps]
        values = value_at(row, steps[0])
        if not isinstance(values, list):
            raise ValueError(f"{name_of(steps[0])!r} must hold a list; found {values!r:.200}. Correct the row.")
        return values

    def _value(self, row: Mapping[str, Any], key: str) -> Any:
        return value_at(row, self.plan.where[key][0])

    def _prompt(self, row: Mapping[str, Any]) -> Any:
        """The prompt; texts of several columns, less the empty ones, are joined by a line break."""
        values = [value_at(row, steps) for steps in self.plan.where["prompt"]]
        if len(values) == 1:
            return values[0]
        if not all(value is None or isinstance(value, str) for value in values):
            raise ValueError(
                f"{self._name('prompt')!r} and the columns after it must hold text; found {values!r:.200}. Correct the "
                "row."
            )
        return "\n".join(value for value in values if value)

    def _with_history(self, values: dict[str, Any], row: Mapping[str, Any]) -> dict[str, Any]:
        """The prompt after earlier turns, which are pairs of what the user and the assistant said."""
        history = self._value(row, "history") if "history" in self.plan.where else None
        if not history or "prompt" not in values:
            return values
        messages = []
        for turn in history:
            if not isinstance(turn, list | tuple) or len(turn) != 2 or not all(isinstance(text, str) for text in turn):
                raise ValueError(
                    f"{self._name('history')!r} must hold pairs of two texts; found {turn!r:.200}. Correct the row."
                )
            messages += [{"role": "user", "content": turn[0]}, {"role": "assistant", "content": turn[1]}]
        return values | {"prompt": messages + values["prompt"]}

    def _with_system(self, values: dict[str, Any], row: Mapping[str, Any]) -> dict[str, Any]:
        """The conversation after a system message: the prompt, or both completions where they hold the prompt."""
        system = self._value(row, "system") if "system" in self.plan.where else None
        if system is None or (isinstance(system, str) and not system.strip()):
            return values
        if isinstance(system, list) and len(system) == 1 and isinstance(system[0], Mapping):
            system = system[0].get("content", system[0].get("value"))
        if not isinstance(system, str):
            raise ValueError(f"{self._name('system')!r} must hold text; found {system!r:.200}. Correct the row.")
        begins = ["prompt"] if "prompt" in values else ["chosen", "rejected"]
        return values | {key: _after_system(values[key], system) for key in begins}

    def _name(self, key: str) -> str:
        return name_of(self.plan.where[key][0])


def converted_row(row: Mapping[str, Any], columns: ColumnMapping) -> Mapping[str, Any]:
    """A row with holdfast's columns; the row itself where it cannot be converted, which is an error elsewhere."""
    try:
        return RowConverter(plan=plan(columns, list(row)))(row).columns
    except ValueError:
        return row


def _as_dialogue(key: str, value: Any, *, has_prompt: bool) -> Any:
    """The messages of a dialogue in one text. After a prompt, a text that is no dialogue is the assistant's answer."""
    if not isinstance(value, str):
        return value
    if key != "prompt" and has_prompt and not is_dialogue(value):
        return [{"role": "assistant", "content": value.strip()}]
    return messages_of(value)


def _as_messages(key: str, value: Any) -> Any:
    if isinstance(value, str):
        return [{"role": _ROLES[key], "content": value}]
    return [value] if isinstance(value, Mapping) else value


def _after_system(messages: Any, system: str) -> Any:
    if not isinstance(messages, list):
        return messages
    first = messages[0] if messages else None
    if isinstance(first, Mapping) and "system" in (first.get("role"), first.get("from")):
        found = first.get("content", first.get("value"))
        if found != system:
            raise ValueError(
                f"the row has two system messages: {system!r:.100} in its column, and {found!r:.100} as its first "
                "message. Leave one out: `columns` may have `system: null`."
            )
        return messages
    return [{"role": "system", "content": system}, *messages]
