"""What one process and two must agree on: each scenario is run by every process, and gives numbers for a JSON file.

A global batch is always `GLOBAL_BATCH` pairs, so N processes of `GLOBAL_BATCH / N` see the same rows in the same steps.
What differs between processes by nature is under names that end in `each_process`.
"""

import contextlib
import logging
import os
import signal
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate.utils import gather_object
from datasets import Dataset, IterableDataset, load_dataset
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from torch import nn
from transformers import TrainerCallback

from families import tiny_model
from holdfast import DataCollatorForPreference, DPOTrainer, Reference, WinRateCallback, interruption
from holdfast.checkpoint.folder import complete_checkpoints
from holdfast.checkpoint.provenance import dataset_digest
from holdfast.data.mixing.mixture import mix
from holdfast.reference.identity.digests import digest
from holdfast.store.store import LogpStore
from holdfast.training import interruption as interruption_of_training
from masked_rows import masked_data
from naive import logp
from policies import POLICIES, config, logged, rows, trainer

GLOBAL_BATCH = 4
RANK, WORLD = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))

PARTS = {"train_dataset", "eval_dataset", "ref_model", "compute_metrics", "data_collator", "callbacks"}
"""Arguments of the trainer; the other options are the config's."""

Scenario = Callable[[Path], Any]


def make(folder: Path, policy: nn.Module, **options: Any) -> DPOTrainer:
    """A trainer whose global batch is `GLOBAL_BATCH` pairs; evaluation is in batches of 2 on every process."""
    parts = {name: options.pop(name) for name in PARTS & options.keys()}
    steps = options.get("gradient_accumulation_steps", 1)
    defaults = {
        "per_device_train_batch_size": GLOBAL_BATCH // WORLD // steps,
        "per_device_eval_batch_size": 2,
        "max_steps": 3,
        "seed": 3,
    }
    return trainer(policy, config(folder, **defaults | options), **parts)


def trained(ours: DPOTrainer, folder: Path, **train_options: Any) -> dict[str, Any]:
    """The logs of a run, the weights it ends with (in a file), and what each process saw of it."""
    losses: list[float] = []
    plain = ours.compute_loss

    def recorded(*args: Any, **kwargs: Any) -> Any:
        loss = plain(*args, **kwargs)
        losses.append(float(loss))
        return loss

    ours.compute_loss = recorded
    ours.train(**train_options)
    weights = {name: p.detach().clone() for name, p in ours.model.named_parameters() if p.requires_grad}
    if ours.ref_model is not None:
        weights |= {f"ref.{name}": p.detach().clone() for name, p in ours.ref_model.named_parameters()}
    if RANK == 0:
        save_file(weights, folder / "weights.safetensors")
    unlike = ("runtime", "per_second", "flos", "memory")
    return {
        "logs": [
            {k: v for k, v in entry.items() if not any(part in k for part in unlike)}
            for entry in ours.state.log_history
        ],
        "losses": logged(ours),
        "first_loss_of_each_process": gather_object([losses[0]]),
        "weights_of_each_process": gather_object([digest(weights.items())]),
    }


def evaluated(metrics: dict[str, float]) -> dict[str, float]:
    """Metrics without those that measure time."""
    return {name: value for name, value in metrics.items() if "per_second" not in name and "time" not in name}


def held_out_rows(num_rows: int) -> Dataset:
    """The first of the rows to evaluate on."""
    return rows(8, seed=5).select(range(num_rows))


def stream(num_rows: int, num_shards: int = 1, table: Dataset | None = None) -> IterableDataset:
    """The rows of `table` (default: those to evaluate on) as a stream, in shards of unequal lengths."""
    table = (table or held_out_rows(num_rows)).to_list()
    cuts = [*range(len(table) - num_shards + 1, len(table)), len(table)]
    shards = [table[start:stop] for start, stop in zip([0, *cuts], cuts, strict=False)]

    def generate(shards: list[list[dict[str, Any]]]) -> Iterator[dict[str, Any]]:
        for shard in shards:
            yield from shard

    made = IterableDataset.from_generator(generate, gen_kwargs={"shards": shards})
    assert made.num_shards == num_shards
    return made


