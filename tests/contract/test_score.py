"""Log-probs and their gradients against the oracle, for every model family, head and way to wrap a model."""

import random
from dataclasses import replace
from functools import cache

import pytest
import torch
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from torch import Tensor, nn

import oracle
from families import CONFIGS, VOCABULARY, tiny_model
from holdfast.batch import PairBatch
from holdfast.data.layouts.padded import PaddedLayout
from holdfast.scoring import head
from holdfast.scoring.score import score
from holdfast.scoring.transform import LogitTransform, known_transform
from recomputation import recompute
from shared_rows import assert_equal_logps

Row = dict[str, list[int]]


@cache
def rows(num_pairs: int = 3, seed: int = 0) -> tuple[Row, ...]:
    draw = random.Random(seed)

    def ids(low: int, high: int) -> list[int]:
        return [draw.randrange(3, VOCABULARY) for _ in range(draw.randint(low, high))]

    return tuple(
        {"prompt_ids": ids(3, 9), "chosen_ids": ids(2, 8), "rejected_ids": ids(1, 8)} for _ in range(num_pairs)
    )


def batch_of(rows: tuple[Row, ...]) -> PairBatch:
    return PairBatch.from_tensors(PaddedLayout(pad_token_id=0)(list(rows)))


def oracle_logps(model: nn.Module, rows: tuple[Row, ...]) -> Tensor:
    completions = [(row["prompt_ids"], row[side]) for side in ("chosen_ids", "rejected_ids") for row in rows]
    return torch.cat([oracle.sequence_logps(model, *completion) for completion in completions])


def assert_same(model: nn.Module, oracle_model: nn.Module | None = None, chunk_tokens: int | None = None) -> None:
    """A padded batch against the oracle."""
    expected = oracle_logps(oracle_model or model, rows())
    found = score(model, batch_of(rows()), chunk_tokens=chunk_tokens).logps.per_token
    assert_equal_logps(found, expected, model, oracle_model or model)


@pytest.mark.parametrize("family", ["llama", "gemma2", "cohere2"])
def test_completions_without_pairs_take_the_vocabulary_in_parts(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """And pairs do not: a reference that is asked about them adds up as the policy does."""
    monkeypatch.setattr(head, "_CPU_VOCABULARY", 7)
    plain, sizes = head._logps_by_vocabulary, []
    monkeypatch.setattr(
        head, "_logps_by_vocabulary", lambda states, *rest: sizes.append(len(states)) or plain(states, *rest)
    )
    model = tiny_model(family)
    pairs, none = batch_of(rows()), torch.empty(0, dtype=torch.int64)
    alone = replace(pairs, chosen=none, rejected=none)
    score(model, alone)  # reads what the model does to its logits
    sizes.clear()
    with torch.no_grad():
        of_pairs = score(model, pairs).logps.per_token
        assert sizes == []
        found = score(model, alone).logps.per_token
    assert sizes == [len(pairs.target)]
    assert torch.equal(of_pairs, score(model, pairs).logps.per_token)
    torch.testing.assert_close(found, oracle_logps(model, rows()), rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize("chunk_tokens", [None, 5])
def test_equals_the_oracle(family: str, chunk_tokens: int | None) -> None:
    assert_same(tiny_model(family), chunk_tokens=chunk_tokens)


@pytest.mark.parametrize(
    ("family", "transform"),
    [
        ("llama", LogitTransform()),
        ("gemma2", LogitTransform(cap=3.0)),
        ("cohere2", LogitTransform(scale=0.25)),
        ("granite", LogitTransform(scale=0.25)),
        ("falcon_h1", LogitTransform(scale=0.5)),
    ],
)
def test_reads_what_the_model_does_to_its_logits(family: str, transform: LogitTransform) -> None:
    model = tiny_model(family)
    score(model, batch_of(rows()))
    assert known_transform(model) == transform


def test_a_transform_that_is_edited_later_is_read_again() -> None:
    model = tiny_model("gemma2")
    score(model, batch_of(rows()))
    model.config.final_logit_softcapping = 1.0
    assert_same(model)


def test_a_model_with_logits_of_its_own_is_scored_through_them() -> None:
    """No scale and no cap describes a model that holds some tokens down."""
    model = tiny_model("llama")
    plain_forward = model.forward

    def forward(*args: object, **kwargs: object) -> object:
        outputs = plain_forward(*args, **kwargs)
        outputs.logits = outputs.logits - 7.0 * (torch.arange(VOCABULARY) % 3 == 0)
        return outputs

    model.forward = forward
    assert_same(model, chunk_tokens=4)
    assert known_transform(model) == "own forward"


def test_statistics_are_those_of_the_distribution() -> None:
    """entropy = -sum p log p; mean logit over the vocabulary; top-1; log sum p^2: each from the oracle's softmax."""
    model, batch = tiny_model("gemma2"), batch_of(rows())
    scores = score(model, batch, statistics=True, chunk_tokens=4)
    completions = [(row["prompt_ids"], row[side]) for side in ("chosen_ids", "rejected_ids") for row in rows()]
    place = 0
    for prompt, completion in completions:
        logits = model(torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1].double()
        p = logits.softmax(-1)
        here = slice(place, place := place + len(completion))
        statistics = scores.statistics
        assert statistics is not None
        for found, expected in (
            (statistics.entropy, -(p * p.log()).sum(-1)),
            (statistics.mean_logit, logits.mean(-1)),
            (statistics.is_top1, (logits.argmax(-1) == torch.tensor(completion)).double()),
            (statistics.log_sum_sq_probs, (p * p).sum(-1).log()),
        ):
            torch.testing.assert_close(found[here].double(), expected, rtol=0, atol=1e-5)
            assert not found.requires_grad


@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], ["lm_head"], ["lm_head", "embed_tokens"]])
def test_lora_also_on_the_head(targets: list[str]) -> None:
    model = get_peft_model(tiny_model("llama"), LoraConfig(r=4, target_modules=targets, init_lora_weights=False))
    assert_same(model.eval())
    assert any("lm_head" in name or "lm_head" not in targets for name, p in model.named_parameters() if p.requires_grad)


