"""All stores in a folder: listed, verified, cleaned up, and their small shards merged.

None of it needs a model, a key or a lock, since a folder says what it holds. It may be done while jobs run: a store
that goes or is begun meanwhile is no damage. `removal` says what may be removed. A merged shard is on the disk before
the shards that it replaces are removed. A running job still has these mapped, or finds the merged one.

Given up: exact sizes in a list. A list reads headers alone, so it counts a completion twice that two processes computed
at the same time.
"""

import contextlib
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from holdfast.store.files import CLAIM, CORRUPT, DROPPED, LAST_USED, PARTIAL, DamagedError, NewerFormatError, remove
from holdfast.store.key import FOLDER_NAME
from holdfast.store.manifest import MANIFEST, Manifest, read_manifest
from holdfast.store.pair_shard import (
    joined_pairs,
    open_pair_shard,
    pair_shard_header,
    pair_shard_paths,
    write_pair_shard,
)
from holdfast.store.removal import content_of, is_store, remove_store
from holdfast.store.shard import joined, open_shard, shard_facts, shard_paths, write_shard
from holdfast.store.trust import Trust

MERGED_COMPLETIONS = 65_536
"""Most completions, or pairs, of a merged shard. A shard with more than half as many is left as it is."""
LEFTOVER_SECONDS = 3_600.0
"""An unfinished file of this age is left over from a kill: writing one takes seconds."""
_DAY = 86_400.0
_NUM_LOOKS, _SECONDS_BETWEEN_LOOKS = 5, 0.05


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreFacts:
    """A store in a list: its manifest, or the `problem` with it; the sizes in its shards' headers, and the number of
    shards whose headers cannot be right; the bytes of its own files; its last use."""

    folder: Path
    manifest: Manifest | None
    problem: str | None
    num_completions: int
    num_tokens: int
    num_damaged: int
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
    """A file of a store that is not as it was written, or that a run would not use, and the reason."""

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
    folders = [folder for folder in root.iterdir() if FOLDER_NAME.fullmatch(folder.name) and folder.is_dir()]
    listed = [_facts(folder) for folder in folders]
    present = [facts for facts in listed if facts.folder.exists()]  # others went in the meantime
    return sorted(present, key=lambda facts: (-facts.last_used, facts.name))


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
    A folder that is not proved to be a store (`holdfast.store.removal`) is not touched, and nothing that is no store's.
    """
    now = time.time() if now is None else now
    present = [facts for facts in stores(root) if is_store(facts.folder)]
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
        steps.append(_removal(facts.folder, reason))
        total -= facts.num_bytes
    removed = {step.path for step in steps}
    if root.is_dir():
        dropped = sorted(folder for folder in root.iterdir() if folder.name.endswith(DROPPED))
        steps += [_removal(folder, "was being removed") for folder in dropped if is_store(folder)]
    for facts in present:
        if facts.folder not in removed:
            steps += _leftovers(facts.folder, now)
            steps += _merging(facts)
    return steps


def carry_out(step: CleanupStep) -> list[Path]:
    """Does one step, and returns what stays although its store goes, since it is not the store's.

    Where a store went in the meantime nothing is left to do. OSError where the step is not permitted or the disk is
    full, ValueError where a folder is not proved to be a store any more.
    """
    if step.action == "remove store":
        return remove_store(step.path)
    with contextlib.suppress(FileNotFoundError):
        if step.action == "remove file":
            step.path.unlink()
        else:
            merge(step.path)
    return []


def merge(folder: Path) -> int:
    """Merges the small shards of a store into larger ones, and its small files of products of pairs. Returns how many
    were merged. Those that are damaged, or that are not believed, are left alone."""
    trust = Trust.of(folder)
    num_merged = _merge_pairs(folder, trust)
    for paths in _small(_shards(folder), _num_completions):
        shards = []
        for path in paths:
            with contextlib.suppress(DamagedError, NewerFormatError, FileNotFoundError):
                shards.append(open_shard(path, folder.name, trust))
        if len(shards) > 1:
            content, lengths, logps = joined(shards)
            merged = write_shard(folder, folder.name, content, lengths, logps)
            for shard in shards:
                if shard.name != merged.name:
                    remove(folder / shard.name)
            num_merged += len(shards)
    return num_merged


def _merge_pairs(folder: Path, trust: Trust) -> int:
    num_merged = 0
    for paths in _small(_pair_shards(folder), _num_pairs):
        parts = {}
        for path in paths:
            with contextlib.suppress(DamagedError, NewerFormatError, FileNotFoundError):
                parts[path] = open_pair_shard(path, folder.name, trust)
        if len(parts) > 1:
            merged = write_pair_shard(folder, folder.name, joined_pairs([*parts.values()]))
            for path in parts.keys() - {merged}:
                remove(path)
            num_merged += len(parts)
    return num_merged


def _facts(folder: Path) -> StoreFacts:
    manifest, problem = None, None
    try:
        manifest = read_manifest(folder)
    except DamagedError as error:
        problem = f"{MANIFEST} is damaged or something else: {error}"
    except NewerFormatError:
        problem = "written by a newer version of holdfast"
    except OSError as error:
        problem = None if isinstance(error, FileNotFoundError) else f"cannot be read: {error.strerror or error}"
    if manifest is None and problem is None:
        problem = f"{MANIFEST} is missing" if _lacks_manifest(folder) else "nothing is in it yet, or it is no store"
    num_damaged, sizes = 0, []
    for path in _shards(folder):
        try:
            sizes.append(shard_facts(path))
        except (DamagedError, NewerFormatError):
            num_damaged += 1
        except FileNotFoundError:  # merged in the meantime
            continue
    for path in _pair_shards(folder):
        try:
            pair_shard_header(path)
        except (DamagedError, NewerFormatError):
            num_damaged += 1
        except FileNotFoundError:
            continue
    return StoreFacts(
        folder=folder,
        manifest=manifest,
        problem=problem,
        num_completions=sum(facts.num_completions for facts in sizes),
        num_tokens=sum(facts.num_tokens for facts in sizes),
        num_damaged=num_damaged,
        num_bytes=_size(folder),
        last_used=max(_modified(folder / LAST_USED), _modified(folder / MANIFEST)) or _modified(folder),
    )


def _damage(folder: Path) -> Iterator[Damage]:
    try:
        read_manifest(folder)
    except FileNotFoundError:
        if _lacks_manifest(folder):
            yield Damage(path=folder / MANIFEST, reason="it is missing")
    except (DamagedError, NewerFormatError, OSError) as error:
        yield Damage(path=folder / MANIFEST, reason=str(error))
    trust = Trust.of(folder)
    opened = [(path, open_shard) for path in _shards(folder)]
    for path, open_file in [*opened, *((path, open_pair_shard) for path in _pair_shards(folder))]:
        try:
            open_file(path, folder.name, trust)
        except FileNotFoundError:  # merged or dropped in the meantime
            continue
        except (DamagedError, NewerFormatError, OSError) as error:
            yield Damage(path=path, reason=str(error))


def _lacks_manifest(folder: Path) -> bool:
    """Whether a folder has shards and no manifest, and stays so. A store that is being begun has no shards yet, and one
    that another process begins again has both at the next look."""
    for number in range(_NUM_LOOKS):
        time.sleep(_SECONDS_BETWEEN_LOOKS if number else 0)
        if (folder / MANIFEST).exists() or not _shards(folder):
            return False
    return True


def _shards(folder: Path) -> list[Path]:
    """The paths of a folder's shards; none where it cannot be listed."""
    try:
        return shard_paths(folder)
    except OSError:
        return []


