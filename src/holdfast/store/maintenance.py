"""All stores in a folder: listed, verified, cleaned up, and their small shards merged.

None of it needs a model, a key or a lock, since a folder says what it holds. It may be done while jobs run. What is
removed goes in one step, by a rename. A merged shard is on the disk before the shards that it replaces are removed. A
running job still has these mapped, or finds the merged one.

Given up: exact sizes in a list. A list reads headers alone, so it counts a completion twice that two processes computed
at the same time.
"""

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from holdfast.store.files import CORRUPT, DROPPED, PARTIAL, DamagedError, remove, remove_folder
from holdfast.store.key import FOLDER_NAME
from holdfast.store.manifest import MANIFEST, Manifest, read_manifest
from holdfast.store.shard import joined, open_shard, shard_paths, shard_size, write_shard
from holdfast.store.store import LAST_USED
from holdfast.store.work_sharing import CLAIM

MERGED_COMPLETIONS = 65_536
"""Most completions of a merged shard. A shard with more than half as many is left as it is."""
LEFTOVER_SECONDS = 3_600.0
"""An unfinished file of this age is left over from a kill: writing one takes seconds."""
_DAY = 86_400.0


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreFacts:
    """A store in a list: its manifest, or the `problem` with it; the sizes in its shards' headers; its last use."""

    folder: Path
    manifest: Manifest | None
    problem: str | None
    num_completions: int
    num_tokens: int
    num_bytes: int
    last_used: float

    @property
    def name(self) -> str:
        """The key's digest."""
        return self.folder.name

    @property
    def description(self) -> str:
        """The problem with its manifest, else the words of its key."""
        return self.problem or (self.manifest.key.description if self.manifest else "")


@dataclass(frozen=True, slots=True, kw_only=True)
class Damage:
    """A file of a store that is not as it was written, and the reason to say so."""

    path: Path
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class CleanupStep:
    """One action of a clean-up: to remove a store or a file, or to merge a store's small shards."""

    action: Literal["remove store", "remove file", "merge shards"]
    path: Path
    num_bytes: int
    reason: str


def stores(root: Path) -> list[StoreFacts]:
    """The stores in a folder, the most recently used first."""
    if not root.is_dir():
        return []
    listed = [_facts(folder) for folder in root.iterdir() if FOLDER_NAME.fullmatch(folder.name) and folder.is_dir()]
    return sorted(listed, key=lambda facts: (-facts.last_used, facts.name))


def find_store(root: Path, key: str) -> StoreFacts:
    """The store whose name begins with `key`. ValueError if there is none or several."""
    matching = [facts for facts in stores(root) if key and facts.name.startswith(key)]
    if len(matching) != 1:
        names = ", ".join(facts.name[:12] for facts in (matching or stores(root))[:5]) or "none at all"
        raise ValueError(
            f"the store {key!r} in {root} was asked for; {len(matching) or 'none'} of its stores begin(s) so (there: "
            f"{names}). Give as many of its digits as make it one; `holdfast store list` shows them."
        )
    return matching[0]


def verify(root: Path, key: str = "") -> list[Damage]:
    """The damaged files of the stores whose names begin with `key`. Every byte is read, and nothing is changed."""
    return [damage for facts in stores(root) if facts.name.startswith(key) for damage in _damage(facts.folder)]


def cleanup_steps(
    root: Path, *, older_than: float | None = None, max_bytes: int | None = None, now: float | None = None
) -> list[CleanupStep]:
    """What a clean-up would do, in order. `carry_out` does one step.

    First it removes the stores not used for `older_than` days, then those not used for longest until no more than
    `max_bytes` are left. Then it removes what kills have left behind and what was set aside, and merges small shards.
    """
    now = time.time() if now is None else now
    present = stores(root)
    steps = []
    total = sum(facts.num_bytes for facts in present)
    for facts in reversed(present):
        days = (now - facts.last_used) / _DAY
        if older_than is not None and days > older_than:
            reason = f"not used for {days:.0f} days"
        elif max_bytes is not None and total > max_bytes:
            reason = "not used for longest, and the stores are too large"
        else:
            continue
        steps.append(CleanupStep(action="remove store", path=facts.folder, num_bytes=facts.num_bytes, reason=reason))
        total -= facts.num_bytes
    removed = {step.path for step in steps}
    steps += [
        CleanupStep(action="remove store", path=folder, num_bytes=_size(folder), reason="was being removed")
        for folder in root.glob(f"*{DROPPED}")
    ]
    for facts in present:
        if facts.folder not in removed:
            steps += _leftovers(facts.folder, now)
            steps += _merging(facts)
    return steps


