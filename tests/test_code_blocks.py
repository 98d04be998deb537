"""Every code block of README, CONTRIBUTING and docs/ is run, page by page, in the order in which a reader meets them.

What a language means is in CONTRIBUTING.md under "Code blocks". How commands are run is in `shown_commands.py`, what
stands for the things that a page names in `page_workplace.py`, and who compares a text in `shown_texts.py`.
"""

import contextlib
import json
import re
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from datasets import Dataset
from transformers import AutoModelForCausalLM

import holdfast.cli.runfile
import holdfast.losses.table
from code_blocks import LANGUAGES, ROOT, Block, blocks_in, blocks_of, pages
from holdfast import DPOConfig
from holdfast.batch import PairBatch
from holdfast.cli.runfile import read_run_file
from holdfast.cli.yaml_document import RunFileError
from holdfast.data.layouts.padded import PaddedLayout
from holdfast.losses import LossInputs, LossOptions, PairLogps, preference_loss
from holdfast.scoring.frozen import frozen_logps
from page_workplace import Workplace
from shown_commands import calls_of, output_of, run_block
from shown_commands import holdfast as run_holdfast
from shown_texts import TEXTS

PAGES = [page for page in pages() if blocks_of(page)]

IN_EVERY_RUN = {"README.md", "docs/troubleshooting.md"}
"""Of the pages that train, those that `make test` runs."""

_TRAINS = re.compile(r"holdfast (train|precompute|report|inspect|quickstart)|\.train\(|python examples|holdfast\.cli")


def marks_of(page: str) -> list[pytest.MarkDecorator]:
    """Pages that train take seconds."""
    commands = (block.text for block in blocks_of(page) if block.language in ("bash", "console", "python"))
    if not any(map(_TRAINS.search, commands)):
        return []
    return [pytest.mark.slow] if page in IN_EVERY_RUN else [pytest.mark.nightly]


