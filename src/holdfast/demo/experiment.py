"""The controlled experiment of the DPO paper in miniature: one start policy, one set of pairs, five ways to anchor.

All arms train the same LoRA of the same start policy on the same pairs in the same order, so that the only difference
is where `log pi_ref` comes from; the three ways to hold a fixed reference must then give the same run, number for
number. The pairs are seen once. Given up: sweeps over beta and error bars over seeds, which would take more than three
minutes; `run_demo(seed=...)` repeats all of it in another world.
"""

import copy
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from types import MappingProxyType
from typing import Any, final

import torch
from datasets import Dataset, are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
from peft import LoraConfig
from rich.console import Console
from torch import Tensor, nn
from transformers import PreTrainedModel, PrinterCallback, TrainerCallback

from holdfast import interruption
from holdfast.config import DPOConfig
from holdfast.demo.checks import check_all
from holdfast.demo.frontier import Frontier, Optimum, frontier, optimal_policy
from holdfast.demo.plot import plot_frontier
from holdfast.demo.policy import (
    Estimate,
    make_policy,
    measure,
    preference_accuracy,
    pretrain,
    sample_texts,
    text_logps,
)
from holdfast.demo.progress import Stage, StageProgress
from holdfast.demo.results import ArmResult, DemoResult, Waypoint
from holdfast.demo.table import print_result
from holdfast.demo.world import Pairs, World, make_tokenizer, make_world
from holdfast.reference.base import num_bytes
from holdfast.trainer import DPOTrainer

BETA = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Arm:
    """One way to anchor the policy: `reference` of `DPOConfig`, and further settings of it."""

    name: str
    label: str
    reference: str
    settings: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))

    @property
    def has_reference(self) -> bool:
        return self.reference != "none"


@dataclass(frozen=True, slots=True, kw_only=True)
class Scale:
    """How large an experiment: steps, pairs and texts."""

    num_pretrain_steps: int
    num_train_steps: int
    num_pairs_per_step: int
    num_sync_steps: int
    num_held_out_pairs: int
    num_measured_texts: int
    num_frontier_texts: int
    waypoint_fractions: tuple[float, ...]
    betas: tuple[float, ...]


FULL = Scale(
    num_pretrain_steps=240,
    num_train_steps=160,
    num_pairs_per_step=64,
    num_sync_steps=40,
    num_held_out_pairs=2000,
    num_measured_texts=4000,
    num_frontier_texts=4000,
    waypoint_fractions=(0.05, 0.15, 0.35, 0.65),
    betas=(8, 4, 2.5, 1.8, 1.35, 1, 0.8, 0.65, 0.5, 0.4, 0.3, 0.2, 0.1, 0.05),
)
QUICK = Scale(
    num_pretrain_steps=60,
    num_train_steps=32,
    num_pairs_per_step=32,
    num_sync_steps=8,
    num_held_out_pairs=500,
    num_measured_texts=1000,
    num_frontier_texts=1000,
    waypoint_fractions=(0.5,),
    betas=(4, 2, 1, 0.5, 0.2),
)


def arms(scale: Scale) -> tuple[Arm, ...]:
    """The four references, and none at all."""
    sync = {"sync_ref_model": True, "ref_model_mixup_alpha": 0.6, "ref_model_sync_steps": scale.num_sync_steps}
    # CPO without its NLL term is DPO's loss with a uniform reference: same pairs, same beta, no anchor.
    unanchored = {"loss_type": "cpo", "cpo_alpha": 0.0}
    return (
        Arm(name="model", label="a second model", reference="model"),
        Arm(name="adapter", label="the policy, adapter off", reference="adapter"),
        Arm(name="precomputed", label="precomputed log-probs", reference="precomputed"),
        Arm(name="tr-dpo", label="a moving model (TR-DPO)", reference="model", settings=MappingProxyType(sync)),
        Arm(name="none", label="none (uniform)", reference="none", settings=MappingProxyType(unanchored)),
    )