def carry_out(step: CleanupStep) -> None:
    """Does one step. OSError where that is not permitted."""
    if step.action == "remove store":
        remove_folder(step.path)
    elif step.action == "remove file":
        step.path.unlink(missing_ok=True)
    else:
        merge(step.path)


def merge(folder: Path) -> int:
    """Merges the small shards of a store into larger ones. Returns how many were merged. Damaged ones are left
    alone."""
    num_merged = 0
    for paths in _small(folder):
        shards = []
        for path in paths:
            with contextlib.suppress(DamagedError, FileNotFoundError):
                shards.append(open_shard(path, folder.name))
        if len(shards) > 1:
            content, lengths, logps = joined(shards)
            merged = write_shard(folder, folder.name, content, lengths, logps)
            for shard in shards:
                if shard.name != merged.name:
                    remove(folder / shard.name)
            num_merged += len(shards)
    return num_merged


def _facts(folder: Path) -> StoreFacts:
    manifest, problem = None, None
    try:
        manifest = read_manifest(folder)
    except DamagedError as error:
        problem = f"{MANIFEST} is damaged: {error}"
    except FileNotFoundError:
        problem = f"{MANIFEST} is missing"
    except ValueError:
        problem = "written by a newer version of holdfast"
    sizes = []
    for path in shard_paths(folder):
        with contextlib.suppress(DamagedError, FileNotFoundError):
            sizes.append(shard_size(path))
    return StoreFacts(
        folder=folder,
        manifest=manifest,
        problem=problem,
        num_completions=sum(completions for completions, _ in sizes),
        num_tokens=sum(tokens for _, tokens in sizes),
        num_bytes=_size(folder),
        last_used=max(_modified(folder / LAST_USED), _modified(folder / MANIFEST)) or _modified(folder),
    )


def _damage(folder: Path) -> Iterator[Damage]:
    try:
        read_manifest(folder)
    except FileNotFoundError:
        yield Damage(path=folder / MANIFEST, reason="it is missing")
    except (DamagedError, ValueError) as error:
        yield Damage(path=folder / MANIFEST, reason=str(error))
    for path in shard_paths(folder):
        try:
            open_shard(path, folder.name)
        except FileNotFoundError:  # merged or dropped in the meantime
            continue
        except (DamagedError, ValueError, OSError) as error:
            yield Damage(path=path, reason=str(error))


def _leftovers(folder: Path, now: float) -> Iterator[CleanupStep]:
    try:
        paths = sorted(folder.iterdir())
    except FileNotFoundError:  # dropped in the meantime
        return
    for path in paths:
        if path.name.endswith(CORRUPT):
            reason = "was damaged, and set aside"
        elif path.name.endswith((PARTIAL, CLAIM)) and now - _modified(path) > LEFTOVER_SECONDS:
            reason = "left over from a kill"
        else:
            continue
        yield CleanupStep(action="remove file", path=path, num_bytes=_size(path), reason=reason)


def _merging(facts: StoreFacts) -> list[CleanupStep]:
    if facts.manifest is None:  # its shards may be of a newer format
        return []
    num_small = sum(len(paths) for paths in _small(facts.folder))
    reason = f"{num_small} small shards into larger ones"
    return [CleanupStep(action="merge shards", path=facts.folder, num_bytes=0, reason=reason)] if num_small else []


def _small(folder: Path) -> list[list[Path]]:
    """The small shards in groups, of which each becomes one larger shard."""
    groups: list[list[Path]] = []
    room = 0
    for path in shard_paths(folder):
        try:
            num_completions, _ = shard_size(path)
        except (DamagedError, FileNotFoundError):
            continue
        if 2 * num_completions > MERGED_COMPLETIONS:
            continue
        if num_completions > room:
            groups.append([])
            room = MERGED_COMPLETIONS
        groups[-1].append(path)
        room -= num_completions
    return [group for group in groups if len(group) > 1]


def _size(path: Path) -> int:
    """Bytes of a file, or of the files in a folder; 0 for a file that is gone by now."""
    try:
        return sum(_size(entry) for entry in path.iterdir()) if path.is_dir() else path.stat().st_size
    except OSError:
        return 0


def _modified(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0