# --- training -------------------------------------------------------------------------------------------------------


def train_whole_epochs(folder: Path) -> Any:
    """12 rows are 3 batches of 4; evaluated on 5 rows at the end."""
    return trained(
        make(folder, tiny_model(), eval_dataset=rows(5, seed=1), eval_strategy="steps", eval_steps=3), folder
    )


def train_uneven_epochs(folder: Path, **reference: Any) -> Any:
    """9 rows: the last batch of both epochs has one pair, so with two processes one of them has nothing real."""
    options = {"max_steps": 6, "logging_steps": 2, "eval_strategy": "steps", "eval_steps": 4} | reference
    return trained(make(folder, tiny_model(), train_dataset=rows(9), eval_dataset=rows(5, seed=1), **options), folder)


def train_with_accumulation(folder: Path, **reference: Any) -> Any:
    """7 rows in micro-batches of 2, two to a step: the last step has a full micro-batch and one of one pair."""
    options = {"gradient_accumulation_steps": 2, "max_steps": 4} | reference
    return trained(make(folder, tiny_model(), train_dataset=rows(7), **options), folder)


def train_with_checkpointing(folder: Path) -> Any:
    """Activations recomputed in the backward pass, under DDP's gradient hooks."""
    return trained(make(folder, POLICIES["lora_fresh"](), activation_checkpointing=True), folder)


def evaluated_first(folder: Path) -> Any:
    """Evaluated before it trains: accelerate must wrap the policy in DDP all the same. In bf16 as well, where it has
    wrapped the forward pass for the evaluation."""
    found: dict[str, Any] = {}
    for name, options in {"bf16": {"bf16": True, "max_steps": 1}, "fp32": {}}.items():
        ours = make(folder, tiny_model(), eval_dataset=rows(5, seed=1), **options)
        found[f"{name} at first"] = evaluated(ours.evaluate())
        found[name] = trained(ours, folder)
        if WORLD > 1:
            assert type(ours.model_wrapped).__name__ == "DistributedDataParallel"
    of_bf16 = {key: found.pop(key) for key in ("bf16", "bf16 at first")}
    return found.pop("fp32") | found | {"bf16 of each_process": of_bf16}


def _from_reference(kind: str, **options: Any) -> Scenario:
    def run(folder: Path) -> Any:
        return trained(make(folder, POLICIES[kind](), **options), folder)

    return run


def reference_chosen(folder: Path) -> Any:
    """Another model as the reference; its measured gap is said once, by one process."""
    with recorded_warnings("holdfast.training.run_watch") as said:
        found = trained(make(folder, tiny_model(), ref_model=tiny_model(seed=5)), folder)
    return found | {
        "said_by_each_process": gather_object([sum("it differs from the policy by" in line for line in said)])
    }


def weights_in_half(folder: Path, **options: Any) -> Any:
    """Weights as files in bf16 have them, but one; evaluated, and saved while they are held."""
    policy = POLICIES["lora_sft"]()
    for name, parameter in policy.named_parameters():
        if "embed" not in name and "down_proj" not in name:
            parameter.data = parameter.data.bfloat16().float()
    before = digest((name, p) for name, p in policy.named_parameters() if not p.requires_grad)
    saving = {"save_strategy": "steps", "save_steps": 2, "eval_strategy": "steps", "eval_steps": 2}
    ours = make(folder, policy, bf16=True, eval_dataset=held_out_rows(4), **saving, **options)
    dtypes: list[int] = []

    class Looks(TrainerCallback):
        def on_step_end(self, *_: Any, model: Any = None, **__: Any) -> None:
            dtypes.append(sum(p.dtype == torch.bfloat16 for p in policy.parameters()))

    ours.add_callback(Looks())
    found = trained(ours, folder)
    after = digest((name, p) for name, p in ours.model.named_parameters() if not p.requires_grad)
    assert after == before
    assert dtypes == [0 if options else 15 if WORLD == 1 else 13] * 3
    return found


