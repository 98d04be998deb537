"""Log-probs stored by one run and found by the next: exactly where nothing changed that changes a number (law L6)."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset

from families import tiny_model
from holdfast.losses import LOSSES
from holdfast.progress import Bar, bar
from holdfast.reference.sources import stored as precomputed
from holdfast.store import work_sharing as claims
from holdfast.store.maintenance import stores, verify
from holdfast.store.manifest import MANIFEST
from holdfast.store.store import LAST_USED, default_root
from policies import POLICIES, config, logged, rows, trainer
from stores import ODD, Counting, odd

AHEAD = {"reference": "precomputed"}


@pytest.fixture
def counting(monkeypatch: pytest.MonkeyPatch) -> Counting:
    return Counting(monkeypatch)


NUM_UNLIKE = 2 * len(rows()) - 1  # rows 0 and 1 share one


def _reordered() -> Dataset:
    return rows().select([*range(11, -1, -1)])


SAME: dict[str, dict[str, Any]] = {
    "learning rate": {"learning_rate": 1e-3},
    "output_dir": {"output_dir": "elsewhere"},
    "seed": {"seed": 7, "data_seed": 8},
    "beta": {"beta": 0.7},
    "loss": {"loss_type": "ipo"},
    "ld_alpha": {"ld_alpha": 0.3},
    "order": {"train_dataset": _reordered},
    "subset": {"train_dataset": lambda: rows().select(range(2, 9))},
    "epochs": {"max_steps": -1, "num_train_epochs": 2},
    "batch size": {"per_device_train_batch_size": 5},
    "scoring batch size": {"precompute_ref_batch_size": 1},
    "swapped": {
        "train_dataset": lambda: rows().rename_columns({"chosen_ids": "rejected_ids", "rejected_ids": "chosen_ids"})
    },
    "other columns": {"train_dataset": lambda: rows().add_column("source", ["web"] * 12)},
    "in memory": {"train_dataset": lambda: Dataset.from_dict(rows().to_dict())},
    "evaluation": {"eval_dataset": lambda: rows().select(range(3))},
    "optimizer": {"optim": "adamw_torch", "weight_decay": 0.1, "learning_rate": 0.01},
    "no truncation": {"max_length": None},
}


@pytest.mark.slow
@pytest.mark.parametrize("change", SAME)
def test_what_changes_no_number_is_found(change: str, tmp_path: Path, counting: Counting) -> None:
    first = trainer(tiny_model(), config(tmp_path, **AHEAD))
    assert counting.scored == NUM_UNLIKE
    options = {name: value() if callable(value) else value for name, value in SAME[change].items()}
    parts = {name: options.pop(name) for name in ("train_dataset", "eval_dataset") if name in options}
    args = config(tmp_path / options.pop("output_dir", ""), **AHEAD | options)
    again = trainer(tiny_model(), args, **parts)
    assert counting.scored == NUM_UNLIKE
    assert again.reference.fingerprint() == first.reference.fingerprint()
    again.train()
    assert counting.scored == NUM_UNLIKE
    args.reference = "model"
    live = trainer(tiny_model(), args, **parts)
    live.train()
    assert logged(again) == pytest.approx(logged(live), rel=1e-4, abs=1e-4)


def _one_ulp(model: Any) -> Any:
    with torch.no_grad():
        weight = model.model.layers[0].mlp.up_proj.weight
        weight[3, 5] = torch.nextafter(weight[3, 5], torch.tensor(9.0))
    return model


OTHER: dict[str, tuple[Any, dict[str, Any]]] = {
    "one weight by one ulp": (lambda: _one_ulp(tiny_model()), {}),
    "rope_theta": (lambda: tiny_model(rope_parameters={"rope_type": "default", "rope_theta": 5e5}), {}),
    "norm epsilon": (lambda: tiny_model(rms_norm_eps=1e-3), {}),
    "dtype": (lambda: tiny_model().bfloat16(), {}),
    "autocast": (tiny_model, {"bf16": True}),
    "attention": (lambda: tiny_model(attn_implementation="eager"), {}),
    "layout": (tiny_model, {"layout": "padded"}),
    "trained adapter": (lambda: POLICIES["lora_sft"](), {}),
}


@pytest.mark.slow
@pytest.mark.parametrize("change", OTHER)
def test_what_changes_numbers_is_scored_again(change: str, tmp_path: Path, counting: Counting) -> None:
    trainer(tiny_model(), config(tmp_path, **AHEAD))
    make, options = OTHER[change]
    made: list[Any] = []
    assert counting.during(lambda: made.append(trainer(make(), config(tmp_path, **AHEAD, **options)))) == NUM_UNLIKE
    assert len(stores(default_root())) == 2
    made[0].train()
    assert counting.during(lambda: trainer(tiny_model(), config(tmp_path, **AHEAD))) == 0
    assert counting.during(lambda: trainer(make(), config(tmp_path, **AHEAD, **options))) == 0
    live = trainer(make(), config(tmp_path, reference="model", **options))
    live.train()
    is_rounded = change in ("dtype", "autocast")  # batches of another shape are rounded in another way
    assert logged(made[0]) == pytest.approx(logged(live), abs=1e-2 if is_rounded else 1e-5)


def test_truncation_scores_only_the_rows_it_touches(tmp_path: Path, counting: Counting) -> None:
    table = rows().to_list()
    trainer(tiny_model(), config(tmp_path, **AHEAD, max_length=None))
    lengths = {
        (tuple(row["prompt_ids"]), tuple(row[side])): len(row["prompt_ids"]) + len(row[side])
        for row in table
        for side in ("chosen_ids", "rejected_ids")
    }
    limit = 13
    touched = sum(length > limit for length in lengths.values())
    assert 0 < touched < len(lengths)
    assert counting.during(lambda: trainer(tiny_model(), config(tmp_path, **AHEAD, max_length=limit))) == touched
    assert counting.during(lambda: trainer(tiny_model(), config(tmp_path, **AHEAD, max_length=limit))) == 0


def test_a_longer_prompt_is_another_completion(tmp_path: Path, counting: Counting) -> None:
    trainer(tiny_model(), config(tmp_path, **AHEAD))
    longer = rows().map(lambda row: {"prompt_ids": [5, *row["prompt_ids"]]})
    assert counting.during(lambda: trainer(tiny_model(), config(tmp_path, **AHEAD), train_dataset=longer)) == NUM_UNLIKE


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind", ["lora_sft", *(pytest.param(kind, marks=pytest.mark.nightly) for kind in ("full", "lora_fresh", "dora"))]
)
def test_a_sweep_pays_once(kind: str, tmp_path: Path, counting: Counting) -> None:
    """Twenty runs over losses and betas: the first scores, the others find, and each follows its live reference."""
    unfit = ("aot", "sppo", "exo")
    losses = [name for name in LOSSES if LOSSES[name].needs_reference and not name.startswith(unfit)][:9]
    runs = [(name, beta) for beta in (0.1, 0.5) for name in losses][:19] + [("sigmoid", 0.9)] * 2
    for number, (loss, beta) in enumerate(runs[:20]):
        options: dict[str, Any] = {"loss_type": loss, "beta": beta, "max_steps": 2, "learning_rate": 0.01}
        ahead = trainer(POLICIES[kind](), config(tmp_path, **AHEAD, **options))
        ahead.train()
        assert counting.scored == NUM_UNLIKE, "the first run, and no other"
        if number in (0, 7, 19):
            before = counting.scored
            live = trainer(POLICIES[kind](), config(tmp_path, reference="model", **options))
            live.train()
            counting.scored = before
            assert logged(ahead) == pytest.approx(logged(live), abs=1e-5)


def test_a_damaged_store_is_scored_again(tmp_path: Path, counting: Counting, caplog: pytest.LogCaptureFixture) -> None:
    first = trainer(tiny_model(), config(tmp_path, **AHEAD))
    first.train()
    (folder,) = (facts.folder for facts in stores(default_root()))
    shard = max((path for path in folder.iterdir()), key=lambda path: path.stat().st_size)
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 4
    shard.write_bytes(content)
    again = trainer(tiny_model(), config(tmp_path, **AHEAD))
    assert counting.scored == 2 * NUM_UNLIKE
    assert "damaged" in caplog.text
    again.train()
    assert logged(again) == logged(first)


@pytest.mark.slow
@pytest.mark.covering(1)
@pytest.mark.parametrize(
    "kind", ["pipe", *(pytest.param(kind, marks=pytest.mark.nightly) for kind in ODD if kind != "pipe")]
)
@pytest.mark.parametrize("name", ["manifest", "shard", "last-used"])
def test_training_goes_on_whatever_a_file_of_the_store_is(
    name: str, kind: str, tmp_path: Path, counting: Counting
) -> None:
    """What cannot be read is scored again, and nothing else; the losses are the same."""
    first = trainer(tiny_model(), config(tmp_path, **AHEAD))
    first.train()
    (folder,) = (facts.folder for facts in stores(default_root()))
    (shard,) = folder.glob("*.safetensors")
    with odd({"manifest": folder / MANIFEST, "shard": shard, "last-used": folder / LAST_USED}[name], kind):
        again = trainer(tiny_model(), config(tmp_path, **AHEAD))
        assert counting.scored == (2 if name == "shard" else 1) * NUM_UNLIKE
        again.train()
    assert logged(again) == logged(first)
    assert verify(default_root()) == []


def test_the_store_can_be_elsewhere(tmp_path: Path, counting: Counting) -> None:
    elsewhere = str(tmp_path / "store")
    trainer(tiny_model(), config(tmp_path, **AHEAD, reference_store=elsewhere))
    trainer(tiny_model(), config(tmp_path, **AHEAD, reference_store=elsewhere))
    assert counting.scored == NUM_UNLIKE
    assert len(stores(tmp_path / "store")) == 1
    assert stores(default_root()) == []


def test_a_file_where_the_store_is_to_be(tmp_path: Path) -> None:
    (tmp_path / "store").write_text("in the way")
    with pytest.raises(ValueError, match=r"log-prob store .*store.*cannot be written"):
        trainer(tiny_model(), config(tmp_path, **AHEAD, reference_store=str(tmp_path / "store")))


def test_completions_of_many_pairs_are_scored_in_few_rows(tmp_path: Path, counting: Counting) -> None:
    """Four completions of each prompt in all six pairs: four rows where the pairs have twelve, and less padding."""
    table = []
    for row in rows(8, seed=2).to_list():
        draw = torch.Generator().manual_seed(len(table))
        ends = [torch.randint(3, 90, (int(n),), generator=draw).tolist() for n in (2, 7, 12, 30)]
        pairs = [(a, b) for i, a in enumerate(ends) for b in ends[i + 1 :]]
        table += [{"prompt_ids": row["prompt_ids"], "chosen_ids": a, "rejected_ids": b} for a, b in pairs]
    data = Dataset.from_list(table)
    ours = trainer(tiny_model(), config(tmp_path, **AHEAD), train_dataset=data)
    assert counting.scored == 8 * 4
    live = trainer(tiny_model(), config(tmp_path, reference="model"), train_dataset=data)
    ours.train()
    live.train()
    assert logged(ours) == pytest.approx(logged(live), abs=1e-5)


def test_the_progress_bar_says_what_is_waited_for(
    tmp_path: Path, counting: Counting, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another process has claimed the only block, until it gives it up."""
    said, answers, claim = [], iter([False, False]), claims._claim

    @contextmanager
    def noting(*args: Any, **options: Any) -> Iterator[Bar]:
        with bar(*args, **options) as shown:
            plain: Any = shown.note
            shown.note = lambda text: said.append(text) or plain(text)  # type: ignore[method-assign]
            yield shown

    monkeypatch.setattr(precomputed, "bar", noting)
    monkeypatch.setattr(claims, "_claim", lambda *parts: next(answers, True) and claim(*parts))
    monkeypatch.setattr(claims, "SHORTEST_POLL_SECONDS", 0.001)
    trainer(tiny_model(), config(tmp_path, **AHEAD))
    assert counting.scored == NUM_UNLIKE
    assert said[0] == "waiting for 1 block of other processes"
    assert said[1].endswith(" tokens/s")


