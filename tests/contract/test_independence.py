"""A kept log-prob is a fact about its own row (law L6b): in models where it is not, numbers are pinned or not kept.

At a learning rate of 0 the policy stays the reference, so every loss is ln 2, however the reference is held and
whatever batches it is scored in. Rotary frequencies that follow the longest row of a batch would show: rows are here
below and above the length that the models were made for.
"""

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch import Tensor, nn

from families import VOCABULARY, tiny_model
from holdfast.policy.independence import dependence, find_dependence
from holdfast.policy.rotations import pin_rotations
from holdfast.policy.untouched import untouched
from holdfast.reference.identity.identity import Identity
from policies import config, logged, rows, trainer

ORIGINAL = 12


def dynamic(**options: Any) -> Any:
    """Frequencies by the longest row that was seen yet."""
    rope = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}
    return tiny_model(max_position_embeddings=ORIGINAL, rope_parameters=rope, **options)


def longrope(**options: Any) -> Any:
    """Two sets of frequencies, chosen by the longest row of the batch."""
    rope = {
        "rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4, "long_factor": [4.0] * 4,
        "original_max_position_embeddings": ORIGINAL,
    }  # fmt: skip
    shape = {"max_position_embeddings": 64, "original_max_position_embeddings": ORIGINAL}
    return tiny_model("phi3", **shape, rope_parameters=rope, **options)


MODELS: dict[str, Callable[..., Any]] = {"dynamic": dynamic, "longrope": longrope}

WAYS: dict[str, dict[str, Any]] = {
    "auto": {},
    "model": {"reference": "model"},
    "snapshot": {"reference": "snapshot"},
    "on the host": {"reference": "snapshot", "snapshot_device": "cpu"},
    "on disk": {"reference": "snapshot", "snapshot_device": "disk"},
    "precomputed": {"reference": "precomputed"},
    "hard sync": {"sync_ref_model": True, "ref_model_sync_steps": 2, "ref_model_mixup_alpha": 1.0},
    "soft sync": {"sync_ref_model": True, "ref_model_sync_steps": 2, "ref_model_mixup_alpha": 0.5},
    "hard sync, ahead": {
        "sync_ref_model": True, "ref_model_sync_steps": 2, "ref_model_mixup_alpha": 1.0,
        "precompute_ref_log_probs": True,
    },
}  # fmt: skip
MANNERS: dict[str, dict[str, Any]] = {
    "plain": {"layout": "padded"},
    "parts": {"tokens_per_batch": 20},
    "windows": {"reference_window": 3},
    "whole rows": {"max_length": None},
    "short rows": {"max_length": ORIGINAL},
}


def mixed_rows(num_pairs: int = 12) -> Dataset:
    """Pairs of 5 to 17 tokens, and every fourth of 28 to 40: below and above `ORIGINAL`."""
    table = rows(num_pairs).to_list()
    for place in range(1, num_pairs, 4):
        draw = torch.Generator().manual_seed(place)
        for column, more in (("prompt_ids", 14), ("chosen_ids", 9), ("rejected_ids", 7)):
            table[place][column] = table[place][column] + torch.randint(3, VOCABULARY, (more,), generator=draw).tolist()
    return Dataset.from_list(table)


def make_trainer(folder: Path, model: nn.Module, **options: Any) -> Any:
    parts = {name: options.pop(name) for name in ("ref_model", "train_dataset", "peft_config") if name in options}
    args = config(folder, **{"learning_rate": 0.0, "max_length": 40, "logging_steps": 1} | options)
    return trainer(model, args, **{"train_dataset": mixed_rows()} | parts)


def assert_zero_margin(losses: list[float]) -> None:
    assert len(losses) >= 2
    assert losses == pytest.approx([math.log(2)] * len(losses), abs=2e-5)


@pytest.mark.covering(1)
@pytest.mark.parametrize("manner", MANNERS)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", MODELS)
def test_every_loss_is_ln_2(kind: str, way: str, manner: str, tmp_path: Path) -> None:
    ours = make_trainer(tmp_path, MODELS[kind](), **WAYS[way] | MANNERS[manner])
    ours.train()
    assert_zero_margin(logged(ours))
    assert ours.evaluate(mixed_rows(5))["eval_loss"] == pytest.approx(math.log(2), abs=2e-5)


@pytest.mark.parametrize("kind", MODELS)
def test_every_loss_is_ln_2_from_a_filled_store(kind: str, tmp_path: Path) -> None:
    """The second run scores other batches than the first one did, and takes over its numbers."""
    for options in ({"per_device_train_batch_size": 2}, {"per_device_train_batch_size": 4, "seed": 3}):
        ours = make_trainer(tmp_path, MODELS[kind](), reference="precomputed", **options)
        ours.train()
        assert_zero_margin(logged(ours))


@pytest.mark.parametrize("kind", MODELS)
def test_every_loss_is_ln_2_beside_a_given_reference(kind: str, tmp_path: Path) -> None:
    ours = make_trainer(tmp_path, MODELS[kind](), ref_model=MODELS[kind]())
    ours.train()
    assert_zero_margin(logged(ours))