def unlike_beginnings(folder: Path) -> Any:
    """Every process makes another model, and another ref_model; DDP trains the first process's."""
    return trained(make(folder, tiny_model(seed=RANK), ref_model=tiny_model(seed=5 + RANK)), folder)


def unlike_beginnings_captured(folder: Path) -> Any:
    """The same with the policy as its reference, which must be what DDP trains; precomputed, as no module shows it."""
    return trained(make(folder, tiny_model(seed=RANK), reference="precomputed"), folder)


def unlike_adapters(folder: Path) -> Any:
    """An adapter drawn without a seed, as a script does that calls `get_peft_model` itself."""
    torch.manual_seed(RANK)
    policy = get_peft_model(tiny_model(), LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False))
    return trained(make(folder, policy), folder)


def resumed(folder: Path, train_dataset: Dataset | None = None, **reference: Any) -> Any:
    """Stopped after 2 of 4 steps and resumed in a new trainer."""
    saving = {"save_strategy": "steps", "save_steps": 2}
    options = reference | saving | {"optim": "adamw_torch", "learning_rate": 0.01, "max_steps": 4}
    options["train_dataset"] = rows(10) if train_dataset is None else train_dataset
    whole = trained(make(folder / "whole", POLICIES["lora_sft"](), **options), folder)
    make(folder / "parts", POLICIES["lora_sft"](), **options | {"max_steps": 2}).train()
    (folder / "again").mkdir(exist_ok=True)
    again = make(folder / "parts", POLICIES["lora_sft"](), **options)
    parts = trained(again, folder / "again", resume_from_checkpoint=True)
    return whole | {"resumed": parts}


def asked_to_end(folder: Path) -> Any:
    """The last process gets SIGTERM within a step, and in another run within an evaluation; a new trainer goes on, and
    begins with the evaluation. The checkpoint is between two logs."""
    interruption_of_training.PREDICTIONS_BETWEEN = 1
    options = {"optim": "adamw_torch", "learning_rate": 0.01, "max_steps": 4, "logging_steps": 3, "eval_steps": 2}
    options |= {"eval_strategy": "steps", "eval_dataset": held_out_rows(8), "train_dataset": rows(10)}
    whole = trained(make(folder / "whole", POLICIES["lora_sft"](), **options), folder)
    found: dict[str, Any] = {}
    for event in ("on_step_begin", "on_evaluate_batch"):
        ours = make(folder / event, POLICIES["lora_sft"](), **options)
        ours.add_callback(_Signal(event))
        code = None
        try:
            ours.train()
        except SystemExit as end:
            code = end.code
        complete = [path.name for path in complete_checkpoints(folder / event)]
        ended = gather_object([[code, ours.state.global_step, complete]])
        (folder / f"{event} again").mkdir(exist_ok=True)
        again = make(folder / event, POLICIES["lora_sft"](), **options)
        again = trained(again, folder / f"{event} again", resume_from_checkpoint=True)
        found[event] = {"ended_each_process": ended, "resumed": again}
    return whole | found


class _Signal(TrainerCallback):
    """Sends the last process SIGTERM in its second step, or in the evaluation after that."""

    def __init__(self, event: str) -> None:
        self.event = event

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """See `transformers.TrainerCallback`."""
        if self.event == "on_step_begin" and state.global_step == 1:
            self._send()

    def on_prediction_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """See `transformers.TrainerCallback`."""
        if self.event == "on_evaluate_batch" and state.global_step == 2:
            self._send()

    def _send(self) -> None:
        if RANK == WORLD - 1 and not interruption.is_asked():
            os.kill(os.getpid(), signal.SIGTERM)


