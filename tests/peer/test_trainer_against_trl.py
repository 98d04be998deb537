"""Whole short runs with the same arguments through TRL 1.16's trainer and ours: every logged number, step by step.

TRL logs means of batch means; here a metric is a mean over pairs or tokens, whatever batches they came in. So TRL's
trainer is made to tell each batch's values and sizes, and its log *weighted by these sizes* is what ours must be; where
all batches of a log are of one size, or there is only one, that is the number TRL logs, and ours equals it as it is.

Where holdfast differs on purpose, a test says so and shows both values:

- Evaluation: above. And `compute_metrics` is shown only half of TRL's last batch, when that is not a full one.
- `label_smoothing` under `sigmoid` is ignored there; here it is conservative DPO.
- `bf16` is on by default there, on every machine; here not on a CPU.
- The reference of a model tuned in memory is read again from its path there; here it is the tuned model.
- Each prompt is computed once here, so `total_flos` is less; with `layout="padded"` it is the same.
- Keyword arguments for loading a model that is loaded already: a warning there, refused here.
"""

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM

import holdfast
import tiny
from families import tiny_model
from holdfast.options.metric_names import LOSS_TERM

trl = pytest.importorskip("trl", reason="needs TRL")

pytestmark = [
    pytest.mark.peer,
    pytest.mark.filterwarnings("ignore"),  # the peer's own
]

TOKENIZER = tiny.tokenizer()
MESSAGES = tiny.preference_rows(13, seed=3)
HELD_OUT = Dataset.from_list(tiny.preference_rows(7, seed=4))
WORDS = tiny.PROSE.split()
TEXTS = [
    {"prompt": " ".join(WORDS[n : n + 7]), "chosen": f" {WORDS[2 * n]} it is", "rejected": f" {WORDS[3 * n + 1]}."}
    for n in range(13)
]
TOOLS = [{"type": "function", "function": {"name": "tides", "description": "When", "parameters": {"day": "Monday"}}}]

OURS_ALONE = {f"reference/{name}" for name in ("kl_chosen", "kl_rejected", "version", "age", "drift")}
OURS_ALONE |= {f"rewards/margins_p{percent}" for percent in (10, 50, 90)}
BY_TOKENS = {
    "entropy": ("chosen", "rejected"),
    "logits/chosen": ("chosen",),
    "logits/rejected": ("rejected",),
    "mean_token_accuracy": ("chosen",),
}
"""Metrics that are means over tokens, and whose; the others are means over pairs."""

RELATIVE = 1e-5
ABSOLUTE = 2e-6
"""Of numbers of size 1 that are differences of larger ones: a log-prob of -100 has a rounding error of 1e-5 itself."""

RELATIVE_OF_RATIOS = 3e-5
"""Of the gradient of a forward KL, which is scaled by pi_ref / pi_theta: the relative error of a ratio is the absolute
error of its logarithm, and a completion's log-prob is the fp32 sum of tens of numbers. From the same weights, single
steps of this test lie up to 1.7e-5 (TRL's; rms 5e-6) from the same step in fp64, and ours no nearer to it than that."""

NATS = 3e-5
"""The same of `logps/*` and what is made of them: sums of many token log-probs, added up in another order."""


