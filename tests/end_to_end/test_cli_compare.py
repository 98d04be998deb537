"""`holdfast inspect MODEL --reference REF`: its answers about real folders, its exit codes and its files."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from peft import LoraConfig, get_peft_model
from rich.cells import cell_len
from typer.testing import CliRunner

import tiny
from browser import opened
from families import tiny_model
from holdfast import DPOConfig, DPOTrainer
from holdfast.cli import app as cli
from holdfast.cli import compare as command
from holdfast.cli.compare import Comparing, compare
from holdfast.data.load import load_preferences

TOKENIZER = tiny.tokenizer()
NUM_PAIRS = 6


def model(seed: int = 0, family: str = "llama", **options: Any) -> Any:
    return tiny_model(family, seed=seed, vocab_size=len(TOKENIZER), max_position_embeddings=512, **options)


def trained(of: Any) -> Any:
    """The model with a little noise in its second layer's first matrix of the feed-forward."""
    with torch.no_grad():
        weight = of.model.layers[1].mlp.gate_proj.weight
        weight.add_(0.05 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(2)))
    return of


def save(made: Any, folder: Path, tokenizer: Any = TOKENIZER) -> None:
    made.save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)


def edited(folder: Path, of: Path, **entries: Any) -> None:
    """A copy of a folder with other entries in its config."""
    shutil.copytree(of, folder)
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))


def with_template(change: tuple[str, str]) -> Any:
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = tiny.CHAT_TEMPLATE.replace(*change)
    return tokenizer


