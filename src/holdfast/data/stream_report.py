"""What is said about the rows of a stream while they are read, since their numbers are not known beforehand.

Each data loader worker has counts of its own.
"""

from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any, final

from holdfast.data.notes import TOPICS, Occurrence, Topic, rows_by_kind
from holdfast.data.token_columns import AS_TEXT, AS_TOKEN, CUT, NOTES
from holdfast.data.usability import prompt_is_cut, remedy, spells_special_tokens
from holdfast.data.verdicts import Judge

REASON = "holdfast_unusable"
"""The column with the reason for which a row cannot be used, or None."""


@final
class StreamReport:
    """True for a usable row of a stream; counts and reports the others. `decode` is the text of token ids, and `warn`
    gets each message."""

    def __init__(self, judge: Judge, decode: Callable[[list[int]], str], warn: Callable[[str], None]) -> None:
        self._judge = judge
        self._decode = decode
        self._warn = warn
        self._counts: Counter[str] = Counter()
        self._has_warned_of_cut = False
        self._has_warned_of_special_tokens = False
        self._said: set[Topic] = set()

    def __call__(self, row: Mapping[str, Any], index: int) -> bool:
        name = self._judge.name
        if len(row[CUT]) > 0 and not self._has_warned_of_cut:
            self._has_warned_of_cut = True
            where = f"in at least one row of the {name} dataset"
            self._warn(prompt_is_cut(where, self._decode(row[CUT]), f"row {index}"))
        if (row[AS_TEXT] or row[AS_TOKEN]) and not self._has_warned_of_special_tokens:
            self._has_warned_of_special_tokens = True
            as_text, as_token = (
                ("in at least one row", row[column], f"row {index}") if row[column] else None
                for column in (AS_TEXT, AS_TOKEN)
            )
            self._warn(spells_special_tokens(name, as_text, as_token))
        if len(row[NOTES]) > 0:  # an array, where the stream is formatted
            self._say_notes(rows_by_kind([(index, row[NOTES])]))
        reason = row[REASON]
        if reason is None:
            return True
        self._counts[reason] += 1
        count = self._counts[reason]
        is_power_of_ten = set(str(count)[1:]) <= {"0"} and str(count)[0] == "1"
        if is_power_of_ten:
            self._warn(
                f"{count} row(s) of the {name} dataset could not be used so far and were left out "
                f"({reason}; the latest: row {index}). Said at the 1st, 10th, 100th, ... such row of this process. "
                f"{remedy({reason: count}, self._judge.max_length)}"
            )
        return False

    def _say_notes(self, found: Mapping[str, tuple[list[int], str]]) -> None:
        """Warns of each topic at the first row that has a note of it."""
        for topic in TOPICS:
            kinds = [kind for kind in topic.kinds if kind in found]
            if not kinds or topic in self._said:
                continue
            self._said.add(topic)
            occurrences = {
                kind: Occurrence(where="in at least one row", detail=found[kind][1], row=f"row {found[kind][0][0]}")
                for kind in kinds
            }
            self._warn(topic.message(self._judge.name, occurrences))
