"""Whether an error is a message of this package to its user, and no defect."""

from types import TracebackType


def is_own(error: BaseException) -> bool:
    """Whether this package raised the error as a message to the user: a `ValueError` or `TypeError` of its own code."""
    return isinstance(error, ValueError | TypeError) and _raised_in(error.__traceback__).startswith("holdfast.")


def _raised_in(traceback: TracebackType | None) -> str:
    """The name of the module whose code raised the error."""
    name = ""
    while traceback is not None:
        name = traceback.tb_frame.f_globals.get("__name__", "")
        traceback = traceback.tb_next
    return name
