"""The words for what is wrong with a file: where it is, and what kind of file it seems to be."""

import reprlib
import stat
from pathlib import Path

MARKS = (
    (b"\x1f\x8b", "compressed by gzip"),
    (b"\x28\xb5\x2f\xfd", "compressed by zstd"),
    (b"BZh", "compressed by bzip2"),
    (b"\xfd7zXZ\x00", "compressed by xz"),
    (b"PK\x03\x04", "a zip archive"),
    (b"PAR1", "a Parquet file"),
    (b"PARE", "an encrypted Parquet file"),
    (b"ARROW1", "an Arrow file"),
    (b"\xff\xfe", "UTF-16"),
    (b"\xfe\xff", "UTF-16"),
)
"""How files begin that are no UTF-8 text."""


_SHOWN = 200
_REPR = reprlib.Repr()
_REPR.maxlevel, _REPR.maxstring = 3, 100


def show(path: object) -> str:
    """The path as text in which control characters are escapes, so that a name cannot write to the terminal.

    A very long one is cut in its middle.
    """
    text = str(path)
    if len(text) > 2 * _SHOWN:
        text = f"{text[:_SHOWN]}...{text[-_SHOWN:]}"
    return "".join(
        character if character.isprintable() else character.encode("unicode_escape").decode() for character in text
    )


def words_of(error: Exception) -> str:
    """What an error of another library says, in one line of at most 300 characters, without a full stop."""
    words = " ".join(str(error).split()) or type(error).__name__
    return show(words if len(words) <= 300 else words[:297] + "...").rstrip(".")


def brief(value: object) -> str:
    """A value as it was found, cut to 100 characters. It may be nested to any depth."""
    text = show(_REPR.repr(value))
    return text if len(text) <= 100 else text[:97] + "..."


def no_rows(path: Path, found: str) -> ValueError:
    """The error for a file without rows."""
    return ValueError(f"{show(path)} must hold at least one row; found {found}. Check how it was written.")


def not_text(path: Path, line: int, encoding: str, error: UnicodeError) -> ValueError:
    """The error for a file whose line is not text of that encoding."""
    name = encoding.removesuffix("-sig")
    remedy = "Convert the file, or pass `encoding=`."
    seems = seeming_kind(path)
    if seems is not None:
        is_encoding = seems.startswith("UTF")
        found = f"{error}; by its first bytes it is {seems}"
        remedy = f"Convert the file to {name}, or pass `encoding={seems.lower()!r}`." if is_encoding else "Unpack it."
        remedy = "Name it `.parquet`." if seems == "a Parquet file" else remedy
    else:
        found = str(error)
    return ValueError(f"{show(path)}, line {line}: the text must be in {name}; found {found}. {remedy}")


def seeming_kind(path: Path) -> str | None:
    """What a file is by its first bytes, where these are no text in UTF-8."""
    with path.open("rb") as file:
        start = file.read(8)
    if start.startswith((b"\xff\xfe\0\0", b"\0\0\xfe\xff")):
        return "UTF-32"
    if (start[1:4:2] == b"\0\0") != (start[0:4:2] == b"\0\0"):  # every second byte, as in English text
        return "UTF-16-LE" if start[1:2] == b"\0" else "UTF-16-BE"
    return next((kind for mark, kind in MARKS if start.startswith(mark)), None)


def check_readable(path: Path) -> None:
    """ValueError where `path` is no file with data that can be opened: a pipe, a device, an empty or locked file."""
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise ValueError(
                f"preference data must be a file; found {kind_of(status.st_mode)}, {show(path)}. Write the rows to a "
                "file, and give its path."
            )
        if status.st_size == 0:
            raise no_rows(path, "an empty file")
        with path.open("rb") as file:
            file.read(1)
    except OSError as error:
        raise ValueError(
            f"{show(path)} could not be opened: {error.strerror}. Check the path and its rights."
        ) from error


def kind_of(mode: int) -> str:
    """What a path is that is no ordinary file, in words."""
    kinds = (
        (stat.S_ISDIR, "a folder"),
        (stat.S_ISFIFO, "a pipe"),
        (stat.S_ISSOCK, "a socket"),
        (stat.S_ISCHR, "a device"),
        (stat.S_ISBLK, "a device"),
    )
    return next((words for is_kind, words in kinds if is_kind(mode)), "something else")
