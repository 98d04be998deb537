"""Runs in which one process knows, finds, measures or meets what the others do not: `<engine>/lockstep/<scenario>`.

Where weights are spread over processes, all of them must go on together all the same, to the numbers of one process.
The audit is off, since its forward passes would hide some unlike beginnings. What differs between processes by nature
is under names that end in `each_process`.
"""

import contextlib
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate.utils import gather_object
from engine_scenarios import HOLDINGS, MOTIONS, gap, numbers, saved
from engines import loaded_in_shards, options_of
from scenarios import GLOBAL_BATCH, RANK, WORLD, evaluated, stream
from torch import nn
from transformers import TrainerCallback

from families import tiny_model
from holdfast import DataCollatorForPreference, DPOTrainer, Reference, WinRateCallback, agreement
from holdfast.batch import PairBatch
from holdfast.data import completions
from holdfast.data.layouts.padded import PaddedLayout
from holdfast.reference import audit, look_ahead
from holdfast.reference import reference as reference_module
from holdfast.reference.sources import lockstep
from holdfast.reference.sources.stored import PrecomputedReference
from holdfast.scoring import transform
from holdfast.scoring.frozen import frozen_logps
from holdfast.store.pair_shard import joined_pairs, open_pair_shard, pair_shard_paths
from holdfast.store.store import LogpStore
from holdfast.store.work_sharing import CLAIM
from policies import POLICIES, config, rows, trainer

IS_LAST = RANK == WORLD - 1
"""Whether this process is the one that differs. Where there is one process, it differs from nobody."""

Scenario = Callable[[str, Path], Any]


def run(name: str, folder: Path) -> dict[str, Any]:
    """What the scenario `name` came to."""
    engine, _, scenario = name.split("/")
    options_of(engine)  # what the run before has left is forgotten
    return SCENARIOS[scenario](engine, folder)