def shorter() -> Any:
    tokenizer = tiny.tokenizer()
    tokenizer.model_max_length = 77
    return tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Folders of models, and pairs."""
    root = tmp_path_factory.mktemp("models")
    save(model(), root / "base")
    save(trained(model()), root / "sft")
    save(model(seed=3), root / "other")
    save(model().to(torch.bfloat16), root / "bf16")
    resized = model()
    resized.resize_token_embeddings(len(TOKENIZER) + 8, mean_resizing=False)
    save(resized, root / "resized")
    adapted: Any = get_peft_model(model(), LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    adapted.peft_config["default"].base_model_name_or_path = str(root / "base")
    adapted.save_pretrained(root / "fresh")
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(5)
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    adapted.save_pretrained(root / "lora")
    save(adapted.merge_and_unload(), root / "merged")
    save(model(family="mistral"), root / "mistral")
    edited(root / "dropout", root / "base", attention_dropout=0.1)
    edited(root / "rope", root / "base", rope_parameters={"rope_type": "default", "rope_theta": 500_000.0})
    scaled = model()
    scaled.lm_head.weight.data.mul_(1.1)
    save(scaled, root / "head")
    edited(root / "window", root / "mistral", sliding_window=9)
    edited(root / "dynamic", root / "base", rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0})
    save(model(), root / "template", with_template(("{{ message['role'] }}\n", "{{ message['role'] }}: ")))
    save(model(), root / "left", shorter())
    config = root / "left" / "tokenizer_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"padding_side": "left"}))
    save(model(), root / "words", tiny.tokenizer(["other words make other merges"] * 9))
    save(model(), root / "bare", None)
    (root / "pairs.jsonl").write_text("".join(json.dumps(each) + "\n" for each in tiny.preference_rows(NUM_PAIRS)))
    return root


def exit_code(asked: Comparing) -> int:
    with pytest.raises(typer.Exit) as ended:
        compare(asked, debug=False)
    return ended.value.exit_code


@pytest.fixture
def asked(folder, tmp_path, monkeypatch, capsys):
    """Compares two of the folders: the exit code, what was printed, and the JSON."""
    monkeypatch.setattr(command, "RANK", 0)

    def run(first: str, second: str, **options: Any) -> tuple[int, str, dict[str, Any]]:
        reference = second if second.startswith("__") else str(folder / second)
        pairs: dict[str, Any] = {"data": str(folder / "pairs.jsonl")} if not options.get("weights_only") else {}
        path = tmp_path / "out.json"
        code = exit_code(Comparing(model=str(folder / first), reference=reference, json=path, **pairs | options))
        return code, capsys.readouterr().out, json.loads(path.read_text())

    return run


@pytest.mark.parametrize(
    ("first", "second", "code", "kind", "parts"),
    [
        ("base", "base", 0, "identical", None),
        ("base", "dropout", 0, "identical", None),
        ("base", "left", 0, "identical", None),
        ("base", "bare", 0, "identical", None),
        ("fresh", "base", 0, "identical", None),
        ("lora", "merged", 0, "merged", None),
        ("merged", "lora", 0, "merged", None),
        ("lora", "base", 1, "base_of_model", "model.layers.0.self_attn.q_proj"),
        ("lora", "__base__", 1, "base_of_model", "model.layers.0.self_attn.q_proj"),
        ("base", "lora", 1, "base_of_reference", "model.layers.0.self_attn.q_proj"),
        ("lora", "fresh", 1, "base_of_model", "model.layers.0.self_attn.q_proj"),
        ("base", "sft", 1, "trained", "model.layers.1.mlp.gate_proj"),
        ("base", "other", 1, "other_model", "model.embed_tokens"),
        ("base", "bf16", 1, "rounded", "model.embed_tokens"),
        ("base", "resized", 1, "resized", None),
        ("base", "rope", 1, "settings", "model.rotary_emb"),
        ("base", "dynamic", 1, "settings", None),
        ("base", "head", 1, "trained", None),
        ("base", "mistral", 1, "other_architecture", "model.layers.0.self_attn.o_proj"),
        ("mistral", "window", 1, "settings", "model.layers.0"),
        ("base", "template", 1, "tokenizer", None),
        ("base", "words", 1, "tokenizer", None),
    ],
)
def test_each_kind_of_difference(asked, first, second, code, kind, parts):
    found_code, printed, found = asked(first, second)
    assert (found_code, found["verdict"]["kind"]) == (code, kind), printed
    assert found["verdict"]["outcome"] == ("differs" if code else "same")
    where = found["parting"]["beyond_rounding"]
    assert (None if where is None else where["event"][0]) == parts
    assert printed.startswith(found["verdict"]["sentence"])
    assert found["gaps"]["num_pairs"] == NUM_PAIRS


def naive_logps(folder: Path, rows: Any) -> list[torch.Tensor]:
    """The log-probs of each completion's tokens: one sequence at a time, all logits in fp64."""
    from transformers import AutoModelForCausalLM

    causal_lm = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).double().eval()
    found = []
    for side in ("chosen", "rejected"):
        for row in rows:
            prompt: Any = TOKENIZER.apply_chat_template(row["prompt"], add_generation_prompt=True, return_dict=False)
            whole: Any = TOKENIZER.apply_chat_template([*row["prompt"], *row[side]], return_dict=False)
            with torch.no_grad():
                logits = causal_lm(torch.tensor([whole])).logits[0]
            of_tokens = logits.log_softmax(-1)[torch.arange(len(whole) - 1), torch.tensor(whole[1:])]
            found.append(of_tokens[len(prompt) - 1 :])
    return found


def test_the_numbers_are_those_of_a_naive_computation(asked, folder):
    rows = tiny.preference_rows(NUM_PAIRS)
    ours, theirs = naive_logps(folder / "base", rows), naive_logps(folder / "sft", rows)
    gaps = torch.cat(ours) - torch.cat(theirs)
    _, printed, found = asked("base", "sft", beta=0.7)
    numbers = found["gaps"]
    assert numbers["num_tokens"] == len(gaps)
    assert numbers["mean"] == pytest.approx(float(gaps.abs().mean()), abs=1e-6)
    assert numbers["largest"] == pytest.approx(float(gaps.abs().max()), abs=1e-5)
    assert numbers["signed_mean"] == pytest.approx(float(gaps.mean()), abs=1e-6)
    ratios = torch.stack([(a - b).sum() for a, b in zip(ours, theirs, strict=True)])
    chosen, rejected = ratios.chunk(2)
    assert numbers["log_ratio"]["chosen"] == pytest.approx(float(chosen.mean()), abs=1e-5)
    loss = -torch.nn.functional.logsigmoid(0.7 * (chosen - rejected)).mean()
    assert numbers["first_loss"] == pytest.approx(float(loss), abs=1e-5)
    chosen_tokens = torch.cat(ours[:NUM_PAIRS])
    assert numbers["nats_per_token"]["chosen"]["model"] == pytest.approx(float(chosen_tokens.mean()), abs=1e-6)
    assert f"{float(loss):.4f}" in " ".join(printed.split())


