"""`Note`: what is to be said of a row that is used. `holdfast.data.notes` says it, and imports who makes notes."""

from typing import NamedTuple


class Note(NamedTuple):
    """Something about a row: its kind, one of those in `notes.TOPICS`, and what was found, in a few words."""

    kind: str
    detail: str
