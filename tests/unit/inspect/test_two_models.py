"""The parts of a comparison of two models: numbers worked out by hand, and what a difference is taken for."""

import math
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from torch import nn

import families
import tiny
from holdfast.data.layouts.padded import PaddedLayout
from holdfast.data.layouts.sequences import TokenSequence
from holdfast.inspect.two_models.gaps import compare_gaps, worst_completion
from holdfast.inspect.two_models.parting import Event, compare_states
from holdfast.inspect.two_models.rows import Completion, Rows
from holdfast.inspect.two_models.settings import Setting, Settings
from holdfast.inspect.two_models.sides import Facts, Side, stored_dtypes
from holdfast.inspect.two_models.tokenizers import Tokenizers, template_diff
from holdfast.inspect.two_models.verdict import Evidence, Kind, verdict_of
from holdfast.inspect.two_models.weights import Weights, compare_weights, tensors_of

TOKENIZER = tiny.tokenizer()
tiny_model: Any = families.tiny_model


# Gaps ----------------------------------------------------------------------------------------------------------------


def rows_of(*completions: tuple[int, str, list[int], int]) -> Rows:
    """Rows of completions: row, side, ids, and how many of these are the prompt."""
    return Rows(
        numbers=tuple(dict.fromkeys(row for row, *_ in completions)),
        completions=tuple(
            Completion(row=row, side=side, sequence=TokenSequence(np.array(ids), num_prompt))
            for row, side, ids, num_prompt in completions
        ),
        layout=PaddedLayout(0),
        raw=Dataset.from_list([{"prompt": "a"}]),
    )


def test_gaps_are_those_worked_out_by_hand():
    """Gaps MODEL - REF: chosen (0.5, -0.1), (0.0,); rejected (0.2,), (-0.4, 0.0).

    Sizes in order: 0, 0, 0.1, 0.2, 0.4, 0.5; mean 1.2/6 = 0.2; signed 0.2/6. Half of six do not exceed the third,
    0.1; 90 % and 99 % of six need all six: 0.5. Above 0.15 are three of six. Log ratios: chosen 0.4 and 0, rejected
    0.2 and -0.4. Margins (beta 0.5): 0.1 and 0.2. Losses: ln(1 + e^-0.1) and ln(1 + e^-0.2)."""
    rows = rows_of(
        (3, "chosen", [5, 6, 7, 8], 2), (9, "chosen", [5, 6], 1), (3, "rejected", [5, 9], 1),
        (9, "rejected", [5, 9, 9], 1),
    )  # fmt: skip
    model = [np.array([-1.0, -2.1]), np.array([-3.0]), np.array([-0.3]), np.array([-1.4, -2.0])]
    reference = [np.array([-1.5, -2.0]), np.array([-3.0]), np.array([-0.5]), np.array([-1.0, -2.0])]
    gaps = compare_gaps(rows, model, reference, tokenizer=TOKENIZER, tolerance=0.15, beta=0.5)
    assert (gaps.num_pairs, gaps.num_completions, gaps.num_tokens) == (2, 4, 6)
    assert gaps.mean == pytest.approx(0.2)
    assert gaps.signed_mean == pytest.approx(0.2 / 6)
    assert gaps.quantiles == pytest.approx({"50%": 0.1, "90%": 0.5, "99%": 0.5})
    assert gaps.largest == pytest.approx(0.5)
    assert gaps.share_above == 0.5
    assert gaps.nats_per_token["chosen"] == pytest.approx({"model": -6.1 / 3, "reference": -6.5 / 3})
    assert gaps.nats_per_token["rejected"] == pytest.approx({"model": -3.7 / 3, "reference": -3.5 / 3})
    assert gaps.log_ratio == pytest.approx({"chosen": 0.2, "rejected": -0.1})
    assert gaps.first_loss == pytest.approx((math.log1p(math.exp(-0.1)) + math.log1p(math.exp(-0.2))) / 2)
    assert gaps.first_accuracy == 1.0
    assert [(each.row, each.side, each.place, each.token) for each in gaps.examples[:3]] == [
        (3, "chosen", 0, 7), (9, "rejected", 0, 9), (3, "rejected", 0, 9),
    ]  # fmt: skip
    assert gaps.examples[0].gap == pytest.approx(0.5)
    completion, position = worst_completion(rows, model, reference)
    assert (completion.row, completion.side, position) == (3, "chosen", 2)


