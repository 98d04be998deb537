"""A folder -> which of its files belong to which split. Nothing that lies in the folder can name a file outside of it.

Files are found as `datasets` finds them: by the `configs` in the head of its README.md, else by `train`, `test` and
`validation` in their names, else all are the split "train". Of the README only names and patterns of files are taken,
and how they are to be read; a pattern that leaves the folder is refused. Loading scripts, `dataset_infos.json` and
whatever else lies there are never read. Symbolic links are followed: caches are made of them, and no text in a file
can make one. Who clones a repository of others looks at its links as at its code.
"""

import glob
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from datasets.data_files import FILES_TO_IGNORE, DataFilesDict, EmptyDatasetError, get_data_patterns

from holdfast.data.files.contents import KINDS
from holdfast.data.files.faults import brief, check_readable, show, words_of

FilesBySplit = dict[str, list[Path]]

_HEAD = re.compile(r"\s*---[\r\n]+(.*?)[\r\n]+---(\r|\n|$)", re.DOTALL)
_SPLIT_NAME = re.compile(r"\w+(\.\w+)*")
_MAX_HEAD = 1_000_000
_PACKED = frozenset({".gz", ".zst", ".bz2", ".xz", ".lz4", ".zip"})
_READING_OPTIONS = ("encoding", "field", "sep", "delimiter")


def files_of_folder(path: Path, name: str | None) -> tuple[FilesBySplit, dict[str, Any]]:
    """The files of each split of the configuration `name`, and the options of reading that it gives.

    Raises `ValueError` for a folder without such files, for files of several kinds, for pipes and the like among them,
    and for metadata that cannot be used or leave the folder.
    """
    candidates = _candidates(path)
    configs = _configs(path)
    if not configs and name not in (None, "default"):
        raise ValueError(
            f"name={name!r} chooses a configuration; {show(path)} has none, since no README.md with `configs` lies in "
            "it. Leave `name` out."
        )
    config = _chosen(configs, name, path) if configs else {}
    if not candidates:
        found = sorted(show(item.name) for item in path.iterdir())[:5]
        raise ValueError(
            f"the folder {show(path)} must hold {', '.join(KINDS)} files or a dataset written by `save_to_disk`; found "
            f"{found or 'nothing'}. Check the path."
        )
    if not configs:
        kind_of_files(candidates)
    files = _resolved(path, config)
    options = {key: config[key] for key in _READING_OPTIONS if key in config}
    return files, options


def kind_of_files(files: Sequence[Path]) -> str:
    """What the files hold, "json", "csv" or "parquet". ValueError where that is not one and the same for all."""
    kinds = {KINDS.get(file.suffix.lower(), "") for file in files}
    if "" in kinds:
        raise ValueError(f"preference data must be a file of {', '.join(KINDS)}; found {show(files[0])}. Convert it.")
    if len(kinds) > 1:
        raise ValueError(
            f"a folder of preference data must hold files of one kind; found {sorted(kinds)} in "
            f"{show(files[0].parent)}. Give one of the files, or move them apart."
        )
    return kinds.pop()


def _candidates(path: Path) -> list[Path]:
    """The files below the folder whose suffix says that they are data; none of them hidden."""
    try:
        inside = sorted(path.rglob("*"))
    except OSError as error:
        raise ValueError(f"the folder {show(path)} could not be listed: {words_of(error)}. Give a file.") from error
    found = []
    for file in inside:
        is_hidden = any(part.startswith(".") for part in file.relative_to(path).parts)
        if is_hidden or file.suffix.lower() not in KINDS or file.name in FILES_TO_IGNORE or file.is_dir():
            continue
        check_readable(file)
        found.append(file)
    return found


def _configs(path: Path) -> dict[str, Mapping[str, Any]]:
    """The configurations in README.md and in .huggingface.yaml, by name."""
    readme, standalone = path / "README.md", path / ".huggingface.yaml"
    metadata: dict[str, Any] = {}
    for file in (readme, standalone):
        if not file.is_file():
            continue
        with file.open(encoding="utf-8-sig", errors="replace") as text:
            head = text.read(_MAX_HEAD)
        if file is readme:
            match = _HEAD.match(head)
            if match is None and head.lstrip().startswith("---") and len(head) == _MAX_HEAD:
                raise _unusable(path, f"{file.name} has a head of over {_MAX_HEAD} characters")
            head = match[1] if match else ""
        try:
            read = yaml.safe_load(head)  # in Python: the parser in C ends the process where text is nested deep
        except (yaml.YAMLError, RecursionError, ValueError) as error:
            raise _unusable(path, f"{file.name} is no YAML, {words_of(error)}") from error
        metadata |= read if isinstance(read, dict) else {}
    configs = metadata.get("configs")
    if configs is None:
        return {}
    if not isinstance(configs, list) or not all(isinstance(config, dict) for config in configs):
        raise _unusable(path, f"`configs` must be a list of mappings; found {brief(configs)}")
    names = [config.get("config_name") for config in configs]
    if not all(isinstance(name, str) for name in names) or len(set(names)) != len(names):
        raise _unusable(path, f"each of `configs` needs a `config_name` of its own; found {brief(names)}")
    return dict(zip(names, configs, strict=True))


