"""Runs of the real trainer on tiny models, each compared with numbers obtained another way."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset, DatasetDict, IterableDataset
from peft import LoraConfig
from torch import Tensor, nn
from transformers import TrainingArguments

from families import tiny_model
from holdfast import DataCollatorForPreference, DPOConfig, DPOTrainer
from holdfast.data.layouts.padded import PaddedLayout
from holdfast.losses import LOSSES
from holdfast.reference.identity.digests import digest
from policies import POLICIES, config, logged, rows, tiny_tokenizer, trainer
from recomputation import NAME
from tiny import preference_rows, tokenizer


def sequence_logp(model: nn.Module, row: dict[str, list[int]], side: str) -> Tensor:
    ids = torch.tensor([row["prompt_ids"] + row[side]])
    logps = model(ids).logits[0].double().log_softmax(-1)[len(row["prompt_ids"]) - 1 : -1]
    return logps.gather(-1, torch.tensor(row[side])[:, None]).sum()


# --- metrics ----------------------------------------------------------------------------------------------------------


def test_evaluation_metrics_are_means_over_pairs(tmp_path: Path) -> None:
    """7 pairs in batches of 3, 3 and 1: every metric is the plain mean, worked out pair by pair in fp64."""
    policy, other, held_out = tiny_model(), tiny_model(seed=3), rows(7, seed=5)
    args = config(tmp_path, per_device_eval_batch_size=3, beta=0.3)
    found = trainer(policy, args, ref_model=other).evaluate(held_out)
    table, expected = held_out.to_list(), {}
    with torch.no_grad():
        pi = {s: torch.stack([sequence_logp(policy, row, s) for row in table]) for s in ("chosen_ids", "rejected_ids")}
        ref = {s: torch.stack([sequence_logp(other, row, s) for row in table]) for s in ("chosen_ids", "rejected_ids")}
    ratio = {side: pi[side] - ref[side] for side in pi}
    rewards = {side: 0.3 * ratio[side] for side in ratio}
    margins = rewards["chosen_ids"] - rewards["rejected_ids"]
    expected = {
        "loss": -nn.functional.logsigmoid(margins).mean(),
        "rewards/chosen": rewards["chosen_ids"].mean(),
        "rewards/rejected": rewards["rejected_ids"].mean(),
        "rewards/accuracies": (margins > 0).double().mean(),
        "rewards/margins": margins.mean(),
        "logps/chosen": pi["chosen_ids"].mean(),
        "logps/rejected": pi["rejected_ids"].mean(),
        "reference/kl_chosen": ratio["chosen_ids"].mean(),
        "reference/kl_rejected": ratio["rejected_ids"].mean(),
    }
    for name, value in expected.items():
        assert found[f"eval_{name}"] == pytest.approx(float(value), abs=2e-5), name
    assert 0 < found["eval_rewards/accuracies"] < 1


def test_token_metrics_are_means_over_completion_tokens(tmp_path: Path) -> None:
    policy, held_out = tiny_model(), rows(5, seed=5)
    found = trainer(policy, config(tmp_path, per_device_eval_batch_size=2)).evaluate(held_out)
    entropies, logits, hits = [], {"chosen": [], "rejected": []}, []
    for row in held_out.to_list():
        for side in ("chosen", "rejected"):
            target = torch.tensor(row[f"{side}_ids"])
            out = policy(torch.tensor([row["prompt_ids"] + row[f"{side}_ids"]])).logits[0].double()
            out = out[len(row["prompt_ids"]) - 1 : -1]
            entropies += torch.distributions.Categorical(logits=out).entropy().tolist()
            logits[side] += out.mean(-1).tolist()
            if side == "chosen":
                hits += (out.argmax(-1) == target).double().tolist()
    for name, values in (
        ("entropy", entropies), ("logits/chosen", logits["chosen"]), ("logits/rejected", logits["rejected"]),
        ("mean_token_accuracy", hits),
    ):  # fmt: skip
        assert found[f"eval_{name}"] == pytest.approx(sum(values) / len(values), abs=1e-5), name


def test_training_logs(tmp_path: Path) -> None:
    """Names of every log, tokens counted over prompts and completions, and a log every other step holds both steps."""
    ours = trainer(tiny_model(), config(tmp_path, logging_steps=2, max_steps=4))
    ours.train()
    table = rows().to_list()
    tokens = sum(2 * len(r["prompt_ids"]) + len(r["chosen_ids"]) + len(r["rejected_ids"]) for r in table)
    assert logged(ours, "num_tokens")[-1] == tokens  # 4 steps of 3 pairs: one epoch
    names = {"rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins", "logps/chosen",
             "logps/rejected", "logits/chosen", "logits/rejected", "entropy", "mean_token_accuracy", "num_tokens",
             "reference/kl_chosen", "reference/kl_rejected"}  # fmt: skip
    assert names <= ours.state.log_history[0].keys()
    single = trainer(tiny_model(), config(tmp_path, logging_steps=1, max_steps=4))
    single.train()
    for name in names - {"num_tokens", "entropy", "logits/chosen", "logits/rejected", "mean_token_accuracy"}:
        steps = logged(single, name)
        pairs = [(steps[0] + steps[1]) / 2, (steps[2] + steps[3]) / 2]
        assert logged(ours, name) == pytest.approx(pairs, abs=1e-5), name


def test_several_evaluation_sets(tmp_path: Path) -> None:
    sets = DatasetDict({"near": rows(4, seed=1), "far": rows(5, seed=2)})
    ours = trainer(tiny_model(), config(tmp_path, eval_strategy="steps", eval_steps=4), eval_dataset=sets)
    ours.train()
    for name, part in sets.items():
        in_run = logged(ours, f"eval_{name}_loss")
        assert in_run[0] == pytest.approx(ours.evaluate(part)["eval_loss"], abs=1e-6)
        assert f"eval_{name}_rewards/margins" in ours.evaluate(sets)


def test_compute_metrics_sees_logits_and_ids(tmp_path: Path) -> None:
    policy, held_out = tiny_model(), rows(4, seed=1)
    seen: dict[str, Any] = {}

    def compute_metrics(prediction: Any) -> dict[str, float]:
        seen.update(logits=prediction.predictions, ids=prediction.label_ids)
        return {"my_metric": 0.123}

    ours = trainer(policy, config(tmp_path, per_device_eval_batch_size=4), compute_metrics=compute_metrics)
    assert ours.evaluate(held_out)["eval_my_metric"] == 0.123
    row = held_out[0]
    length = len(row["prompt_ids"] + row["chosen_ids"])
    assert seen["ids"][0, :length].tolist() == row["prompt_ids"] + row["chosen_ids"]
    expected = policy(torch.tensor([row["prompt_ids"] + row["chosen_ids"]])).logits[0].detach()
    torch.testing.assert_close(torch.tensor(seen["logits"][0, :length]), expected, rtol=0, atol=1e-4)


# --- the loss ---------------------------------------------------------------------------------------------------------

ZERO_MARGIN = {  # at log ratios of zero, beta 0.2
    "sigmoid": math.log(2), "hinge": 1.0, "ipo": 1 / (4 * 0.2**2), "robust": math.log(2), "sigmoid_norm": math.log(2),
    "nca_pair": 2 * math.log(2), "bco_pair": 2 * math.log(2), "sppo_hard": 2 * (0.5 / 0.2) ** 2,
    "aot": math.log(2), "aot_unpaired": math.log(2), "apo_zero": 1.0, "apo_down": 1.0,
    "discopop": 0.5 * math.log(2) + 0.5,
}  # fmt: skip


@pytest.mark.parametrize("name", LOSSES)
def test_every_loss_trains_from_its_value_at_zero_margin(name: str, tmp_path: Path) -> None:
    options = {"label_smoothing": 1e-3} if name == "exo_pair" else {}
    policy = tiny_model()
    ours = trainer(policy, config(tmp_path, loss_type=name, learning_rate=0.05, **options))
    before = digest(policy.named_parameters())
    if name in ZERO_MARGIN:
        ours.train()
        assert logged(ours)[0] == pytest.approx(ZERO_MARGIN[name], abs=1e-4)
    else:  # their value depends on the data: that of the oracle is compared in the unit tests
        ours.train()
        assert (ours.reference is None) == (not LOSSES[name].needs_reference)
    assert digest(policy.named_parameters()) != before
    assert all(math.isfinite(loss) for loss in logged(ours))


def test_losses_combine_linearly(tmp_path: Path) -> None:
    """0.7 sigmoid + 0.3 ipo, first loss: 0.7 ln 2 + 0.3 / (4 beta^2)."""
    ours = trainer(tiny_model(), config(tmp_path, loss_type=["sigmoid", "ipo"], loss_weights=[0.7, 0.3]))
    ours.train()
    assert logged(ours)[0] == pytest.approx(0.7 * math.log(2) + 0.3 / (4 * 0.2**2), abs=1e-4)


def test_modifiers_apply_to_policy_and_reference_alike(tmp_path: Path) -> None:
    """With LD-DPO the first loss is still ln 2, and its rewards are those of the weighted tails."""
    ours = trainer(tiny_model(), config(tmp_path, ld_alpha=0.3))
    ours.train()
    assert logged(ours)[0] == pytest.approx(math.log(2), abs=1e-6)
    assert logged(ours, "rewards/margins")[0] == pytest.approx(0, abs=1e-6)


def test_gradient_accumulation_is_a_larger_batch(tmp_path: Path) -> None:
    """Two micro-batches of 3 pairs give the step of one batch of 6."""
    args = {"max_steps": 2, "seed": 3}
    large = trainer(tiny_model(), config(tmp_path, per_device_train_batch_size=6, **args))
    small = trainer(tiny_model(), config(tmp_path, gradient_accumulation_steps=2, **args))
    large.train()
    small.train()
    assert logged(small) == pytest.approx(logged(large), abs=1e-6)
    for found, expected in zip(small.model.parameters(), large.model.parameters(), strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("coef", [None, 0.0, 0.5])
def test_load_balancing_loss(coef: float | None, tmp_path: Path) -> None:
    """loss = ln 2 + coef * aux, with the model's own aux loss of the batch."""
    policy = tiny_model("mixtral", router_aux_loss_coef=0.25)
    ours = trainer(policy, config(tmp_path, router_aux_loss_coef=coef))
    inputs = PaddedLayout(0)(rows().to_list()[:3])
    weight = 0.25 if coef is None else coef
    own = policy(inputs["input_ids"], attention_mask=inputs["attention_mask"], output_router_logits=True).aux_loss
    loss = ours.compute_loss(policy, ours.data_collator(rows().to_list()[:3]))
    assert loss.item() == pytest.approx(math.log(2) + weight * own.item(), abs=1e-5)