def test_equal_models_begin_at_ln_2():
    rows = rows_of((0, "chosen", [5, 6], 1), (0, "rejected", [5, 7], 1))
    logps = [np.array([-1.0]), np.array([-2.0])]
    gaps = compare_gaps(rows, logps, logps, tokenizer=TOKENIZER, tolerance=0.1, beta=0.1)
    assert (gaps.largest, gaps.first_accuracy, gaps.examples) == (0, 0.5, ())
    assert gaps.first_loss == pytest.approx(math.log(2))


def test_a_large_gap_is_shown_in_its_text():
    ids = TOKENIZER("Boil the water, warm the pot.")["input_ids"]
    place = 7
    rows = rows_of((0, "chosen", ids, 2), (0, "rejected", ids, 2))
    model = [np.zeros(len(ids) - 2), np.zeros(len(ids) - 2)]
    reference = [values.copy() for values in model]
    reference[0][place] = -3.0
    example = compare_gaps(rows, model, reference, tokenizer=TOKENIZER, tolerance=0.1, beta=0.1).examples[0]
    assert example.text == TOKENIZER.decode([ids[place + 2]])
    assert example.before + example.text + example.after == TOKENIZER.decode(ids)
    assert (example.model, example.reference, example.place, example.token) == (0.0, -3.0, place, ids[place + 2])


def test_only_scored_tokens_of_a_mask_have_gaps():
    """Of ids [5, 6, 7, 8, 9] with a prompt of two, the mask scores the ids at 2 and 4."""
    scored = np.array([True, False, True])
    completion = Completion(row=0, side="chosen", sequence=TokenSequence(np.arange(5, 10), 2, scored))
    assert completion.scored_positions().tolist() == [2, 4]


# Tensors -------------------------------------------------------------------------------------------------------------


def side(model: nn.Module, label: str = "MODEL") -> Side:
    facts = facts_like()
    return Side(label=label, model=model.eval(), tokenizer=None, facts=facts,
                peft=model if hasattr(model, "peft_config") else None)  # type: ignore[arg-type]  # fmt: skip


def changed(change: Any, **options: Any) -> Weights:
    """A tiny model compared with itself after a change."""
    model, other = tiny_model(**options), tiny_model(**options)
    with torch.no_grad():
        change(other)
    return compare_weights(side(model), side(other, "REF"))


def test_distances_are_those_worked_out_by_hand():
    """The norm weight a = (3, 4, 0, ...) and b = (3, 4, 5, 0, ...): |a - b| = 5, |a| = 5, |b| = sqrt(50), a.b = 25."""
    model, other = tiny_model(), tiny_model()
    with torch.no_grad():
        for each, values in ((model, [3.0, 4.0]), (other, [3.0, 4.0, 5.0])):
            weight: Any = each.model.norm.weight
            weight.zero_()
            weight[: len(values)] = torch.tensor(values)
    found = compare_weights(side(model), side(other, "REF"))
    assert [each.name for each in found.differing] == ["model.norm.weight"]
    one = found.differing[0]
    assert (one.largest, one.relative, one.num_differing, one.num_values) == (5.0, 1.0, 1, 32)
    assert one.cosine == pytest.approx(25 / (5 * math.sqrt(50)))
    assert found.num_common == len(tensors_of(side(model)))
    assert found.num_equal == found.num_common - 1


