"""The documentation says what the code does: tables that name code are compared with it, examples are run."""

import json
import re
import runpy
import sys
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

import holdfast
import tiny
from holdfast import passed_through
from holdfast.cli.app import app
from holdfast.cli.runfile import SECTIONS, read_run_file
from holdfast.config import DPOConfig
from holdfast.data.columns import TOKENIZED_COLUMNS
from holdfast.data.usability import UNUSABLE_REASONS
from holdfast.losses import LOSSES, LossOptions, ModifierOptions, other_names
from holdfast.losses.options import Options, option_names, rules
from holdfast.options.renamed import RENAMED, RENAMED_ARGUMENTS, Expression, spelled
from holdfast.reference.build import WAY_NAMES
from holdfast.report.healthy import HEALTHY
from holdfast.training.never_called import NEVER_CALLED
from holdfast.training.script_attributes import READABLE, OfOption, ScriptableTrainer

ROOT = Path(__file__).parent.parent


def table(page: str, heading: str) -> list[list[str]]:
    """The rows of the table whose first column has that heading, without Markdown's backticks."""
    lines = (ROOT / "docs" / page).read_text(encoding="utf-8").splitlines()
    start = next(number for number, line in enumerate(lines) if line.startswith(f"| {heading} |"))
    rows = []
    for line in lines[start + 2 :]:
        if not line.startswith("|"):
            break
        rows.append([cell.strip() for cell in line.strip("|").split(" |")])
    return rows


def names(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


def test_the_table_of_losses_is_the_one_in_the_code():
    written = {
        names(name)[0]: (source, set(names(options)), reference == "yes")
        for name, _, source, options, reference in table("losses.md", "loss")
    }
    assert written == {name: (loss.paper, set(loss.reads), loss.needs_reference) for name, loss in LOSSES.items()}


def test_the_options_of_losses_are_those_in_the_code():
    """Each row is an option's declaration: name, default, rule and help text, and then who reads it."""
    page = {tuple(cell.replace("`", "") for cell in row) for row in table("losses.md", "option of losses")}
    assert page == set(declared_options())


def declared_options() -> Iterator[tuple[str, ...]]:
    """The rows of that table, as the code has them."""
    of_losses = rules(LossOptions)
    for field in fields(LossOptions):
        readers = [name for name, loss in LOSSES.items() if field.name in loss.reads]
        if field.name == "beta":
            readers = ["every loss", *(f"except {name}" for name, loss in LOSSES.items() if loss.options is Options)]
        elif (read_under := of_losses[field.name].read_under) is not None:
            readers = [read_under[1]]
        demand, meaning = of_losses[field.name].demand, field.metadata["help"]
        yield field.name, str(field.default), demand, meaning, ", ".join(readers)


def test_the_modifiers_are_those_in_the_code():
    modifiers = {names(row[0])[0] for row in table("losses.md", "modifier")}
    assert modifiers == {"f_divergence_type", *option_names(ModifierOptions)}


def plain(text: str) -> str:
    return text.replace("\\|", "|")


@pytest.mark.parametrize(("heading", "entries"), [("option", RENAMED), ("argument", RENAMED_ARGUMENTS)])
def test_the_options_of_other_trainers_are_those_in_the_code(heading, entries):
    written = [
        (*names(name), plain(advice), names(silent)) for name, advice, silent in table("howto/script.md", heading)
    ]
    assert written == [
        (name, entry.advice(Expression("x"), {}), [spelled(value) for value in entry.asks_nothing])
        for name, entry in entries.items()
    ]


@pytest.mark.parametrize(
    ("heading", "entries"),
    [("loss_type", other_names.INSTEAD), ("method", NEVER_CALLED), ("name", passed_through.INSTEAD)],
)
def test_the_names_of_other_trainers_are_those_in_the_code(heading, entries):
    assert [(*names(name), plain(advice)) for name, advice in table("howto/script.md", heading)] == [*entries.items()]


def test_the_attributes_of_a_trainer_are_those_in_the_code():
    of_options = {name: f"the option `{value.option}`" for name, value in vars(ScriptableTrainer).items()
                  if isinstance(value, OfOption)}  # fmt: skip
    written = [(*names(name), what) for name, what in table("howto/script.md", "attribute")]
    assert written == [*of_options.items(), *((name, "read only") for name in READABLE)]


def test_the_error_of_the_page_is_the_one_that_a_script_gets():
    page = (ROOT / "docs" / "howto" / "script.md").read_text(encoding="utf-8")
    example = re.findall(r"```text\n(DPOConfig was given.*?)And in the call", page, re.DOTALL)[0]
    with pytest.raises(TypeError) as error:
        DPOConfig(output_dir="o", use_cpu=True, max_prompt_length=128, rpo_alpha=0.5, evaluation_strategy="steps")
    assert str(error.value) + "\n" == example


def test_the_ways_to_hold_a_reference():
    page = (ROOT / "docs" / "references.md").read_text(encoding="utf-8")
    found = set(re.findall(r'`reference="(\w+)"`', page))
    assert found == set(WAY_NAMES)


def test_options_named_on_the_reference_page_exist():
    page = (ROOT / "docs" / "references.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`(\w+)=(?:True|False)`", page)) | {"ref_model_sync_steps", "ref_model_mixup_alpha"}
    assert named - set(DPOConfig.__dataclass_fields__) == set()