def test_the_tokens_with_the_largest_gaps_are_shown(asked, folder):
    _, printed, found = asked("base", "sft")
    examples = found["gaps"]["examples"]
    sizes = [abs(each["gap"]) for each in examples]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[0] == pytest.approx(found["gaps"]["largest"])
    for each in examples:
        assert each["gap"] == pytest.approx(each["model"] - each["reference"])
        assert each["text"] == TOKENIZER.decode([each["token"]])
        assert f"row {each['row']}, {each['side']}, scored token {each['place']}" in printed


def test_tensors_that_differ_are_named(asked):
    _, printed, found = asked("base", "sft")
    assert [each["name"] for each in found["weights"]["differing"]] == ["model.layers.1.mlp.gate_proj.weight"]
    assert "model.layers.*.mlp.gate_proj.weight" in printed
    assert "its weight differs" in printed


def test_where_models_part_after_all_modules_or_between_them(asked):
    assert "log-probs part in the head, or in what follows it: lm_head.weight differs" in asked("base", "head")[1]
    printed = asked("mistral", "window")[1]
    assert "They part first in what model.layers.0 is given as attention_mask" in printed


def test_the_templates_and_a_row_are_shown(asked):
    _, printed, found = asked("base", "template")
    lines = [line.strip() for line in printed.splitlines()]
    assert "-{{ message['role'] }}" in lines
    assert "+{{ message['role'] }}:" in lines
    assert f"{NUM_PAIRS} of {NUM_PAIRS} rows become other tokens" in printed
    assert "-<|im_start|>user" in lines
    first = tiny.preference_rows(1)[0]["prompt"][0]["content"]
    assert f"+<|im_start|>user: {first}<|im_end|>" in lines
    assert found["tokenizers"]["rendering"]["model"].startswith(f"<|im_start|>user\n{first}")
    assert found["gaps"]["largest"] == 0


def test_parts_of_tokenizers_without_effect_are_told_apart(asked):
    _, _, found = asked("base", "left")
    assert {each["name"] for each in found["tokenizers"]["without_effect"]} == {"padding_side", "model_max_length"}
    assert found["tokenizers"]["counting"] == []
    _, _, found = asked("base", "words")
    assert "model.merges" in {each["name"] for each in found["tokenizers"]["counting"]}
    assert found["tokenizers"]["vocabulary"]["num_moved"] > 0


def test_tokenizers_may_be_left_aside(asked):
    assert asked("base", "words", ignore_tokenizer=True)[0] == 0


def test_a_tolerance_decides(asked):
    largest = asked("base", "bf16")[2]["gaps"]["largest"]
    code, _, found = asked("base", "bf16", tolerance=largest * 1.01)
    assert (code, found["verdict"]["kind"]) == (0, "within_tolerance")
    assert asked("base", "bf16", tolerance=largest * 0.99)[0] == 1


def test_weights_alone(asked):
    code, _printed, found = asked("lora", "merged", weights_only=True)
    assert (code, found["verdict"]["kind"], found["gaps"]) == (0, "identical", None)
    code, _, found = asked("base", "words", weights_only=True)
    assert (code, found["tokenizers"]) == (0, None)
    assert asked("base", "sft", weights_only=True)[0] == 1


