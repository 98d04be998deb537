"""Peak memory of full fine-tuning under each way to hold the reference, against the same run with a loss that has none.

    python benchmarks/bench_memory.py

A Llama of 97 M fp32 parameters takes six steps of AdamW on a few short pairs, so the weights outweigh everything else:
the policy, its gradients and the optimizer's two moments are four copies of them. Every measurement is a process of its
own, modes are interleaved, and the median of the repeats is reported. The peak is the kernel's own (VmHWM, which unlike
`ru_maxrss` a process does not inherit from its parent). A thread samples how it splits into anonymous memory and pages
of mapped files, which the kernel can drop at any time. Needs Linux. Writes results/memory.json.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any

MIB = 1024.0  # /proc counts in KiB

SNAPSHOT = {"reference": "snapshot"}
SYNCED = {"sync_ref_model": True, "ref_model_mixup_alpha": 0.6, "ref_model_sync_steps": 2}
MODES: dict[str, dict[str, Any]] = {
    "reference_free": {"loss_type": "simpo"},
    "snapshot_disk": SNAPSHOT | {"snapshot_device": "disk"},
    "snapshot_disk_synced": SNAPSHOT | SYNCED | {"snapshot_device": "disk"},
    "snapshot_disk_hard_synced": SNAPSHOT | SYNCED | {"snapshot_device": "disk", "ref_model_mixup_alpha": 1.0},
    "snapshot_cpu": SNAPSHOT | {"snapshot_device": "cpu"},
    "snapshot_cpu_synced": SNAPSHOT | SYNCED | {"snapshot_device": "cpu"},
    "snapshot_device": SNAPSHOT | {"snapshot_device": "device"},
    "precomputed": {"reference": "precomputed"},
    "model": {"reference": "model"},
}


# --- one measurement, in a process of its own -------------------------------------------------------------------------


def memory() -> dict[str, float]:
    """This process's resident memory in MiB: the peak, the present amount, its anonymous and its file pages."""
    lines = Path("/proc/self/status").read_text().splitlines()
    values = {line.split(":")[0]: line.split()[1] for line in lines if line.startswith(("VmHWM", "VmRSS", "Rss"))}
    names = {"peak": "VmHWM", "now": "VmRSS", "anonymous": "RssAnon", "files": "RssFile"}
    return {name: int(values[field]) / MIB for name, field in names.items()}


class Sampler(threading.Thread):
    """Samples `memory()` every two milliseconds; `largest` is the sample with the most."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.largest = memory()
        self._is_over = threading.Event()

    def run(self) -> None:
        """See `threading.Thread.run`."""
        while not self._is_over.wait(0.002):
            self.largest = max(self.largest, memory(), key=lambda sample: sample["now"])

    def stop(self) -> None:
        """Ends the sampling."""
        self._is_over.set()
        self.join()


def measure(mode: str, *, checkpointing: bool, width: int, layers: int, steps: int) -> dict[str, Any]:
    """The peaks of one run in MiB, and the memory that was resident before the model was made."""
    import torch
    import transformers
    from datasets import Dataset

    from holdfast import DPOConfig, DPOTrainer

    torch.manual_seed(0)
    vocabulary = 8192
    draw = torch.Generator().manual_seed(1)

    def ids(length: int) -> list[int]:
        return torch.randint(3, vocabulary, (length,), generator=draw).tolist()

    rows = [{"prompt_ids": ids(6), "chosen_ids": ids(10), "rejected_ids": ids(10)} for _ in range(2 * steps)]
    with tempfile.TemporaryDirectory() as folder:
        os.environ["HOLDFAST_HOME"] = folder  # nothing that an earlier run stored is found
        options: dict[str, Any] = {
            "output_dir": folder, "max_steps": steps, "per_device_train_batch_size": 2, "learning_rate": 1e-4,
            "optim": "adamw_torch", "logging_steps": 1, "save_strategy": "no", "report_to": "none",
            "disable_tqdm": True, "bf16": False, "activation_checkpointing": checkpointing,
            "use_cpu": not torch.cuda.is_available(),
        }  # fmt: skip
        args = DPOConfig(**options | MODES[mode])
        tokenizer = word_level_tokenizer(vocabulary)
        dataset = Dataset.from_list(rows)
        before = memory()["now"]
        sampler = Sampler()
        sampler.start()
        config = transformers.LlamaConfig(
            vocab_size=vocabulary, hidden_size=width, intermediate_size=8 * width // 3, num_hidden_layers=layers,
            num_attention_heads=width // 64, max_position_embeddings=64,
        )  # fmt: skip
        model = transformers.LlamaForCausalLM(config)
        trainer = DPOTrainer(model, args=args, train_dataset=dataset, processing_class=tokenizer)
        trainer.train()
        sampler.stop()
        entries = [entry for entry in trainer.state.log_history if "grad_norm" in entry]
        assert len(entries) == steps
    return {
        "weights": sum(p.numel() * p.element_size() for p in model.parameters()) / MIB**2,
        "before": before,
        "peak": memory()["peak"],
        "split": {name: sampler.largest[name] for name in ("anonymous", "files")},
        "device_peak": torch.cuda.max_memory_allocated() / MIB**2 if torch.cuda.is_available() else None,
        "last_loss": entries[-1]["loss"],
    }


def word_level_tokenizer(vocabulary: int) -> Any:
    """A tokenizer of so many words, which nothing is tokenized with: the rows are token ids already."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = {"<pad>": 0, "<bos>": 1, "<eos>": 2} | {f"w{i}": i for i in range(3, vocabulary)}
    backend = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>")