def resumed_given(folder: Path) -> Any:
    """The same, with the reference's sums in the dataset's own columns, obtained from one row at a time."""
    table, policy = rows(10), POLICIES["lora_sft"]().eval()
    with torch.no_grad():
        for side in ("chosen", "rejected"):
            sums = [float(logp(policy, row, f"{side}_ids")) for row in table.to_list()]
            table = table.add_column(f"ref_{side}_logps", sums)
    found = resumed(folder, train_dataset=table, reference="precomputed")
    kinds = gather_object([make(folder, policy, train_dataset=table, reference="precomputed").reference.kind])
    return found | {"kind_of_each_process": kinds}


def checkpoint_order(folder: Path) -> Any:
    """The second process is slow to write its part of a checkpoint; the manifest says that all of it is there."""
    ours = make(folder, tiny_model(), save_strategy="steps", save_steps=1, max_steps=1)
    plain = ours._save_rng_state

    def slow(output_dir: str) -> None:
        time.sleep(0.3 * RANK)
        plain(output_dir)

    ours._save_rng_state = slow
    ours.train()
    if dist.is_initialized():
        dist.barrier()
    written = {path.name: path.stat().st_mtime for path in sorted((folder / "checkpoint-1").rglob("*"))}
    return {"written_by_each_process": {name: when for name, when in written.items() if "rng" in name or "man" in name}}


def train_stream(folder: Path, num_shards: int = 1, **reference: Any) -> Any:
    """10 rows, streamed: batches of 4, 4 and 2, then from the start again."""
    options = {"max_steps": 4, "eval_strategy": "steps", "eval_steps": 2, "eval_dataset": stream(5)} | reference
    return trained(make(folder, tiny_model(), train_dataset=stream(10, num_shards, table=rows(10)), **options), folder)


def train_stream_in_shards(folder: Path) -> Any:
    """The same from shards of 8, 1 and 1 rows."""
    return train_stream(folder, num_shards=3)


def train_masked_stream(folder: Path) -> Any:
    """9 rows of which only some tokens are scored, under LD-DPO; the fillers of the last batch are masked as well."""
    table = masked_data()
    options = {"max_steps": 4, "ld_alpha": 0.4, "train_dataset": stream(9, table=table), "eval_dataset": table}
    return trained(make(folder, tiny_model(), eval_strategy="steps", eval_steps=2, **options), folder)


# --- references -----------------------------------------------------------------------------------------------------


def precomputed_values(folder: Path) -> Any:
    """What every process scores of 5 and 1 rows, and finds when they were prepared, without asking again."""
    held_out = rows(5, seed=1).select([0])
    scored: list[int] = []
    plain = Reference._score

    def counted(self: Reference, batch: Any) -> Any:
        scored.append(batch.num_sequences)
        return plain(self, batch)

    Reference._score = counted
    ours = make(folder, tiny_model(), train_dataset=rows(5), eval_dataset=held_out, reference="precomputed")
    Reference._score = plain
    ours.reference.scorer = None
    found = {}
    for row in (*rows(5).to_list(), *held_out.to_list()):
        batch = ours._collated([row])
        parts = ours.reference.logps(batch).per_token.split(torch.bincount(batch.sequence).tolist())
        found |= {str(key): part.tolist() for key, part in zip(batch.content.tolist(), parts, strict=True)}
    return {"kept_by_each_process": gather_object([found]), "scored_by_each_process": gather_object([sum(scored)])}


def precomputed_by_a_collator(folder: Path) -> Any:
    """How many completions of 12 pairs each process holds once it has prepared, under a collator of the user's, where
    the last process takes its time to write what it scored."""
    plain = LogpStore.flush

    def late(self: LogpStore) -> Any:
        time.sleep(1.0 if RANK == WORLD - 1 else 0.0)
        return plain(self)

    def collate(features: list[dict[str, Any]]) -> dict[str, Any]:
        return dict(DataCollatorForPreference(pad_token_id=0)(features))

    LogpStore.flush = late
    ours = make(folder, tiny_model(), train_dataset=rows(12), data_collator=collate, reference="precomputed")
    LogpStore.flush = plain
    ours.reference.scorer = None
    for row in rows(12).to_list():
        ours.reference.logps(ours._collated([row]))  # an error where it is not held
    return {"held_by_each_process": gather_object([ours.reference.stored.store.num_completions])}