# --- streams and moving references ------------------------------------------------------------------------------------


def test_a_stream_is_scored_once(tmp_path: Path, counting: Counting) -> None:
    """Window by window in the first run; in a second pass and a second run everything is found, weights untouched."""
    options = AHEAD | {"reference_window": 2, "max_steps": 8}
    first = trainer(tiny_model(), config(tmp_path / "a", **options), train_dataset=rows().to_iterable_dataset())
    first.train()
    once = counting.scored
    assert NUM_UNLIKE <= once <= 2 * len(rows()) + 6, "two sides of each pair, and the audit's batch"
    args = config(tmp_path / "b", **options | {"beta": 0.7})
    second = trainer(tiny_model(), args, train_dataset=rows().to_iterable_dataset())
    second.train()
    assert counting.scored == once
    live = trainer(tiny_model(), config(tmp_path, reference="model", max_steps=8), train_dataset=_streamed())
    live.train()
    assert logged(first) == pytest.approx(logged(live), abs=1e-5)


def _streamed() -> Any:
    return rows().to_iterable_dataset()


@pytest.mark.slow
@pytest.mark.parametrize("keeps", [False, True])
@pytest.mark.parametrize("alpha", [0.3, 1.0])
def test_past_versions_leave_the_store(alpha: float, keeps: bool, tmp_path: Path) -> None:
    moving = {"sync_ref_model": True, "ref_model_sync_steps": 2, "ref_model_mixup_alpha": alpha}
    ours = trainer(tiny_model(), config(tmp_path, **AHEAD, **moving, max_steps=6, reference_store_versions=keeps))
    ours.train()
    assert ours.reference.version == 3
    ours.reference.state_dict()  # what is in memory is written
    versions = sorted(facts.manifest.key.version for facts in stores(default_root()) if facts.manifest is not None)
    assert versions == ([0, 1, 2] if keeps else [])
    live = trainer(tiny_model(), config(tmp_path, **moving, max_steps=6))
    live.train()
    assert logged(ours) == pytest.approx(logged(live), abs=1e-5)


def test_training_goes_on_where_the_store_is_full(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from holdfast.store.store import LogpStore

    def full(self: Any, logps: Any) -> None:
        raise ValueError("there is no room for them.")

    monkeypatch.setattr(LogpStore, "add", full)
    ours = trainer(tiny_model(), config(tmp_path, **AHEAD, reference_window=2))
    ours.train()
    assert caplog.text.count("there is no room for them. Training goes on") == 1
    live = trainer(tiny_model(), config(tmp_path, reference="model"))
    live.train()
    assert logged(ours) == pytest.approx(logged(live), abs=1e-5)


def test_versions_are_kept_of_a_moving_reference_only(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"reference_store_versions=True was asked for, but no log-probs of a moving"):
        config(tmp_path, **AHEAD, reference_store_versions=True)
    with pytest.raises(ValueError, match=r"reference_store='here' was asked for, but no log-probs are computed ahead"):
        config(tmp_path, reference_store="here")
