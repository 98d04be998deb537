"""What can be asked of all stores in a folder, and done to them: listed, verified, cleared out, merged.

None of it needs a model, a key or a lock: a folder says what it holds. What is removed goes at once (a rename), and a
merged shard is on the disk before those that it replaces are removed, so it may be done under running jobs: these have
their shards mapped, or find the merged one. Given up: exact sizes in a list, which counts a completion that two
processes computed at the same time twice, since it reads headers alone.
"""

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from holdfast.store.manifest import KEY_NAME, MANIFEST, Manifest, read_manifest
from holdfast.store.shard import (
    CORRUPT,
    PARTIAL,
    Damaged,
    joined,
    open_shard,
    remove,
    shard_paths,
    shard_size,
    write_shard,
)
from holdfast.store.store import DROPPED, LAST_USED, drop_folder
from holdfast.store.work_sharing import CLAIM

MERGED_COMPLETIONS = 65_536
"""Most completions of a merged shard; shards with half as many are left as they are."""
LEFT_SECONDS = 3_600.0
"""An unfinished file is left over from a kill if it is older than this: writing one takes seconds."""
DAY = 86_400.0


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreFacts:
    """A store in a list: its manifest or why it has none to read, what its shards' headers say, when it was used."""

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
        """In words."""
        return self.problem or (self.manifest.key.description if self.manifest else "")


@dataclass(frozen=True, slots=True, kw_only=True)
class Damage:
    """A file of a store that is not as it was written, and how."""

    path: Path
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One thing that clearing out does: remove a store or a file, or merge a store's small shards."""

    action: Literal["remove store", "remove file", "merge shards"]
    path: Path
    num_bytes: int
    reason: str


def stores(root: Path) -> list[StoreFacts]:
    """The stores in a folder, the last used first."""
    if not root.is_dir():
        return []
    found = [_facts(folder) for folder in root.iterdir() if KEY_NAME.fullmatch(folder.name) and folder.is_dir()]
    return sorted(found, key=lambda facts: (-facts.last_used, facts.name))


def find_store(root: Path, key: str) -> StoreFacts:
    """The store whose key's digest begins with `key`. ValueError if there is none or several."""
    found = [facts for facts in stores(root) if key and facts.name.startswith(key)]
    if len(found) != 1:
        names = ", ".join(facts.name[:12] for facts in (found or stores(root))[:5]) or "none at all"
        raise ValueError(
            f"the store {key!r} in {root} was asked for; {len(found) or 'none'} of its stores begin(s) so (there: "
            f"{names}). Give as many of its digits as make it one; `holdfast store list` shows them."
        )
    return found[0]


def verify(root: Path, key: str = "") -> list[Damage]:
    """What is damaged in the stores whose key's digest begins with `key`: every byte is read, nothing is changed."""
    return [damage for facts in stores(root) if facts.name.startswith(key) for damage in _damage(facts.folder)]


def plan(
    root: Path, *, older_than: float | None = None, max_bytes: int | None = None, now: float | None = None
) -> list[Step]:
    """What clearing out would do: remove the stores not used for `older_than` days, then those not used for longest
    until no more than `max_bytes` are left; remove what kills have left and what was set aside; merge small shards."""
    now = time.time() if now is None else now
    found = stores(root)
    steps = []
    total = sum(facts.num_bytes for facts in found)
    for facts in reversed(found):
        days = (now - facts.last_used) / DAY
        if older_than is not None and days > older_than:
            reason = f"not used for {days:.0f} days"
        elif max_bytes is not None and total > max_bytes:
            reason = "not used for longest, and the stores are too large"
        else:
            continue
        steps.append(Step(action="remove store", path=facts.folder, num_bytes=facts.num_bytes, reason=reason))
        total -= facts.num_bytes
    removed = {step.path for step in steps}
    steps += [
        Step(action="remove store", path=folder, num_bytes=_size(folder), reason="was being removed")
        for folder in root.glob(f"*{DROPPED}")
    ]
    for facts in found:
        if facts.folder not in removed:
            steps += _leftovers(facts.folder, now)
            steps += _merging(facts)
    return steps


def carry_out(step: Step) -> None:
    """Does what the step says. OSError where that is not permitted."""
    if step.action == "remove store":
        drop_folder(step.path)
    elif step.action == "remove file":
        step.path.unlink(missing_ok=True)
    else:
        merge(step.path)


def merge(folder: Path) -> int:
    """The number of small shards of a store that were merged into larger ones; damaged ones are left as they are."""
    num_merged = 0
    for paths in _small(folder):
        shards = []
        for path in paths:
            with contextlib.suppress(Damaged, FileNotFoundError):
                shards.append(open_shard(path, folder.name))
        if len(shards) > 1:
            merged = write_shard(folder, folder.name, *joined(shards))
            for shard in shards:
                if shard.name != merged.name:
                    remove(folder / shard.name)
            num_merged += len(shards)
    return num_merged


def _facts(folder: Path) -> StoreFacts:
    manifest, problem = None, None
    try:
        manifest = read_manifest(folder)
    except Damaged as error:
        problem = f"{MANIFEST} is damaged: {error}"
    except FileNotFoundError:
        problem = f"{MANIFEST} is missing"
    except ValueError:
        problem = "written by a newer version of holdfast"
    sizes = []
    for path in shard_paths(folder):
        with contextlib.suppress(Damaged, FileNotFoundError):
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
    except (Damaged, ValueError) as error:
        yield Damage(path=folder / MANIFEST, reason=str(error))
    for path in shard_paths(folder):
        try:
            open_shard(path, folder.name)
        except FileNotFoundError:  # merged or dropped in the meantime
            continue
        except (Damaged, ValueError, OSError) as error:
            yield Damage(path=path, reason=str(error))


def _leftovers(folder: Path, now: float) -> Iterator[Step]:
    try:
        paths = sorted(folder.iterdir())
    except FileNotFoundError:  # dropped in the meantime
        return
    for path in paths:
        if path.name.endswith(CORRUPT):
            reason = "was damaged, and set aside"
        elif path.name.endswith((PARTIAL, CLAIM)) and now - _modified(path) > LEFT_SECONDS:
            reason = "left over from a kill"
        else:
            continue
        yield Step(action="remove file", path=path, num_bytes=_size(path), reason=reason)


def _merging(facts: StoreFacts) -> list[Step]:
    if facts.manifest is None:  # perhaps of a newer format
        return []
    num_small = sum(len(paths) for paths in _small(facts.folder))
    reason = f"{num_small} small shards into larger ones"
    return [Step(action="merge shards", path=facts.folder, num_bytes=0, reason=reason)] if num_small else []


def _small(folder: Path) -> list[list[Path]]:
    """Groups of small shards, each of which makes one larger shard."""
    groups: list[list[Path]] = []
    room = 0
    for path in shard_paths(folder):
        try:
            num_completions, _ = shard_size(path)
        except (Damaged, FileNotFoundError):
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
    """Bytes of a file, or of those in a folder; what vanishes meanwhile has none."""
    try:
        return sum(_size(entry) for entry in path.iterdir()) if path.is_dir() else path.stat().st_size
    except OSError:
        return 0


def _modified(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0