def test_tensors_are_grouped_by_name_over_layers():
    def change(model: Any) -> None:
        for layer in model.model.layers:
            layer.mlp.up_proj.weight.mul_(1.5)
        model.model.layers[1].self_attn.q_proj.weight.mul_(3)

    found = changed(change)
    assert [(each.pattern, each.count, each.num_tensors) for each in found.groups] == [
        ("model.layers.*.self_attn.q_proj.weight", 1, 2), ("model.layers.*.mlp.up_proj.weight", 2, 2),
    ]  # fmt: skip
    assert [each.relative for each in found.groups] == pytest.approx([2.0, 0.5], rel=1e-6)


@pytest.mark.parametrize("rank", [1, 3, 8])
def test_the_rank_of_a_difference(rank):
    def change(model: Any) -> None:
        draw = torch.Generator().manual_seed(rank)
        weight = model.model.layers[0].mlp.up_proj.weight
        left, right = (torch.randn(size, rank, generator=draw) for size in weight.shape)
        weight.add_(0.1 * left @ right.T)

    found = changed(change)
    assert (found.rank, found.rank_of) == (rank, "model.layers.0.mlp.up_proj.weight")


def test_a_full_rank_has_no_number():
    assert changed(lambda model: model.model.layers[0].mlp.up_proj.weight.normal_()).rank is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounded_weights_are_known(dtype):
    name = str(dtype).removeprefix("torch.")
    found = changed(lambda model: model.to(dtype).float())
    assert found.rounded == ("reference", name)
    found = compare_weights(side(tiny_model().to(dtype).float()), side(tiny_model(), "REF"))
    assert found.rounded == ("model", name)
    assert changed(lambda model: model.model.norm.weight.add_(0.3)).rounded is None


def test_other_dtypes_of_equal_values():
    model = tiny_model().to(torch.bfloat16)
    found = compare_weights(side(model), side(tiny_model().to(torch.bfloat16).float(), "REF"))
    assert found.is_of_other_dtype
    assert not found.are_equal
    assert found.rounded is None
    assert found.differing[0].dtypes == ("bfloat16", "float32")


def test_resized_embeddings_and_other_shapes():
    found = changed(lambda model: model.resize_token_embeddings(101, mean_resizing=False))
    assert found.is_resized
    assert not found.is_of_other_shape
    assert {each.name: each.shapes for each in found.differing} == {
        "model.embed_tokens.weight": ((97, 32), (101, 32)), "lm_head.weight": ((97, 32), (101, 32)),
    }  # fmt: skip
    deeper = compare_weights(side(tiny_model()), side(tiny_model(num_hidden_layers=3), "REF"))
    assert deeper.is_of_other_shape
    assert not deeper.only_model
    assert all(name.startswith("model.layers.2.") for name in deeper.only_reference)
    wider = compare_weights(side(tiny_model()), side(tiny_model(intermediate_size=56), "REF"))
    up = next(each for each in wider.differing if "layers.0.mlp.up_proj" in each.name)
    assert up.shapes == ((48, 32), (56, 32))
    assert not wider.is_resized