class Recording(trl.DPOTrainer):
    """TRL's trainer, which keeps for each of its logs what the same batches give when weighted by their sizes."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.weighted: list[dict[str, float]] = []
        self.sizes: dict[str, list[dict[str, float]]] = {"train": [], "eval": []}
        super().__init__(*args, **kwargs)

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        result = super().compute_loss(model, inputs, *args, **kwargs)
        chosen, rejected = inputs["completion_mask"][:, 1:].sum(1).chunk(2)
        loss = result[0] if isinstance(result, tuple) else result
        size = {"pairs": len(chosen), "chosen": int(chosen.sum()), "rejected": int(rejected.sum()), "loss": loss.item()}
        self.sizes["train" if self.model.training else "eval"].append(size)
        return result

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        mode = "train" if "loss" in logs or "train_loss" in logs else "eval"
        sizes, found = self.sizes[mode], {}
        for name, values in self._metrics[mode].items() if sizes else ():
            weights = [sum(size[side] for side in BY_TOKENS.get(name, ("pairs",))) for size in sizes]
            if name == "num_tokens":
                weights = [1]
            found[name] = sum(v * w for v, w in zip(values, weights, strict=True)) / sum(weights)
        if mode == "eval" and sizes:
            found["loss"] = sum(s["loss"] * s["pairs"] for s in sizes) / sum(s["pairs"] for s in sizes)
        self.weighted.append({name if mode == "train" else f"eval_{name}": value for name, value in found.items()})
        self.sizes[mode] = []
        super().log(logs, *args, **kwargs)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., str]:
    """The folder of a tiny model (family, seed) with its tokenizer: TRL reads its reference from there."""
    folders: dict[tuple[str, int], str] = {}

    def folder(family: str = "llama", seed: int = 0) -> str:
        if (family, seed) not in folders:
            path = str(tmp_path_factory.mktemp(family))
            model = tiny_model(family, seed, vocab_size=len(TOKENIZER), max_position_embeddings=256)
            learn_a_little(model)
            model.save_pretrained(path)
            TOKENIZER.save_pretrained(path)
            folders[family, seed] = path
        return folders[family, seed]

    return folder


def learn_a_little(model: nn.Module) -> None:
    """Some steps on the chosen answers, so that top-1 tokens are sometimes right and no metric is idle."""
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    rows = [
        TOKENIZER.apply_chat_template(r["prompt"] + r["chosen"])["input_ids"] for r in MESSAGES[:6] + HELD_OUT.to_list()
    ]
    for ids in (torch.tensor([row]) for row in rows * 3):
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()


def loaded(path: str) -> nn.Module:
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)


def dataset(rows: list[dict[str, Any]] = MESSAGES) -> Dataset:
    return Dataset.from_list(rows)


def arguments(folder: Path, **options: Any) -> dict[str, Any]:
    defaults = {
        "output_dir": str(folder),
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "per_device_train_batch_size": 3,
        "max_steps": 5,
        "logging_steps": 1,
        "learning_rate": 0.05,
        "beta": 0.2,
        "optim": "sgd",
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }
    return defaults | options


def trainers(folder: Path, make: Callable[[], dict[str, Any]], **options: Any) -> tuple[Recording, holdfast.DPOTrainer]:
    """TRL's trainer and ours of the same arguments (`layout` is ours alone); `make` makes the constructor's, afresh for
    each."""
    common = {"train_dataset": dataset(), "processing_class": TOKENIZER}
    layout = {"layout": options.pop("layout")} if "layout" in options else {}
    theirs = Recording(args=trl.DPOConfig(**arguments(folder / "theirs", **options)), **common | make())
    ours = holdfast.DPOTrainer(
        args=holdfast.DPOConfig(**arguments(folder / "ours", **options), **layout), **common | make()
    )
    return theirs, ours


def assert_same_run(theirs: Recording, ours: holdfast.DPOTrainer, relative: float = RELATIVE) -> None:
    """Every log of the two runs has the same names, and the same numbers once batches are weighted by size."""
    for trainer in (theirs, ours):
        trainer.train()
    assert_same_logs(theirs, ours, relative)
    assert_same_weights(theirs.model, ours.model)


def assert_same_logs(theirs: Recording, ours: holdfast.DPOTrainer, relative: float = RELATIVE) -> None:
    their_log, our_log = theirs.state.log_history, ours.state.log_history
    assert [entry["step"] for entry in our_log] == [entry["step"] for entry in their_log]
    for entry, weighted, found in zip(their_log, theirs.weighted, our_log, strict=True):
        # What TRL knows of the last steps when it ends on an evaluation, and leaves out of its log, is in `weighted`.
        expected = {name: value for name, value in (entry | weighted).items() if not is_speed(name)}
        if ".ref." in str(list(dict(theirs.model.named_parameters()))):
            expected.pop("total_flos", None)  # its copy of the adapter counts there
        if "total_flos" in expected and ours.data_collator.name != "padded":
            assert found["total_flos"] < expected.pop("total_flos")
        alone = found.keys() - expected.keys() - entry.keys()
        terms = {f"{LOSS_TERM}{name}" for name in [*ours.args.loss_types, "aux_loss"]}
        assert alone <= OURS_ALONE | terms | {f"eval_{name}" for name in OURS_ALONE | terms}
        for name, value in expected.items():
            scale = NATS if "logps/" in name or "rewards/" in name else ABSOLUTE
            if name.endswith("rewards/accuracies") and abs(expected[name.replace("accuracies", "margins")]) < NATS:
                continue  # before the first step, where rounding alone decides which reward is the higher
            assert found[name] == pytest.approx(value, rel=relative, abs=scale), (name, entry["step"])


def is_speed(name: str) -> bool:
    return name.endswith(("_runtime", "_per_second"))


def assert_same_weights(theirs: nn.Module, ours: nn.Module) -> None:
    """All trained weights agree, by name; TRL's frozen copy of an adapter is its own."""
    expected = {name: p for name, p in theirs.named_parameters() if p.requires_grad and ".ref." not in name}
    found = {name: p for name, p in ours.named_parameters() if p.requires_grad}
    assert_close(found, expected)