def audit_of_a_wrong_reference(folder: Path) -> Any:
    """The policy changes after its reference was captured: every process refuses."""
    ours = make(folder, tiny_model())
    with torch.no_grad():
        ours.model.model.layers[0].mlp.down_proj.weight.add_(0.1)
    try:
        ours.train()
    except ValueError as error:
        return {"refused_by_each_process": gather_object([str(error)])}
    return {"refused_by_each_process": gather_object(["not refused"])}


# --- evaluation -----------------------------------------------------------------------------------------------------


def evaluation(folder: Path) -> Any:
    """5, 7, 3, 1 and 8 rows in batches of 2 on every process, and a dict of them."""
    ours = make(folder, tiny_model(), ref_model=tiny_model(seed=5))
    found = {str(n): evaluated(ours.evaluate(held_out_rows(n))) for n in (5, 7, 3, 1, 8)}
    sets = {"near": rows(3, seed=1), "far": rows(2, seed=2)}
    return found | {
        "dict": evaluated(ours.evaluate(sets)),
        "predict": evaluated(ours.predict(held_out_rows(5)).metrics),
    }


def samples(folder: Path) -> Any:
    """Held-out prompts completed by two processes, three by one and two by the other, and judged by the first."""
    judge = WinRateCallback(lambda prompt, first, second: first < second)
    ours = make(
        folder, tiny_model(), ref_model=tiny_model(seed=5), eval_dataset=rows(7, seed=1), callbacks=[judge],
        generate_samples=5, samples_max_new_tokens=4,
    )  # fmt: skip
    at_first = evaluated(ours.evaluate())
    texts = [(each.row, each.policy, each.reference) for each in ours._last_samples]
    ours.train()
    return {"at first": at_first, "texts": texts, "in the end": evaluated(ours.evaluate())} | {
        "texts in the end": [(each.row, each.policy, each.reference) for each in ours._last_samples]
    }


def evaluation_of_streams(folder: Path) -> Any:
    """The same rows streamed, in one shard and in three of unequal lengths, and read by two workers."""
    ours = make(folder, tiny_model(), ref_model=tiny_model(seed=5))
    found = {f"{n} in {parts}": evaluated(ours.evaluate(stream(n, parts))) for n in (5, 7) for parts in (1, 3)}
    ours = make(folder, tiny_model(), ref_model=tiny_model(seed=5), dataloader_num_workers=2)
    return found | {"7 by workers": evaluated(ours.evaluate(stream(7, 3)))}


def evaluation_by_source(folder: Path) -> Any:
    """7 and 5 rows of which a source has only one, so that a process has none of it; as streams, and in a mixture. What
    the first process says of a column that is not used."""
    ours = make(folder, tiny_model(), ref_model=tiny_model(seed=5))
    found = {}
    for sources in (["a", None, "a", "b/c", "a", "a", "a"], ["a", "a", "a", "", "d e"]):
        held_out = held_out_rows(len(sources)).add_column("source", sources)
        names = list(dict.fromkeys(name or "(none)" for name in sources))
        for kind, dataset in {"rows": held_out, "stream": held_out.to_iterable_dataset(num_shards=3)}.items():
            metrics = evaluated(ours.evaluate(dataset))
            assert {f"eval_reference/kl_chosen/{name}" for name in names} <= metrics.keys()
            found[f"{len(sources)} {kind}"] = metrics
        for name in names:
            of_source = [row for row, other in enumerate(sources) if (other or "(none)") == name]
            alone = held_out_rows(len(sources)).select(of_source)
            found[f"{len(sources)} of {name}"] = evaluated(ours.evaluate(alone))
    mixture = mix({"near": rows(3, seed=1), "far": rows(4, seed=2)}, weights={"near": 1, "far": 1})
    found["mixture"] = evaluated(ours.evaluate(mixture))
    with recorded_warnings("holdfast.training.by_source") as said:
        urls = rows(60, seed=5).add_column("source", [f"https://site.org/{row}" for row in range(60)])
        found["too many"] = evaluated(ours.evaluate(urls))
        found["too many of a stream"] = evaluated(ours.evaluate(urls.to_iterable_dataset(num_shards=3)))
    found["said by each_process"] = gather_object([said])
    return found


