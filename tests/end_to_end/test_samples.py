"""Samples at evaluations: each completion is the greedy one of a naive loop, and training does not notice."""

import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import IterableDataset
from torch import Tensor, nn

from families import tiny_model
from holdfast import DPOTrainer
from holdfast.record.entries import Sample
from policies import POLICIES, config, rows, sft_lora, tiny_tokenizer, trainer

NUM_NEW = 5
OPTIONS: dict[str, Any] = {"generate_samples": 4, "samples_max_new_tokens": NUM_NEW, "per_device_eval_batch_size": 3}
EVERY_TWO: dict[str, Any] = {**OPTIONS, "eval_strategy": "steps", "eval_steps": 2}
EOS = 2


def held_out() -> Any:
    """Six rows; the first two share their prompt."""
    return rows(6, seed=1)


def prompts() -> list[list[int]]:
    """The four prompts that are completed: the first that differ."""
    ids = held_out()["prompt_ids"]
    return [ids[0], *ids[2:5]]


@torch.no_grad()
def naive(score: Callable[[Tensor], Tensor], prompt: Sequence[int]) -> str:
    """The greedy completion by a loop without cache or batch, up to the end of sequence. `score(ids)` are the scores of
    the next token."""
    ids = list(prompt)
    while len(ids) < len(prompt) + NUM_NEW:
        token = int(score(torch.tensor([ids])).argmax())
        if token == EOS:
            break
        ids.append(token)
    return tiny_tokenizer().decode(ids[len(prompt) :], skip_special_tokens=True)


def of_model(model: nn.Module) -> list[str]:
    """The naive completions of the four prompts by a model in eval mode."""
    model = copy.deepcopy(model).eval()
    return [naive(lambda ids: model(input_ids=ids).logits[0, -1], prompt) for prompt in prompts()]


def history(made: DPOTrainer) -> list[dict[str, Any]]:
    """What was logged, without times and without what only a run with samples has."""
    timed = ("runtime", "per_second", "win_rate", "preparation_time")
    return [{k: v for k, v in log.items() if not any(word in k for word in timed)} for log in made.state.log_history]


def collect(made: DPOTrainer) -> list[list[Sample]]:
    """A list to which each evaluation adds its samples."""
    found: list[list[Sample]] = []
    samples = made._samples

    def noted(*args: Any) -> list[Sample]:
        found.append(samples(*args))
        return found[-1]

    made._samples = noted
    return found


def other(seed: int = 5) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = tiny_model()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.3 * torch.randn_like(parameter)
    return model


WAYS: dict[str, tuple[Callable[[], nn.Module], dict[str, Any]]] = {
    "second module": (POLICIES["full"], {"reference": "model"}),
    "adapters off": (POLICIES["lora_fresh"], {}),
    "first values of an adapter": (sft_lora, {"reference": "adapter"}),
    "snapshot": (POLICIES["full"], {"reference": "snapshot"}),
    "snapshot in host memory": (POLICIES["partly_frozen"], {"reference": "snapshot", "snapshot_device": "cpu"}),
    "snapshot on disk": (sft_lora, {"reference": "snapshot", "snapshot_device": "disk"}),
    "precomputed": (POLICIES["full"], {"precompute_ref_log_probs": True}),
    "precomputed in windows": (sft_lora, {"precompute_ref_log_probs": True, "reference_window": 2}),
    "kept beside sft": (POLICIES["full"], {"loss_type": "sft", "reference": "snapshot"}),
    **{f"policy {name}": (make, {}) for name, make in POLICIES.items()},
}


def nightly_but(table: dict[str, Any], *names: str) -> list[Any]:
    """The rows of a table, of which only those of these names run in `make test`."""
    return [
        pytest.param(*row, id=name, marks=() if name in names else pytest.mark.nightly) for name, row in table.items()
    ]


OFTEN = ("adapters off", "snapshot on disk", "precomputed", "policy prompt_tuning")


@pytest.mark.parametrize(("make", "options"), nightly_but(WAYS, *OFTEN))
def test_the_reference_is_the_policy_as_it_started(make: Any, options: dict[str, Any], tmp_path: Path) -> None:
    policy = make()
    first = of_model(policy)
    made = trainer(policy, config(tmp_path, **EVERY_TWO, **options), eval_dataset=held_out())
    found = collect(made)
    made.train()
    assert [[sample.reference for sample in samples] for samples in found] == [first, first]
    assert [sample.policy for sample in found[1]] == of_model(made.model)
    assert [sample.row for sample in found[1]] == [0, 2, 3, 4]
    assert {sample.step for sample in found[1]} == {4}