def test_activation_offloading_and_checkpointing_change_nothing(tmp_path: Path) -> None:
    plain = trainer(tiny_model(), config(tmp_path))
    plain.train()
    for options in ({"activation_offloading": True}, {"activation_checkpointing": True}):
        other = trainer(tiny_model(), config(tmp_path, **options))
        other.train()
        assert logged(other) == pytest.approx(logged(plain), abs=1e-6)


# --- data -------------------------------------------------------------------------------------------------------------


def conversations(n: int = 12) -> tuple[Dataset, Any, nn.Module]:
    tiny = tokenizer()
    return Dataset.from_list(preference_rows(n)), tiny, tiny_model(vocab_size=len(tiny), max_position_embeddings=512)


def test_text_messages_and_token_ids_are_one_dataset(tmp_path: Path) -> None:
    """The same pairs as messages, as the text that the template makes of them, and as ids give the same losses."""
    dataset, tiny, _ = conversations()
    losses = {}
    for kind in ("messages", "ids", "implicit"):
        given = dataset
        if kind == "ids":
            given = trainer(
                tiny_model(vocab_size=len(tiny)), config(tmp_path), train_dataset=dataset, processing_class=tiny
            )
            given = given.train_dataset.select_columns(["prompt_ids", "chosen_ids", "rejected_ids"])
        if kind == "implicit":
            given = dataset.map(
                lambda row: {side: row["prompt"] + row[side] for side in ("chosen", "rejected")},
                remove_columns="prompt",
            )
        model = tiny_model(vocab_size=len(tiny), max_position_embeddings=512)
        ours = trainer(model, config(tmp_path), train_dataset=given, processing_class=tiny)
        ours.train()
        losses[kind] = logged(ours)
    assert losses["messages"] == losses["ids"] == losses["implicit"]
    assert losses["messages"][0] == pytest.approx(math.log(2), abs=1e-6)