def run_demo(output_dir: Path, *, seed: int = 0, quick: bool = False, console: Console | None = None) -> DemoResult:
    """Runs the experiment, prints its table and verdict, and returns everything found.

    Writes `results.json`, `table.txt` and `frontier.png` into `output_dir`, which is made where missing. `quick` is a
    smaller experiment of some seconds, for tests. The exit code to use is `result.exit_code`.
    """
    started = time.perf_counter()
    console = console or Console()
    scale = QUICK if quick else FULL
    output_dir.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(seed)
    world = make_world(seed=seed)
    all_arms = arms(scale)
    learning, bounding, *training = stages = _stages(scale, all_arms)
    with one_thread(), TemporaryDirectory() as checkpoints, StageProgress(console, stages) as progress:
        policy = make_policy(world, seed=seed)
        pretrain(
            policy, world, num_steps=scale.num_pretrain_steps, generator=generator, on_step=progress.advancing(learning)
        )
        pairs = sample_pairs(policy, world, scale.num_train_steps * scale.num_pairs_per_step, generator)
        held_out = sample_pairs(policy, world, scale.num_held_out_pairs, generator)
        start = measure(policy, policy, world, num_texts=scale.num_measured_texts, generator=generator)
        optima, target = _optima(policy, world, scale, generator, progress.advancing(bounding))
        results = tuple(
            train_arm(
                world, policy, pairs, held_out, arm=arm, scale=scale, seed=seed,
                output_dir=Path(checkpoints), on_step=progress.advancing(stage),
            )
            for arm, stage in zip(all_arms, training, strict=True)
        )  # fmt: skip
    true_margins = world.reward(held_out.chosen) - world.reward(held_out.rejected)
    texts = world.source.sample(scale.num_measured_texts, generator)
    result = DemoResult(
        seed=seed,
        beta=BETA,
        start=start,
        source_fluency=Estimate.of(world.source.token_logps(texts).mean(1)),
        best_accuracy=Estimate.of((true_margins > 0).double()),
        arms=results,
        target=target,
        frontier=optima,
        checks=check_all(results, optima),
        seconds=time.perf_counter() - started,
        output_dir=output_dir,
    )
    with interruption.waiting():
        result.write_json(output_dir / "results.json")
        plot_frontier(result, output_dir / "frontier.png")
        print_result(result, console, output_dir / "table.txt")
        interruption.finished()
    return result


def sample_pairs(policy: nn.Module, world: World, num_pairs: int, generator: torch.Generator) -> Pairs:
    """Pairs of different texts that the policy wrote, labelled by the world's reward. ValueError where it writes one
    text alone."""
    num_drawn = num_pairs + num_pairs // 20 + 20  # a few pairs are of one text twice; of a narrow policy many are
    drawn: list[Tensor] = []
    while sum(map(len, drawn)) < num_pairs:
        texts = sample_texts(policy, num_texts=2 * num_drawn, length=world.source.length, generator=generator)
        pairs = torch.stack(texts.chunk(2), dim=1)
        drawn.append(pairs[(pairs[:, 0] != pairs[:, 1]).any(1)])
        if not len(drawn[-1]):
            raise ValueError(
                f"pairs of different texts were to be drawn, but {num_drawn} draws gave one text twice each."
            )
    first, second = torch.cat(drawn)[:num_pairs].unbind(1)
    return world.label(first, second, generator)


def train_arm(
    world: World,
    policy: PreTrainedModel,
    pairs: Pairs,
    held_out: Pairs,
    *,
    arm: Arm,
    scale: Scale,
    seed: int,
    output_dir: Path,
    on_step: Callable[[], None] = lambda: None,
) -> ArmResult:
    """The run that trains a fresh LoRA of a copy of `policy` on `pairs`, anchored as `arm` says."""
    observer = _Observer(world, policy, scale, seed, on_step)
    started = time.perf_counter()
    with quiet():
        trainer = DPOTrainer(
            model=copy.deepcopy(policy),
            args=DPOConfig(**_training_settings(arm, scale, seed, output_dir)),
            train_dataset=Dataset.from_dict(pairs.rows()),
            processing_class=make_tokenizer(world.source.vocabulary_size),
            peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"),
            callbacks=[observer],
        )
    trainer.remove_callback(PrinterCallback)
    num_reference_bytes = num_bytes(trainer.reference) if trainer.reference is not None else 0
    trainer.train()
    interruption.at_once()
    seconds = time.perf_counter() - started - observer.seconds

    generator = torch.Generator().manual_seed(seed + 1)
    return ArmResult(
        name=arm.name,
        label=arm.label,
        measurement=measure(trainer.model, policy, world, num_texts=scale.num_measured_texts, generator=generator),
        # Without a reference the implicit reward is the log-prob itself: its reference is the uniform policy.
        accuracy=preference_accuracy(trainer.model, policy if arm.has_reference else None, held_out),
        num_reference_bytes=num_reference_bytes,
        seconds=seconds,
        losses=tuple(entry["loss"] for entry in trainer.state.log_history if "loss" in entry),
        waypoints=tuple(observer.waypoints),
        held_out_logps=tuple(text_logps(trainer.model, torch.cat((held_out.chosen, held_out.rejected))).tolist()),
    )


