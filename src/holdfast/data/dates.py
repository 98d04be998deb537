"""The date that chat templates print: one for the whole run, so that a row has the same token ids tomorrow.

Many templates print the day with `strftime_now`, which transformers answers from the clock. Here it is answered with
the run's date: `template_date`, or the day on which the run began, which its checkpoints record. Given up: the time of
day, which is midnight.
"""

import json
import string
from collections.abc import Iterable, Mapping
from datetime import date, datetime
from functools import lru_cache
from typing import Any

from accelerate.utils import broadcast_object_list
from datasets import Dataset, IterableDataset
from transformers import PreTrainedTokenizerBase

from holdfast.data.columns import CHOSEN_IDS

FUNCTION = "strftime_now"
"""What a template calls to print the date."""

_LETTERS, _FLAGS = string.ascii_letters, "-_0^#"

# No white space comes of it: the newline after a block belongs to the block, as in all chat templates.
_MACRO = """{%%- macro %(function)s(format) -%%}
{%%- set parts = namespace(done=[]) -%%}
{%%- for part in format.split('%%%%') -%%}
{%%- set text = namespace(now=part) -%%}
{%%- for directive, value in %(printed)s -%%}
{%%- set text.now = text.now.replace(directive, value) -%%}
{%%- endfor -%%}
{%%- set parts.done = parts.done + [text.now] -%%}
{%%- endfor -%%}
{{- parts.done | join('%%') -}}
{%%- endmacro %%}
"""


def today() -> str:
    """The date of the clock, as YYYY-MM-DD."""
    return date.today().isoformat()


def check_date(template_date: Any) -> None:
    """ValueError for what is no date."""
    try:
        is_date = date.fromisoformat(template_date).isoformat() == template_date
    except (TypeError, ValueError):
        is_date = False
    if not is_date:
        raise ValueError(
            f"template_date={template_date!r} was asked for; it is a date as YYYY-MM-DD. Write it so, for example "
            '"2026-01-31".'
        )


@lru_cache
def dated(template: str, template_date: str) -> str:
    """The chat template, in which `strftime_now` prints that date; one that does not call it as it is.

    A macro is put before it that takes the name, since transformers lets no function in beside its own. It is computed
    from what `strftime` gives for each directive.
    """
    if FUNCTION not in template:
        return template
    day = datetime.fromisoformat(template_date)
    directives = [f"%{flag}{letter}" for flag in ("", *_FLAGS) for letter in _LETTERS]
    printed = json.dumps([[directive, day.strftime(directive)] for directive in directives])
    return _MACRO % {"function": FUNCTION, "printed": printed} + template


def prints_date(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether a chat template of the tokenizer prints the date."""
    template: Any = tokenizer.chat_template
    templates = template.values() if isinstance(template, Mapping) else [template]
    return any(FUNCTION in text for text in templates if text)


def date_of_run(
    tokenizer: PreTrainedTokenizerBase, asked: str | None, recorded: str | None, datasets: Iterable[Any]
) -> str | None:
    """The date that the templates of a run print, on all processes: the one that was asked for, the one that the
    checkpoint records which the run is to go on from, or today's; None where none is printed.

    ValueError where one was asked for and none is printed.
    """
    parts = [part for data in datasets for part in (data.values() if isinstance(data, Mapping) else [data])]
    if prints_date(tokenizer) and any(map(_has_messages, parts)):
        found = [asked or recorded or today()]  # midnight may pass between two processes
        return broadcast_object_list(found)[0]
    if asked is not None:
        why = "the rows hold no messages" if prints_date(tokenizer) else f"the chat template does not call `{FUNCTION}`"
        raise ValueError(f"template_date={asked!r} was asked for, but no date is printed: {why}. Drop template_date.")
    return None


def _has_messages(dataset: Any) -> bool:
    """Whether the first row's completions are messages, which go through the chat template."""
    if not isinstance(dataset, Dataset | IterableDataset):
        return False
    row = next(iter(dataset), None) or {}
    return CHOSEN_IDS not in row and isinstance(row.get("chosen"), list)
