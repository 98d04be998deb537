"""Trainings whose loss is a function of the whole batch, not a mean of one number per pair: a row each.

A run of N processes must see the pairs of all of them as one process sees its batch of `GLOBAL_BATCH`. 9 rows make a
last batch of one real pair, so all but one process have nothing real there. The evaluation is in batches of
`GLOBAL_BATCH` too, the last one of one pair, and by source, of which a process may have no row.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from datasets import Dataset
from engine_scenarios import numbers
from engines import options_of
from scenarios import GLOBAL_BATCH, RANK, WORLD, Scenario, held_out_rows, make, stream, trained
from torch import Tensor
from transformers import DogeConfig, DogeForCausalLM

from families import tiny_model
from holdfast import DataCollatorForPreference
from holdfast.losses import PairLogps
from holdfast.training import global_batch
from holdfast.training.global_batch import GlobalBatch
from policies import POLICIES, config, rows

SORTING = {"loss_type": ["aot", "aot_unpaired"], "loss_weights": [1.0, 0.5], "label_smoothing": 0.1}
LIKELIHOOD = {"loss_type": ["sigmoid", "sft"], "ld_alpha": 0.4, "use_weighting": True}
MOMENTS = {"loss_type": ["beta_dpo", "alpha_dpo"], "beta_dpo_share": 0.6, "alpha_dpo_alpha": 2.0}
ROUTED = {"router_aux_loss_coef": 0.5}


def shared_rows() -> Dataset:
    """9 rows, of which the first has the last one's prompt, and its chosen completion too: so the filler that stands in
    a row of tokens with the last pair has a prompt and a completion of its own and of that pair."""
    table = rows(9).to_list()
    table[0] |= {"prompt_ids": table[8]["prompt_ids"], "chosen_ids": table[8]["chosen_ids"]}
    return Dataset.from_list(table)


def run_options(options: dict[str, Any]) -> dict[str, Any]:
    """Those of 5 steps over 9 rows, so of one epoch and part of a second one, with an evaluation of 5 rows after every
    two steps and at the end."""
    held_out = held_out_rows(5).add_column("source", ["a", "b", "a", "a", "b"])
    steps = options.get("gradient_accumulation_steps", 1)
    evaluation = {"eval_strategy": "steps", "eval_steps": 2, "per_device_eval_batch_size": GLOBAL_BATCH // WORLD}
    options = {"train_dataset": shared_rows(), "eval_dataset": held_out, "max_steps": 5 // steps} | evaluation | options
    options["train_sampling_strategy"] = "sequential"  # so the first rows are the fillers of the last batch
    if "reference" not in options:
        options["ref_model"] = tiny_model(seed=5)
    return options


def batch_loss(folder: Path, policy: Any = tiny_model, **options: Any) -> Any:
    """The numbers of a training with these options."""
    folder.mkdir(exist_ok=True)
    return trained(make(folder, policy(), **run_options(options)), folder)


def mixture_of_experts(family: str = "mixtral") -> Any:
    """A tiny model with routers."""
    return tiny_model(family)


def sharded(folder: Path, policy: Any = tiny_model, **options: Any) -> Any:
    """What a training logs over FSDP2, and the engine that it ran on."""
    if WORLD == 1:
        return None
    ours = make(folder, policy(), **run_options(options | options_of("fsdp2")))
    ours.train()
    options_of("ddp")  # what transformers set for the engine would hold for the next run too
    return {"logs": numbers(ours.state.log_history), "engine": str(ours.accelerator.distributed_type)}


def by_hand(folder: Path) -> Any:
    """The losses and gradients of three pairs, of which the first process has two and the last one has one."""
    own = slice(0, 3) if WORLD == 1 else slice(0, 2) if RANK == 0 else slice(2, 3 if RANK == WORLD - 1 else 2)
    found: dict[str, Any] = {}
    for name in ("aot", "sft"):
        chosen = torch.tensor([-3.0, -5.0, -4.0])[own].requires_grad_()
        policy = pair_logps(chosen, [-5.0, -4.0, -4.5], own)
        reference = pair_logps(torch.zeros(3)[own], [0.0, -1.0, 0.5], own)
        args = config(folder, loss_type=name, beta=1.0)
        batch = GlobalBatch(args, Accelerator(cpu=True), has_router=False)
        pairs = batch.compared(policy, reference, weights=(), margins=None, is_uneven=True, is_training=True)
        loss = batch.mean(pairs, pairs.losses_of(pairs.terms(args)), None, is_uneven=True)
        loss.backward()
        assert chosen.grad is not None
        found[f"{name} of each_process"] = gather_object([loss.item()])
        found[f"gradients of {name}"] = gather_object((chosen.grad / WORLD).tolist())
    return found


def unexchanged(folder: Path) -> Any:
    """What two of the trainings log in 2 steps where each process gets its own numbers back for the others'."""
    plain = global_batch._of_all_processes
    global_batch._of_all_processes = lambda values, accelerator: torch.cat([values] * WORLD)
    try:
        table = {"batch_sorted": SORTING, "batch_routed": {"policy": mixture_of_experts, **ROUTED}}
        return {name: batch_loss(folder / name, **options, max_steps=2)["logs"] for name, options in table.items()}
    finally:
        global_batch._of_all_processes = plain