def train_mixture(folder: Path) -> Any:
    """A mixture with weights, and the best model by the metric of a source that the last row alone has."""
    mixture = mix({"near": rows(9, seed=1), "far": rows(8, seed=2)}, weights={"near": 2, "far": 1}, seed=3)
    held_out = held_out_rows(5).add_column("source", ["a"] * 4 + ["b"])
    ours = make(
        folder, tiny_model(), train_dataset=mixture, eval_dataset=held_out, eval_strategy="steps", eval_steps=1,
        save_strategy="best", metric_for_best_model="eval_loss/b", learning_rate=0.5,
    )  # fmt: skip
    logs = trained(ours, folder)
    return logs | {"best": ours.state.best_metric, "digest": dataset_digest(ours.train_dataset)}


def predictions(folder: Path) -> Any:
    """What `compute_metrics` gets to see of 5 rows: ids, and the logits' largest entries."""
    seen: dict[str, Any] = {}

    def compute_metrics(prediction: Any) -> dict[str, float]:
        largest = torch.tensor(prediction.predictions).amax(-1)
        seen[str(len(seen))] = {"ids": prediction.label_ids.tolist(), "largest": largest.tolist()}
        return {"mine": float(len(prediction.label_ids))}

    ours = make(folder, tiny_model(), compute_metrics=compute_metrics)
    counts = [ours.evaluate(held_out)["eval_mine"] for held_out in (held_out_rows(5), stream(5, 3))]
    return {"num_rows": counts, "seen": seen}


# --- data -----------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def recorded_warnings(name: str) -> Iterator[list[str]]:
    """The warnings that this process's logger of that name is given."""
    said: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: said.append(record.getMessage())
    logging.getLogger(name).addHandler(handler)
    try:
        yield said
    finally:
        logging.getLogger(name).removeHandler(handler)


def unusable_rows(folder: Path) -> Any:
    """Of 6 rows, 2 have prompts that fill max_length: said by one process, as a file and as a stream."""
    table = rows(6).to_list()
    for index in (1, 4):
        table[index]["prompt_ids"] = [5] * 30
    counts = {}
    for kind, data in {"map": Dataset.from_list(table), "stream": stream(6, table=Dataset.from_list(table))}.items():
        with recorded_warnings("holdfast.data.prepare") as said:
            found = trained(make(folder, tiny_model(), train_dataset=data, max_length=24, max_steps=1), folder)
        counts[kind] = {"said_by_each_process": gather_object([said]), "losses": found["losses"]}
    return counts


def preparation(folder: Path) -> Any:
    """The main process prepares the dataset, and only then the others, from its cache."""
    import holdfast.data.prepare as module

    if RANK == 0:
        rows(6).to_json(folder / "rows.jsonl")
    if dist.is_initialized():
        dist.barrier()
    dataset = load_dataset(
        "json", data_files=str(folder / "rows.jsonl"), split="train", cache_dir=str(folder / f"{RANK}")
    )
    plain, times = module.prepare_dataset, []

    def timed(*args: Any, **kwargs: Any) -> Any:
        times.append(time.time())
        time.sleep(0.2)
        prepared = plain(*args, **kwargs)
        times.append(time.time())
        return prepared

    module.prepare_dataset = timed
    try:
        make(folder, tiny_model(), train_dataset=dataset)
    finally:
        module.prepare_dataset = plain
    return {"times_of_each_process": gather_object([times])}