def assert_close(found: dict[str, nn.Parameter], expected: dict[str, nn.Parameter]) -> None:
    assert found.keys() == expected.keys()
    for name, parameter in found.items():
        assert float((parameter - expected[name]).abs().max()) < 2e-5, name


def moved(trainer: Any, start: nn.Module) -> bool:
    """Whether training changed the weights by more than the comparison forgives."""
    before = dict(start.named_parameters())
    return any(float((p - before[n]).abs().max()) > 1e-3 for n, p in trainer.model.named_parameters() if n in before)


# --- optimizers, batches, accumulation -------------------------------------------------------------------------------


@pytest.mark.parametrize("optim", ["sgd", "adamw_torch"])
@pytest.mark.parametrize(("batch", "accumulation", "steps"), [(3, 1, 5), (4, 1, 6), (1, 4, 4), (2, 3, 5), (13, 1, 4)])
def test_batches(optim: str, batch: int, accumulation: int, steps: int, saved: Any, tmp_path: Path) -> None:
    """13 pairs, so the last batch of an epoch is smaller; 7 pairs evaluated in batches of 4 and 3 at the end."""
    theirs, ours = trainers(
        tmp_path,
        lambda: {"model": loaded(saved()), "eval_dataset": HELD_OUT},
        optim=optim,
        learning_rate=0.05 if optim == "sgd" else 1e-3,
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=accumulation,
        max_steps=steps,
        per_device_eval_batch_size=4,
        eval_strategy="steps",
        eval_steps=steps,
    )
    assert_same_run(theirs, ours)
    assert moved(ours, loaded(saved()))


def test_logs_of_several_steps(saved: Any, tmp_path: Path) -> None:
    """Logged every third step of seven, evaluated every second: what is left over goes into the last log."""
    theirs, ours = trainers(
        tmp_path,
        lambda: {"model": saved(), "eval_dataset": HELD_OUT},
        logging_steps=3,
        max_steps=7,
        eval_strategy="steps",
        eval_steps=2,
        logging_first_step=True,
    )
    assert_same_run(theirs, ours)


def test_gradient_checkpointing_and_defaults_of_the_run(saved: Any, tmp_path: Path) -> None:
    """AdamW, linear decay, clipping and checkpointing as they are by default, over one epoch."""
    folder = tmp_path
    make = lambda: {"model": saved(), "train_dataset": dataset(), "processing_class": TOKENIZER}  # noqa: E731
    plain = {"use_cpu": True, "bf16": False, "report_to": "none", "disable_tqdm": True, "num_train_epochs": 1}
    theirs = Recording(args=trl.DPOConfig(str(folder / "theirs"), logging_steps=1, **plain), **make())
    ours = holdfast.DPOTrainer(args=holdfast.DPOConfig(str(folder / "ours"), logging_steps=1, **plain), **make())
    assert ours.args.gradient_checkpointing is theirs.args.gradient_checkpointing is True
    for name in ("learning_rate", "logging_steps", "optim", "lr_scheduler_type", "max_grad_norm", "weight_decay"):
        assert getattr(ours.args, name) == getattr(theirs.args, name), name
    assert_same_run(theirs, ours)


