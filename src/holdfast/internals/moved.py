"""`MovedError`: a private name of a library is not where the tested versions have it.

It names the installed version and the tested ones, so that a user can choose. Given up: guessing where the name went.
"""

from importlib.metadata import PackageNotFoundError, version
from typing import Any, final

TESTED = {
    "torch": ("2.13.0", "2.13.0"),
    "transformers": ("5.17.0", "5.23.0"),
    "peft": ("0.20.0", "0.21.2"),
    "accelerate": ("1.10.0", "1.15.0"),
    "deepspeed": ("0.19.8", "0.19.8"),
}
"""The oldest and the newest version of each library that the tests have run on."""


@final
class MovedError(RuntimeError):
    """A private name of a library is gone, or no longer does what it did."""

    def __init__(self, library: str, name: str, found: str = "") -> None:
        try:
            installed = version(library)
        except PackageNotFoundError:
            installed = "unknown"
        oldest, newest = TESTED[library]
        super().__init__(
            f"{library}.{name} moved in version {installed}{f': {found}' if found else ''} (installed: {installed}; "
            f"holdfast was tested with {oldest}..{newest}). Nothing was scored with it. Install {library}>={oldest},"
            f"<={newest}, or a holdfast that knows version {installed}."
        )


def looked_up(library: str, owner: Any, name: str) -> Any:
    """The attribute `name` of `owner`, a module, class or object of `library`. MovedError where it has none."""
    try:
        return getattr(owner, name)
    except AttributeError:
        kind = owner.__name__ if isinstance(owner, type) or hasattr(owner, "__name__") else type(owner).__name__
        raise MovedError(library, f"{kind}.{name}") from None
