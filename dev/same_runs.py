"""The same numbers before and after, as one command: `python dev/same_runs.py COMMIT`.

The tiny runs of `recorded_runs.py` are trained by the working tree and by another commit, each in a process of its own,
through the public names alone. What each run logs, computes, saves, stores and says is recorded, and the two records
are compared bit for bit; exit status 1 where anything differs. `--only WORD` chooses runs by name, `--record FILE`
writes the record of the package that is imported, and such a file may stand in the place of COMMIT. Given up: times and
throughput, which differ from run to run, and runs of several processes or devices.
"""

import argparse
import gc
import hashlib
import io
import json
import logging
import os
import re
import subprocess
import sys
import tarfile
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers as tf
from datasets import Dataset, disable_progress_bars
from safetensors.torch import load_file
from torch import Tensor, nn

import holdfast
from holdfast import DataCollatorForPreference, DPOConfig, DPOTrainer
from recorded_runs import FORMS, RUNS, Run, pairs, tokenizer

ROOT = Path(__file__).resolve().parent.parent
TIMES = re.compile(
    r"runtime$|_per_second$|preparation_time$|^created$|^checksum$|^time/|^speed/|^memory/|^seconds$"
    r"|^(started|finished|time|command)$"
)
LEFT_OUT = ("files", "optimizer", "unlogged", "evaluation_due", "epoch_end")
MOST_SHOWN, WIDEST = 12, 400

# --- what is recorded -------------------------------------------------------------------------------------------------


def digest(tensors: Any) -> str:
    """Digest of named tensors: names, dtypes, shapes and bytes."""
    state = hashlib.blake2b(digest_size=16)
    for name, tensor in tensors:
        found = tensor.detach().contiguous().flatten().view(torch.uint8)
        state.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode() + found.numpy().tobytes())
    return state.hexdigest()


def exact(value: Any) -> Any:
    """The value as JSON holds it, floats to the last bit, without times."""
    if isinstance(value, dict):
        return {str(name): exact(found) for name, found in value.items() if not TIMES.search(str(name))}
    if isinstance(value, list | tuple):
        return [exact(found) for found in value]
    return float(value).hex() if isinstance(value, float) else value


class Gradients(tf.TrainerCallback):
    """Keeps a digest of the gradients of each optimizer step."""

    def __init__(self) -> None:
        self.digests: list[str] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """See `transformers.TrainerCallback`."""
        self.digests.append(digest((n, p.grad) for n, p in model.named_parameters() if p.grad is not None))


def plain(value: Any) -> Any:
    """A nest of dicts and sequences with digests in the place of tensors, lists in that of arrays."""
    if isinstance(value, dict):
        return {name: plain(found) for name, found in value.items()}
    if isinstance(value, list | tuple):
        return [plain(found) for found in value]
    if isinstance(value, np.ndarray):
        return value.tolist()
    return digest([("", value)]) if isinstance(value, Tensor) else value


def file_record(path: Path) -> Any:
    """A file's content where it is JSON, digests by tensor where it holds weights, else a digest of its content."""
    if path.suffix == ".json":
        content = json.loads(path.read_text())
        if path.name == "manifest.json":  # digests of files, among them pickled ones
            content = {name: value for name, value in content.items() if name not in LEFT_OUT}
        return exact(content)
    if path.suffix == ".jsonl":
        return [exact(json.loads(line)) for line in path.read_text().splitlines()]
    if path.suffix == ".safetensors":
        return {name: digest([(name, tensor)]) for name, tensor in load_file(path).items()}
    # Of equal states pickle may write unequal bytes, by which of their strings are one object.
    is_pickled = path.suffix in (".pt", ".pth")
    content = repr(plain(torch.load(path, weights_only=False))).encode() if is_pickled else path.read_bytes()
    return hashlib.blake2b(content, digest_size=16).hexdigest()


def folder_record(folder: Path) -> dict[str, Any]:
    """The files that a run has left, but for the pickled options, which name classes by module, and for a reference on
    disk, which is in a folder of random name until its trainer is collected."""
    found = sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file() and path.suffix != ".md")
    left = [path for path in found if path.parts[0] != "_reference" and path.name != "training_args.bin"]
    return {str(path): file_record(folder / path) for path in left}


def store_record(root: Path) -> dict[str, Any]:
    """By name of a store: its manifest, and the log-probs by content id and length, whichever shard holds them."""
    record: dict[str, Any] = {}
    for folder in sorted(root.iterdir()) if root.is_dir() else ():
        logps: dict[str, str] = {}
        for path in sorted(folder.glob("*.safetensors")):
            shard = load_file(path)
            values = shard["logps"].split(shard["lengths"].tolist())
            for content, value in zip(shard["content"].tolist(), values, strict=True):
                logps[f"{content} {len(value)}"] = digest([("", value)])
        others = sorted(path.name for path in folder.iterdir() if path.suffix != ".safetensors")
        manifest = exact(json.loads((folder / "manifest.json").read_text()))
        record[folder.name] = {"manifest": manifest, "logps": dict(sorted(logps.items())), "files": others}
    return record


