"""Trainings whose loss is a function of the whole batch, not a mean of one number per pair: a row each.

A run of N processes must see the pairs of all of them as one process sees its batch of `GLOBAL_BATCH`. 9 rows make a
last batch of one real pair, so all but one process have nothing real there. The evaluation is in batches of
`GLOBAL_BATCH` too, the last one of one pair, and by source, of which a process may have no row.
"""

from functools import partial
from pathlib import Path
from typing import Any

from datasets import Dataset
from scenarios import GLOBAL_BATCH, WORLD, Scenario, held_out_rows, make, stream, trained

from families import tiny_model
from policies import POLICIES, rows

SORTING = {"loss_type": ["aot", "aot_unpaired"], "loss_weights": [1.0, 0.5], "label_smoothing": 0.1}
LIKELIHOOD = {"loss_type": ["sigmoid", "sft"], "ld_alpha": 0.4, "use_weighting": True}
ROUTED = {"router_aux_loss_coef": 0.5}


def shared_rows() -> Dataset:
    """9 rows, of which the first has the last one's prompt, and its chosen completion too: so the filler that stands in
    a row of tokens with the last pair has a prompt and a completion of its own and of that pair."""
    table = rows(9).to_list()
    table[0] |= {"prompt_ids": table[8]["prompt_ids"], "chosen_ids": table[8]["chosen_ids"]}
    return Dataset.from_list(table)


def batch_loss(folder: Path, policy: Any = tiny_model, **options: Any) -> Any:
    """4 steps of a first epoch of 9 rows and a second one; an evaluation of 5 rows after 2 steps and at the end."""
    held_out = held_out_rows(5).add_column("source", ["a", "b", "a", "a", "b"])
    steps = options.get("gradient_accumulation_steps", 1)
    evaluation = {"eval_strategy": "steps", "eval_steps": 2, "per_device_eval_batch_size": GLOBAL_BATCH // WORLD}
    options = {"train_dataset": shared_rows(), "eval_dataset": held_out, "max_steps": 5 // steps} | evaluation | options
    options["train_sampling_strategy"] = "sequential"  # so the first rows are the fillers of the last batch
    if "reference" not in options:
        options["ref_model"] = tiny_model(seed=5)
    return trained(make(folder, policy(), **options), folder)


def mixture_of_experts(family: str = "mixtral") -> Any:
    """A tiny model with routers."""
    return tiny_model(family)


SCENARIOS: dict[str, Scenario] = {
    "batch_sorted": partial(batch_loss, **SORTING),
    "batch_sorted_unpaired_of_a_stream": partial(
        batch_loss, loss_type="aot_unpaired", train_dataset=stream(9, table=rows(9))
    ),
    "batch_likelihood": partial(batch_loss, **LIKELIHOOD),
    "batch_likelihood_accumulated": partial(batch_loss, **LIKELIHOOD, gradient_accumulation_steps=2),
    "batch_orpo_of_lora": partial(batch_loss, policy=POLICIES["lora_fresh"], loss_type="orpo", reference="none"),
    "batch_cpo": partial(batch_loss, loss_type=["cpo", "aot"], learning_rate=0.1),
    "batch_routed": partial(batch_loss, policy=mixture_of_experts, **ROUTED),
    "batch_routed_padded": partial(batch_loss, policy=mixture_of_experts, **ROUTED, layout="padded"),
    "batch_routed_packed": partial(
        batch_loss, policy=partial(mixture_of_experts, "qwen3_moe"), **ROUTED, **LIKELIHOOD, layout="packed"
    ),
    "batch_routed_of_a_stream": partial(
        batch_loss, policy=partial(mixture_of_experts, "gpt_oss"), **ROUTED, train_dataset=stream(9, table=rows(9))
    ),
}