@pytest.mark.slow
@pytest.mark.covering(1)
@pytest.mark.parametrize("way", ["auto", "model", "snapshot", "precomputed", "soft sync"])
@pytest.mark.parametrize("kind", MODELS)
def test_a_resumed_run_is_the_uninterrupted_one(kind: str, way: str, tmp_path: Path) -> None:
    """At a learning rate that moves the policy, bit for bit."""
    options = WAYS[way] | {"learning_rate": 1e-2, "save_strategy": "steps", "save_steps": 2}
    whole = make_trainer(tmp_path / "whole", MODELS[kind](), **options, max_steps=4)
    whole.train()
    make_trainer(tmp_path / "cut", MODELS[kind](), **options, max_steps=2).train()
    resumed = make_trainer(tmp_path / "cut", MODELS[kind](), **options, max_steps=4)
    resumed.train(resume_from_checkpoint=True)
    assert logged(resumed) == logged(whole)


@pytest.mark.parametrize("kind", MODELS)
def test_a_pinned_model_computes_as_on_a_row_of_that_length(kind: str) -> None:
    """What transformers gives the longest row is what every row has now: the first 8 tokens of a row of 40, alone."""
    long = torch.randint(3, VOCABULARY, (1, 40), generator=torch.Generator().manual_seed(1))
    expected = MODELS[kind]()(long).logits[:, :8]
    pinned = MODELS[kind]()
    assert (pinned(long[:, :8]).logits - expected).abs().max() > 1e-3
    pinned = MODELS[kind]()
    assert pin_rotations([pinned], 40, mixed_rows()) == 40
    torch.testing.assert_close(pinned(long[:, :8]).logits, expected)
    torch.testing.assert_close(pinned(long).logits[:, :8], expected)


@pytest.mark.parametrize("lengths", [(40, 80), (80, 40), (40, 8), (8, 40)])
@pytest.mark.parametrize("kind", MODELS)
def test_a_model_that_was_pinned_is_pinned_anew(kind: str, lengths: tuple[int, int]) -> None:
    """As in a sweep over `max_length` that hands the same reference to each trainer."""
    ids = torch.randint(3, VOCABULARY, (1, 8), generator=torch.Generator().manual_seed(1))
    again, fresh = MODELS[kind](), MODELS[kind]()
    for length in lengths:
        pin_rotations([again], length, mixed_rows())
    pin_rotations([copy.deepcopy(again)], 17, mixed_rows())
    pin_rotations([fresh], lengths[1], mixed_rows())
    torch.testing.assert_close(again(ids).logits, fresh(ids).logits, rtol=0, atol=0)
    assert Identity.of(again) == Identity.of(fresh)


def test_frequencies_are_those_of_the_longest_pair(tmp_path: Path) -> None:
    """Without `max_length`: of a data set's longest completion with its prompt. A line says so."""
    table = mixed_rows().to_list()
    longest = max(len(row["prompt_ids"]) + max(len(row["chosen_ids"]), len(row["rejected_ids"])) for row in table)
    assert pin_rotations([dynamic()], None, mixed_rows()) == longest


def test_a_stream_needs_max_length(tmp_path: Path) -> None:
    stream = mixed_rows().to_iterable_dataset()
    with pytest.raises(ValueError, match=r"max_length=None was asked for with a stream, but LlamaForCausalLM takes"):
        make_trainer(tmp_path, dynamic(), max_length=None, train_dataset=stream, max_steps=2)
    make_trainer(tmp_path, dynamic(), max_length=40, train_dataset=stream, max_steps=2)