@pytest.fixture(scope="session")
def stand_ins(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("stand-ins")


@pytest.fixture
def workplace(tmp_path, stand_ins, monkeypatch) -> Workplace:
    """A folder with everything that pages name, which is the current one."""
    folder = tmp_path / "page"
    folder.mkdir()
    monkeypatch.chdir(folder)
    place = Workplace(folder, stand_ins)
    place.fill()
    return place


@pytest.fixture(autouse=True)
def _tables_as_before(monkeypatch) -> Iterator[None]:
    """A loss that a page enters into the table is gone afterwards, and so are modules that it makes."""
    monkeypatch.setattr(holdfast.losses.table, "LOSSES", holdfast.losses.table.LOSSES)
    losses, modules = dict(holdfast.losses.table.LOSSES), set(sys.modules)
    yield
    for name in holdfast.losses.table.LOSSES.keys() - losses.keys():
        del holdfast.losses.table.LOSSES[name]
    for name in [name for name in sys.modules.keys() - modules if name.startswith("holdfast.") and is_shown(name)]:
        del sys.modules[name]


def is_shown(module: str) -> bool:
    """Whether a module is none of the package, but one that a page makes."""
    return not getattr(sys.modules[module], "__file__", None)


def test_every_block_says_what_it_is():
    unknown = [block.place for page in PAGES for block in blocks_of(page) if block.language not in LANGUAGES]
    assert unknown == [], f"each block has one of the languages {', '.join(LANGUAGES)}"


def test_every_fence_is_a_block():
    """As many fences are found as lines open or close one."""
    for page in pages():
        lines = re.findall(r"^ *```", (ROOT / page).read_text(encoding="utf-8"), re.MULTILINE)
        assert len(lines) == 2 * len(blocks_of(page)), page


@pytest.mark.parametrize("page", [pytest.param(page, marks=marks_of(page)) for page in PAGES])
def test_the_blocks_of_a_page_run(page, workplace, tmp_path):
    for block in blocks_of(page):
        try:
            RUN[block.language](block, workplace, tmp_path / "bin")
        except (Exception, SystemExit) as error:
            raise AssertionError(f"{block.place}: {type(error).__name__}: {error}") from error


# --- what becomes of a block, by its language -------------------------------------------------------------------------


def run_python(block: Block, place: Workplace, bin_folder: Path) -> None:
    """Code with the title of a file of the package, or of the tests, is run as a part of that file."""
    place.provide(block.text, train)
    if block.title.startswith(("src/", "tests/")):
        run_as_part_of(block, place)
        return
    if block.title:
        place.write(block.title, block.text)
    names = place.names_for(block.text)
    names["__name__"] = "__main__"
    exec(compile(block.text, block.place, "exec"), names)


def run_as_part_of(block: Block, place: Workplace) -> types.ModuleType:
    """The module of that title, or a copy of it, with the code of the block at its end. A block that is an expression
    only is evaluated."""
    name = block.title.removeprefix("src/").removeprefix("tests/").removesuffix(".py").replace("/", ".")
    module = types.ModuleType(name)
    if (ROOT / block.title).exists():
        __import__(name)
        vars(module).update({key: value for key, value in vars(sys.modules[name]).items() if key != "__file__"})
    else:
        sys.modules[name] = module
    vars(module).update({key: value for key, value in place.names.items() if not key.startswith("__")})
    before = dict(vars(module))
    exec(compile(block.text, block.place, "exec", dont_inherit=True), vars(module))
    place.names |= {key: value for key, value in vars(module).items() if value is not before.get(key)}
    place.names |= {key: value for key, value in vars(module).items() if getattr(value, "__module__", "") == name
                    and not (ROOT / block.title).exists()}  # fmt: skip
    return module


def run_bash(block: Block, place: Workplace, bin_folder: Path) -> None:
    place.provide(block.text, train)
    run_block(block.text, place.folder, bin_folder)


def run_console(block: Block, place: Workplace, bin_folder: Path) -> None:
    """Each line after a `$` is a command of holdfast; the lines up to the next are what it prints. An error is one
    line, and a page may break it."""
    place.provide(block.text, train)
    shown = re.split(r"^\$ ", block.text, flags=re.MULTILINE)
    assert not shown[0].strip(), "a console begins with `$ ` and a command"
    for part in shown[1:]:
        command, _, expected = part.partition("\n")
        while command.endswith("\\"):
            more, _, expected = expected.partition("\n")
            command = f"{command}\n{more}"
        (call,) = calls_of(command, place.folder, bin_folder)
        assert call.program == "holdfast", f"{command}: only what holdfast prints is compared"
        code, printed = output_of(call.arguments, columns=max([80, *map(len, expected.splitlines())]))
        if "error: " in expected:
            assert code != 0, f"{command}: it does not fail"
            assert_shown(
                " ".join(expected.removeprefix("...").split()),
                " ".join("".join(printed.partition("error: ")[1:]).split()),
            )
        else:
            assert code == 0, f"{command} ended with {code}: {printed}"
            assert_shown(expected, printed)


def assert_shown(expected: str, printed: str) -> None:
    """`...` stands for any text, on a line of its own for any number of lines."""
    lines = [line.rstrip() for line in printed.strip().splitlines()]
    pattern = "".join(
        r"(?:.*\n)*?" if line.strip() == "..." else ".*?".join(map(re.escape, line.rstrip().split("..."))) + r"\n"
        for line in expected.strip().splitlines()
    )
    assert re.fullmatch(pattern, "".join(f"{line}\n" for line in lines)), f"shown:\n{expected}\nprinted:\n{printed}"


def run_yaml(block: Block, place: Workplace, bin_folder: Path) -> None:
    """A run file, or a part of one. With a title that is a file's, later blocks find it there."""
    found = yaml.safe_load(block.text)
    if block.title and not block.title.endswith((".yaml", ".yml")):
        assert block.title in OTHERS_FILES, f"{block.title}: whose file is it?"
        return
    if block.title:
        place.write(block.title, block.text)
    missing = {"model": "model", "data": {"train": "pairs.jsonl"}}
    place.write("shown.yaml", yaml.safe_dump({**missing, **found}, sort_keys=False))
    run = read_run_file(place.folder / "shown.yaml", ["training.use_cpu=true", "training.bf16=null"])
    engines = {"fsdp", "deepspeed"} & (found.get("training") or {}).keys()
    if engines:  # they are refused for what this process lacks, not for how they are written
        with pytest.raises(RunFileError, match=r"in a single process|DeepSpeed.*is not installed|pip install"):
            run.training_arguments()
    else:
        assert_set(found, run.training_arguments())


def assert_set(found: dict[str, Any], args: DPOConfig) -> None:
    """The numbers of the section `training` are those of the config."""
    for name, value in (found.get("training") or {}).items():
        if isinstance(value, int | float) and name not in ("bf16", "fsdp"):
            assert getattr(args, name) == pytest.approx(value), name


def run_json(block: Block, place: Workplace, bin_folder: Path) -> None:
    """Rows. Each alone is a dataset of which nothing is left out, unless the block has a file's title."""
    decoder, rows, text = json.JSONDecoder(), [], block.text.strip()
    while text:
        row, end = decoder.raw_decode(text)
        rows.append(row)
        text = text[end:].lstrip()
    if block.title:
        place.write(block.title, "".join(json.dumps(row) + "\n" for row in rows))
        return
    for row in rows:
        if not {"chosen", "chosen_ids"} & row.keys():
            continue
        place.write("shown.jsonl", json.dumps(row) + "\n")
        place.write("shown.yaml", "model: model\ndata: {train: shown.jsonl}\n")
        run_holdfast(["data", "shown.yaml", "--json", "shown.json"])
        found = json.loads((place.folder / "shown.json").read_text(encoding="utf-8"))
        assert found["datasets"]["train"]["num_used"] == 1


def run_text(block: Block, place: Workplace, bin_folder: Path) -> None:
    """A text is no code; a test compares it with what is said."""
    first = block.text.splitlines()[0]
    found = [how for (page, begins), how in TEXTS.items() if page == block.page and first.startswith(begins)]
    assert found, f"nothing compares this text: add a line to TEXTS in tests/shown_texts.py ({first!r})"
    how = found[0]
    if isinstance(how, str):
        path, _, name = how.partition("::")
        assert f"def {name}(" in (ROOT / path).read_text(encoding="utf-8"), how
    else:
        assert_shown(block.text, how(place))


RUN: dict[str, Callable[[Block, Workplace, Path], Any]] = {
    "bash": run_bash,
    "console": run_console,
    "json": run_json,
    "python": run_python,
    "text": run_text,
    "yaml": run_yaml,
}

OTHERS_FILES = ("Axolotl", "LLaMA-Factory", "TRL")
"""Files of other trainers, by the titles of their blocks: `test_migration_pages.py` compares them with ours."""


def train(run_file: str) -> None:
    """Makes the run that a page speaks of as finished."""
    run_holdfast(["train", run_file])


# --- the runner finds what is wrong -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("```bash\nholdfast trane run.yaml\n```\n", "No such command"),
        ("```bash\nholdfast data 'run.yaml\n```\n", "bash says"),
        ("```bash\nmake tea\n```\n", "the Makefile has"),
        ("```bash\ntorchrun --nproc_per_nodes=2 -m holdfast.cli data run.yaml\n```\n", "2"),
        ("```bash\npython benchmarks/run.py --no-such-flag\n```\n", "not there"),
        ("```python\nDPOConfig(output_dir='o', betta=1)\n```\n", "betta"),
        ("```yaml\ntraining: {betta: 0.1}\n```\n", "betta"),
        ("```json\n{\"prompt\": \"a\", \"chosen\": \n```\n", "Expecting value"),
        ("```text\nanything\n```\n", "nothing compares this text"),
        ("```console\n$ holdfast --version\nholdfast 99\n```\n", "holdfast 99"),
    ],
)  # fmt: skip
def test_a_wrong_block_is_found(text, message, workplace, tmp_path):
    (block,) = blocks_in("docs/index.md", text)
    with pytest.raises((Exception, SystemExit)) as error:
        RUN[block.language](block, workplace, tmp_path / "bin")
    assert message in str(error.value) or message in repr(error.value)


