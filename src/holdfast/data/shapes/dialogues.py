r"""A dialogue in one text, as HH-RLHF has it -> messages.

The turns begin with "\n\nHuman: " and "\n\nAssistant: ". An open "\n\nAssistant:" at the end asks for the next turn and
holds nothing. Text is stripped of the white space around it, as each turn has some by the format alone. Given up: other
names of speakers.
"""

import re
import reprlib
from typing import Any

_TURN = re.compile(r"(?:^|\n\n)(Human|Assistant|System):[ \t]?")
_ROLES = {"Human": "user", "Assistant": "assistant", "System": "system"}


def is_dialogue(text: str) -> bool:
    """Whether a text begins as such a dialogue."""
    return text.startswith(("\n\nHuman:", "Human:", "\n\nAssistant:")) and "Assistant:" in text


def messages_of(text: str) -> list[dict[str, Any]]:
    """The messages of a dialogue. ValueError for a text that is none, or has text before its first turn."""
    turns = list(_TURN.finditer(text))
    if not turns or text[: turns[0].start()].strip():
        raise ValueError(
            'a dialogue in one text must begin with "\\n\\nHuman: " or "\\n\\nAssistant: "; found '
            f"{reprlib.repr(text)}. Correct the row, or leave out what makes `columns` read dialogues."
        )
    ends = [*(turn.start() for turn in turns[1:]), len(text)]
    contents = [text[turn.end() : end].strip() for turn, end in zip(turns, ends, strict=True)]
    messages = [{"role": _ROLES[turn[1]], "content": content} for turn, content in zip(turns, contents, strict=True)]
    return messages[:-1] if messages[-1] == {"role": "assistant", "content": ""} else messages