def _pair_shards(folder: Path) -> list[Path]:
    """The paths of a folder's files of products of pairs; none where it cannot be listed."""
    try:
        return pair_shard_paths(folder)
    except OSError:
        return []


def _removal(folder: Path, reason: str) -> CleanupStep:
    try:
        num_foreign = len(content_of(folder).foreign)
    except OSError:
        num_foreign = 0
    stay = f"; what is not the store's stays ({num_foreign})" if num_foreign else ""
    return CleanupStep(action="remove store", path=folder, num_bytes=_size(folder), reason=reason + stay)


def _leftovers(folder: Path, now: float) -> Iterator[CleanupStep]:
    try:
        names = content_of(folder).own
    except OSError:  # dropped in the meantime, or not permitted
        return
    for path in (folder / name for name in names):
        if path.name.endswith(CORRUPT):
            reason = "was damaged, and set aside"
        elif path.name.endswith((PARTIAL, CLAIM)) and now - _modified(path) > LEFTOVER_SECONDS:
            reason = "left over from a kill"
        else:
            continue
        yield CleanupStep(action="remove file", path=path, num_bytes=_bytes(path), reason=reason)


def _merging(facts: StoreFacts) -> list[CleanupStep]:
    if facts.manifest is None:  # its shards may be of a newer format
        return []
    folder = facts.folder
    small = [*_small(_shards(folder), _num_completions), *_small(_pair_shards(folder), _num_pairs)]
    num_small = sum(map(len, small))
    reason = f"{num_small} small shards into larger ones"
    return [CleanupStep(action="merge shards", path=folder, num_bytes=0, reason=reason)] if num_small else []


def _num_completions(path: Path) -> int:
    return shard_facts(path).num_completions


def _num_pairs(path: Path) -> int:
    return pair_shard_header(path).sizes["M"]


def _small(paths: Iterable[Path], num_in: Callable[[Path], int]) -> list[list[Path]]:
    """The small ones of these shards in groups, of which each becomes one larger shard. `num_in` is how many
    completions or pairs one has."""
    groups: list[list[Path]] = []
    room = 0
    for path in paths:
        try:
            number = num_in(path)
        except (DamagedError, NewerFormatError, FileNotFoundError):
            continue
        if 2 * number > MERGED_COMPLETIONS:
            continue
        if number > room:
            groups.append([])
            room = MERGED_COMPLETIONS
        groups[-1].append(path)
        room -= number
    return [group for group in groups if len(group) > 1]


def _size(folder: Path) -> int:
    """Bytes of a store's own files in a folder."""
    try:
        return sum(_bytes(folder / name) for name in content_of(folder).own)
    except OSError:
        return 0


def _bytes(path: Path) -> int:
    """Bytes of a file; 0 for one that is gone by now."""
    try:
        return path.lstat().st_size
    except OSError:
        return 0


def _modified(path: Path) -> float:
    try:
        return path.lstat().st_mtime
    except OSError:
        return 0.0
