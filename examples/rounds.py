"""Rounds (iterative DPO): in each, the newest policy answers every prompt, a judge ranks its answers, and it trains on.

Every round names its reference: `base`, the model that the first round began with, or `before`, the policy that this
round begins with. With `base` a round trains on the pairs of all rounds so far (Dong et al. 2024, arXiv:2405.07863),
with `before` on its own. All rounds share one store, so a round scores only the completions that are new to its
reference. A script that was killed goes on: answers are not drawn again, and log-probs not computed again.

Usage: python examples/rounds.py MODEL PAIRS.jsonl OUTPUT [base|before]
"""

import hashlib
import json
import os
import sys
from itertools import combinations
from pathlib import Path

import torch
from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

from holdfast import DPOConfig, DPOTrainer
from holdfast.quickstart.village import judge  # (prompt, first, second) -> probability that `first` is better

NUM_ROUNDS = 3
NUM_ANSWERS = 4  # to each prompt, drawn at temperature 1
NUM_PROMPTS = 32  # answered at a time
LEARNING_RATE = 1e-4  # for the quickstart's small model; 5e-7 to 5e-6 is usual for all weights of a large one


def main(model: str, pairs: str, output: str, which: str = "base") -> None:
    if which not in ("base", "before"):
        sys.exit(f"The reference of a round is `base` or `before`; found {which!r}.")
    check_settings(Path(output), model, prompts_of(pairs), which)
    policy, drawn = model, []
    for number in range(1, NUM_ROUNDS + 1):
        folder = Path(output, f"round-{number}")
        drawn.append(folder / "pairs.jsonl")
        if not drawn[-1].exists():
            write_whole(drawn[-1], pairs_of(policy, prompts_of(pairs), seed=number))
        reference, data = (model, drawn) if which == "base" else (policy, drawn[-1:])
        if not (folder / "trainer_state.json").exists():  # the last file of a round
            train(policy, reference, data, folder, store=f"{output}/store")
        print(f"round {number}: {policy} trained against {reference} on {sum(map(num_rows, data))} pairs: {folder}")
        policy = str(folder)


def train(policy: str, reference: str, pairs: list[Path], folder: Path, *, store: str) -> None:
    """A round: `policy` is trained on the pairs against `reference`, and saved in `folder`."""
    trainer = DPOTrainer(
        model=policy,
        ref_model=reference,
        args=DPOConfig(
            output_dir=str(folder),
            beta=0.1,
            learning_rate=LEARNING_RATE,
            num_train_epochs=1,
            per_device_train_batch_size=16,
            logging_steps=5,
            precompute_ref_log_probs=True,
            reference_store=store,
            save_strategy="no",
            report_to="none",
        ),
        train_dataset=load_dataset("json", data_files=[str(path) for path in pairs], split="train"),
    )
    trainer.train()
    trainer.save_model()
    trainer.save_state()


@torch.no_grad()
def pairs_of(model: str, prompts: list[str], *, seed: int) -> list[dict]:
    """Pairs of answers that a model gives to each prompt, of which the judge prefers one."""
    tokenizer = AutoTokenizer.from_pretrained(model, padding_side="left")
    network = AutoModelForCausalLM.from_pretrained(model)
    torch.manual_seed(seed)
    rows = []
    for begin in range(0, len(prompts), NUM_PROMPTS):
        asked = [[{"role": "user", "content": prompt}] for prompt in prompts[begin : begin + NUM_PROMPTS]]
        texts = tokenizer.apply_chat_template(asked, add_generation_prompt=True, tokenize=False)
        tokens = tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=False)
        found = network.generate(
            input_ids=tokens["input_ids"],
            attention_mask=tokens["attention_mask"],
            max_new_tokens=40,
            do_sample=True,
            num_return_sequences=NUM_ANSWERS,
        )
        answers = tokenizer.batch_decode(found[:, tokens["input_ids"].shape[1] :], skip_special_tokens=True)
        for place, prompt in enumerate(asked):
            own = answers[place * NUM_ANSWERS : (place + 1) * NUM_ANSWERS]
            for first, second in combinations(filter(None, dict.fromkeys(own)), 2):
                if (share := judge(prompt[0]["content"], first, second)) != 0.5:
                    rows.append(pair(prompt, *((first, second) if share > 0.5 else (second, first))))
    if not rows:
        sys.exit(f"The judge prefers none of the answers of {model} to another: there is nothing to train on.")
    return rows


def pair(prompt: list[dict[str, str]], better: str, worse: str) -> dict[str, list[dict[str, str]]]:
    """A row of training data, in messages."""
    chosen, rejected = ([{"role": "assistant", "content": text}] for text in (better, worse))
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def prompts_of(pairs: str) -> list[str]:
    """The different prompts of a file of pairs, as text."""
    rows = map(json.loads, Path(pairs).read_text(encoding="utf-8").splitlines())
    return list(dict.fromkeys(row["prompt"][-1]["content"] for row in rows))


def num_rows(path: Path) -> int:
    return len(path.read_text(encoding="utf-8").splitlines())


def check_settings(output: Path, model: str, prompts: list[str], which: str) -> None:
    """Ends the script where the output folder has rounds of other settings."""
    digest = hashlib.sha256("\n".join(prompts).encode()).hexdigest()
    settings = {"model": model, "prompts": digest, "reference": which, "constants": [NUM_ANSWERS, LEARNING_RATE]}
    path = output / "settings.json"
    if not path.exists():
        write_whole(path, [settings])
    elif (found := json.loads(path.read_text(encoding="utf-8"))) != settings:
        names = ", ".join(name for name in settings if settings[name] != found.get(name))
        sys.exit(f"The rounds in {output} were begun with other settings ({names}). Name another folder.")


def write_whole(path: Path, rows: list[dict]) -> None:
    """Writes the rows as lines of JSON; a script that is killed leaves all of them or none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    os.replace(part, path)


if __name__ == "__main__":
    main(*sys.argv[1:])