def defaults() -> dict[str, str]:
    """The options of `DPOConfig` with their defaults."""
    plain = [(f.name, f.default if f.default_factory is MISSING else f.default_factory()) for f in fields(DPOConfig)]
    return {name: "required" if value is MISSING else repr(value) for name, value in plain}


@contextmanager
def messages() -> Iterator[list[str]]:
    """What the package's loggers say meanwhile, without the names of the modules that say it."""
    said: list[str] = []

    class Keeper(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            said.append(f"{record.levelname}: {record.getMessage()}")

    logger, keeper = logging.getLogger("holdfast"), Keeper()
    logger.addHandler(keeper)
    logger.propagate = False
    try:
        yield said
    finally:
        logger.removeHandler(keeper)


def make(run: Run, **options: Any) -> tuple[DPOTrainer, Gradients]:
    """A new trainer of the run, and what keeps its gradients."""
    defaults: dict[str, Any] = {
        "output_dir": "run", "use_cpu": True, "per_device_train_batch_size": 3, "max_steps": 4, "logging_steps": 1,
        "learning_rate": 0.5, "beta": 0.2, "lr_scheduler_type": "constant", "optim": "sgd", "max_grad_norm": 0.0,
        "gradient_checkpointing": False, "save_strategy": "steps", "save_steps": 4, "report_to": "none",
        "disable_tqdm": True,
    }  # fmt: skip
    form = FORMS[run.form]
    train = Dataset.from_list([form(row) for row in pairs()])
    sets = {
        name: Dataset.from_list([form(row) for row in pairs(6, seed)]) for seed, name in enumerate(run.eval_sets, 1)
    }
    gradients, policy, ref_model = Gradients(), run.policy(), run.ref_model()
    trainer = DPOTrainer(
        policy,
        ref_model,
        DPOConfig(**defaults | run.options | options),
        train_dataset=train.to_iterable_dataset() if run.is_stream else train,
        eval_dataset=sets or None,
        processing_class=tokenizer(run.template),
        callbacks=[gradients],
        data_collator=DataCollatorForPreference(pad_token_id=0) if run.is_collated else None,
        compute_metrics=(lambda found: {"logits": digest([("", torch.as_tensor(found.predictions))])})
        if run.after == "predict"
        else None,
        **run.more,
    )
    trainer.remove_callback(tf.PrinterCallback)
    return trainer, gradients


def carry_out(run: Run) -> dict[str, Any]:
    """Trains, does what comes after, and records all of it."""
    trainer, gradients = make(run)
    trainer.train()
    record: dict[str, Any] = {}
    if run.after in ("resume", "restore", "again"):
        record["first"] = {"log": exact(trainer.state.log_history), "gradients": gradients.digests}
        trainer, gradients = make(run, **({"learning_rate": 0.25} if run.after == "again" else {}))
        if run.after == "restore":
            trainer.restore("run/checkpoint-2")
        else:
            trainer.train(resume_from_checkpoint="run/checkpoint-2" if run.after == "resume" else None)
    if run.after in ("restore", "evaluate"):
        new = Dataset.from_list([FORMS[run.form](row) for row in pairs(5, seed=9)])
        record["evaluated"] = exact([trainer.evaluate(new), *([trainer.evaluate()] if run.eval_sets else [])])
    if run.after == "predict":
        found: Any = trainer.predict(Dataset.from_list(pairs(5, seed=9)))
        record["predicted"] = [exact(found.metrics), digest([("", torch.as_tensor(found.predictions))])]
    policy: nn.Module = trainer.model
    state: dict[str, Tensor] = policy.state_dict()
    return record | {
        "log": exact(trainer.state.log_history),
        "gradients": gradients.digests,
        "policy": digest(state.items()),
        "reference": trainer.reference.describe() if trainer.reference is not None else None,
        "card": Path("run/README.md").read_text().splitlines(),
    }


def recorded(run: Run) -> dict[str, Any]:
    """The record of a run in a folder of its own; of one that is refused, the message."""
    before = Path.cwd()
    with tempfile.TemporaryDirectory() as folder, messages() as said, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        os.chdir(folder)
        os.environ["HOLDFAST_HOME"] = str(Path(folder, "home"))
        try:
            record = carry_out(run)
        except ValueError as error:
            record = {"refused": str(error)}
        finally:
            os.chdir(before)
        record |= {"files": folder_record(Path(folder, "run")), "store": store_record(Path(folder, "home", "store"))}
        text = json.dumps(record | {"messages": said}).replace(folder, "FOLDER")
        if "snapshot_device" in run.options and "reference_window" not in run.options:  # as long as was measured to pay
            text = re.sub(r"asked ahead for \d+ optimizer steps", "asked ahead for SOME optimizer steps", text)
        return json.loads(text)


# --- comparing --------------------------------------------------------------------------------------------------------


def leaves(value: Any, path: str = "") -> dict[str, Any]:
    """The values in a nest of dicts and lists, by path."""
    if isinstance(value, dict | list) and value:
        items = value.items() if isinstance(value, dict) else enumerate(value)
        return {name: leaf for key, part in items for name, leaf in leaves(part, f"{path}/{key}").items()}
    return {path: value}


def differences(before: dict[str, Any], after: dict[str, Any]) -> dict[str, list[str]]:
    """By name of a run, what differs; for a run that one of the records lacks, that."""
    found: dict[str, list[str]] = {}
    for name in dict.fromkeys((*before, *after)):
        ours, theirs = leaves(before.get(name, "no such run")), leaves(after.get(name, "no such run"))
        where = [path for path in dict.fromkeys((*ours, *theirs)) if ours.get(path, "-") != theirs.get(path, "-")]
        if where:
            found[name] = [f"{path}: {ours.get(path, '-')} -> {theirs.get(path, '-')}" for path in where]
    return found


def write_record(path: Path, only: str) -> None:
    """Runs the set with the package that this process imports, which is that of `PYTHONPATH` where that is set."""
    assert Path(str(holdfast.__file__)).is_relative_to(os.environ.get("PYTHONPATH", "/")), holdfast.__file__
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    tf.logging.set_verbosity_error()
    tf.logging.disable_progress_bar()
    disable_progress_bars()
    gc.collect()  # each run of a trainer collects garbage; what is imported never is any
    gc.freeze()
    record = {name: recorded(run) for name, run in RUNS.items() if only in name}
    record |= {"public names": {"names": sorted(holdfast.__all__), "defaults": defaults()}}
    assert len(record) > 1, f"no run has {only!r} in its name"
    path.write_text(json.dumps(record, indent=1) + "\n")


def started(source: Path, record: Path, only: str) -> subprocess.Popen[bytes]:
    """A process that records the set with the package in `source`."""
    environment = os.environ | {
        "PYTHONPATH": str(source / "src"), "PYTHONHASHSEED": "0", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }  # fmt: skip
    command = [sys.executable, __file__, "--record", str(record), "--only", only]
    return subprocess.Popen(command, env=environment)


def main() -> int:
    """The exit status: 1 where something differs."""
    parser = argparse.ArgumentParser(description="Compare the working tree's runs with another commit's, bit for bit.")
    parser.add_argument("before", nargs="?", help="a commit, or a file that --record has written")
    parser.add_argument("--only", default="", help="runs whose name has this in it")
    parser.add_argument("--record", type=Path, help="write the record of the package that is imported to this file")
    asked = parser.parse_args()
    if (asked.before is None) == (asked.record is None):
        parser.error("give either a commit (or a record) to compare with, or --record FILE")
    if asked.record is not None:
        write_record(asked.record.resolve(), asked.only)
        return 0
    with tempfile.TemporaryDirectory() as folder:
        before, after = Path(folder, "before.json"), Path(folder, "after.json")
        processes = [started(ROOT, after, asked.only)]
        if Path(asked.before).is_file():
            before = Path(asked.before)
        else:
            archive = subprocess.run(["git", "archive", asked.before, "src"], cwd=ROOT, check=True, capture_output=True)
            with tarfile.open(fileobj=io.BytesIO(archive.stdout)) as tree:
                tree.extractall(Path(folder, "tree"), filter="data")
            processes.append(started(Path(folder, "tree"), before, asked.only))
        statuses = [process.wait() for process in processes]
        assert not any(statuses), "a process that records has failed"
        records = [json.loads(path.read_text()) for path in (before, after)]
    chosen = {name for name in {*records[0], *records[1]} if asked.only in name}
    old, new = ({name: record for name, record in found.items() if name in chosen} for found in records)
    found = differences(old, new)
    for name, lines in found.items():
        more = [f"... and {len(lines) - MOST_SHOWN} more"] if len(lines) > MOST_SHOWN else []
        shown = [line if len(line) <= WIDEST else f"{line[:WIDEST]}..." for line in lines[:MOST_SHOWN]]
        print("\n    ".join([f"{name}: {len(lines)} values differ", *shown, *more]))
    num_refused = sum("refused" in record for record in new.values())
    print(f"{len(new)} runs, {num_refused} of them refused; {len(found)} differ from {asked.before}.")
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main())