# --- every mode -------------------------------------------------------------------------------------------------------


def in_a_process(mode: str, options: argparse.Namespace, *, checkpointing: bool) -> dict[str, Any]:
    """`measure` in a fresh process."""
    command = [sys.executable, __file__, "--one", mode, "--width", str(options.width), "--layers", str(options.layers)]
    command += ["--steps", str(options.steps)] + ["--checkpointing"] * checkpointing
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{mode}: exit code {done.returncode}\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def summary(runs: list[dict[str, Any]], base: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians over the repeats of one mode, and their growth over `base`, the same run without a reference."""

    def median(values: list[dict[str, Any]], name: str) -> float:
        return statistics.median(value[name] for value in values)

    peak, weights = median(runs, "peak"), median(runs, "weights")
    growth = peak - median(base, "peak")
    found = {
        "peak_mib": round(peak, 1),
        "peaks_mib": [round(run["peak"], 1) for run in runs],
        "ratio": round(peak / median(base, "peak"), 4),
        "growth_mib": round(growth, 1),
        "growth_in_weights": round(growth / weights, 4),
        "ratio_without_imports": round(
            (peak - median(runs, "before")) / (median(base, "peak") - median(base, "before")), 4
        ),
        "at_peak_anonymous_mib": round(statistics.median(run["split"]["anonymous"] for run in runs), 1),
        "at_peak_files_mib": round(statistics.median(run["split"]["files"] for run in runs), 1),
    }
    if runs[0]["device_peak"] is not None:
        found["device_peak_mib"] = round(median(runs, "device_peak"), 1)
        found["device_ratio"] = round(median(runs, "device_peak") / median(base, "device_peak"), 4)
    return found


def environment(options: argparse.Namespace, weights: float) -> dict[str, Any]:
    """The machine, threads and versions that the numbers depend on."""
    import safetensors
    import torch
    import transformers

    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "safetensors": safetensors.__version__,
        "system": f"{platform.system()} {platform.machine()}",
        "num_cpus": os.cpu_count(),
        "num_threads": torch.get_num_threads(),
        "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "weights_mib": round(weights, 1),
        "steps": options.steps,
        "repeats": options.repeats,
    }


def table(results: dict[str, dict[str, Any]]) -> str:
    """The summaries as text, a line per mode."""
    lines = [f"{'mode':<42}{'peak MiB':>10}{'ratio':>8}{'growth / weights':>18}{'anonymous':>11}{'files':>8}"]
    lines += [
        f"{name:<42}{r['peak_mib']:>10}{r['ratio']:>8}{r['growth_in_weights']:>18}{r['at_peak_anonymous_mib']:>11}"
        f"{r['at_peak_files_mib']:>8}"
        for name, r in results.items()
    ]
    return "\n".join(lines)


def main() -> None:
    """Measures one mode and prints it as JSON (`--one`), or all of them and writes the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--one", choices=MODES, help="measure this mode here, and print it as JSON")
    parser.add_argument("--checkpointing", action="store_true", help="with --one: recompute activations")
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "memory.json")
    options = parser.parse_args()
    if options.one:
        shape = {"width": options.width, "layers": options.layers, "steps": options.steps}
        sys.stdout.write(json.dumps(measure(options.one, checkpointing=options.checkpointing, **shape)) + "\n")
        return
    settings = [(mode, checkpointing) for checkpointing in (False, True) for mode in options.modes]
    runs: dict[tuple[str, bool], list[dict[str, Any]]] = {setting: [] for setting in settings}
    for _ in range(options.repeats):
        for mode, checkpointing in settings:
            runs[mode, checkpointing].append(in_a_process(mode, options, checkpointing=checkpointing))
    results = {
        f"{mode}{', checkpointing' if checkpointing else ''}": summary(found, runs["reference_free", checkpointing])
        for (mode, checkpointing), found in runs.items()
    }
    sys.stdout.write(table(results) + "\n")
    document = {"environment": environment(options, next(iter(runs.values()))[0]["weights"]), "results": results}
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(document, indent=2) + "\n")


if __name__ == "__main__":
    main()
