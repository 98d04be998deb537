"""The setting of a seed: a world, a start policy that learnt its texts, pairs, and the best possible policies.

All runs of a seed share it, so their differences are due to what they do. It is made once and kept in a folder: the
policy as transformers saves it, pairs as safetensors, numbers as JSON. The world is made again from its seed.
"""

import functools
import json
import shutil
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import LlamaForCausalLM, PreTrainedModel

from holdfast.demo.experiment import one_thread, sample_pairs
from holdfast.demo.frontier import Frontier, Optimum, frontier
from holdfast.demo.policy import Estimate, make_policy, measure, pretrain, text_logps
from holdfast.demo.world import Pairs, World, make_world


@dataclass(frozen=True, slots=True, kw_only=True)
class Scale:
    """How large an experiment: steps, pairs and texts; `betas` are those of the frontier's points."""

    name: str
    num_pretrain_steps: int
    num_train_steps: int
    num_pairs_per_step: int
    num_held_out_pairs: int
    num_measured_texts: int
    num_frontier_texts: int
    betas: tuple[float, ...]

    @property
    def num_pairs(self) -> int:
        """Pairs of one epoch, which is a whole run."""
        return self.num_train_steps * self.num_pairs_per_step


FULL = Scale(
    name="full",
    num_pretrain_steps=240,
    num_train_steps=100,
    num_pairs_per_step=64,
    num_held_out_pairs=2000,
    num_measured_texts=4000,
    num_frontier_texts=2000,
    betas=(
        8,
        5.6,
        4,
        2.8,
        2,
        1.7,
        1.4,
        1.2,
        1,
        0.85,
        0.7,
        0.6,
        0.5,
        0.42,
        0.35,
        0.3,
        0.25,
        0.21,
        0.18,
        0.14,
        0.1,
        0.07,
        0.05,
    ),
)
QUICK = Scale(
    name="quick",
    num_pretrain_steps=20,
    num_train_steps=6,
    num_pairs_per_step=16,
    num_held_out_pairs=100,
    num_measured_texts=200,
    num_frontier_texts=200,
    betas=(4, 1, 0.25),
)
"""For tests: everything happens, and no number means anything."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """What all runs of a seed have in common.

    `reference_margins` are those of the held-out pairs, nats: `log pi_ref(chosen) - log pi_ref(rejected)`.
    `best_accuracy` is the share of held-out pairs whose chosen text has the larger true reward, `wrong_share` that of
    those which the start policy ranks wrongly. `folder` has the store.
    """

    seed: int
    scale: Scale
    world: World
    policy: PreTrainedModel
    pairs: Pairs
    held_out: Pairs
    frontier: Frontier
    reference_margins: Tensor
    start_reward: float
    best_accuracy: float
    wrong_share: float
    folder: Path

    def optimum(self, beta: float) -> Optimum | None:
        """The optimal policy at this beta, if it is one of the frontier's points."""
        return next((optimum for optimum in self.frontier.optima if optimum.beta == beta), None)


def published_numbers(folder: Path) -> dict[str, Any]:
    """What a result file says of the setting in `folder`."""
    numbers = json.loads((folder / "numbers.json").read_text(encoding="utf-8"))
    optima = [
        {name: each[name]["value"] for name in ("reward", "kl", "log_partition")} | {"beta": each["beta"]}
        for each in numbers["optima"]
    ]
    return {name: numbers[name] for name in ("start_reward", "best_accuracy", "wrong_share")} | {"optima": optima}


def margins(policy: nn.Module, pairs: Pairs) -> Tensor:
    """`log pi(chosen) - log pi(rejected)` of each pair, nats, fp64."""
    return text_logps(policy, pairs.chosen) - text_logps(policy, pairs.rejected)


def true_margins(world: World, pairs: Pairs) -> Tensor:
    """`r(chosen) - r(rejected)` of each pair, nats, fp64."""
    return world.reward(pairs.chosen) - world.reward(pairs.rejected)


def better_first(world: World, pairs: Pairs) -> Pairs:
    """The pairs as they are labelled without mistakes: the text of the larger true reward is the chosen one."""
    is_right = (true_margins(world, pairs) >= 0)[:, None]
    return Pairs(
        chosen=torch.where(is_right, pairs.chosen, pairs.rejected),
        rejected=torch.where(is_right, pairs.rejected, pairs.chosen),
    )


@functools.cache
def setting(seed: int, scale: Scale, folder: Path) -> Setting:
    """The setting of `seed`: what is kept in `folder`, or made and kept there."""
    if not folder.exists():
        unfinished = folder.with_name(f"{folder.name}.unfinished")
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
        with one_thread():
            _make(seed, scale, unfinished)
        unfinished.rename(folder)
    numbers = json.loads((folder / "numbers.json").read_text(encoding="utf-8"))
    tensors = load_file(folder / "pairs.safetensors")
    policy = LlamaForCausalLM.from_pretrained(folder / "policy").eval()
    held_out = Pairs(chosen=tensors["held_out_chosen"], rejected=tensors["held_out_rejected"])
    return Setting(
        seed=seed,
        scale=scale,
        world=make_world(seed=seed),
        policy=policy,
        pairs=Pairs(chosen=tensors["chosen"], rejected=tensors["rejected"]),
        held_out=held_out,
        frontier=Frontier(optima=tuple(_optimum(each) for each in numbers["optima"])),
        reference_margins=margins(policy, held_out),
        start_reward=numbers["start_reward"],
        best_accuracy=numbers["best_accuracy"],
        wrong_share=numbers["wrong_share"],
        folder=folder,
    )


def _make(seed: int, scale: Scale, folder: Path) -> None:
    """Writes the setting's files; the seconds of the processor that it took are among them."""
    started = time.process_time()
    generator = torch.Generator().manual_seed(seed)
    world = make_world(seed=seed)
    policy = make_policy(world, seed=seed)
    pretrain(policy, world, num_steps=scale.num_pretrain_steps, generator=generator)
    pairs = sample_pairs(policy, world, scale.num_pairs, generator)
    held_out = sample_pairs(policy, world, scale.num_held_out_pairs, generator)
    start = measure(policy, policy, world, num_texts=scale.num_measured_texts, generator=generator)
    optima = frontier(policy, world, scale.betas, num_texts=scale.num_frontier_texts, generator=generator)
    true_margins = world.reward(held_out.chosen) - world.reward(held_out.rejected)
    policy.save_pretrained(folder / "policy")
    tensors = {
        "chosen": pairs.chosen, "rejected": pairs.rejected,
        "held_out_chosen": held_out.chosen, "held_out_rejected": held_out.rejected,
    }  # fmt: skip
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "pairs.safetensors")
    numbers = {
        "start_reward": start.reward.value,
        "best_accuracy": float((true_margins > 0).double().mean()),
        "wrong_share": float((margins(policy, held_out) < 0).double().mean()),
        "optima": [asdict(optimum) for optimum in optima.optima],
        "cpu_seconds": round(time.process_time() - started, 1),
    }
    (folder / "numbers.json").write_text(json.dumps(numbers), encoding="utf-8")


def _optimum(numbers: dict[str, Any]) -> Optimum:
    read: dict[str, Any] = {
        name: Estimate(**each) if isinstance(each, dict) else each for name, each in numbers.items()
    }
    return Optimum(**read)