def test_streams(tmp_path: Path) -> None:
    """A stream of the rows in their order trains as the same rows without shuffling."""
    table = rows(12).to_list()

    def stream() -> Any:
        yield from table

    streamed = trainer(tiny_model(), config(tmp_path), train_dataset=IterableDataset.from_generator(stream))
    streamed.train()
    fixed = trainer(tiny_model(), config(tmp_path, train_sampling_strategy="sequential"))
    fixed.train()
    assert logged(streamed) == pytest.approx(logged(fixed), abs=1e-6)


def test_the_common_collator_by_name(tmp_path: Path) -> None:
    collator = DataCollatorForPreference(pad_token_id=0, max_length=12)
    named = trainer(tiny_model(), config(tmp_path, max_length=12), data_collator=collator)
    plain = trainer(tiny_model(), config(tmp_path, max_length=12, layout="padded"))
    named.train()
    plain.train()
    assert logged(named) == logged(plain)


@pytest.mark.parametrize("mode", ["keep_start", "keep_end"])
def test_truncation(mode: str, tmp_path: Path) -> None:
    """Rewards against another reference, of rows cut by hand to 8 tokens."""
    policy, other = tiny_model(), tiny_model(seed=3)
    table = [r for r in rows(8, seed=5).to_list() if len(r["prompt_ids"]) < 8]
    args = config(tmp_path, max_length=8, truncation_mode=mode, per_device_eval_batch_size=2)
    found = trainer(policy, args, ref_model=other, train_dataset=Dataset.from_list(table)).evaluate(
        Dataset.from_list(table)
    )
    sums = []
    for row in table:
        ids = row["prompt_ids"] + row["chosen_ids"]
        start = len(row["prompt_ids"])
        cut = max(0, len(ids) - 8)
        ids, start = (ids[:8], start) if mode == "keep_start" else (ids[cut:], max(start - cut, 0))
        logps = policy(torch.tensor([ids])).logits[0].log_softmax(-1).detach()
        sums.append(sum(float(logps[t - 1, ids[t]]) for t in range(max(start, 1), len(ids))))
    assert found["eval_logps/chosen"] == pytest.approx(sum(sums) / len(sums), abs=1e-4)


