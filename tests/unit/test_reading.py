"""A damaged or hostile folder of a model, an adapter or a tokenizer is one message that names folder and file."""

import json
import os
import pickle
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file

import tiny
from families import tiny_model
from holdfast.policy import faults
from holdfast.policy.load import load_model
from holdfast.policy.tokenizer import read_tokenizer
from policies import POLICIES, config


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole model, one in shards, an adapter and a tokenizer."""
    folder = tmp_path_factory.mktemp("models")
    tiny_model().save_pretrained(folder / "model")
    tiny_model().save_pretrained(folder / "sharded", max_shard_size="20kB")
    adapted = POLICIES["lora_sft"]()
    adapted.peft_config["default"].base_model_name_or_path = str(folder / "model")
    adapted.save_pretrained(folder / "adapter")
    tiny.tokenizer().save_pretrained(folder / "tokenizer")
    return folder


def load(folder: Path, out: Path, **options: Any) -> Any:
    """What a folder of this name holds, loaded as a run would."""
    if (folder / "tokenizer.json").exists() or "tokenizer" in folder.name:
        return read_tokenizer(str(folder), trust_remote_code=False, advice="Give another.", **options)
    return load_model(str(folder), options or None, args=config(out), is_trainable=False)


def a_folder(file: Path) -> None:
    file.unlink()
    file.mkdir()


def a_pipe(file: Path) -> None:
    file.unlink()
    os.mkfifo(file)


def nothing_there(file: Path) -> None:
    file.unlink()
    file.symlink_to("nowhere")


ANY_FILE: dict[str, Callable[[Path], Any]] = {
    "empty": lambda file: file.write_bytes(b""),
    "cut": lambda file: file.write_bytes(file.read_bytes()[: file.stat().st_size // 2]),
    "flipped": lambda file: file.write_bytes(bytes([file.read_bytes()[0] ^ 0xFF]) + file.read_bytes()[1:]),
    "garbage": lambda file: file.write_bytes(bytes(range(256)) * 12),
    "zeros": lambda file: file.write_bytes(bytes(5000)),
    "folder": a_folder,
    "pipe": a_pipe,
    "link to nothing": nothing_there,
}
JSON: dict[str, Callable[[Path], Any]] = {
    "list": lambda file: file.write_text("[1, 2]"),
    "null": lambda file: file.write_text("null"),
    "text": lambda file: file.write_text('"text"'),
    "deep": lambda file: file.write_text('{"a":' * 100_000 + "1" + "}" * 100_000),
    "surrogate": lambda file: file.write_text('{"eos_token": "\\ud800"}'),
}


def changed(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    """A change of a JSON file's mapping in place."""

    def write(file: Path) -> None:
        values = json.loads(file.read_text())
        change(values)
        file.write_text(json.dumps(values))

    return write


def tensors(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], None]:
    """A change of a safetensors file's tensors in place."""

    def write(file: Path) -> None:
        values = load_file(file)
        change(values)
        save_file(values, file, metadata={"format": "pt"})

    return write


def _without(values: dict[str, Any]) -> None:
    del values[sorted(values)[0]]


def _cut_off(values: dict[str, torch.Tensor]) -> None:
    name = sorted(values)[0]
    values[name] = values[name][:2].contiguous()


WEIGHTS: dict[str, Callable[[Path], Any]] = {
    "a tensor missing": tensors(_without),
    "a tensor of another shape": tensors(_cut_off),
    "a long header": lambda file: file.write_bytes(struct.pack("<Q", 2**62) + file.read_bytes()[8:]),
}
CONFIGS: dict[str, Callable[[Path], Any]] = {
    "no model type": changed(lambda values: values.pop("model_type")),
    "another width": changed(lambda values: values.update(hidden_size=8)),
    "more layers": changed(lambda values: values.update(num_hidden_layers=3)),
    "endless layers": changed(lambda values: values.update(num_hidden_layers=10**9)),
    "layers below 0": changed(lambda values: values.update(num_hidden_layers=-2)),
    "no layers but a list": changed(lambda values: values.update(num_hidden_layers=[2])),
    "no head": changed(lambda values: values.update(num_attention_heads=0)),
}
SHARD = "model-00002-of-*.safetensors"
TABLE: list[tuple[str, str, str, Callable[[Path], Any]]] = [
    (folder, file, kind, damage)
    for folder, file, damages in (
        ("model", "config.json", {**ANY_FILE, **JSON, **CONFIGS}),
        ("model", "model.safetensors", {**ANY_FILE, **WEIGHTS}),
        ("model", "generation_config.json", {**ANY_FILE, **JSON}),
        ("sharded", "model.safetensors.index.json", {**ANY_FILE, **JSON}),
        ("sharded", SHARD, {**ANY_FILE, **WEIGHTS, "missing": os.remove}),
        ("adapter", "adapter_config.json", {**ANY_FILE, **JSON}),
        ("adapter", "adapter_model.safetensors", {**ANY_FILE, **WEIGHTS, "missing": os.remove}),
        ("tokenizer", "tokenizer.json", {**ANY_FILE, **JSON}),
        ("tokenizer", "tokenizer_config.json", {**ANY_FILE, **JSON}),
        ("tokenizer", "chat_template.jinja", {"folder": a_folder, "pipe": a_pipe}),
    )
    for kind, damage in damages.items()
]