def made(
    engine: str, folder: Path, policy: nn.Module | None = None, holding: str = "precomputed", motion: str = "fixed",
    train_dataset: Any = None, eval_dataset: Any = None, ref_model: Any = None, data_collator: Any = None,
    callbacks: Any = None, **changed: Any,
) -> DPOTrainer:  # fmt: skip
    """A trainer over `engine`, without an audit, of `GLOBAL_BATCH` pairs a step. Its rows are padded, so that its store
    has one key over every engine."""
    options: dict[str, Any] = HOLDINGS[holding] | MOTIONS[motion] | options_of(engine)
    options |= {"reference_audit": False, "layout": "padded", "max_steps": 4, "seed": 3}
    options |= {"per_device_train_batch_size": GLOBAL_BATCH // WORLD, "per_device_eval_batch_size": 2}
    policy = policy or tiny_model()
    if engine == "native":
        policy = loaded_in_shards(policy, folder / "model")
    return trainer(
        policy, config(folder, **options | changed), ref_model=ref_model, data_collator=data_collator,
        callbacks=callbacks,
        train_dataset=rows(9) if train_dataset is None else train_dataset,
        eval_dataset=rows(5, seed=1) if eval_dataset is None else eval_dataset,
    )  # fmt: skip


def trained(ours: DPOTrainer, folder: Path) -> dict[str, Any]:
    """The numbers of the run, evaluated at its end, and how far the reference is from the policy."""
    ours.train()
    found = {"logs": numbers(ours.state.log_history), "evaluation": evaluated(ours.evaluate())}
    return found | {"weights": saved(ours.model, folder), "gap": round(gap(ours), 4), "stores": stores()}


def stores() -> dict[str, Any]:
    """Of each store of this process: its key, and its log-probs by content id."""
    found: dict[str, Any] = {}
    root = Path(os.environ["HOLDFAST_HOME"]) / "store"
    for folder in sorted(root.iterdir()) if root.is_dir() else []:
        store = LogpStore.open(root, _key_of(folder))
        ids = sorted({tuple(row) for shard in store._shards for row in shard.content.tolist()})
        found[folder.name] = {str(key): value.tolist() for key, value in store.get(ids).items()}
    return found


def _key_of(folder: Path) -> Any:
    from holdfast.store.manifest import read_manifest

    return read_manifest(folder).key


@contextlib.contextmanager
def replaced(where: Any, name: str, value: Any) -> Iterator[None]:
    """A context in which an attribute has another value."""
    plain = getattr(where, name)
    setattr(where, name, value)
    try:
        yield
    finally:
        setattr(where, name, plain)


def together() -> None:
    """All processes are here."""
    if WORLD > 1:
        dist.barrier()


def raised(act: Callable[[], Any]) -> str:
    """What `act` raises, in words."""
    try:
        act()
    except (Exception, SystemExit) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def batch_of(row: int) -> PairBatch:
    """One pair, padded."""
    return PairBatch.from_tensors(PaddedLayout(0)([rows(9)[row]]))


def sampled(
    engine: str, folder: Path, policy: nn.Module | None = None, holding: str = "device", motion: str = "fixed"
) -> Any:
    """What policy and reference make of held-out prompts while the run trains, by batches of 2, and a win rate that the
    first process works out."""
    options = {"generate_samples": 3, "samples_max_new_tokens": 5, "eval_strategy": "steps", "eval_steps": 2}
    judge = WinRateCallback(lambda prompt, first, second: first < second)
    ours = made(engine, folder, policy, holding, motion, callbacks=[judge], **options)
    texts: list[Any] = []
    samples = ours._samples

    def noted(*args: Any) -> Any:
        texts.append([(each.policy, each.reference, each.reference_version) for each in samples(*args)])
        return ours._last_samples

    ours._samples = noted
    ours.train()
    return {
        "logs": numbers(ours.state.log_history),
        "texts": texts,
        "texts of each_process": gather_object([texts]),
        "weights": saved(ours.model, folder),
    }


def samples_of_a_snapshot(engine: str, folder: Path) -> Any:
    """The reference's values in host memory are put in place to generate."""
    return sampled(engine, folder, holding="cpu")


def samples_of_a_moving_module(engine: str, folder: Path) -> Any:
    """A second module that follows the policy."""
    return sampled(engine, folder, holding="model", motion="soft")


def samples_of_adapters(engine: str, folder: Path) -> Any:
    """The policy with its adapters off."""
    return sampled(engine, folder, POLICIES["lora_fresh"](), holding="adapter")


# --- what one process knows -----------------------------------------------------------------------------------------


def plain(engine: str, folder: Path) -> Any:
    """Nothing differs."""
    return trained(made(engine, folder), folder)


def transform_known_to_one(engine: str, folder: Path) -> Any:
    """One process has scored the model before, which bounds its logits."""
    policy = tiny_model("gemma2")
    if IS_LAST:
        frozen_logps(policy, batch_of(0), contextlib.nullcontext)
    return trained(made(engine, folder, policy), folder)


def transform_known_to_one_without_reference(engine: str, folder: Path) -> Any:
    """The first forward pass is the training's own."""
    policy = tiny_model("gemma2")
    if IS_LAST:
        frozen_logps(policy, batch_of(0), contextlib.nullcontext)
    ours = made(engine, folder, policy, reference="none", loss_type="simpo", eval_dataset=rows(5, seed=1))
    ours.train()
    return {"logs": numbers(ours.state.log_history), "weights": saved(ours.model, folder)}


def transform_forgotten_by_one(engine: str, folder: Path) -> Any:
    """One process forgets what it has read, between two steps."""

    class Forgets(TrainerCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            if IS_LAST:
                transform._READINGS.clear()

    ours = made(engine, folder, holding="device")
    ours.add_callback(Forgets())
    return trained(ours, folder)


# --- what one process finds -----------------------------------------------------------------------------------------


def store_half_full(engine: str, folder: Path) -> Any:
    """A run of fewer rows has filled a part of it."""
    made(engine, folder, train_dataset=rows(9).select(range(4)), eval_dataset=rows(5, seed=1).select(range(2)))
    return trained(made(engine, folder), folder)


def store_full(engine: str, folder: Path) -> Any:
    """Nothing is scored a second time."""
    made(engine, folder)
    scored: list[int] = []
    with replaced(Reference, "_score", lambda self, batch: scored.append(1)):
        ours = made(engine, folder)
    return trained(ours, folder) | {"num_scored": len(scored)}


def store_of_each_process(engine: str, folder: Path) -> Any:
    """Each process has a store of its own; the last one's has a part of what is asked, and the first one's another."""
    home = Path(os.environ["HOLDFAST_HOME"])
    made(engine, folder, train_dataset=rows(9).select(range(4)), eval_dataset=rows(9).select(range(1)))
    together()
    os.environ["HOLDFAST_HOME"] = str(home / f"of-{RANK}")
    if IS_LAST:
        shutil.copytree(home / "store", home / f"of-{RANK}" / "store")
    together()
    found = trained(made(engine, folder), folder)
    each = gather_object([found["stores"]])
    return found | {"are_alike": all(close(one, each[0]) for one in each)}


def alike_pairs() -> dict[str, float]:
    """How alike the hidden states of each stored pair are (their cosine), by content ids."""
    root = Path(os.environ["HOLDFAST_HOME"]) / "store"
    found: dict[str, float] = {}
    for folder in sorted(root.iterdir()):
        pairs = joined_pairs([open_pair_shard(path, folder.name) for path in pair_shard_paths(folder)])
        for key, (cross, one, other) in zip(pairs.content.tolist(), pairs.products.tolist(), strict=True):
            found[str(key)] = round(cross / (one * other) ** 0.5, 3)
    return found


def pairs_of_hidden_states(engine: str, folder: Path) -> Any:
    """All pairs have theirs after a filling pass, and again after one that finds log-probs alone. Batches are
    small, so the completions of a pair come in different ones."""
    with small_batches():
        ours = made(engine, folder, reference_window=1)
        data = ours.completions_to_score({"train": ours.train_dataset})
        ours.reference.fill(data)
        together()
        first = alike_pairs()
        together()
        if RANK == 0:
            for path in ours.reference.stored.store.folder.glob("*.pairs"):
                path.unlink()
        together()
        ours.reference.fill(data)
        together()
    return {"first": first, "again": alike_pairs(), "num_pairs": len({*data["train"].pairs()})}


def close(one: Any, other: Any) -> bool:
    """Whether two sets of stores hold the same."""
    return one.keys() == other.keys() and all(
        one[name].keys() == other[name].keys()
        and all(torch.allclose(*map(torch.tensor, (one[name][key], other[name][key])), atol=1e-5) for key in one[name])
        for name in one
    )


def missed_by_one(engine: str, folder: Path) -> Any:
    """A completion cannot be found by one process, in the middle of training."""
    calls: list[int] = []
    find = PrecomputedReference.find

    def forgetful(self: PrecomputedReference, batch: PairBatch) -> Any:
        calls.append(1)
        return None if IS_LAST and len(calls) == 3 else find(self, batch)

    ours = made(engine, folder)
    with replaced(PrecomputedReference, "find", forgetful):
        return trained(ours, folder)


def claimed_by_another_job(engine: str, folder: Path) -> Any:
    """Another job has claimed the work, and gives it up a little later."""
    plain_blocks = lockstep.claimed_blocks

    def claimed(store: LogpStore, ids: Any, num_per_block: int, on_wait: Any) -> Any:
        from holdfast.store import work_sharing

        ids = list(dict.fromkeys(ids))
        path = store.folder / f"{work_sharing._digest(ids)}{CLAIM}"
        store.check_writable()
        path.write_text(f"{os.getppid()} {work_sharing.machine()}")
        threading.Timer(0.4, lambda: path.unlink(missing_ok=True)).start()
        yield from plain_blocks(store, ids, num_per_block, on_wait)

    with replaced(lockstep, "claimed_blocks", claimed):
        return trained(made(engine, folder), folder)


# --- what one process measures --------------------------------------------------------------------------------------


def window_measured_by_each(engine: str, folder: Path) -> Any:
    """An exchange of weights takes one process longer, so its windows would be longer."""

    def slow(is_measured: bool) -> None:
        time.sleep(0.02 if IS_LAST and is_measured else 0.0)

    ours = made(engine, folder, holding="cpu", max_steps=8)
    with replaced(reference_module, "_wait_for_device", slow):
        found = trained(ours, folder)
    return found | {"window_of_each_process": gather_object([ours.reference.window.num_steps])}


def window_of_unlike_bytes(engine: str, folder: Path) -> Any:
    """A window's batches take all of one process's memory."""
    with replaced(look_ahead, "WAITING_BYTES", 1 if IS_LAST else 2**28):
        return trained(made(engine, folder, holding="cpu", motion="hard", max_steps=6), folder)


def windows_of_a_stream(engine: str, folder: Path) -> Any:
    """Log-probs of a stream are stored window by window."""
    made(engine, folder, train_dataset=rows(9).select(range(3)), eval_dataset=rows(5, seed=1))
    return trained(made(engine, folder, train_dataset=stream(8)), folder)


# --- what else is scored --------------------------------------------------------------------------------------------


def collator_of_the_user(engine: str, folder: Path) -> Any:
    """Pairs are scored in order, and do not divide evenly."""

    def collate(features: list[dict[str, Any]]) -> dict[str, Any]:
        return dict(DataCollatorForPreference(pad_token_id=0)(features))

    made(engine, folder, data_collator=collate, train_dataset=rows(9).select(range(4)), layout="auto")
    return trained(made(engine, folder, data_collator=collate, layout="auto", precompute_ref_batch_size=1), folder)


def columns_of_the_user(engine: str, folder: Path) -> Any:
    """Log-probs that came with the data are compared with a sample."""
    model, table = tiny_model(), rows(9).to_list()
    for number, row in enumerate(table):
        logps = frozen_logps(model, batch_of(number), contextlib.nullcontext).sums().tolist()
        row["ref_chosen_logps"], row["ref_rejected_logps"] = logps
    data = type(rows(9)).from_list(table)
    return trained(made(engine, folder, train_dataset=data, eval_dataset=data.select(range(5))), folder)


def new_data(engine: str, folder: Path) -> Any:
    """After training, data are evaluated that nobody announced; the weights of the reference are in files by then."""
    ours = made(engine, folder, holding="chosen", ref_model=tiny_model(seed=5), precompute_ref_log_probs=True)
    found = trained(ours, folder)
    for number in (3, 1):
        found[f"evaluation of {number}"] = evaluated(ours.evaluate(rows(number + 1, seed=9).select(range(number))))
    found["prediction"] = evaluated(ours.predict(rows(5, seed=8)).metrics)
    return found | {"stores": stores()}


# --- what one process meets -----------------------------------------------------------------------------------------


@contextlib.contextmanager
def small_batches() -> Iterator[None]:
    """A context in which a batch has few completions, so that there are several."""
    with replaced(completions, "CPU_TOKENS", 40):
        yield


def nan_of_one(engine: str, folder: Path) -> Any:
    """The reference gives one process a NaN, in its second batch. What was scored before is kept."""
    plain_score, calls = Reference._score, []

    def score(self: Reference, batch: PairBatch) -> Any:
        calls.append(1)
        found = plain_score(self, batch)
        if IS_LAST and len(calls) == 2:
            found.per_token[0] = float("nan")
        return found

    with small_batches(), replaced(Reference, "_score", score):
        messages = gather_object([raised(lambda: made(engine, folder))])
    together()
    kept = sum(len(values) for values in stores().values())
    return {"messages": messages, "kept_of_each_process": gather_object([kept])}


def wrong_weights_of_one(engine: str, folder: Path) -> Any:
    """One process has loaded NaN."""
    policy = tiny_model()
    if IS_LAST:
        next(policy.parameters()).data[0] = float("nan")
    return {"messages": gather_object([raised(lambda: made(engine, folder, policy))])}


def audit_of_one(engine: str, folder: Path) -> Any:
    """One process finds the reference wrong, before and after training began."""
    plain_between = audit.Gap.between

    def between(*args: Any, **kwargs: Any) -> Any:
        return audit.Gap(mean=1.0, largest=2.0) if IS_LAST else plain_between(*args, **kwargs)

    with replaced(audit.Gap, "between", between):
        ours = made(engine, folder, holding="device", reference_audit=True)
        return {"messages": gather_object([raised(ours.train)])}


def disk_of_one_full(engine: str, folder: Path) -> Any:
    """The store of one process cannot be written."""
    os.environ["HOLDFAST_HOME"] += f"/of-{RANK}"
    plain_add = LogpStore.add

    def add(self: LogpStore, logps: Any) -> None:
        if IS_LAST:
            raise ValueError("the disk is full")
        plain_add(self, logps)

    with replaced(LogpStore, "add", add):
        return {"messages": gather_object([raised(lambda: made(engine, folder))])}


def signal_to_one(engine: str, folder: Path) -> Any:
    """One process is asked to end while completions are scored. All end, and the next run goes on."""
    plain_score, calls = Reference._score, []

    def score(self: Reference, batch: PairBatch) -> Any:
        calls.append(1)
        if IS_LAST and len(calls) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return plain_score(self, batch)

    with small_batches(), replaced(Reference, "_score", score):
        messages = gather_object([raised(lambda: made(engine, folder))])
    kept = sum(len(values) for values in stores().values())
    found = trained(made(engine, folder), folder)
    return found | {"messages": messages, "kept_of_each_process": gather_object([kept])}


def agreement_itself(engine: str, folder: Path) -> Any:
    """What `holdfast.agreement` does with a value, a flag, and an error of one process, of some or of all."""

    def fail(who: Callable[[int], bool], kind: type[Exception], text: str) -> str:
        def act() -> None:
            with agreement.raised_together(), agreement.raised_together():
                if who(RANK):
                    raise kind(text)

        return raised(act)

    last = WORLD - 1
    found = {
        "values": agreement.of_all(RANK),
        "flags": [agreement.any_of_all(last == RANK), agreement.any_of_all(False)],
        "largest": agreement.largest_of_all([float(RANK), -float(RANK)]),
        "of one": fail(lambda rank: rank == last, ValueError, "a"),
        "of some": fail(lambda rank: rank > 0, ValueError, f"of {RANK}"),
        "of all": fail(lambda rank: True, TypeError, "b"),
        "of the disk": fail(lambda rank: rank == last, OSError, "c"),
        "of none": fail(lambda rank: False, ValueError, "d"),
    }
    return {"found_by_each_process": agreement.of_all(found)}


SCENARIOS: dict[str, Scenario] = {
    function.__name__: function
    for function in (
        agreement_itself,
        plain,
        samples_of_a_snapshot,
        samples_of_a_moving_module,
        samples_of_adapters,
        transform_known_to_one,
        transform_known_to_one_without_reference,
        transform_forgotten_by_one,
        store_half_full,
        store_full,
        store_of_each_process,
        missed_by_one,
        claimed_by_another_job,
        window_measured_by_each,
        window_of_unlike_bytes,
        windows_of_a_stream,
        collator_of_the_user,
        columns_of_the_user,
        new_data,
        nan_of_one,
        wrong_weights_of_one,
        audit_of_one,
        disk_of_one_full,
        signal_to_one,
        pairs_of_hidden_states,
    )
}