def test_no_arguments_at_all(saved: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same options and folder. But bf16 is on there on a CPU as well, and so, without a GPU, `args=None` fails."""
    monkeypatch.chdir(tmp_path)
    theirs, ours = (made.DPOConfig("out", use_cpu=True) for made in (trl, holdfast))
    shared = set(trl.DPOConfig.__dataclass_fields__)
    assert shared <= set(holdfast.DPOConfig.__dataclass_fields__)
    values, our_values = theirs.to_dict(), ours.to_dict()
    differing = {name for name in shared & values.keys() if values[name] != our_values[name]}
    # The filter waits for the device at every step, to hide a NaN from the log; here a NaN is an error.
    assert differing - {"accelerator_config"} == {"bf16", "logging_nan_inf_filter"}
    differing = {
        name for name, value in values["accelerator_config"].items() if our_values["accelerator_config"][name] != value
    }
    assert differing <= {"dispatch_batches"}  # never here; there not for streams
    assert (theirs.bf16, ours.bf16) == (True, False)
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="doesn't support bf16/gpu"):
            trl.DPOTrainer(model=saved(), train_dataset=dataset())
    made = holdfast.DPOTrainer(model=saved(), train_dataset=dataset())
    assert Path(made.args.output_dir).name == f"{Path(saved()).name}-DPO"
    assert len(made.processing_class) == len(TOKENIZER)


# --- policies and references -----------------------------------------------------------------------------------------


def lora(**options: Any) -> LoraConfig:
    return LoraConfig(**{"r": 4, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"} | options)


def fresh_adapter(path: str, **options: Any) -> PeftModel:
    torch.manual_seed(7)
    return get_peft_model(loaded(path), lora(**options))


def trained_adapter(path: str, **options: Any) -> PeftModel:
    """A PEFT model whose adapter, called "default", has been trained: its B factors are not zero."""
    model = fresh_adapter(path, **options)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.2)
    return model


def cases() -> Iterator[Any]:
    """(what goes to the constructor given `saved`, options)"""

    def case(name: str, make: Callable[[Any], dict[str, Any]], **options: Any) -> Any:
        return pytest.param(make, options, id=name)

    rough = {"learning_rate": 0.5}
    ahead = {"precompute_ref_log_probs": True}
    yield case("path", lambda saved: {"model": saved()})
    yield case("padded", lambda saved: {"model": saved()}, layout="padded")
    yield case("packed", lambda saved: {"model": saved()}, layout="packed")
    yield case("ref_model", lambda saved: {"model": loaded(saved()), "ref_model": loaded(saved("llama", 1))})
    yield case("precompute", lambda saved: {"model": saved()}, **ahead)
    yield case(
        "precompute-ref_model",
        lambda saved: {"model": saved(), "ref_model": loaded(saved("llama", 1))},
        precompute_ref_batch_size=5,
        **ahead,
    )
    yield case("moe", lambda saved: {"model": saved("mixtral")})
    yield case("moe-coef", lambda saved: {"model": saved("qwen3_moe")}, router_aux_loss_coef=0.3)
    yield case("moe-off", lambda saved: {"model": saved("qwen3_moe")}, router_aux_loss_coef=0.0)
    yield case("softcap", lambda saved: {"model": saved("gemma2")})
    yield case("tied", lambda saved: {"model": saved("llama_tied")})
    yield case("lora", lambda saved: {"model": saved(), "peft_config": lora()}, **rough)
    yield case("lora-moe", lambda saved: {"model": saved("qwen3_moe"), "peft_config": lora()}, **rough)
    yield case("lora-precompute", lambda saved: {"model": saved(), "peft_config": lora()}, **ahead, **rough)
    yield case(
        "lora-ref_model",
        lambda saved: {"model": saved(), "peft_config": lora(), "ref_model": loaded(saved("llama", 1))},
        **rough,
    )
    for kwargs in ({"use_reentrant": True}, {"use_reentrant": False}):
        yield case(
            f"lora-checkpointing-{kwargs['use_reentrant']}",
            lambda saved: {"model": saved(), "peft_config": lora()},
            gradient_checkpointing=True,
            gradient_checkpointing_kwargs=kwargs,
            **rough,
        )
    yield case("fresh-adapter", lambda saved: {"model": fresh_adapter(saved())}, **rough)
    yield case("sft-adapter", lambda saved: {"model": trained_adapter(saved())}, **rough)
    yield case("sft-adapter-precompute", lambda saved: {"model": trained_adapter(saved())}, **ahead, **rough)
    yield case(
        "sft-adapter-modules_to_save", lambda saved: {"model": trained_adapter(saved(), modules_to_save=["lm_head"])}
    )
    for alpha in (0.6, 1.0):
        yield case(
            f"sync-{alpha}",
            lambda saved: {"model": saved()},
            sync_ref_model=True,
            ref_model_mixup_alpha=alpha,
            ref_model_sync_steps=2,
            max_steps=6,
        )
    yield case(
        "sync-ref_model",
        lambda saved: {"model": saved(), "ref_model": loaded(saved("llama", 1))},
        sync_ref_model=True,
        ref_model_sync_steps=1,
    )


@pytest.mark.parametrize(("make", "options"), list(cases()))
def test_policies_and_references(make: Any, options: dict[str, Any], saved: Any, tmp_path: Path) -> None:
    theirs, ours = trainers(
        tmp_path, lambda: {**make(saved), "eval_dataset": HELD_OUT}, eval_strategy="steps", eval_steps=5, **options
    )
    assert_same_run(theirs, ours)
    losses = [entry["loss"] for entry in ours.state.log_history if "loss" in entry]
    assert max(losses) - min(losses) > 1e-3
    if options.get("sync_ref_model"):
        assert_close(*(dict(trainer.ref_model.named_parameters()) for trainer in (ours, theirs)))


# --- losses and their modifiers --------------------------------------------------------------------------------------


def loss_options() -> Iterator[Any]:
    smoothed = {"exo_pair": 0.001, "robust": 0.1, "aot": 0.1, "aot_unpaired": 0.1}
    for name in (
        "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot", "aot_unpaired", "apo_zero",
        "apo_down", "discopop", "sigmoid_norm",
    ):  # fmt: skip
        yield pytest.param({"loss_type": name, "label_smoothing": smoothed.get(name, 0.0)}, id=name)
    mixed = {"loss_type": ["sigmoid", "bco_pair", "sft"]}
    yield pytest.param(mixed | {"loss_weights": [0.8, 0.2, 1.0]}, id="mixed")
    yield pytest.param(mixed, id="mixed-unweighted")
    yield pytest.param({"ld_alpha": 0.4}, id="ld_alpha")
    yield pytest.param({"use_weighting": True}, id="use_weighting")
    for divergence in ("forward_kl", "js_divergence", "alpha_divergence"):
        # A reference 60 nats away has a forward-KL score of -e^60.
        near = {"beta": 0.01, "reference_is_policy": True} if divergence == "forward_kl" else {}
        yield pytest.param({"f_divergence_type": divergence} | near, id=divergence)
    yield pytest.param({"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 0.8}, id="alpha0.8")


@pytest.mark.parametrize("options", list(loss_options()))
def test_losses(options: dict[str, Any], saved: Any, tmp_path: Path) -> None:
    """Against another model as reference, but where that is too far away; the steps small enough to stay in range."""
    options = {"learning_rate": 1e-3, "max_steps": 4, "per_device_eval_batch_size": 7} | options
    seed = 0 if options.pop("reference_is_policy", False) else 1

    def make() -> dict[str, Any]:
        return {"model": loaded(saved()), "ref_model": loaded(saved("llama", seed)), "eval_dataset": HELD_OUT}

    is_ratio = options.get("f_divergence_type") == "forward_kl"
    theirs, ours = trainers(tmp_path, make, eval_strategy="steps", eval_steps=4, **options)
    assert_same_run(theirs, ours, RELATIVE_OF_RATIOS if is_ratio else RELATIVE)


# --- data -------------------------------------------------------------------------------------------------------------


def joined(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{side: row["prompt"] + row[side] for side in ("chosen", "rejected")} for row in rows]


DATA: dict[str, tuple[list[dict[str, Any]], dict[str, Any]]] = {
    "text": (TEXTS, {}),
    "text, implicit prompt": (joined(TEXTS), {}),
    "messages, implicit prompt": (joined(MESSAGES), {}),
    "tools": ([{**row, "tools": TOOLS} for row in MESSAGES], {}),
    "tools as JSON": ([{**row, "tools": json.dumps(TOOLS)} for row in MESSAGES], {}),
    "template variables": ([{**row, "chat_template_kwargs": {"style": "dry"}} for row in MESSAGES], {}),
    "keep_start": (MESSAGES, {"max_length": 45}),
    "keep_end": (MESSAGES, {"max_length": 45, "truncation_mode": "keep_end"}),
    "no truncation": (MESSAGES, {"max_length": None}),
    "padded to a multiple": (MESSAGES, {"pad_to_multiple_of": 16}),
    "all columns kept": (MESSAGES, {"remove_unused_columns": False}),
    "in their order": (MESSAGES, {"train_sampling_strategy": "sequential"}),
}


@pytest.mark.parametrize(("rows", "options"), DATA.values(), ids=DATA.keys())
def test_data(rows: list[dict[str, Any]], options: dict[str, Any], saved: Any, tmp_path: Path) -> None:
    theirs, ours = trainers(tmp_path, lambda: {"model": saved(), "train_dataset": dataset(rows)}, **options)
    assert_same_run(theirs, ours)


def test_streams(saved: Any, tmp_path: Path) -> None:
    def make() -> dict[str, Any]:
        return {
            "model": saved(),
            "train_dataset": dataset().to_iterable_dataset(),
            "eval_dataset": HELD_OUT.to_iterable_dataset(),
        }

    theirs, ours = trainers(tmp_path, make, eval_strategy="steps", eval_steps=5, per_device_eval_batch_size=4)
    assert_same_run(theirs, ours)


def test_several_evaluation_sets_and_one_more_after_training(saved: Any, tmp_path: Path) -> None:
    sets = {"near": HELD_OUT, "far": dataset(TEXTS)}
    theirs, ours = trainers(
        tmp_path, lambda: {"model": saved(), "eval_dataset": sets}, eval_strategy="steps", eval_steps=3, max_steps=3
    )
    for trainer in (theirs, ours):
        trainer.train()
        trainer.evaluate(dataset(TEXTS[:5]))
        trainer.evaluate()
    assert_same_logs_of_sets(theirs, ours, ("near", "far"))


def assert_same_logs_of_sets(theirs: Recording, ours: holdfast.DPOTrainer, names: tuple[str, ...]) -> None:
    """TRL puts only loss and speed under the name of a set; its metrics overwrite each other as `eval_...`."""
    assert len(ours.state.log_history) == len(theirs.state.log_history)
    for entry, weighted, found in zip(theirs.state.log_history, theirs.weighted, ours.state.log_history, strict=True):
        own = next((f"eval_{name}_" for name in names if f"eval_{name}_loss" in entry), "eval_")
        for name, value in weighted.items():
            name = name.replace("eval_", own)
            scale = NATS if "logps/" in name or "rewards/" in name else ABSOLUTE
            assert found[name] == pytest.approx(value, rel=RELATIVE, abs=scale), name


# --- where we differ -------------------------------------------------------------------------------------------------


def test_where_we_differ_evaluation(saved: Any, tmp_path: Path) -> None:
    """7 pairs in batches of 4 and 3: metrics are the mean of two means there, here each pair counts once."""
    theirs, ours = trainers(
        tmp_path,
        lambda: {"model": loaded(saved()), "ref_model": loaded(saved("llama", 1))},
        per_device_eval_batch_size=4,
    )
    first, second = (theirs.evaluate(HELD_OUT.select(part)) for part in (range(4), range(4, 7)))
    their_whole, our_whole = theirs.evaluate(HELD_OUT), ours.evaluate(HELD_OUT)
    for name in ("eval_rewards/accuracies", "eval_rewards/margins", "eval_logps/chosen"):
        a, b = first[name], second[name]
        assert abs(a - b) > 0.05
        assert their_whole[name] == pytest.approx((a + b) / 2, rel=1e-5)
        assert our_whole[name] == pytest.approx((4 * a + 3 * b) / 7, rel=1e-5)
    loss = (4 * first["eval_loss"] + 3 * second["eval_loss"]) / 7  # each pair counts once in both
    assert their_whole["eval_loss"] == pytest.approx(loss, rel=1e-5)
    assert our_whole["eval_loss"] == pytest.approx(loss, rel=1e-5)


def test_where_we_differ_compute_metrics(saved: Any, tmp_path: Path) -> None:
    """The same logits and ids: all 14 rows of 7 pairs here, there 3 of the 6 rows of the last batch of 3 pairs."""
    seen: list[Any] = []

    def compute_metrics(prediction: Any) -> dict[str, float]:
        seen.append(prediction)
        return {"rows": float(len(prediction.label_ids))}

    theirs, ours = trainers(
        tmp_path,
        lambda: {"model": saved(), "compute_metrics": compute_metrics, "eval_dataset": HELD_OUT},
        per_device_eval_batch_size=4,
    )
    assert theirs.evaluate()["eval_rows"] == 8 + 3
    assert ours.evaluate()["eval_rows"] == 8 + 6
    expected, found = seen
    assert (found.label_ids[:11] == expected.label_ids).all()
    attended = expected.label_ids != -100
    assert abs(found.predictions[:11] - expected.predictions)[attended].max() < 1e-4


def first_log(trainer: Any) -> dict[str, float]:
    trainer.train()
    return trainer.state.log_history[0]


def test_where_we_differ_label_smoothing(saved: Any, tmp_path: Path) -> None:
    """TRL ignores it. Conservative DPO adds eps * margin to the sigmoid loss: log sigma(-m) = log sigma(m) - m."""

    def make() -> dict[str, Any]:
        return {"model": loaded(saved()), "ref_model": loaded(saved("llama", 1))}

    plain, _ = trainers(tmp_path, make, max_steps=1)
    theirs, ours = (first_log(t) for t in trainers(tmp_path, make, max_steps=1, label_smoothing=0.2))
    expected = first_log(plain)
    margin = expected["rewards/margins"]
    assert abs(margin) > 0.1
    assert theirs["loss"] == pytest.approx(expected["loss"], rel=1e-5)
    assert ours["loss"] == pytest.approx(expected["loss"] + 0.2 * margin, rel=1e-5)


def tuned_in_memory(saved: Any) -> dict[str, Any]:
    model = loaded(saved())
    learn_a_little(model)
    return {"model": model}


def merged(saved: Any) -> dict[str, Any]:
    model = trained_adapter(saved()).merge_and_unload()
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    return {"model": model}


DRIFTED: dict[str, Callable[[Any], dict[str, Any]]] = {
    "tuned in memory": tuned_in_memory,
    "merged": merged,
    "prompt tuning": lambda saved: {
        "model": saved(), "peft_config": PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    },
    "an adapter that adds something at once": lambda saved: {
        "model": saved(), "peft_config": lora(init_lora_weights=False)
    },
}  # fmt: skip


@pytest.mark.parametrize("make", DRIFTED.values(), ids=DRIFTED.keys())
def test_where_we_differ_the_reference_is_captured(make: Any, saved: Any, tmp_path: Path) -> None:
    """Here the reference is the policy as it starts to train; there the file it came from, or the bare base."""
    theirs, ours = (first_log(t) for t in trainers(tmp_path, lambda: make(saved), max_steps=1))
    assert abs(theirs["rewards/margins"]) > 1e-3
    assert ours["rewards/margins"] == pytest.approx(0, abs=1e-6)
    assert ours["loss"] == pytest.approx(math.log(2), abs=1e-6)
    for name in ("logps/chosen", "logps/rejected", "entropy", "logits/chosen"):  # the policy is the same
        assert ours[name] == pytest.approx(theirs[name], rel=RELATIVE, abs=NATS), name


def test_where_we_differ_options_without_effect(saved: Any, tmp_path: Path) -> None:
    """There a warning, or not even that; here they are refused."""
    args = arguments(tmp_path, discopop_tau=0.3)
    trl.DPOTrainer(saved(), args=trl.DPOConfig(**args), train_dataset=dataset())
    with pytest.raises(ValueError, match=r"discopop_tau=0\.3"):
        holdfast.DPOConfig(**args)
    options = {"model_init_kwargs": {"dtype": "float32"}}
    make = {"model": loaded(saved()), "ref_model": loaded(saved("llama", 1)), "train_dataset": dataset()}
    make["processing_class"] = TOKENIZER
    trl.DPOTrainer(args=trl.DPOConfig(**arguments(tmp_path, **options)), **make)
    with pytest.raises(ValueError, match="`model_init_kwargs` says how to load a model"):
        holdfast.DPOTrainer(args=holdfast.DPOConfig(**arguments(tmp_path, **options)), **make)