# --- saving and going on ----------------------------------------------------------------------------------------------


def test_what_is_saved_is_the_policy_alone(tmp_path: Path) -> None:
    ours = trainer(POLICIES["lora_sft"](), config(tmp_path, save_strategy="steps", save_steps=4))
    ours.train()
    ours.save_model(str(tmp_path / "final"))
    assert (tmp_path / "final" / "adapter_model.safetensors").is_file()
    assert not [path for path in (tmp_path / "final").rglob("*") if "ref" in path.name]
    # A checkpoint names its reference; weights of one that did not move are not in it.
    assert [path.name for path in (tmp_path / "checkpoint-4" / "reference").iterdir()] == ["manifest.json"]


def test_model_card(tmp_path: Path) -> None:
    ours = trainer(tiny_model(), config(tmp_path / "kelp", loss_type="ipo", save_strategy="steps", save_steps=4))
    ours.train()
    card = (tmp_path / "kelp" / "README.md").read_text()
    assert "# kelp" in card
    assert "| loss | ipo |" in card
    assert "a copy of the policy" in card
    ours.create_model_card(model_name="rock", dataset_name="tides", tags=["sea"], license="apache-2.0")
    card = (tmp_path / "kelp" / "README.md").read_text()
    for piece in ("license: apache-2.0", "- tides", "- sea", "- holdfast", "- dpo", "# rock"):
        assert piece in card
    assert {"holdfast", "dpo"} <= set(ours.model.model_tags)


def test_loading_by_path(tmp_path: Path) -> None:
    """A model, its tokenizer and an adapter folder, each by path; dtype by name; the run is that of the objects."""
    dataset, tiny, model = conversations()
    model.save_pretrained(tmp_path / "model")
    tiny.save_pretrained(tmp_path / "model")
    by_object = trainer(model, config(tmp_path / "out"), train_dataset=dataset, processing_class=tiny)
    by_path = trainer(str(tmp_path / "model"), config(tmp_path / "out"), train_dataset=dataset, processing_class=None)
    assert len(by_path.processing_class) == len(tiny)
    by_object.train()
    by_path.train()
    assert logged(by_path) == logged(by_object)
    half = config(tmp_path / "out", model_init_kwargs={"dtype": "float16"})
    loaded = trainer(str(tmp_path / "model"), half, train_dataset=dataset, processing_class=None)
    assert loaded.model.dtype == torch.float16


