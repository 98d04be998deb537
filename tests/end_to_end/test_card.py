"""The model card: the names of transformers become those of a header, and no path of this machine is in it."""

from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard
from peft import LoraConfig

from families import tiny_model
from holdfast.card import is_hub_id
from policies import config, tiny_tokenizer, trainer


def card_of(folder: Path, **metadata: Any) -> ModelCard:
    ours = trainer(tiny_model(), config(folder / "kelp"))
    ours.create_model_card(**metadata)
    return ModelCard.load(folder / "kelp" / "README.md")


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"finetuned_from": "org/base"}, {"base_model": "org/base"}),
        ({"finetuned_from": "gpt2"}, {"base_model": "gpt2"}),
        ({"finetuned_from": "./base"}, {"base_model": None}),
        ({"finetuned_from": "runs/of/mine"}, {"base_model": None}),
        ({"tasks": "text-generation"}, {"pipeline_tag": "text-generation"}),
        (
            {"tasks": ["text-generation", "chat"]},
            {"pipeline_tag": "text-generation", "tags": ["chat", "dpo", "holdfast"]},
        ),
        ({"dataset_tags": "org/pairs"}, {"datasets": ["org/pairs"]}),
        ({"dataset_tags": ["a/b", "c"], "dataset": "Pairs"}, {"datasets": ["a/b", "c"]}),
        ({"dataset_name": "org/pairs", "dataset_args": "split=train"}, {"datasets": ["org/pairs"]}),
        ({"dataset_name": "/data/pairs"}, {"datasets": None}),
        ({"language": "en", "license": "mit"}, {"language": "en", "license": "mit"}),
    ],
)
def test_names_of_a_header(given: dict[str, Any], expected: dict[str, Any], tmp_path: Path) -> None:
    header = card_of(tmp_path, **given).data.to_dict()
    assert {name: header.get(name) for name in expected} == expected
    assert not {"finetuned_from", "dataset_tags", "dataset", "dataset_args", "tasks"} & header.keys()
    if "dataset_args" in given:
        assert "org/pairs, (split=train)" in (tmp_path / "kelp" / "README.md").read_text()


@pytest.mark.parametrize("is_adapter", [False, True])
def test_no_path_is_in_what_is_saved(is_adapter: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither in the card nor in those that peft writes into checkpoints, whether the path is absolute or not."""
    tiny_model().save_pretrained(tmp_path / "secret" / "place")
    tiny_tokenizer().save_pretrained(tmp_path / "secret" / "place")
    monkeypatch.chdir(tmp_path)
    for path in (str(tmp_path / "secret" / "place"), "secret/place"):
        lora = {"peft_config": LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")} if is_adapter else {}
        ours = trainer(path, config(tmp_path / "out", save_strategy="steps", save_steps=2, max_steps=2), **lora)
        ours.train()
        ours.save_model()
        ours.create_model_card(dataset_name="secret/place")
        cards = list((tmp_path / "out").rglob("README.md"))
        assert len(cards) == (2 if is_adapter else 1)
        assert [card for card in cards if "secret" in card.read_text()] == []
        assert "holdfast" in ModelCard.load(tmp_path / "out" / "README.md").data.tags


def test_what_may_be_a_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "org" / "here").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    names = ["gpt2", "org/base", "org/here", "a/b/c", "../x", "~/x", "C:\\x", "C:/x", "", "with space/x", "a--b/c"]
    assert [name for name in names if is_hub_id(name)] == ["gpt2", "org/base"]