def test_a_named_reference_completes_as_itself(tmp_path: Path) -> None:
    for number, options in enumerate([{}, {"precompute_ref_log_probs": True}]):
        made = trainer(
            tiny_model(), config(tmp_path / str(number), **EVERY_TWO, **options), eval_dataset=held_out(),
            ref_model=other(),
        )  # fmt: skip
        found = collect(made)
        made.train()
        assert [sample.reference for sample in found[-1]] == of_model(other())


def test_another_adapter_completes_as_itself(tmp_path: Path) -> None:
    policy = POLICIES["lora_fresh_over_sft"]()
    reference = copy.deepcopy(policy)
    reference.set_adapter("default")
    args = config(tmp_path, **EVERY_TWO, ref_adapter_name="default", model_adapter_name="dpo")
    made = trainer(policy, args, eval_dataset=held_out())
    found = collect(made)
    made.train()
    assert [sample.reference for sample in found[-1]] == of_model(reference)


def test_a_mixture_takes_the_largest_sum_of_weighted_log_probs(tmp_path: Path) -> None:
    one, two = tiny_model().eval(), other().eval()

    def mixed(ids: Tensor) -> Tensor:
        logps = [model(input_ids=ids).logits[0, -1].log_softmax(-1) for model in (one, two)]
        return 0.3 * logps[0] + 0.7 * logps[1]

    expected = [naive(mixed, prompt) for prompt in prompts()]
    args = config(tmp_path, **EVERY_TWO, ref_model_weights=[0.3, 0.7])
    made = trainer(tiny_model(), args, eval_dataset=held_out(), ref_model=[None, other()])
    found = collect(made)
    made.train()
    assert [sample.reference for sample in found[-1]] == expected
    assert expected not in (of_model(one), of_model(two))