def test_what_a_console_may_leave_out():
    assert_shown("a ... c\n...\nz\n", "a b c\nd\ne\nz\n")
    with pytest.raises(AssertionError, match="shown"):
        assert_shown("a\nz\n", "a\nb\nz\n")


# --- examples of how to add something ---------------------------------------------------------------------------------


def parts_of(page: str, place: Workplace) -> dict[str, Any]:
    """The names that the titled blocks of a page make."""
    for block in blocks_of(page):
        if block.language == "python" and block.title:
            run_as_part_of(block, place)
    return place.names


def test_the_loss_of_the_page_is_the_one_of_its_oracle(workplace):
    """Also by hand, beta 0.5: margins 0.5 * (2 + 1) = 1.5 and 0.5 * (1 - 2) = -0.5; (1 - -0.5)^2 = 2.25."""
    names = parts_of("docs/howto/loss.md", workplace)
    chosen, rejected = torch.tensor([-10.0, -11.0]), torch.tensor([-14.0, -11.0])
    lengths = torch.tensor([4, 4])
    policy, reference = (
        PairLogps(
            chosen=chosen, rejected=rejected, chosen_lengths=lengths, rejected_lengths=lengths, chosen_likelihood=chosen
        )
        for chosen, rejected in ((chosen, rejected), (torch.tensor([-12.0, -12.0]), torch.tensor([-13.0, -13.0])))
    )
    options = names["SquaredHingeOptions"](beta=0.5, hinge_margin=1.0)
    found = names["squared_hinge"](LossInputs(policy=policy, reference=reference, options=options))
    assert found.tolist() == [0.0, 2.25]
    pairs = [
        types.SimpleNamespace(o={"hinge_margin": 1.0}, beta=0.5, score_w=of_chosen, score_l=of_rejected)
        for of_chosen, of_rejected in torch.tensor([[2.0, -1.0], [1.0, 2.0]])
    ]
    assert [names["_squared_hinge"](pair).item() for pair in pairs] == found.tolist()