def test_an_adapter_folder_is_a_policy(tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path / "base")
    base = type(tiny_model()).from_pretrained(tmp_path / "base")
    from peft import get_peft_model

    adapted = get_peft_model(
        base, LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    )
    adapted.save_pretrained(tmp_path / "sft")
    ours = trainer(str(tmp_path / "sft"), config(tmp_path / "out"))
    ours.train()
    assert logged(ours)[0] == pytest.approx(math.log(2), abs=1e-6)
    assert min(logged(ours)) < math.log(2) - 1e-3


def test_a_merged_model_trains_whole(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """`merge_and_unload` leaves every weight frozen."""
    merged = POLICIES["lora_sft"]().merge_and_unload()
    before = merged.lm_head.weight.detach().clone()
    trainer(merged, config(tmp_path)).train()
    assert not torch.equal(merged.lm_head.weight, before)
    assert "all of it trains" in caplog.text


def test_peft_config(tmp_path: Path) -> None:
    """A fresh adapter, the same for the same seed; only its factors train; the reference is the base."""
    lora = LoraConfig(r=4, target_modules=["q_proj"])
    first, second = (trainer(tiny_model(), config(tmp_path), peft_config=lora) for _ in range(2))
    first.train()
    second.train()
    assert logged(first) == logged(second)
    assert all("lora_" in name for name, p in first.model.named_parameters() if p.requires_grad)
    assert first.ref_model is None
    untouched = tiny_model()
    with first.null_ref_context():
        ids = torch.tensor([[5, 6, 7]])
        assert torch.equal(first.model.eval()(ids).logits, untouched(ids).logits)


def test_defaults_of_the_config(tmp_path: Path) -> None:
    made = DPOConfig(output_dir=str(tmp_path))
    assert (made.learning_rate, made.logging_steps, made.beta, made.max_length) == (1e-6, 10, 0.1, 1024)
    assert made.gradient_checkpointing is True
    assert made.bf16 is torch.cuda.is_available()
    assert made.loss_type == ["sigmoid"]
    assert json.loads(made.to_json_string())["ref_model_mixup_alpha"] == 0.6
    assert DPOConfig(output_dir=str(tmp_path), gradient_checkpointing=False).gradient_checkpointing is False
    renamed_option: dict[str, Any] = {NAME: False}
    assert DPOConfig(output_dir=str(tmp_path), **renamed_option).gradient_checkpointing is False


# --- refusals ---------------------------------------------------------------------------------------------------------


def test_nan_weights_are_named(tmp_path: Path) -> None:
    policy = tiny_model()
    policy.model.layers[1].mlp.down_proj.weight.data[3, 4] = float("nan")
    with pytest.raises(ValueError, match=r"NaN or infinite weights, in `model.layers.1.mlp.down_proj.weight` first"):
        trainer(policy, config(tmp_path))


def test_nan_in_a_ref_model_is_found_before_training(tmp_path: Path) -> None:
    other = tiny_model(seed=1)
    other.model.layers[1].mlp.down_proj.weight.data[3, 4] = float("nan")
    with pytest.raises(ValueError, match="a log-prob is NaN"):
        trainer(tiny_model(), config(tmp_path), ref_model=other).train()
    other = tiny_model(seed=1)
    other.lm_head.weight.data[3, 4] = float("nan")
    with pytest.raises(ValueError, match=r"The reference \(the given ref_model.*gave a log-prob of nan"):
        trainer(tiny_model(), config(tmp_path, precompute_ref_log_probs=True), ref_model=other)


def test_a_loss_that_becomes_nan_stops_the_run(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"The loss is NaN at step \d.*Lower the learning rate"):
        trainer(tiny_model(), config(tmp_path, learning_rate=1e30)).train()


def test_an_output_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ValueError, match=r"output_dir='.*file/out' was asked for, and cannot be written"):
        trainer(tiny_model(), config(tmp_path / "file" / "out"))


def test_a_tokenizer_that_does_not_fit(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"(?s)97.*90.*resize_token_embeddings"):
        trainer(tiny_model(vocab_size=90), config(tmp_path))