@pytest.mark.parametrize(
    ("folder", "file", "kind", "damage"), TABLE, ids=[f"{file}-{kind}" for _, file, kind, _ in TABLE]
)
def test_a_damaged_file_is_one_message(
    folder: str, file: str, kind: str, damage: Callable[[Path], Any], folders: Path, tmp_path: Path
) -> None:
    """It names the folder, and the file unless only the whole model shows what is wrong."""
    copy = tmp_path / folder
    shutil.copytree(folders / folder, copy)
    file = next(copy.glob(file)).name
    damage(copy / file)
    with pytest.raises(ValueError, match=str(copy)) as refusal:
        load(copy, tmp_path / "out")
    message = str(refusal.value)
    assert len(message) < 1000
    assert file in message or "weights are" in message or "missing adapter keys" in message or kind in CONFIGS


def test_what_is_whole_is_loaded(folders: Path, tmp_path: Path) -> None:
    expected = tiny_model().state_dict()
    for name in ("model", "sharded"):
        found = load(folders / name, tmp_path / "out").state_dict()
        assert all(torch.equal(found[key], value) for key, value in expected.items())
    adapter = load(folders / "adapter", tmp_path / "out")
    assert isinstance(adapter, PeftModel)
    assert torch.equal(adapter.get_base_model().lm_head.weight, expected["lm_head.weight"])
    assert len(load(folders / "tokenizer", tmp_path)) == len(tiny.tokenizer())


def test_tied_weights_are_not_missing(tmp_path: Path) -> None:
    model = tiny_model("llama_tied")
    model.save_pretrained(tmp_path / "model")
    assert "lm_head.weight" not in load_file(tmp_path / "model" / "model.safetensors")
    assert torch.equal(load(tmp_path / "model", tmp_path / "out").lm_head.weight, model.model.embed_tokens.weight)


def test_weights_that_would_be_random_are_an_error_even_where_they_are_asked_for(folders: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"of other shapes.*\[97, 32\], not \[101, 32\]\).*They would be random"):
        load(folders / "model", tmp_path / "out", vocab_size=101, ignore_mismatched_sizes=True)


def test_what_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "weights").write_bytes(b"")
    os.mkfifo(tmp_path / "pipe")
    for name in ("weights", "pipe"):
        with pytest.raises(ValueError, match=rf"{name}' is no folder\. Name the folder"):
            load(tmp_path / name, tmp_path / "out")


def test_a_file_that_may_not_be_read(folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As another user: root may read every file."""

    def refuse(file: Path, *args: Any) -> Any:
        raise PermissionError(13, "Permission denied", str(file))

    monkeypatch.setattr(faults, "open", refuse, raising=False)
    with pytest.raises(ValueError, match=r"config\.json may not be read \(Permission denied\); ask its owner"):
        load(folders / "model", tmp_path / "out")


@pytest.mark.parametrize("kind", ["model", "tokenizer"])
def test_code_of_its_own_is_asked_for(kind: str, folders: Path, tmp_path: Path) -> None:
    copy = tmp_path / kind
    shutil.copytree(folders / kind, copy)
    file, auto = ("config.json", {"AutoConfig": "x.C", "AutoModelForCausalLM": "x.M"})
    if kind == "tokenizer":
        file, auto = ("tokenizer_config.json", {"AutoTokenizer": ["x.T", None]})
    changed(lambda values: values.update(auto_map=auto, model_type="new", tokenizer_class="New"))(copy / file)
    (copy / "x.py").write_text("raise SystemExit('this code was run')")
    with pytest.raises(
        ValueError, match=r"code of its own.*can do all that you can.*training\.trust_remote_code: true"
    ):
        load(copy, tmp_path / "out")


class _Touch:
    def __init__(self, path: Path) -> None:
        self._path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self._path,)


@pytest.mark.parametrize("kind", ["pickle", "torch"])
def test_pickled_weights_run_nothing(kind: str, folders: Path, tmp_path: Path) -> None:
    copy, trace = tmp_path / "model", tmp_path / "was-run"
    shutil.copytree(folders / "model", copy)
    (copy / "model.safetensors").unlink()
    if kind == "pickle":
        (copy / "pytorch_model.bin").write_bytes(pickle.dumps(_Touch(trace)))
    else:
        torch.save({"lm_head.weight": _Touch(trace)}, copy / "pytorch_model.bin")
    with pytest.raises(ValueError, match=str(copy)):
        load(copy, tmp_path / "out")
    assert not trace.exists()


def test_the_base_of_an_adapter_is_named(folders: Path, tmp_path: Path) -> None:
    copy = tmp_path / "adapter"
    shutil.copytree(folders / "adapter", copy)
    for base, message in (
        (str(tmp_path / "gone"), r"whose base '.*gone' was to be loaded, but there is no such folder"),
        (None, r"names no base \(`base_model_name_or_path`: None\)"),
    ):
        changed(lambda values, base=base: values.update(base_model_name_or_path=base))(copy / "adapter_config.json")
        with pytest.raises(ValueError, match=message):
            load(copy, tmp_path / "out")
