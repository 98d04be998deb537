"""What a parser of command lines had no use for, while it makes the dataclasses of a script.

`HfArgumentParser` of transformers makes its dataclasses first, and names the words that none of them knows afterwards,
in an error of its own. Here they are read from its frame, which a config is made under, so that it can say what to
write instead of each. Where the parser no longer has such variables, nothing is found and its own error stands.
"""

import sys
from collections.abc import Iterator, Mapping
from dataclasses import fields
from types import FrameType
from typing import Any


def callers(*names: str) -> Iterator[FrameType]:
    """The frames of the callers, the nearest first; with `names`, of functions called so.

    The variables of other frames are not to be read: in Python 3.12 and before, that keeps the objects alive that the
    caller lets go of later, such as a model.
    """
    frame = sys._getframe(1)
    while (frame := frame.f_back) is not None:  # type: ignore[assignment]
        if not names or frame.f_code.co_name in names:
            yield frame


def unread_words() -> list[str]:
    """The words of a command line, or of its YAML file, that the parser at work has no option for; none where no parser
    is at work, or where its caller asked to be handed them."""
    words: list[str] = []
    for frame in callers("parse_args_into_dataclasses", "parse_args_and_config"):
        variables = frame.f_locals
        if variables.get("return_remaining_strings"):
            continue
        if frame.f_code.co_name == "parse_args_into_dataclasses":
            words += variables.get("remaining_args") or []
        elif variables.get("fail_with_unknown_args", True):
            words = [*(variables.get("config_remaining_strings") or []), *words]
    return words


def unread_keys() -> dict[str, Any]:
    """The keys of a mapping, a JSON file or a YAML file that the parser at work has no option for, with their
    values; none where there is no such parser or where it is to allow them."""
    for frame in callers("parse_dict"):
        variables = frame.f_locals
        parser, values = variables.get("self"), variables.get("args")
        if isinstance(values, Mapping):
            known = {field.name for kind in getattr(parser, "dataclass_types", ()) for field in fields(kind)}
            is_allowed = variables.get("allow_extra_keys", False)
            return {} if is_allowed else {name: value for name, value in values.items() if name not in known}
    return {}