def pair_logps(chosen: Tensor, rejected: list[float], own: slice) -> PairLogps:
    """The log-probs of a process's own pairs; the chosen completions have 2, 3 and 1 tokens."""
    lengths = torch.tensor([2, 3, 1])[own]
    return PairLogps(
        chosen=chosen,
        rejected=torch.tensor(rejected)[own],
        chosen_lengths=lengths,
        rejected_lengths=lengths,
        chosen_likelihood=chosen,
    )


def without_the_first(features: list[dict[str, Any]]) -> dict[str, Any]:
    """A user's own collator, which leaves a row out where there are several."""
    return dict(DataCollatorForPreference(pad_token_id=0)(features[1:] or features))


def refused(folder: Path) -> Any:
    """What each process says to what would give several unlike batches, or another loss than the one that adds up."""
    if WORLD == 1:
        return None
    config_of_doge = DogeConfig(vocab_size=97, hidden_size=32, num_attention_heads=4, num_hidden_layers=2, is_moe=True)
    attempts: dict[str, Callable[[], Any]] = {
        "even_batches": lambda: make(folder, tiny_model(), accelerator_config={"even_batches": False}),
        "collator": lambda: make(
            folder, tiny_model(), data_collator=without_the_first, per_device_train_batch_size=2
        ).train(),
        "router": lambda: make(folder, DogeForCausalLM(config_of_doge), router_aux_loss_coef=0.1),
    }
    said = {}
    for name, attempt in attempts.items():
        try:
            attempt()
            message = "not refused"
        except ValueError as error:
            message = str(error)
        said[f"{name} of each_process"] = gather_object([message])
    return said


SCENARIOS: dict[str, Scenario] = {
    "by_hand": by_hand,
    "refused": refused,
    "unexchanged": unexchanged,
    "sharded_batch_sorted": partial(sharded, **SORTING),
    "sharded_batch_moments": partial(sharded, **MOMENTS, use_weighting=True),
    "sharded_batch_routed": partial(sharded, policy=mixture_of_experts, **ROUTED),
    "batch_sorted": partial(batch_loss, **SORTING),
    "batch_sorted_unpaired_of_a_stream": partial(
        batch_loss, loss_type="aot_unpaired", train_dataset=stream(9, table=rows(9))
    ),
    "batch_likelihood": partial(batch_loss, **LIKELIHOOD),
    "batch_likelihood_accumulated": partial(batch_loss, **LIKELIHOOD, gradient_accumulation_steps=2),
    "batch_orpo_of_lora": partial(batch_loss, policy=POLICIES["lora_fresh"], loss_type="orpo", reference="none"),
    "batch_cpo": partial(batch_loss, loss_type=["cpo", "aot"], learning_rate=0.1),
    "batch_moments": partial(batch_loss, **MOMENTS, use_weighting=True),
    "batch_moments_accumulated": partial(batch_loss, **MOMENTS, gradient_accumulation_steps=2),
    "batch_pair_values": partial(
        batch_loss,
        loss_type=["sigmoid", "sft"],
        use_weighting=True,
        train_dataset=rows(9).add_column("w", [2.0, 0.0, 0.5] * 3).add_column("m", [0.5, -1.0, 2.0] * 3),
        weight_column="w",
        margin_column="m",
    ),
    "batch_routed": partial(batch_loss, policy=mixture_of_experts, **ROUTED),
    "batch_routed_padded": partial(batch_loss, policy=mixture_of_experts, **ROUTED, layout="padded"),
    "batch_routed_packed": partial(
        batch_loss, policy=partial(mixture_of_experts, "qwen3_moe"), **ROUTED, **LIKELIHOOD, layout="packed"
    ),
    "batch_routed_of_a_stream": partial(
        batch_loss, policy=partial(mixture_of_experts, "gpt_oss"), **ROUTED, train_dataset=stream(9, table=rows(9))
    ),
}