@pytest.mark.parametrize(
    ("way", "options"),
    nightly_but(
        {
            f"{way} {alpha}": (way, {"ref_model_mixup_alpha": alpha})
            for way in ("model", "snapshot")
            for alpha in (1.0, 0.5)
        },
        "model 0.5",
        "snapshot 1.0",
    ),
)
def test_a_moving_reference_completes_anew_after_each_sync(
    way: str, options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is completed at steps 1 (version 0), 2 (1), 3 (1 still) and 4 (2)."""
    moving = {"eval_steps": 1, "sync_ref_model": True, "ref_model_sync_steps": 2, "reference": way}
    args = config(tmp_path, **{**EVERY_TWO, **moving, **options})
    made = trainer(POLICIES["full"](), args, eval_dataset=held_out())
    found, asked = collect(made), []
    sampler = made._sampler
    assert sampler is not None
    completed = sampler._completed
    monkeypatch.setattr(sampler, "_completed", lambda *args: asked.append(1) or completed(*args))
    made.train()
    assert [samples[0].reference_version for samples in found] == [0, 1, 1, 2]
    assert len(asked) == 4 + 3
    if options["ref_model_mixup_alpha"] == 1:
        assert [[s.policy for s in found[place]] for place in (1, 3)] == [
            [s.reference for s in found[place]] for place in (1, 3)
        ]
    with made.reference.null_ref_context() if way == "snapshot" else torch.no_grad():
        model = made.model if way == "snapshot" else made.reference.module
        assert [sample.reference for sample in found[3]] == of_model(model)


RUNS: dict[str, tuple[str, dict[str, Any]]] = {
    "full, dropout": ("full", {"disable_dropout": False}),
    "lora, dropout, recomputed": ("lora_sft", {"disable_dropout": False, "activation_checkpointing": True}),
    "snapshot on disk": ("full", {"reference": "snapshot", "snapshot_device": "disk"}),
    "bf16": ("lora_fresh", {"bf16": True}),
    "moved": ("full", {"sync_ref_model": True, "ref_model_sync_steps": 1}),
    "accumulated": ("full", {"gradient_accumulation_steps": 2}),
}


@pytest.mark.parametrize(("policy", "options"), nightly_but(RUNS, "lora, dropout, recomputed"))
def test_training_does_not_notice(policy: str, options: dict[str, Any], tmp_path: Path) -> None:
    """Losses, gradients, metrics, weights and the random state are those of a run without samples, bit for bit."""
    runs = []
    for number, samples in enumerate([{}, OPTIONS]):
        args = config(tmp_path / str(number), eval_strategy="steps", eval_steps=1, **{
            **options, **samples, "per_device_eval_batch_size": 3
        })  # fmt: skip
        torch.manual_seed(0)
        made = trainer(POLICIES[policy](), args, eval_dataset=held_out())
        made.train()
        runs.append((made, torch.get_rng_state(), {n: m.training for n, m in made.model.named_modules()}))
    (plain, random, modes), (sampled, other_random, other_modes) = runs
    assert history(sampled) == history(plain)
    assert torch.equal(random, other_random)
    assert modes == other_modes
    assert all(
        torch.equal(one, other) for one, other in zip(plain.model.parameters(), sampled.model.parameters(), strict=True)
    )
    assert vars(sampled.model).keys() == vars(plain.model).keys()
    config_of = sampled.model.generation_config.to_dict
    assert config_of() == plain.model.generation_config.to_dict()


def test_what_the_generation_config_says_is_set_aside_but_for_its_ends(tmp_path: Path) -> None:
    """A token that the config names as an end ends a completion before it."""
    policy = POLICIES["full"]()
    expected = of_model(policy)
    end = tiny_tokenizer().convert_tokens_to_ids(expected[1].split()[1])
    config_of: Any = policy.generation_config
    config_of.repetition_penalty, config_of.do_sample, config_of.temperature = 5.0, True, 3.0
    config_of.eos_token_id = [EOS, end]
    made = trainer(policy, config(tmp_path, **OPTIONS), eval_dataset=held_out())
    made.evaluate()
    cut = [" ".join(text.split()[: text.split().index(f"w{end}")]) if f"w{end}" in text.split() else text
           for text in expected]  # fmt: skip
    assert [sample.policy for sample in made._last_samples] == cut
    assert cut[1] == expected[1].split()[0]
    assert policy.generation_config is config_of


def test_several_evaluation_sets_and_a_stream(tmp_path: Path) -> None:
    stream = IterableDataset.from_generator(lambda: iter(rows(6, seed=2)))
    made = trainer(tiny_model(), config(tmp_path, **OPTIONS), eval_dataset={"a": held_out(), "b": stream})
    found = collect(made)
    made.evaluate()
    assert [samples[0].dataset for samples in found] == ["a", "b"]
    assert [sample.policy for sample in found[0]] == of_model(made.model)
    assert [len(samples) for samples in found] == [4, 4]
    made.evaluate("b")
    assert [samples[0].dataset for samples in found] == ["a", "b", "b"]
    made.evaluate(rows(3, seed=4))
    made.predict(rows(3, seed=4))
    assert len(found) == 3


def test_prompts_fit_a_table_of_positions(tmp_path: Path) -> None:
    """GPT-2's table has 64 positions: a prompt of 60 leaves no room for 10 tokens and is passed over."""
    policy = tiny_model("gpt2")
    positions = policy.config.max_position_embeddings
    data = held_out().to_list()
    data[0]["prompt_ids"] = ([5, 6, 7] * positions)[: positions - 10]
    from datasets import Dataset

    args = config(tmp_path, **{**OPTIONS, "samples_max_new_tokens": positions})
    made = trainer(policy, args, eval_dataset=Dataset.from_list(data))
    made.evaluate()
    assert [sample.row for sample in made._last_samples] == [1, 2, 3, 4]


@pytest.mark.parametrize(
    ("options", "arguments", "message"),
    [
        ({"generate_samples": 3}, {}, r"generate_samples=3 was asked for, but there are no data to evaluate on"),
        ({"samples_max_new_tokens": 9}, {}, r"samples_max_new_tokens=9 was asked for with generate_samples=0"),
        ({"generate_samples": -1}, {}, r"generate_samples=-1 was asked for; it counts from 0"),
        ({"generate_samples": 2, "samples_max_new_tokens": 0}, {}, r"samples_max_new_tokens=0 .* counts from 1"),
    ],
)
def test_what_cannot_be_is_refused(
    options: dict[str, Any], arguments: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        trainer(tiny_model(), config(tmp_path, **options), **arguments)