def test_the_sections_of_a_run_file():
    assert [names(row[0])[0] for row in table("cli.md", "section")] == list(SECTIONS)


def test_the_reasons_for_which_a_row_is_left_out():
    assert tuple(row[0] for row in table("data.md", "reason")) == UNUSABLE_REASONS


def test_the_columns_of_token_ids():
    assert tuple(names(table("data.md", "columns")[-1][0])) == TOKENIZED_COLUMNS


def test_the_run_file_of_the_documentation_is_one(tmp_path):
    page = (ROOT / "docs" / "cli.md").read_text(encoding="utf-8")
    path = tmp_path / "run.yaml"
    path.write_text(re.findall(r"```yaml\n(.*?)```", page, re.DOTALL)[0], encoding="utf-8")
    run = read_run_file(path, ["training.use_cpu=true"])
    assert run.training_arguments().learning_rate == 1e-6
    assert run.peft_config().r == 16


def test_every_public_name_is_in_the_api_reference():
    pages = (ROOT / "docs" / "api").glob("*.md")
    described = {name for page in pages for name in re.findall(r"^::: (\S+)", page.read_text("utf-8"), re.MULTILINE)}
    homes = {name: getattr(holdfast, name).__module__ for name in holdfast.__all__ if name != "__version__"}
    missing = {name for name, home in homes.items() if not {home, f"{home}.{name}"} & described}
    assert missing == set()


def test_the_tree_in_the_readme_is_the_package():
    block = re.search(r"```text\nsrc/holdfast/\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    assert block is not None
    rooms, room = set(), ""
    for indent, name in re.findall(r"^( +)(\S+)  ", block[1], re.MULTILINE):
        room = name if len(indent) == 2 else room
        rooms.add(name if len(indent) == 2 else room + name)
    package = ROOT / "src" / "holdfast"
    modules = {path.name for path in package.glob("*.py")} - {"__init__.py"}
    packages = {f"{path.parent.relative_to(package)}/" for path in package.glob("*/**/__init__.py")}
    assert rooms == modules | packages


@pytest.fixture
def workplace(tmp_path, monkeypatch) -> Path:
    """A current folder with a model and pairs in it."""
    tokenizer = tiny.tokenizer()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    rows = "\n".join(json.dumps(row) for row in tiny.preference_rows(8))
    (tmp_path / "pairs.jsonl").write_text(rows, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_report_of_the_documentation_is_what_is_printed(workplace):
    page = (ROOT / "docs" / "howto" / "data.md").read_text(encoding="utf-8")
    rows, printed = re.findall(r"```(?:json|text)[^\n]*\n([{m].*?)```", page, re.DOTALL)
    (workplace / "pairs.jsonl").write_text(rows, encoding="utf-8")
    run = "model: model\ndata: {train: pairs.jsonl}\ntraining: {max_length: 36, use_cpu: true}\n"
    (workplace / "run.yaml").write_text(run, encoding="utf-8")
    result = CliRunner().invoke(app, ["data", "run.yaml", "--rows", "0", "--row", "1"])
    assert result.exit_code == 0, result.output
    assert [line.rstrip() for line in result.stdout.splitlines()] == printed.splitlines()


def test_the_two_examples_are_the_same_run(workplace, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["dpo.py", "model", "pairs.jsonl", "by-python"])
    runpy.run_path(str(ROOT / "examples" / "dpo.py"))
    overrides = ["--set", "model=model", "--set", "training.output_dir=by-file"]
    result = CliRunner().invoke(app, ["train", str(ROOT / "examples" / "run.yaml"), *overrides, "--debug"])
    assert result.exit_code == 0, result.output
    files = [workplace / folder / "adapter_model.safetensors" for folder in ("by-python", "by-file")]
    one, other = map(load_file, files)
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert max(one[name].abs().max() for name in one if "lora_B" in name) > 0


def test_the_healthy_ranges_are_those_in_the_code():
    written = [(*names(metric)[:1], words, otherwise) for metric, words, otherwise in table("metrics.md", "metric")]
    assert written == [(each.metric, each.words, each.otherwise) for each in HEALTHY]