def lora(seed: int = 0, **options: Any) -> Any:
    """A tiny model with an adapter that adds something."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        config = LoraConfig(**{"r": 4, "target_modules": ["q_proj", "v_proj"]} | options)
        model = get_peft_model(tiny_model(), config)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(std=0.1)
    return model


@pytest.mark.parametrize(
    "options",
    [
        {}, {"use_rslora": True}, {"use_dora": True}, {"modules_to_save": ["lm_head"]}, {"bias": "all"},
        {"target_modules": "all-linear"}, {"target_modules": ["embed_tokens", "q_proj"]},
        {"trainable_token_indices": [3, 5]},
    ],
    ids=str,
)  # fmt: skip
def test_an_adapter_has_the_tensors_of_the_merged_model(options):
    model = lora(**options)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    read = {name: read().clone() for name, read in tensors_of(side(model)).items()}
    after = model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)  # read without a trace
    merged = dict(model.merge_and_unload().named_parameters())
    assert merged.keys() <= read.keys()
    for name, tensor in merged.items():
        torch.testing.assert_close(read[name], tensor.detach(), rtol=0, atol=0)


def test_adapters_and_their_bases():
    base, one, other = tiny_model(), lora(), lora(seed=1)
    found = compare_weights(side(one), side(base, "REF"))
    assert (found.base_is_reference, found.model_is_base, found.same_base) == (True, None, None)
    assert {each.name.split(".")[4] for each in found.differing} == {"q_proj", "v_proj"}
    found = compare_weights(side(base), side(one, "REF"))
    assert (found.base_is_reference, found.model_is_base) == (None, True)
    found = compare_weights(side(one), side(other, "REF"))
    assert (found.same_base, found.base_is_reference, found.model_is_base) == (True, False, False)
    found = compare_weights(side(one), side(tiny_model(seed=4), "REF"))
    assert found.base_is_reference is False


def test_virtual_tokens_are_tensors_of_their_own():
    prompt = get_peft_model(tiny_model(), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    found = compare_weights(side(prompt), side(tiny_model(), "REF"))
    assert found.base_is_reference
    assert not found.differing
    assert all(name.startswith("|prompt") for name in found.only_model)
    assert found.only_model


def test_stored_dtypes_are_those_of_the_files(tmp_path):
    model = tiny_model()
    num_values = sum(each.numel() for each in model.parameters())
    model.to(torch.bfloat16).save_pretrained(tmp_path)
    assert stored_dtypes(tmp_path) == {"BF16": num_values}
    assert stored_dtypes(tmp_path / "nothing") == {}


# Hidden states -------------------------------------------------------------------------------------------------------


def test_states_part_at_the_first_event_that_differs():
    """|a - b| / |a|: (3, 4) and (3, 4 + 1e-6) are 2e-7 apart, (3, 4) and (0, 4) 0.6."""
    completion = rows_of((2, "rejected", [5, 6, 7], 1)).completions[0]
    names = ["model.embed", "model.layers.0.q", "model.layers.0", "model.layers.1", "model.norm"]
    values = [[3.0, 4.0], [3.0, 4.000001], [0.0, 4.0], [0.0, 0.0], [3.0, 4.0]]
    ours = {Event(name, "returned", "0"): torch.tensor([3.0, 4.0]) for name in names}
    theirs = {Event(name, "returned", "0"): torch.tensor(each) for name, each in zip(names, values, strict=True)}
    found = compare_states(ours, theirs, completion, rounding=1e-4)
    assert found.first is not None
    assert found.beyond_rounding is not None
    assert found.first.event.module == "model.layers.0.q"
    assert found.first.relative == pytest.approx(2e-7, rel=0.3)
    assert found.beyond_rounding.event.module == "model.layers.0"
    assert found.beyond_rounding.relative == 0.6
    assert {each.name: each.relative for each in found.layers} == pytest.approx(
        {"model.embed": 0, "model.layers.0": 0.6, "model.layers.1": 1, "model.norm": 0}
    )
    assert (found.row, found.side, found.num_tokens) == (2, "rejected", 3)
    same = compare_states(ours, ours, completion, rounding=1e-4)
    assert same.first is None
    assert same.beyond_rounding is None


def test_states_of_other_shapes_part():
    completion = rows_of((0, "chosen", [5, 6], 1)).completions[0]
    event = Event("model.embed_tokens", "returned", "0")
    found = compare_states({event: torch.ones(2)}, {event: torch.ones(3)}, completion, rounding=1e-4)
    assert found.beyond_rounding is not None
    assert found.beyond_rounding.relative is None


# Templates -----------------------------------------------------------------------------------------------------------


def test_a_template_of_one_line_is_broken_at_its_tags():
    ours = "{% for m in messages %}{{ m.role }}: {{ m.content }}{% endfor %}"
    diff = template_diff({"default": ours}, {"default": ours.replace("m.role }}: ", "m.role }}> ")})
    assert "-{{ m.role }}: " in diff
    assert "+{{ m.role }}> " in diff
    assert " {{ m.content }}" in diff
    assert template_diff({"default": ours}, {"default": ours}) == ()
    assert "+{% endfor %}" in template_diff({}, {"default": ours})


# The verdict ---------------------------------------------------------------------------------------------------------


def facts_like(**more: Any) -> Facts:
    return Facts(**{
        "path": "x", "revision": None, "kind": "LlamaForCausalLM", "num_parameters": 1, "num_embeddings": 97,
        "dtype": "float32", "stored": {}, "attention": "sdpa", "adapter": None, "adapter_base": None,
        "quantisation": None, "tied": (), "tokenizer": None,
    } | more)  # fmt: skip


NO_SETTINGS = Settings(counting=(), without_effect=(), numerics=())
EQUAL = compare_weights(side(tiny_model()), side(tiny_model(), "REF"))
EVIDENCE = Evidence(
    model=facts_like(), reference=facts_like(), weights=EQUAL, settings=NO_SETTINGS, gaps=None, unscored=None,
    tokenizers=None, is_half_precision=False, is_same_to_rounding=True, tolerance=None,
)  # fmt: skip


def gaps_like(largest: float, mean: float | None = None) -> Any:
    return SimpleNamespace(largest=largest, mean=largest if mean is None else mean, num_tokens=10)


def trained() -> Weights:
    """Every matrix is moved by a little noise."""

    def change(model: Any) -> None:
        draw = torch.Generator().manual_seed(3)
        for parameter in model.parameters():
            parameter.add_(0.01 * torch.randn(parameter.shape, generator=draw))

    return changed(change)


def between(model: nn.Module, reference: nn.Module) -> Weights:
    return compare_weights(side(model), side(reference, "REF"))


def other_weights(**options: Any) -> Weights:
    return compare_weights(side(tiny_model()), side(tiny_model(**options), "REF"))


def resized() -> Weights:
    return changed(lambda model: model.resize_token_embeddings(99, mean_resizing=False))


def tie(model: Any) -> None:
    model.lm_head.weight = nn.Parameter(model.lm_head.weight + torch.randn(97, 32))


TIED = (("lm_head.weight", "model.embed_tokens.weight"),)
ROPE = Settings(counting=(Setting(name="config.rope_theta", model="1", reference="2"),), without_effect=(), numerics=())


@pytest.mark.parametrize(
    ("kind", "outcome", "more"),
    [
        (Kind.IDENTICAL, "same", lambda: {"gaps": gaps_like(0)}),
        (Kind.IDENTICAL, "same", dict),
        (Kind.NUMERICS, "differs", lambda: {"gaps": gaps_like(0.2), "is_same_to_rounding": False}),
        (Kind.MERGED, "same", lambda: {"gaps": gaps_like(1e-6), "model": facts_like(adapter="LORA")}),
        (Kind.SETTINGS, "differs", lambda: {"settings": ROPE, "gaps": gaps_like(0.2), "is_same_to_rounding": False}),
        (Kind.SETTINGS, "differs", lambda: {"settings": ROPE, "gaps": gaps_like(0)}),
        (Kind.WITHIN_TOLERANCE, "same", lambda: {"settings": ROPE, "gaps": gaps_like(0.2), "tolerance": 0.3}),
        (Kind.SETTINGS, "differs", lambda: {"settings": ROPE, "gaps": gaps_like(0.2), "tolerance": 0.1}),
        (Kind.ROUNDED, "differs", lambda: {"weights": changed(lambda model: model.to(torch.bfloat16).float())}),
        (Kind.RESIZED, "differs", lambda: {"weights": resized()}),
        (Kind.TRAINED, "differs", lambda: {"weights": trained()}),
        (Kind.TRAINED, "differs", lambda: {"weights": changed(lambda model: model.lm_head.weight[3].add_(1e-7)),
                                   "gaps": gaps_like(1e-7)}),
        (Kind.OTHER_MODEL, "differs", lambda: {"weights": other_weights(seed=1)}),
        (Kind.OTHER_SHAPE, "differs", lambda: {"weights": other_weights(num_hidden_layers=1)}),
        (Kind.OTHER_ARCHITECTURE, "differs", lambda: {"weights": trained(), "reference": facts_like(kind="Other")}),
        (Kind.UNTIED, "differs", lambda: {"weights": changed(tie), "model": facts_like(tied=TIED)}),
        (Kind.QUANTISED, "differs", lambda: {"weights": trained(), "model": facts_like(quantisation="nf4")}),
        (Kind.BASE_OF_MODEL, "differs", lambda: {"weights": between(lora(), tiny_model()),
                                         "model": facts_like(adapter="LORA")}),
        (Kind.BASE_OF_REFERENCE, "differs", lambda: {"weights": between(tiny_model(), lora()),
                                             "reference": facts_like(adapter="LORA")}),
        (Kind.OTHER_ADAPTER, "differs", lambda: {"weights": between(lora(), lora(seed=1)),
                                         "model": facts_like(adapter="LORA"), "reference": facts_like(adapter="LORA")}),
        (Kind.TOKENIZER, "differs", lambda: {"tokenizers": Tokenizers(num_rows=3, num_differing=1)}),
        (Kind.TOKENIZER, "differs", lambda: {"tokenizers": Tokenizers(num_rows=3, refusal="no chat template")}),
        (Kind.IDENTICAL, "same", lambda: {"tokenizers": Tokenizers(num_rows=3, template_diff=("-a", "+b"))}),
    ],
)  # fmt: skip
def test_what_a_difference_is_taken_for(kind, outcome, more):
    verdict = verdict_of(replace(EVIDENCE, **more()))
    assert (verdict.kind, verdict.outcome) == (kind, outcome)


@pytest.mark.parametrize(("size", "kind"), [(1e-6, Kind.MERGED), (1e-3, Kind.TRAINED)])
def test_a_merged_adapter_may_be_off_by_rounding_and_no_more(size, kind):
    """Every weight of the merged model is moved by a millionth of itself, or by a thousandth."""
    merged = lora().merge_and_unload()
    with torch.no_grad():
        for parameter in merged.parameters():
            parameter.mul_(1 + size)
    weights = compare_weights(side(lora()), side(merged, "REF"))
    assert verdict_of(replace(EVIDENCE, weights=weights, model=facts_like(adapter="LORA"))).kind is kind
    without_adapter = changed(lambda model: [each.mul_(1 + size) for each in model.parameters()])
    assert verdict_of(replace(EVIDENCE, weights=without_adapter, gaps=gaps_like(1e-6))).outcome == "differs"


def test_the_remark_of_a_merged_lora():
    weights = compare_weights(side(lora().merge_and_unload()), side(tiny_model(), "REF"))
    verdict = verdict_of(replace(EVIDENCE, weights=weights))
    assert verdict.kind is Kind.TRAINED
    assert any("has rank 4, as after merging a LoRA" in remark for remark in verdict.remarks)


def test_the_page_lists_every_verdict_with_its_exit_code():
    page = Path(__file__).parents[3] / "docs" / "howto" / "compare.md"
    written = dict(re.findall(r"^\| `(\w+)` \| (\d) \|", page.read_text(encoding="utf-8"), re.MULTILINE))
    same = {Kind.IDENTICAL, Kind.MERGED, Kind.WITHIN_TOLERANCE}
    assert written == {kind.value: "0" if kind in same else "1" for kind in Kind}
