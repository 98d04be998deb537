"""What may be removed as a store: a folder that is proved to be one, and in it the store's own files alone.

Other programs name folders by 32 hexadecimal digits too, and people leave files where they should not. A folder is
proved to be a store by a manifest that can be read and has the key of the folder's name. Where that is lost, shards of
this key prove it, if nothing else is in the folder; and so does the name of a store that is being removed, if at most
unfinished files of it are left. No link is followed, since it may lead anywhere.

A store goes at once, by renaming its folder, which keeps the key's digest in its name; then file by file. Given up:
folders that earlier versions were removing, where a kill left neither manifest nor shard.
"""

import contextlib
import os
import re
import uuid
from dataclasses import dataclass
from pathlib import Path

from holdfast.store.files import CLAIM, CORRUPT, DROPPED, LAST_USED, PARTIAL, DamagedError, NewerFormatError
from holdfast.store.manifest import MANIFEST, manifest_in
from holdfast.store.shard import shard_facts, shard_paths

_DIGITS = "[0-9a-f]{32}"
_FOLDER = re.compile(rf"(?P<digest>{_DIGITS})(\.{_DIGITS}{re.escape(DROPPED)})?|{_DIGITS}{re.escape(DROPPED)}")
"""A store's folder, as it is or while it is removed; earlier versions named the latter without the key's digest."""
_OWN = re.compile(
    rf"({re.escape(MANIFEST)}|{LAST_USED}|{_DIGITS}\.(safetensors|pairs))({re.escape(CORRUPT)})?"
    rf"|{_DIGITS}({re.escape(PARTIAL)}|{re.escape(CLAIM)})"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Content:
    """The names in a store's folder: of the store's own files, and of what others put there."""

    own: tuple[str, ...]
    foreign: tuple[str, ...]


def content_of(folder: Path | int) -> Content:
    """What is in a folder, given by its path or by a descriptor. OSError where it cannot be listed."""
    with os.scandir(folder) as entries:
        is_own = {entry.name: _is_own(entry) for entry in entries}
    names = sorted(is_own, key=lambda name: (name == MANIFEST, name))  # the proof goes last
    return Content(
        own=tuple(name for name in names if is_own[name]), foreign=tuple(name for name in names if not is_own[name])
    )


def is_store(folder: Path) -> bool:
    """Whether a folder is proved to be a store, or the rest of one that was being removed."""
    match = _FOLDER.fullmatch(folder.name)
    if match is None or folder.is_symlink() or not folder.is_dir():
        return False
    digest = match["digest"]
    with contextlib.suppress(DamagedError, NewerFormatError, OSError):
        if digest in (None, manifest_in(folder).key.digest()):
            return True
    try:
        content = content_of(folder)
    except OSError:
        return False
    if content.foreign:
        return False
    shards = shard_paths(folder)
    if not content.own or (digest is not None and not shards and MANIFEST not in content.own):
        return folder.name.endswith(DROPPED)  # of a store that went, at most what came last is left
    return any(_is_shard_of(path, digest) for path in shards)


def remove_store(folder: Path) -> list[Path]:
    """Removes a store, and returns what stays in its folder because it is not the store's.

    ValueError where the folder is not proved to be a store; nothing is removed then. OSError where that is not
    permitted. A folder that is gone already is removed.
    """
    if not os.path.lexists(folder):
        return []
    if not is_store(folder):
        if not os.path.lexists(folder):
            return []
        raise ValueError(
            f"the store {folder} was to be removed; the folder has no manifest that fits its name, nor shards of it "
            "alone, so it may be another program's. Nothing was removed: remove it by hand if it is yours."
        )
    try:
        if not folder.name.endswith(DROPPED) and not content_of(folder).foreign:
            dropped = folder.with_name(f"{folder.name}.{uuid.uuid4().hex}{DROPPED}")
            os.replace(folder, dropped)
            with contextlib.suppress(OSError):  # what is left of it goes with the next clean-up
                return _cleared(dropped)
            return []
        return _cleared(folder)
    except FileNotFoundError:  # another process has removed it
        return []


def _cleared(folder: Path) -> list[Path]:
    """Removes a store's own files from a folder, and the folder if nothing is left. Returns what is left."""
    # By a descriptor: should the folder be replaced by a link meanwhile, nothing beyond the link is touched.
    descriptor = None if os.name == "nt" else os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        content = content_of(folder if descriptor is None else descriptor)
        for name in content.own:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(folder / name if descriptor is None else name, dir_fd=descriptor)
    finally:
        if descriptor is not None:
            os.close(descriptor)
    if not content.foreign:
        with contextlib.suppress(OSError):  # something came meanwhile
            os.rmdir(folder)
    return [folder / name for name in content.foreign]


def _is_own(entry: "os.DirEntry[str]") -> bool:
    return _OWN.fullmatch(entry.name) is not None and not entry.is_dir(follow_symlinks=False)


def _is_shard_of(path: Path, digest: str | None) -> bool:
    with contextlib.suppress(DamagedError, NewerFormatError, OSError):
        return digest in (None, shard_facts(path).key)
    return False