def test_a_saved_head_module() -> None:
    config = LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head"])
    assert_same(get_peft_model(tiny_model("llama"), config).eval())


def test_prompt_tuning_keeps_the_places_of_real_tokens() -> None:
    """Virtual tokens shift the rows; the oracle feeds one unpadded row through the model and reads from its end."""
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    model = get_peft_model(tiny_model("llama"), config).eval()
    expected = []
    for side in ("chosen_ids", "rejected_ids"):
        for row in rows():
            ids = row["prompt_ids"] + row[side]
            logps = model(torch.tensor([ids]), attention_mask=torch.ones(1, len(ids))).logits[0].log_softmax(-1)
            target = torch.tensor(row[side])
            expected.append(logps[-len(target) - 1 : -1].gather(-1, target[:, None])[:, 0])
    torch.testing.assert_close(score(model, batch_of(rows())).logps.per_token, torch.cat(expected), rtol=0, atol=1e-5)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing_changes_nothing(use_reentrant: bool) -> None:
    model, plain = tiny_model("llama"), tiny_model("llama")
    recompute(model, use_reentrant)
    model.enable_input_require_grads()
    assert_same(model.train(), oracle_model=plain)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_log_softmax_is_fp32_under_autocast(dtype: torch.dtype) -> None:
    """The only rounding is the body's: from the very hidden states that autocast gives, fp32 log-probs are exact."""
    model, batch = tiny_model("llama"), batch_of(rows())
    with torch.autocast("cpu", dtype=dtype), torch.no_grad():
        logps = score(model, batch).logps.per_token
        logits = model(**batch.inputs).logits.flatten(0, 1)[batch.source]
    assert logits.dtype == dtype
    assert logps.dtype == torch.float32
    expected = logits.double().log_softmax(-1).gather(-1, batch.target[:, None])[:, 0]
    torch.testing.assert_close(logps.double(), expected, rtol=0, atol=1e-5)


def test_no_tensor_of_all_completions_by_vocabulary_is_alive() -> None:
    """The largest tensor that the head makes is a chunk's, forward and backward."""
    vocabulary, chunk = 5_003, 8
    model = tiny_model("llama", vocab_size=vocabulary)
    batch = batch_of(tuple(r | {"chosen_ids": r["chosen_ids"] * 9} for r in rows()))
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            nonlocal largest
            result = func(*args, **(kwargs or {}))
            for tensor in torch.utils._pytree.tree_leaves(result):
                if isinstance(tensor, Tensor) and tensor.shape[-1:] == (vocabulary,) and tensor.dim() == 2:
                    largest = max(largest, tensor.shape[0])
            return result

    with Watch():
        score(model, batch, statistics=True, chunk_tokens=chunk).logps.per_token.sum().backward()
    assert len(batch.target) > 20 * chunk
    assert 0 < largest <= max(chunk, 32)  # 32: the head's weight gradient is [V h] turned around


def test_ordinary_calls_are_untouched_afterwards() -> None:
    model = tiny_model("llama")
    before = model(torch.tensor([[5, 6, 7]])).logits
    score(model, batch_of(rows()))
    assert "forward" not in vars(model)
    assert "forward" not in vars(model.lm_head)
    assert torch.equal(model(torch.tensor([[5, 6, 7]])).logits, before)
    assert model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=2, do_sample=False).shape == (1, 5)


def test_patches_are_undone_when_the_forward_fails() -> None:
    model = tiny_model("llama")
    batch = batch_of(rows())
    batch.inputs["input_ids"] = torch.full_like(batch.inputs["input_ids"], VOCABULARY + 3)
    with pytest.raises(IndexError):
        score(model, batch)
    assert "forward" not in vars(model)
    assert "forward" not in vars(model.lm_head)


def test_a_model_without_a_head_is_refused() -> None:
    with pytest.raises(ValueError, match=r"no output embeddings.*Pass a causal language model"):
        score(tiny_model("llama").model, batch_of(rows()))
