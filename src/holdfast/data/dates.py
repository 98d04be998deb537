"""The date that chat templates print: one for the whole run, so that a row has the same token ids tomorrow.

Many templates print the day with `strftime_now`, which transformers computes from the clock. Here a macro of that name
is put before the template. It prints the run's date: `template_date`, or the day on which the run began. Checkpoints
record that day. Given up: the time of day, which is always midnight.
"""

import json
import string
from collections.abc import Iterable, Mapping
from datetime import date, datetime
from functools import lru_cache
from typing import Any

from accelerate.utils import broadcast_object_list
from datasets import Dataset, IterableDataset, Json
from transformers import PreTrainedTokenizerBase

from holdfast.data.columns import CHOSEN_IDS
from holdfast.data.mixing.mixture import first_rows
from holdfast.data.reading.written import may_hold_messages
from holdfast.data.shapes.mapping import ColumnMapping
from holdfast.data.shapes.row import converted_row

FUNCTION = "strftime_now"
"""What a template calls to print the date."""

_LETTERS, _FLAGS = string.ascii_letters, "-_0^#"

# The macro prints no white space: the newline after a block belongs to the block, as in all chat templates.
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
    """Today's date as YYYY-MM-DD, by the machine's clock."""
    return date.today().isoformat()


def check_date(template_date: Any) -> None:
    """ValueError where `template_date` is not a date as YYYY-MM-DD."""
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
def template_with_date(template: str, template_date: str) -> str:
    """The chat template, in which `strftime_now` prints that date. A template that does not call it stays as it is.

    A macro of that name is used, since transformers passes only its own functions to templates. The macro replaces each
    directive (`%Y`, `%-d`) by what `strftime` gives for it.
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
    tokenizer: PreTrainedTokenizerBase,
    template_date: str | None,
    checkpoint_date: str | None,
    datasets: Iterable[Any],
    columns: ColumnMapping | None = None,
) -> str | None:
    """The date that the templates of a run print, the same on all processes; None where none prints a date.

    It is the option `template_date`, else the `checkpoint_date` that the checkpoint to resume records, else today's.
    `columns` says which columns of the datasets are what. Raises ValueError where `template_date` is set and no date is
    printed.
    """
    parts = [part for data in datasets for part in (data.values() if isinstance(data, Mapping) else [data])]
    if prints_date(tokenizer) and any(has_messages(part, columns) for part in parts):
        date_of_main = [template_date or checkpoint_date or today()]  # midnight may pass between two processes
        return broadcast_object_list(date_of_main)[0]
    if template_date is not None:
        why = "the rows hold no messages" if prints_date(tokenizer) else f"the chat template does not call `{FUNCTION}`"
        raise ValueError(
            f"template_date={template_date!r} was asked for, but no date is printed: {why}. Drop template_date."
        )
    return None


def has_messages(dataset: Any, columns: ColumnMapping | None = None) -> bool:
    """Whether the first row may hold messages, which go through the chat template; of a mixture, that of any source. A
    column that mixes messages with text counts as messages."""
    if not isinstance(dataset, Dataset | IterableDataset):
        return False
    if isinstance((dataset.features or {}).get("chosen"), Json):
        return True
    rows = [row for row in first_rows(dataset) if row and CHOSEN_IDS not in row]
    return any(may_hold_messages(row if columns is None else converted_row(row, columns)) for row in rows)