def test_ids_that_the_reference_has_not(asked, folder, tmp_path):
    """A tokenizer with a token more, which is in every row, and a model with as many embeddings."""
    tokenizer = tiny.tokenizer()
    tokenizer.add_tokens(["<|im_role|>"], special_tokens=True)
    tokenizer.chat_template = tiny.CHAT_TEMPLATE.replace("{{ message['role'] }}", "<|im_role|>{{ message['role'] }}")
    larger = model()
    larger.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    save(larger, folder / "larger", tokenizer)
    code, printed, found = asked("larger", "base")
    assert (code, found["gaps"], found["parting"]) == (1, None, None)
    assert f"REF has {len(TOKENIZER)} embeddings, and MODEL's tokenizer makes ids up to {len(TOKENIZER)}" in printed
    assert asked("base", "larger")[2]["gaps"] is not None


def test_the_reference_that_a_run_recorded(asked, folder, tmp_path):
    rows = load_preferences(folder / "pairs.jsonl")
    args = DPOConfig(output_dir=str(folder / "run"), max_steps=1, save_steps=1, report_to="none", use_cpu=True,
                     learning_rate=1e-3, disable_tqdm=True)  # fmt: skip
    DPOTrainer(model=str(folder / "base"), args=args, train_dataset=rows).train()  # type: ignore[arg-type]
    code, printed, found = asked("run/checkpoint-1", "base")
    assert (code, found["verdict"]["kind"], found["recorded"]["is_it"]) == (1, "trained", True)
    assert "REF is the reference that MODEL's run began with" in printed
    assert asked("run/checkpoint-1", "sft")[2]["recorded"]["is_it"] is False
    assert asked("run/checkpoint-1", "base", dtype="bfloat16")[2]["recorded"]["is_it"] is None
    assert asked("base", "sft")[2]["recorded"] is None


# What cannot be compared ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model": "nowhere"}, "model='nowhere' was to be loaded"),
        ({"reference": "nowhere"}, "ref_model='nowhere' was to be loaded"),
        ({"model": "$NOT_SET_HERE/x"}, "MODEL is '$NOT_SET_HERE/x': the environment variable NOT_SET_HERE is not set"),
        ({"reference": "__base__"}, "has no adapter_config.json"),
        ({"revision": "main"}, "is a local folder and has none"),
        ({"data": None}, "--data is missing"),
        ({"data": "nothing.jsonl"}, "there is no such file"),
        ({"weights_only": True}, "so --data would be ignored"),
        ({"dtype": "float8"}, "--dtype is float32, bfloat16, float16, auto; found 'float8'"),
        ({"beta": -1.0}, "--beta is a number from 0 on; found -1.0"),
        ({"tolerance": math.nan}, "--tolerance is a number from 0 on; found nan"),
        ({"columns": "{no json"}, "--columns is '{no json', which is no JSON"),
        ({"html": Path("no/such/folder/x.html")}, "--html is to be 'no/such/folder/x.html'"),
        ({"model": "bare"}, "there is none. Save it there"),
    ],
)
def test_what_cannot_be_compared(folder, capsys, monkeypatch, options, message):
    monkeypatch.chdir(folder)
    given: dict[str, Any] = {"model": "base", "reference": "sft", "data": "pairs.jsonl"} | options
    assert exit_code(Comparing(**given)) == 2
    assert message in " ".join(capsys.readouterr().err.split())


def test_weights_that_are_not_numbers(folder, capsys):
    broken = model()
    broken.model.layers[0].mlp.up_proj.weight.data[1, 2] = math.nan
    save(broken, folder / "nan")
    given: dict[str, Any] = {
        "model": str(folder / "base"),
        "reference": str(folder / "nan"),
        "data": str(folder / "pairs.jsonl"),
    }
    assert exit_code(Comparing(**given)) == 2
    message = capsys.readouterr().err
    assert "is not a number. Its `model.layers.0.mlp.up_proj.weight` has NaN" in " ".join(message.split())