def test_the_layout_of_the_page_fills_rows_to_their_length(workplace):
    """Two pairs whose rows have 5, 4, 3 and 6 tokens are four rows of 8; the rest of each is not attended to."""
    names = parts_of("docs/howto/layout.md", workplace)
    pairs = [
        {"prompt_ids": [5, 6], "chosen_ids": [7, 8, 9], "rejected_ids": [7, 9]},
        {"prompt_ids": [4], "chosen_ids": [7, 8], "rejected_ids": [7, 9, 9, 9, 9]},
    ]
    batch = names["FullLengthLayout"](0, 8, "keep_start", None)(pairs)
    assert batch["input_ids"].tolist() == [
        [5, 6, 7, 8, 9, 0, 0, 0],
        [4, 7, 8, 0, 0, 0, 0, 0],
        [5, 6, 7, 9, 0, 0, 0, 0],
        [4, 7, 9, 9, 9, 9, 0, 0],
    ]
    assert batch["attention_mask"].sum(1).tolist() == [5, 3, 4, 6]
    with pytest.raises(ValueError, match="max_length, which is None"):
        names["FullLengthLayout"](0, None, "keep_start", None)


def test_the_reference_of_the_page_keeps_the_first_policy(workplace):
    """Its log-probs are the policy's, and stay so when the policy moves."""
    names = parts_of("docs/howto/reference.md", workplace)
    assert names["WAYS"]["late_copy"] is names["_late_copy"]
    policy = AutoModelForCausalLM.from_pretrained("model")
    reference = names["LateCopyReference"](policy, contextlib.nullcontext)
    batch = PaddedLayout(0, 64, "keep_start", None)([{"prompt_ids": [5, 6], "chosen_ids": [7, 8], "rejected_ids": [9]}])
    pair_batch = PairBatch.from_tensors(batch)
    first = reference.logps(pair_batch).per_token.clone()
    reference.before_policy_changes()
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter += 0.1
    assert torch.equal(reference.logps(pair_batch).per_token, first)
    assert not torch.equal(frozen_logps(policy, pair_batch, contextlib.nullcontext).per_token, first)


def test_the_key_of_the_page_shuffles_the_rows(workplace):
    block = next(block for block in blocks_of("docs/howto/run-file-key.md") if block.language == "python")
    key = eval(block.text, vars(holdfast.cli.runfile))
    rows = Dataset.from_list([{"n": n} for n in range(20)])
    found = key.arguments(None, 3, {"train_dataset": rows})["train_dataset"]
    assert found["n"] == rows.shuffle(seed=3)["n"]
    assert sorted(found["n"]) == rows["n"] != found["n"]


def test_the_first_losses_of_the_page():
    """Policy and reference are the same; beta is 0.1."""
    row = next(
        line for line in (ROOT / "docs/troubleshooting.md").read_text("utf-8").splitlines() if "(`hinge`)" in line
    )
    formulas = re.findall(r"`?(1[\d./() a-z^]*?)`? \(`(\w+)`\)", row)
    shown = {
        name: eval(formula.replace("^", "**").replace("4 beta", "4 * beta"), {"beta": 0.1})
        for formula, name in formulas
    }
    zeros, lengths = torch.zeros(1), torch.tensor([4])
    same = PairLogps(
        chosen=zeros, rejected=zeros, chosen_lengths=lengths, rejected_lengths=lengths, chosen_likelihood=zeros
    )
    found = {
        name: preference_loss(same, same, loss_types=[name], loss_weights=[1.0], options=LossOptions(beta=0.1)).item()
        for name in shown
    }
    assert set(shown) == {"hinge", "ipo", "apo_zero", "bco_pair"}
    assert found == pytest.approx(shown, rel=1e-3)


def test_texts_that_are_compared_are_on_their_pages():
    """No line of the table is left behind by a page that changed."""
    shown = {(block.page, block.text.splitlines()[0]) for page in PAGES for block in blocks_of(page)}
    left = [key for key in TEXTS if not any(page == key[0] and first.startswith(key[1]) for page, first in shown)]
    assert left == []