@final
class _Observer(TrainerCallback):
    """Advances the progress bar, and measures the policy at a few steps. `seconds` is the time that measuring took."""

    def __init__(self, world: World, start: nn.Module, scale: Scale, seed: int, on_step: Callable[[], None]) -> None:
        self.world, self.start, self.scale, self.seed, self.on_step = world, start, scale, seed, on_step
        self.steps = {max(1, round(fraction * scale.num_train_steps)) for fraction in scale.waypoint_fractions}
        self.waypoints: list[Waypoint] = []
        self.seconds = 0.0

    def on_step_end(self, args: Any, state: Any, control: Any, *, model: nn.Module, **kwargs: Any) -> None:
        self.on_step()
        if state.global_step not in self.steps:
            return
        started = time.perf_counter()
        generator = torch.Generator().manual_seed(self.seed + 1)
        num_texts = self.scale.num_measured_texts // 4
        measurement = measure(model, self.start, self.world, num_texts=num_texts, generator=generator)
        self.waypoints.append(Waypoint(step=state.global_step, measurement=measurement))
        self.seconds += time.perf_counter() - started


def _training_settings(arm: Arm, scale: Scale, seed: int, output_dir: Path) -> dict[str, Any]:
    """The fields of one arm's `DPOConfig`: the same for all arms, and the arm's own."""
    return {
        "output_dir": str(output_dir / arm.name),
        "reference": arm.reference,
        "beta": BETA,
        "learning_rate": 5e-3,
        "lr_scheduler_type": "linear",
        "warmup_steps": scale.num_train_steps // 20,
        "per_device_train_batch_size": scale.num_pairs_per_step,
        "num_train_epochs": 1,
        "precompute_ref_batch_size": scale.num_pairs_per_step,
        "max_grad_norm": 1.0,
        "gradient_checkpointing": False,
        "logging_steps": 5,
        "logging_first_step": True,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "run_record": False,
        "use_cpu": True,
        "bf16": False,
        "seed": seed,
        **({"reference_store": str(output_dir / "store")} if arm.reference == "precomputed" else {}),
        **arm.settings,
    }


@contextmanager
def one_thread() -> Iterator[None]:
    """A context with one torch thread. Matrices this small gain nothing from a second one, and wait for it where
    another program has the core."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(num_threads)


@contextmanager
def quiet() -> Iterator[None]:
    """A context without output that would tear progress bars of one's own: those of `datasets`, and a warning about
    peft."""
    was_off = are_progress_bars_disabled()
    disable_progress_bars()
    try:
        with warnings.catch_warnings():
            # peft reads the name that transformers 5.0 has; later versions rename it. To go when peft has followed.
            warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
            yield
    finally:
        if not was_off:
            enable_progress_bars()


def _optima(
    policy: nn.Module, world: World, scale: Scale, generator: torch.Generator, on_step: Callable[[], None]
) -> tuple[Frontier, Optimum]:
    """The frontier over the betas of `scale`, and the optimum at the beta that the arms train with."""
    num_texts = scale.num_frontier_texts
    optima = frontier(policy, world, scale.betas, num_texts=num_texts, generator=generator, on_step=on_step)
    target = optimal_policy(policy, world, BETA, num_texts=num_texts, generator=generator)
    on_step()
    return optima, target


def _stages(scale: Scale, all_arms: tuple[Arm, ...]) -> tuple[Stage, ...]:
    """What the progress bars show."""
    return (
        Stage(name="the start policy learns the source", num_steps=scale.num_pretrain_steps, typical_seconds=10),
        Stage(name="the frontier of optimal policies", num_steps=len(scale.betas) + 1, typical_seconds=4),
        *(
            Stage(name=f"DPO against {arm.label}", num_steps=scale.num_train_steps, typical_seconds=10)
            for arm in all_arms
        ),
    )