def test_a_defect_is_no_difference(folder, capsys, monkeypatch):
    def fail(_asked: Any) -> None:
        raise RuntimeError("a defect")

    monkeypatch.setattr(command, "_compared", fail)
    assert exit_code(Comparing(model="a", reference="b", data="c")) == 2
    assert "RuntimeError: a defect" in capsys.readouterr().err


# How it is shown -----------------------------------------------------------------------------------------------------


HOSTILE = "\x1b]0;title\x07<script>alert(1)</script>\u202e&amp;"


@pytest.fixture(scope="module")
def hostile(folder) -> Path:
    """Pairs, a template and a token that would steer a terminal or a page."""
    rows = [{"prompt": f"{HOSTILE} {number}", "chosen": f"yes {HOSTILE}", "rejected": "no"} for number in range(3)]
    path = folder / "hostile.jsonl"
    path.write_text("".join(json.dumps(each) + "\n" for each in rows))
    tokenizer = with_template(("<|im_start|>{{ message", f"<|im_start|>{HOSTILE}{{{{ message"))
    tokenizer.add_tokens([HOSTILE])
    larger = trained(model())
    larger.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    save(larger, folder / "hostile", tokenizer)
    return path


def test_nothing_steers_a_terminal_or_a_page(asked, folder, hostile, tmp_path):
    page = tmp_path / "page.html"
    code, printed, found = asked("base", "hostile", data=str(hostile), html=page)
    assert code == 1
    assert all(each.isprintable() or each == "\n" for each in printed)
    assert "\\x1b]0;title\\x07<script>" in printed
    text = page.read_text()
    assert "<script" not in text
    assert "\x1b" not in text
    assert "\u202e" not in text
    assert found["tokenizers"]["num_differing"] == 3


@pytest.mark.parametrize("width", [80, 200])
def test_lines_fit_a_terminal(folder, width):
    from holdfast.inspect.two_models.compare import Request, compare_models
    from holdfast.inspect.two_models.lines import comparison_lines
    from holdfast.inspect.two_models.sides import Loading, Place

    request = Request(model=Place(path=str(folder / "base")), reference=Place(path=str(folder / "template")),
                      loading=Loading(disable_tqdm=True))  # fmt: skip
    comparison = compare_models(request, load_preferences(folder / "pairs.jsonl"))
    lines = ["".join(span.text for span in line) for line in comparison_lines(comparison, width)]
    prose = [line for line in lines if line[:1].isalpha() or line.startswith("  - ")]
    assert max(map(cell_len, prose)) <= width
    whole = ["".join(span.text for span in line) for line in comparison_lines(comparison)]
    assert whole[0] == comparison.verdict.sentence


@pytest.mark.parametrize(("first", "second", "charts"), [("lora", "base", 2), ("base", "template", 0)])
def test_the_page_in_a_browser(asked, tmp_path, first, second, charts):
    path = tmp_path / "page.html"
    _, _, found = asked(first, second, html=path)
    for width, scheme in ((400, "light"), (1600, "dark")):
        page = opened(path, width=width, scheme=scheme)
        assert (page.complaints, page.requests, page.too_wide, page.overlapping) == ((), (), (), ())
        assert len(page.plots) == charts
        assert page.smallest_text >= 8
        assert page.faintest[0] >= 4.5, page.faintest
        assert " ".join(found["verdict"]["sentence"].split()) in " ".join(page.text.split())


@pytest.mark.parametrize(
    ("reference", "more", "code"),
    [("base", [], 0), ("sft", [], 1), ("nowhere", [], 2), ("sft", ["--limit", "0"], 2), ("sft", ["--run", "out"], 2)],
)
def test_the_command_ends_with_these_exit_codes(folder, monkeypatch, reference, more, code):
    monkeypatch.chdir(folder)
    words = ["inspect", "base", "--reference", reference, "--data", "pairs.jsonl", *more]
    assert CliRunner().invoke(cli.app, words).exit_code == code