@pytest.mark.parametrize("kind", MODELS)
def test_the_user_is_told(kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    make_trainer(tmp_path, MODELS[kind]())
    told = [record.message for record in caplog.records if "longest row of a batch" in record.message]
    assert len(told) == 1
    assert "rows of 40 tokens" in told[0]


# --- what cannot be pinned --------------------------------------------------------------------------------------------


class _ByNeighbours(nn.Module):
    """Scales the embeddings by how many rows the batch has, as an expert's capacity might."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.inner(input_ids) * (1 + 0.1 * math.log(input_ids.shape[0]))


class _ByHistory(nn.Module):
    """Scales the embeddings by the longest row that was seen yet."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.register_buffer("longest", torch.zeros(()), persistent=False)

    def forward(self, input_ids: Tensor) -> Tensor:
        self.longest = torch.maximum(self.longest, torch.tensor(float(input_ids.shape[1])))
        return self.inner(input_ids) * (1 + 0.01 * self.longest)


class _ByAttribute(nn.Module):
    """The same in a plain attribute."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.longest = 0

    def forward(self, input_ids: Tensor) -> Tensor:
        self.longest = max(self.longest, input_ids.shape[1])
        return self.inner(input_ids) * (1 + 0.01 * self.longest)


PLANTED: dict[str, Callable[[nn.Module], nn.Module]] = {
    "neighbours": _ByNeighbours, "history": _ByHistory, "attribute": _ByAttribute,
}  # fmt: skip


def planted(kind: str) -> Any:
    model = tiny_model()
    model.model.embed_tokens = PLANTED[kind](model.model.embed_tokens)
    return model


OTHER_BATCHES: dict[str, dict[str, Any]] = {
    "precompute_ref_log_probs=True": {"precompute_ref_log_probs": True},
    "precompute_ref_log_probs=True (as reference)": {"reference": "precomputed"},
    "reference_window=3": {"reference_window": 3},
    "tokens_per_batch=20": {"tokens_per_batch": 20, "reference": "model"},
    "snapshot_device='cpu' without reference_window=1": {"reference": "snapshot", "snapshot_device": "cpu"},
}


@pytest.mark.parametrize("asked", OTHER_BATCHES)
@pytest.mark.parametrize("kind", PLANTED)
def test_other_batches_are_refused(kind: str, asked: str, tmp_path: Path) -> None:
    option = asked.split(" (")[0]
    with pytest.raises(
        ValueError, match=rf"{option} was asked for, which scores rows in other batches.*but .*LlamaFor"
    ):
        make_trainer(tmp_path, planted(kind), layout="padded", **OTHER_BATCHES[asked])


def test_a_reference_that_goes_by_its_batch_is_refused_too(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"precompute_ref_log_probs=True was asked for.*scores a row otherwise beside"):
        make_trainer(tmp_path, tiny_model(), ref_model=planted("neighbours"), precompute_ref_log_probs=True)


def test_the_same_batches_are_scored_live(tmp_path: Path) -> None:
    ours = make_trainer(tmp_path, planted("neighbours"), layout="padded", reference="model")
    ours.train()
    assert_zero_margin(logged(ours))


@pytest.mark.parametrize("kind", ["history", "attribute"])
def test_no_resume_with_what_no_checkpoint_holds(kind: str, tmp_path: Path) -> None:
    options: dict[str, Any] = {"layout": "padded", "reference": "model", "save_strategy": "steps", "save_steps": 1}
    make_trainer(tmp_path, planted(kind), **options, max_steps=1).train()
    again = make_trainer(tmp_path, planted(kind), **options, max_steps=2)
    with pytest.raises(
        ValueError, match=r"Resuming was asked for, but `.*longest` of LlamaForCausalLM changes with the"
    ):
        again.train(resume_from_checkpoint=True)


@pytest.mark.parametrize("family", ["llama", "gpt2", "mistral", "gemma3", "mixtral", "gpt_oss", "lfm2", "opt"])
def test_ordinary_models_are_independent(family: str) -> None:
    """Of every kind of attention, positions and experts: nothing found, and nothing left behind."""
    model = tiny_model(family)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert find_dependence([model], rows(), 40, torch.no_grad) is None
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("kind", PLANTED)
def test_dependence_is_found_and_its_kind(kind: str) -> None:
    found = dependence(planted(kind), rows()[0], 40, torch.no_grad)
    assert found is not None
    assert found.outlives_batch == (kind != "neighbours")


# --- start-up leaves the model as it was ------------------------------------------------------------------------------


def test_untouched_restores_all_that_a_forward_pass_may_change() -> None:
    model = planted("history")
    attributed = planted("attribute")
    model.train()
    model.lm_head.eval()
    before, state = copy.deepcopy(dict(model.named_buffers())), torch.get_rng_state()
    with untouched(model), untouched(attributed):
        model(torch.ones(1, 9, dtype=torch.long))
        attributed(torch.ones(1, 9, dtype=torch.long))
        model.model.rotary_emb.inv_freq.mul_(2)  # in place
        model.model.new_attribute = 3
        model.eval()
        torch.rand(3)
        assert attributed.model.embed_tokens.longest == 9
    after = dict(model.named_buffers())
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert not hasattr(model.model, "new_attribute")
    assert model.training
    assert not model.lm_head.training
    assert attributed.model.embed_tokens.longest == 0
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("kind", "way"), [("history", "auto"), ("attribute", "auto"), ("plain", "auto"), ("plain", "precomputed")]
)
def test_a_policy_starts_as_it_was_handed_in(kind: str, way: str, tmp_path: Path) -> None:
    """Parameters, buffers, modes and plain attributes, after all that is done before the first step: the independence
    check, the layout's check, filling the store and the audit."""
    model = tiny_model() if kind == "plain" else planted(kind)
    model.train()
    tensors = copy.deepcopy(dict(model.named_parameters()) | dict(model.named_buffers()))
    longest = getattr(model.model.embed_tokens, "longest", None)
    longest = copy.deepcopy(longest)
    ours = make_trainer(tmp_path, model, **WAYS[way])
    ours._settle(None)  # the audit
    now = dict(model.named_parameters()) | dict(model.named_buffers())
    assert tensors.keys() == now.keys()
    assert all(torch.equal(tensors[name], now[name]) for name in now)
    assert getattr(model.model.embed_tokens, "longest", None) == longest
