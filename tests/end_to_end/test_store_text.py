"""Text and messages before the store: what changes token ids is scored again for the rows whose ids change, no others.

Which rows these are is found with the tokenizer's own `apply_chat_template`, without the package.
"""

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset

from families import tiny_model
from holdfast.losses import LOSSES
from policies import config, logged, trainer
from tiny import CHAT_TEMPLATE, preference_rows, tokenizer

AHEAD = {"reference": "precomputed", "reference_audit": False, "layout": "padded"}
"""One row for each completion, and no layout to be compared with the padded one: every row without gradients is the
reference's."""
ROWS = preference_rows(24)

Row = dict[str, Any]


@pytest.fixture
def scored() -> Iterator[list[int]]:
    """The rows of each forward pass without gradients, of whatever module: without evaluation and audit, these are the
    reference's. Counted below the package, so that nothing of it is believed."""
    found: list[int] = []
    decoder = type(tiny_model().model)

    def count(module: torch.nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        if isinstance(module, decoder) and not torch.is_grad_enabled():
            found.append(len(kwargs["input_ids"]))

    hook = torch.nn.modules.module.register_module_forward_hook(
        lambda module, args, kwargs, output: count(module, args, kwargs), with_kwargs=True
    )
    yield found
    hook.remove()


def completions(rows: list[Row], template: str = CHAT_TEMPLATE) -> set[tuple[tuple[int, ...], ...]]:
    """(prompt ids, completion ids) of the rows, each once."""
    found = set()
    processing = tokenizer()
    for row in rows:
        options = {"chat_template": template, "tokenize": True, "return_dict": False}
        prompt = processing.apply_chat_template(row["prompt"], add_generation_prompt=True, **options)
        for side in ("chosen", "rejected"):
            whole = processing.apply_chat_template(row["prompt"] + row[side], **options)
            assert whole[: len(prompt)] == prompt
            found.add((tuple(prompt), tuple(whole[len(prompt) :])))
    return found


def run(folder: Path, rows: list[Row], template: str = CHAT_TEMPLATE, **options: Any) -> Any:
    """A trainer of the tiny model on these rows, each of which has its completions scored or found."""
    processing = tokenizer()
    processing.chat_template = template
    args = config(folder, **AHEAD | options)
    return trainer(tiny_model(vocab_size=512), args, train_dataset=Dataset.from_list(rows), processing_class=processing)


def in_long_conversations(text: str) -> str:
    """A template that says so much more where a conversation has more than a question and an answer."""
    return "{%- if messages | length > 2 %}" + text + "{% endif %}" + CHAT_TEMPLATE


SYSTEM = {"role": "system", "content": "Be kind."}

CHANGES: dict[str, tuple[list[Row], str]] = {
    "a template that touches some rows": (ROWS, in_long_conversations("<|im_start|>system\nBe kind.<|im_end|>\n")),
    "a template that touches all rows": (ROWS, CHAT_TEMPLATE.replace("<|im_end|>\n", "<|im_end|>")),
    "a template that writes the same": (ROWS, "{#- Another one. -#}" + CHAT_TEMPLATE),
    "a system prompt for every third row": (
        [row | {"prompt": [SYSTEM, *row["prompt"]]} if n % 3 == 0 else row for n, row in enumerate(ROWS)],
        CHAT_TEMPLATE,
    ),
    "a system prompt for all rows": ([row | {"prompt": [SYSTEM, *row["prompt"]]} for row in ROWS], CHAT_TEMPLATE),
    "one edited row": (
        [*ROWS[:7], ROWS[7] | {"chosen": [{"role": "assistant", "content": "No."}]}, *ROWS[8:]],
        CHAT_TEMPLATE,
    ),
}
NUM_TOUCHED = {"some": range(1, 48), "all": range(46, 49), "same": range(1), "every third": range(14, 17)}


@pytest.mark.slow
@pytest.mark.parametrize("change", CHANGES)
def test_what_changes_ids_is_scored_where_they_change(change: str, tmp_path: Path, scored: list[int]) -> None:
    before = completions(ROWS)
    run(tmp_path, ROWS)
    assert sum(scored) == len(before)
    scored.clear()
    rows, template = CHANGES[change]
    touched = completions(rows, template) - before
    for words, expected in NUM_TOUCHED.items():
        assert words not in change or len(touched) in expected
    changed = run(tmp_path, rows, template)
    assert sum(scored) == len(touched)
    scored.clear()
    changed.train()
    assert scored == []
    live = run(tmp_path, rows, template, reference="model")
    live.train()
    assert logged(changed) == pytest.approx(logged(live), abs=1e-5)


def _as_ids(row: Row) -> Row:
    (prompt, _), _ = pair = sorted(completions([row]), key=lambda ids: ids[1] != _answer(row, "chosen"))
    return {"prompt_ids": prompt, "chosen_ids": pair[0][1], "rejected_ids": pair[1][1]}


def _answer(row: Row, side: str) -> tuple[int, ...]:
    return tuple(tokenizer()(row[side][0]["content"] + "<|im_end|>\n", add_special_tokens=False)["input_ids"])


COLUMNS: dict[str, Callable[[Row], Row]] = {
    "an implicit prompt": lambda row: {side: row["prompt"] + row[side] for side in ("chosen", "rejected")},
    "other columns beside them": lambda row: {"source": "web", **row, "score": 0.5},
    "another order of columns": lambda row: dict(reversed(row.items())),
    "token ids": _as_ids,
}


@pytest.mark.slow
@pytest.mark.parametrize("columns", COLUMNS)
def test_names_of_columns_change_nothing(columns: str, tmp_path: Path, scored: list[int]) -> None:
    run(tmp_path, ROWS)
    assert sum(scored) == len(completions(ROWS))
    scored.clear()
    named = run(tmp_path, [COLUMNS[columns](row) for row in ROWS])
    named.train()
    assert scored == []
    live = run(tmp_path, ROWS, reference="model")
    live.train()
    assert logged(named) == pytest.approx(logged(live), abs=1e-5)


# --- the real pairs ---------------------------------------------------------------------------------------------------

NUM_PAIRS, NUM_RUNS = 60, 20
UNFIT = {"exo_pair": {"label_smoothing": 0.1}, "robust": {"label_smoothing": 0.1}}


def real_pairs() -> list[Row]:
    """Pairs of real conversations with short prompts; skips the test where there are none."""
    default = "shared/data/preference_pairs_en.jsonl"
    places = [folder / default for folder in Path(__file__).parents]
    named = os.environ.get("HOLDFAST_REAL_PAIRS")
    path = Path(named) if named else next(filter(Path.is_file, places), None)
    if path is None or not path.is_file():
        pytest.skip("no real pairs: set HOLDFAST_REAL_PAIRS")
    table = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    table.sort(key=lambda row: sum(len(turn["content"]) for turn in row["prompt"]))
    return [{name: row[name] for name in ("prompt", "chosen", "rejected")} for row in table[:NUM_PAIRS]]


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["padded", "auto"])
def test_a_sweep_over_real_pairs_pays_once(layout: str, tmp_path: Path, scored: list[int]) -> None:
    """Twenty runs over loss, beta, learning rate and seed: the reference runs forward in the first, and in no other."""
    pairs = Dataset.from_list(real_pairs())
    texts = [turn["content"] for row in pairs for side in ("prompt", "chosen", "rejected") for turn in row[side]]
    processing = tokenizer(texts, vocab_size=2_000)
    losses = [name for name in LOSSES if LOSSES[name].needs_reference]
    assert len(losses) >= 10

    def forwards(number: int, reference: str, loss: str) -> tuple[list[float], int]:
        """The losses of a run, and how many forward passes it made without gradients."""
        options = {"beta": (0.05, 0.1, 0.5)[number % 3], "learning_rate": (1e-3, 1e-2)[number % 2], "seed": number}
        options |= {"loss_type": loss, "reference": reference} | UNFIT.get(loss, {})
        args = config(
            tmp_path / f"{number}", reference_audit=False, layout=layout, max_length=64,
            per_device_train_batch_size=4, **options,
        )  # fmt: skip
        scored.clear()
        made = trainer(tiny_model(vocab_size=2_000), args, train_dataset=pairs, processing_class=processing)
        made.train()
        return logged(made), len(scored)

    _, num_without = forwards(0, "none", "simpo")  # the layout is tried on the first batch
    assert num_without == {"padded": 0, "auto": 2}[layout]
    for number in range(NUM_RUNS):
        loss = losses[number % len(losses)]
        found, num_forwards = forwards(number, "precomputed", loss)
        if number == 0:
            assert num_forwards > num_without + 5
            assert layout != "padded" or 1.5 * NUM_PAIRS < sum(scored) <= 2 * NUM_PAIRS
        else:
            assert num_forwards == num_without, f"run {number} has asked the reference"
        if number < len(losses):
            online, num_forwards = forwards(number, "model", loss)
            assert num_forwards >= num_without + 4
            assert len(found) == 4
            assert found == pytest.approx(online, rel=1e-5, abs=1e-5)