def test_no_padding_token(tmp_path: Path) -> None:
    """The end-of-sequence token stands in, as rows are only filled up with it; without either it is an error."""
    dataset, tiny, model = conversations()
    tiny.pad_token = None
    ours = trainer(model, config(tmp_path), train_dataset=dataset, processing_class=tiny)
    assert ours.data_collator.pad_token_id == tiny.eos_token_id
    assert tiny.pad_token is None
    tiny.eos_token = None
    with pytest.raises(ValueError, match="neither a padding nor an end-of-sequence token"):
        trainer(model, config(tmp_path), train_dataset=dataset, processing_class=tiny)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"train_dataset": None}, "`train_dataset` is required"),
        ({"train_dataset": DatasetDict({"train": rows(4)})}, r"`train_dataset` is a DatasetDict.*one split"),
        ({"train_dataset": Dataset.from_list([])}, "train dataset has no rows"),
        (
            {"train_dataset": Dataset.from_list([{"text": "a"}])},
            r"columns \{prompt, chosen, rejected\}.*found \['text'\]",
        ),
        ({"processing_class": "gpt2"}, r"`processing_class` is a str"),
        ({"peft_config": {"r": 4}}, r"`peft_config` is a dict"),
        ({"quantization_config": object()}, r"`quantization_config` says how to load a model.*loaded already"),
    ],
)
def test_arguments_that_cannot_be_right(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        trainer(tiny_model(), config(tmp_path), **options)


def test_a_peft_config_for_an_adapted_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"already carries the adapters \['default'\].*merge_and_unload"):
        trainer(POLICIES["lora_sft"](), config(tmp_path), peft_config=LoraConfig(r=2, target_modules=["q_proj"]))


def test_a_frozen_adapter_is_refused(tmp_path: Path) -> None:
    policy = POLICIES["lora_sft"]()
    for parameter in policy.parameters():
        parameter.requires_grad_(False)
    with pytest.raises(ValueError, match=r"Nothing of the policy would train.*is_trainable=True"):
        trainer(policy, config(tmp_path))


def test_other_arguments_than_a_dpo_config_are_refused(tmp_path: Path) -> None:
    args = TrainingArguments(output_dir=str(tmp_path))
    with pytest.raises(TypeError, match=r"`args` is a TrainingArguments; pass a `holdfast.DPOConfig`"):
        DPOTrainer(tiny_model(), args=args, train_dataset=rows(4), processing_class=tiny_tokenizer())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"beta": -0.1}, "beta"),
        ({"loss_type": "sigmoyd"}, "sigmoid"),
        ({"reference": "modle"}, r"reference='modle'.*model, adapter"),
        ({"reference": "none"}, r"reference='none'.*\['sigmoid'\] compares with a reference.*simpo, orpo, cpo"),
        (
            {"loss_type": "simpo", "reference": "none", "precompute_ref_log_probs": True},
            r"precompute_ref_log_probs was asked for.*no\s+refer",
        ),
        ({"loss_type": "orpo", "sync_ref_model": True}, r"sync_ref_model was asked for.*no\s+reference"),
        ({"reference_window": 0}, "reference_window=0 was asked for; it counts from 1"),
        ({"loss_type": "orpo", "reference_window": 2}, r"reference_window was asked for.*no\s+reference"),
        ({"sync_ref_model": True, "ref_model_mixup_alpha": 0.0}, r"alpha lies in \(0, 1\]"),
        ({"ref_model_sync_steps": 0}, "ref_model_sync_steps=0"),
        ({"snapshot_device": "gpu"}, r"snapshot_device='gpu'.*device, cpu, disk"),
        ({"snapshot_device": "cpu"}, r"snapshot_device='cpu' was asked for with reference='auto'.*no snapshot"),
        ({"max_length": 1}, "max_length=1"),
        ({"truncation_mode": "keep_middle"}, "'keep_start' or 'keep_end'"),
        ({"padding_free": True, "layout": "padded"}, "padding_free=True was asked for with layout='padded'"),
        ({"layout": "flat"}, r"layout='flat'.*auto, prefix_shared, packed, padded"),
    ],
)
def test_options_that_cannot_be_right(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        config(tmp_path, **options)


def test_router_loss_of_a_model_without_experts_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"router_aux_loss_coef=0.1 was asked for.*not a Mixture-of-Experts"):
        trainer(tiny_model(), config(tmp_path, router_aux_loss_coef=0.1))
