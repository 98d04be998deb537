"""What is wrong with the files of a model's folder, named by file.

The libraries that read a model fail in many ways, and few of their errors name the file. So the files are looked at
here. `check_folder` comes before they are read: a pipe would be waited for without end, and a file that may not be read
is "not found" to some libraries. `fault_of` comes after reading failed, and says which file is damaged and how. Given
up: damage inside tensors, which no file of a model lets one see.
"""

import json
import os
import stat
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

OF_A_MODEL = ("config.json", "generation_config.json", "adapter_config.json")
OF_A_TOKENIZER = (
    "tokenizer_config.json", "tokenizer.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "processor_config.json", "preprocessor_config.json", "config.json",
)  # fmt: skip
"""Files that hold one JSON mapping. Libraries pass some of them over in silence where they are damaged."""
INDEX = ".safetensors.index.json"
_READ = (".json", ".safetensors", ".bin", ".jinja", ".model", ".txt", ".py")
_NAMES = (
    *OF_A_MODEL, *OF_A_TOKENIZER, "model.safetensors", "adapter_model.safetensors", "pytorch_model.bin",
    "adapter_model.bin", "chat_template.jinja", "merges.txt", "tokenizer.model",
)  # fmt: skip
_WEIGHTS = (".safetensors", ".bin", ".gguf", INDEX)
_MOST_PARTS = 100_000
_KINDS = {list: "a list", str: "a text", int: "a number", float: "a number", bool: "a truth value", type(None): "null"}


def check_folder(path: str, mappings: Sequence[str]) -> None:
    """ValueError where something in the folder stands in a file's place (a folder, a pipe), or may not be read, where
    one of the files `mappings` holds no JSON mapping, or where the config asks for more layers than any model has.
    Nothing where `path` is no local path."""
    if not os.path.exists(path):
        return
    if not os.path.isdir(path):
        raise ValueError(f"{path!r} is no folder. Name the folder that `save_pretrained` wrote, or a hub id")
    try:
        names = sorted(os.listdir(path))
    except OSError as error:
        raise ValueError(f"its files cannot be listed: {error.strerror}") from error
    for name in names:
        if name.endswith(_READ):
            _check_file(Path(path) / name, is_a_files_name=name in _NAMES)
    for index in (name for name in names if name.endswith(INDEX)):
        for shard in _shards(Path(path) / index):
            _check_file(Path(path) / shard, is_a_files_name=True)
    for name in mappings:
        if (fault := _fault_of_json(Path(path) / name)) is not None:
            raise ValueError(fault)
    _check_counts(Path(path) / "config.json")


def _check_file(file: Path, *, is_a_files_name: bool) -> None:
    try:
        mode = file.stat().st_mode
        if stat.S_ISDIR(mode):
            if is_a_files_name:
                raise ValueError(f"{file.name} is a folder, not a file")
            return
        if not stat.S_ISREG(mode):
            raise ValueError(f"{file.name} is a pipe or a device, not a file")
        with open(file, "rb"):
            pass
    except PermissionError as error:
        raise ValueError(
            f"{file.name} may not be read ({error.strerror}); ask its owner, or change its mode"
        ) from error
    except OSError:
        return  # a link to nothing: `fault_of` names it, where the file is needed


def _shards(index: Path) -> list[str]:
    """The names of the files that an index of shards lists; empty where it cannot be read."""
    try:
        shards = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
    except (OSError, ValueError, RecursionError, LookupError, TypeError, AttributeError):
        return []
    return sorted({shard for shard in shards if isinstance(shard, str) and "\0" not in shard})


def _check_counts(config: Path) -> None:
    """ValueError where a config asks for more layers, heads or experts than any model has: making them has no end."""
    try:
        values = json.loads(config.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return
    for name, value in _items(values):
        is_count = name.startswith(("num_", "n_")) and any(
            part in name for part in ("layer", "head", "expert", "block")
        )
        if is_count and isinstance(value, int | float) and not 0 <= value <= _MOST_PARTS:
            raise ValueError(f"config.json says {name}={value:.6g}, which no model has")


def _items(value: Any) -> Iterator[tuple[str, Any]]:
    """The entries of a mapping and of the mappings in it."""
    if isinstance(value, Mapping):
        for name, inner in value.items():
            yield str(name), inner
            yield from _items(inner)


def fault_of(path: str) -> str | None:
    """What is wrong with the first damaged file of weights in a local folder, as a clause; None where none is seen."""
    folder = Path(path)
    is_adapter = (folder / "adapter_config.json").is_file()
    weights = "adapter_model.safetensors" if is_adapter else "model.safetensors"
    if not [name for name in os.listdir(folder) if name.endswith(_WEIGHTS)] and (
        is_adapter or (folder / "config.json").is_file()
    ):
        return f"{weights} is missing"
    for file in sorted(folder.glob("*.safetensors")):
        if (fault := _fault_of_tensors(file)) is not None:
            return fault
    for index in sorted(folder.glob(f"*{INDEX}")):
        if (fault := _fault_of_json(index)) is not None:
            return fault
        if not (shards := _shards(index)):
            return f"{index.name} lists no files of weights (`weight_map`)"
        for shard in shards:
            if not (folder / shard).is_file():
                return f"{shard} is missing, which {index.name} lists"
    return None


def _fault_of_json(file: Path) -> str | None:
    if file.is_symlink() and not file.exists():
        return f"{file.name} is a link to a file that is not there"
    if not file.is_file():
        return None
    if file.stat().st_size == 0:
        return f"{file.name} is empty"
    try:
        text = file.read_text(encoding="utf-8")
        value = json.loads(text)
        if "\\ud" in text.lower():
            json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return f"{file.name} holds half a character (a lone surrogate)"
    except UnicodeDecodeError as error:
        return f"{file.name} is no text in UTF-8 (byte {error.start})"
    except json.JSONDecodeError as error:
        return f"{file.name} is not readable as JSON: {error.msg} (line {error.lineno}, column {error.colno})"
    except RecursionError:
        return f"{file.name} nests too deep"
    except ValueError as error:
        return f"{file.name} is not readable as JSON: {error}"
    return None if isinstance(value, dict) else f"{file.name} holds {_KINDS[type(value)]}, not a mapping"


def _fault_of_tensors(file: Path) -> str | None:
    """What is wrong with a safetensors file: 8 bytes of the header's length, a JSON header, then the tensors, up to the
    largest of the header's ends."""
    if not file.exists():
        return f"{file.name} is a link to a file that is not there"
    if file.is_dir():
        return f"{file.name} is a folder, not a file"
    size = file.stat().st_size
    if size < 8:
        return f"{file.name} is empty or cut: it has {size} bytes"
    with open(file, "rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if length > size - 8 or length > 100_000_000:
            return f"{file.name} is cut, or is no safetensors file: its header would have {length} bytes"
        header = stream.read(length)
    try:
        tensors = json.loads(header)
        ends = [tensor["data_offsets"][1] for name, tensor in tensors.items() if name != "__metadata__"]
        needed = 8 + length + max(ends, default=0)
    except (ValueError, RecursionError, LookupError, TypeError, AttributeError):
        return f"{file.name} has a damaged header"
    return f"{file.name} is cut or damaged: it has {size} bytes, not {needed}" if size != needed else None