def _chosen(configs: Mapping[str, Mapping[str, Any]], name: str | None, path: Path) -> Mapping[str, Any]:
    if name is None:
        defaults = [config for config in configs.values() if config.get("default") is True]
        if len(configs) == 1 or defaults or "default" in configs:
            return (defaults or [configs.get("default") or next(iter(configs.values()))])[0]
    elif name in configs:
        return configs[name]
    asked = "no `name` was given" if name is None else f"name={name!r} was asked for"
    raise ValueError(f"{asked}; {show(path)} has the configurations {list(configs)}. Choose one of them as `name`.")


def _resolved(path: Path, config: Mapping[str, Any]) -> FilesBySplit:
    """The files that the configuration names, or that their names put into splits."""
    data_dir = config.get("data_dir") or ""
    _check_inside(data_dir, path)
    base = path.absolute() / data_dir
    if any(mark in base.as_posix() for mark in ("::", "://")):
        raise ValueError(
            f"a folder must have no '::' or '://' in its path, which are for archives and addresses; found "
            f"{show(base)}. Rename it, or give the path of a file."
        )
    escaped = glob.escape(base.as_posix())
    patterns = _patterns(config["data_files"], path) if config.get("data_files") else None
    try:
        patterns = patterns or get_data_patterns(escaped)
        resolved = DataFilesDict.from_patterns(patterns, base_path=escaped)
    except (EmptyDatasetError, FileNotFoundError, ValueError) as error:
        raise _unusable(path, f"its files could not be found, {words_of(error)}") from error
    files: FilesBySplit = {}
    for split, found in resolved.items():
        for file in map(Path, found):
            if file.suffix.lower() in _PACKED and Path(file.stem).suffix.lower() in KINDS:
                raise ValueError(f"preference data must be unpacked; found {show(file)}. Unpack it, or remove it.")
            if file.suffix.lower() in KINDS:
                files.setdefault(str(split), []).append(file)
    if not files:
        raise _unusable(path, f"no {', '.join(KINDS)} files are where `data_files` looks for them")
    return files


def _patterns(data_files: Any, path: Path) -> dict[str, list[str]]:
    """The patterns of each split: of `data_files: x`, of a list of them, or of a list of {split, path}."""
    items = data_files if isinstance(data_files, list) else [data_files]
    if all(isinstance(item, str) for item in items):
        items = [{"split": "train", "path": items}]
    patterns: dict[str, list[str]] = {}
    for item in items:
        fields = item if isinstance(item, dict) else {}
        split, of_split = fields.get("split"), fields.get("path")
        of_split = [of_split] if isinstance(of_split, str) else of_split
        is_split = isinstance(split, str) and _SPLIT_NAME.fullmatch(split) is not None and split not in patterns
        if not is_split or not isinstance(of_split, list) or not of_split:
            found = brief(data_files)
            raise _unusable(path, f"`data_files` must be paths, or a `split` and a `path` each; found {found}")
        for pattern in of_split:
            _check_inside(pattern, path)
        patterns[str(split)] = of_split
    return patterns


def _check_inside(pattern: Any, path: Path) -> None:
    """ValueError for a pattern that names something outside of the folder, or is none."""
    if not isinstance(pattern, str):
        raise _unusable(path, f"paths must be text; found {brief(pattern)}")
    is_url = "://" in pattern or "::" in pattern
    is_absolute = pattern.startswith(("/", "\\", "~")) or re.match(r"[A-Za-z]:", pattern) is not None
    if is_url or is_absolute or ".." in re.split(r"[/\\]", pattern):
        raise _unusable(path, f"they name {brief(pattern)}, which is outside of the folder")


def _unusable(path: Path, found: str) -> ValueError:
    return ValueError(
        f"the metadata of the folder {show(path)} (in its README.md or .huggingface.yaml) must name files inside "
        f"of it; {found}. Correct them, or give the path of a file."
    )