def breaks(folder: Path) -> dict[str, Any]:
    """What each process says where one of them alone has a loss, or an evaluation's loss, that is not finite."""
    said: dict[str, Any] = {}
    for where in ("loss", "evaluation"):
        options = {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 1, "max_steps": 4}
        ours = make(folder / where, tiny_model(), eval_dataset=rows(4, seed=1), logging_strategy="no", **options)
        plain = ours.compute_loss

        def broken(*args: Any, where: str = where, ours: DPOTrainer = ours, plain: Any = plain, **kwargs: Any) -> Any:
            loss = plain(*args, **kwargs)
            is_training = ours.model.training
            if RANK == WORLD - 1 and ours.state.global_step == 2 and is_training == (where == "loss"):
                ours._tallies["eval"]._totals.get("loss", torch.zeros(2))[0] = float("nan")
                loss = loss + float("inf")
            return loss

        ours.compute_loss = broken
        message = "none"
        try:
            ours.train()
        except ValueError as error:
            message = str(error).replace(str(folder), "")
        said[f"{where}_of_each_process"] = gather_object([message])
        said[f"{where}_checkpoints"] = sorted(path.name for path in (folder / where).glob("checkpoint-*"))
    return said


IN_WINDOWS = {"reference": "snapshot", "snapshot_device": "disk", "reference_window": 2}
SYNCED = {"sync_ref_model": True, "ref_model_sync_steps": 2, "ref_model_mixup_alpha": 0.3}

SCENARIOS: dict[str, Scenario] = (
    {
        function.__name__: function
        for function in (
            train_whole_epochs,
            train_uneven_epochs,
            train_with_accumulation,
            train_with_checkpointing,
            evaluated_first,
            reference_chosen,
            unlike_beginnings,
            unlike_beginnings_captured,
            unlike_adapters,
            weights_in_half,
            resumed,
            asked_to_end,
            resumed_given,
            checkpoint_order,
            train_stream,
            train_stream_in_shards,
            train_masked_stream,
            precomputed_values,
            precomputed_by_a_collator,
            audit_of_a_wrong_reference,
            evaluation,
            samples,
            evaluation_of_streams,
            evaluation_by_source,
            train_mixture,
            predictions,
            unusable_rows,
            preparation,
            breaks,
        )
    }
    | {
        f"{function.__name__}_in_windows": partial(function, **IN_WINDOWS)
        for function in (train_uneven_epochs, train_with_accumulation, train_stream, resumed)
    }
    | {
        "weights_as_loaded": partial(weights_in_half, frozen_weights_dtype="as_loaded"),
        "resumed_synced_in_windows": partial(resumed, **SYNCED, reference="precomputed"),
        "sync_full_in_windows": _from_reference("full", **SYNCED, reference="precomputed"),
        "sync_lora_in_windows": _from_reference("lora_sft", **SYNCED, reference="snapshot", reference_window=3),
        "resumed_synced": partial(resumed, sync_ref_model=True, ref_model_sync_steps=1, ref_model_mixup_alpha=0.3),
        "reference_model": _from_reference("full", reference="model"),
        "reference_model_of_lora": _from_reference("lora_fresh", reference="model"),
        "reference_adapter_fresh": _from_reference("lora_fresh", reference="adapter"),
        "reference_adapter_trained": _from_reference("lora_sft", reference="adapter"),
        "reference_precomputed": _from_reference("full", reference="precomputed"),
        "reference_precomputed_of_lora": _from_reference("lora_sft", reference="precomputed"),
        "reference_none": _from_reference("full", loss_type="simpo"),
        "sync_full": _from_reference("full", **SYNCED),
        "sync_lora": _from_reference("lora_sft", **SYNCED),
    }
)
