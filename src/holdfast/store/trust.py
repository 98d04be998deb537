"""Whose shards are believed: a digest finds damage, not malice.

Whoever can write into a store's folder can put a shard of wrong numbers there. Where only one user can, that is whom
the reader chose when the folder was named. Where a group or everybody can, a shard is believed if its owner is this
user, root, the owner of the folder of stores, or a user whom `HOLDFAST_STORE_TRUST` names. A manifest holds no numbers,
and its key is checked against the folder's name, so its owner does not matter.

Given up: the folders above the folder of stores, which are not looked at, and Windows, which has other permissions.
"""

import os
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from holdfast.store.files import UnusableError

VARIABLE = "HOLDFAST_STORE_TRUST"
"""The environment variable that names further users, by name or number and separated by commas; or `all`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Trust:
    """The users (by number) whose files in a folder are believed; None for everybody's."""

    users: frozenset[int] | None

    @classmethod
    def of(cls, folder: Path) -> Self:
        """For the store in `folder`, by the permissions of it and of the folder that it is in. ValueError where
        `HOLDFAST_STORE_TRUST` names no user."""
        named = _named(os.environ.get(VARIABLE, ""))
        if named is None or os.name == "nt":
            return cls(users=None)
        try:
            root, own = folder.parent.stat(), folder.stat()
        except OSError:  # then there is nothing to be read either
            return cls(users=named | {_this_user()})
        if not _is_exposed(root):
            # Whoever owns the store's folder has it from the owner of the folder of stores.
            named = named | {_owner(own)}
            if not _is_exposed(own):
                return cls(users=None)
        return cls(users=named | {_this_user(), 0, _owner(root)})

    def check(self, status: os.stat_result) -> None:
        """UnusableError where the file with this status is not to be believed."""
        if self.users is not None and _owner(status) not in self.users:
            owner = _owner(status)
            raise UnusableError(
                f"it is user {owner}'s, in a folder that others than its owner can write to; {VARIABLE}={owner} (or a "
                "name, several, or all) has it used"
            )


def _is_exposed(status: os.stat_result) -> bool:
    """Whether others than its owner can write to a folder."""
    return bool(status.st_mode & (stat.S_IWGRP | stat.S_IWOTH))


def _owner(status: os.stat_result) -> int:
    return status.st_uid


def _this_user() -> int:
    return os.geteuid()


def _named(text: str) -> frozenset[int] | None:
    """The users that the variable names; None for all. ValueError."""
    names = [name.strip() for name in text.split(",") if name.strip()]
    return None if "all" in names else frozenset(map(_number, names))


def _number(name: str) -> int:
    if name.isascii() and name.isdigit() and len(name) <= 10:
        return int(name)
    import pwd  # Windows has none

    try:
        return pwd.getpwnam(name).pw_uid
    except (KeyError, ValueError, UnicodeError) as error:
        raise ValueError(
            f"{VARIABLE} names users whose shards are used, by name or number and separated by commas, or is `all`; "
            f"found {name!r}, who is no user here. Correct it, or leave it out."
        ) from error
