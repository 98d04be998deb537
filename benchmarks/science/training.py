"""A run, as a user would start it with `DPOTrainer`, and what is measured of the policy that comes out.

All weights are trained, in one pass over the pairs, in the same order in all runs of a seed. The reference's log-probs
come from the setting's store, unless `options` ask for another reference. Given up: a search for the best learning
rate of each loss.
"""

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, cast

import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import PreTrainedModel, PrinterCallback, TrainerCallback

from holdfast import DPOConfig, DPOTrainer
from holdfast.demo.experiment import one_thread, quiet
from holdfast.demo.policy import measure
from holdfast.demo.world import Pairs, make_tokenizer
from science.settings import Setting, margins

Numbers = dict[str, float]


def trained_and_measured(setting: Setting, options: Mapping[str, Any]) -> Numbers:
    """What is measured of the start policy trained on the setting's pairs with these options of `DPOConfig`."""
    return measured(train(setting, setting.pairs, options), setting, beta=options.get("beta"))


def train(
    setting: Setting,
    pairs: Pairs,
    options: Mapping[str, Any],
    *,
    start: PreTrainedModel | None = None,
    ref_model: PreTrainedModel | str | None = None,
    columns: Mapping[str, Sequence[float]] | None = None,
    callbacks: Sequence[TrainerCallback] = (),
) -> PreTrainedModel:
    """The policy after one pass over `pairs`, with these options of `DPOConfig` over those that all runs share.

    `start` is the policy to train, of which a copy is made (default: the setting's own); `ref_model` as in
    `DPOTrainer`; `columns` are further columns of the data.
    """
    with TemporaryDirectory() as output_dir, quiet(), one_thread():
        rows = {**pairs.rows(), **{name: list(values) for name, values in (columns or {}).items()}}
        trainer = DPOTrainer(
            model=copy.deepcopy(setting.policy if start is None else start),
            ref_model=ref_model,
            args=DPOConfig(**{**_shared_options(setting, len(pairs.chosen), Path(output_dir)), **options}),
            train_dataset=Dataset.from_dict(rows),
            processing_class=make_tokenizer(setting.world.source.vocabulary_size),
            callbacks=list(callbacks),
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    return cast("PreTrainedModel", trainer.model).eval()


def fill_store(setting: Setting) -> None:
    """Scores the setting's pairs under its start policy into its store, all of them in one process.

    Runs at the same time would share this work, and which of them scores which texts would be up to chance: batches of
    other texts round differently.
    """
    with TemporaryDirectory() as output_dir, quiet(), one_thread():
        DPOTrainer(
            model=copy.deepcopy(setting.policy),
            args=DPOConfig(**_shared_options(setting, len(setting.pairs.chosen), Path(output_dir))),
            train_dataset=Dataset.from_dict(setting.pairs.rows()),
            processing_class=make_tokenizer(setting.world.source.vocabulary_size),
        )


def _shared_options(setting: Setting, num_pairs: int, output_dir: Path) -> dict[str, Any]:
    num_steps = -(-num_pairs // setting.scale.num_pairs_per_step)
    return {
        "output_dir": str(output_dir),
        "reference": "precomputed",
        "reference_store": str(setting.folder / "store"),
        "precompute_ref_batch_size": 512,
        "beta": 1.0,
        "learning_rate": 1e-3,
        "lr_scheduler_type": "linear",
        "warmup_steps": max(1, num_steps // 20),
        "per_device_train_batch_size": setting.scale.num_pairs_per_step,
        "num_train_epochs": 1,
        "max_grad_norm": 1.0,
        "gradient_checkpointing": False,
        "logging_steps": 1000,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "run_record": False,
        "use_cpu": True,
        "bf16": False,
        "seed": setting.seed,
    }


def measured(policy: nn.Module, setting: Setting, *, beta: float | None = None) -> Numbers:
    """What is known of a policy. KL is to the start policy, per text; nats throughout.

    - `reward`, `kl`, `fluency`: of texts that the policy writes; `reward_error`, `kl_error` their standard errors;
    - `below`: how far the reward is below the largest that a policy with this KL can have;
    - `accuracy`: the share of held-out pairs whose chosen text has the larger implicit reward `log pi - log pi_ref`;
    - `ranking`: that has the larger log-prob;
    - `flipped`: the share of the held-out pairs that the start policy ranks wrongly, and this policy rightly;
    - `unflipped`: of those that the start policy ranks rightly, the share that this policy ranks wrongly;
    - `to_optimum`, where the frontier has a point at `beta`: `KL(pi || pi*_beta)`, which is `KL(pi || pi_ref) -
      E[r] / beta + log Z`.
    """
    with one_thread():
        generator = torch.Generator().manual_seed(setting.seed + 1)
        found = measure(
            policy, setting.policy, setting.world, num_texts=setting.scale.num_measured_texts, generator=generator
        )
        own, reference = margins(policy, setting.held_out), setting.reference_margins
    reward, kl = found.reward.value, found.kl.value
    numbers = {
        "reward": reward,
        "reward_error": found.reward.error,
        "kl": kl,
        "kl_error": found.kl.error,
        "fluency": found.fluency.value,
        "below": setting.frontier.reward_ceiling(kl).value - reward,
        "accuracy": _share(own > reference),
        "ranking": _share(own > 0),
        "flipped": _share(own[reference < 0] > 0),
        "unflipped": _share(own[reference > 0] < 0),
    }
    optimum = None if beta is None else setting.optimum(beta)
    if optimum is not None:
        numbers["to_optimum"] = kl - reward / optimum.beta + optimum.log_partition.value
    return numbers


def _share(is_so: Tensor) -> float:
    return float(is_so.double().mean())
