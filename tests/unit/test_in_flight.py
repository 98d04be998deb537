"""A batch in flight while the store is filled: what is launched and read when, and that nothing is lost."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import holdfast.reference.sources.filling as filling
from holdfast.batch import ContentId, PairBatch, SequenceLogps
from holdfast.data.completions import Completions
from holdfast.data.layouts.padded import PaddedLayout
from holdfast.reference.sources.filling import filled_by_claims, filled_in_lockstep
from holdfast.reference.sources.in_flight import Started
from holdfast.store.store import LogpStore
from policies import rows
from stores import KEY

DATA = rows(10)


def nothing(*_: Any) -> None:
    pass


def completions(num_tokens: int = 45) -> Completions:
    return Completions(DATA, PaddedLayout(0), PairBatch.from_tensors, 1, num_tokens)


class Events:
    """What happens, in its order, on a device whose forward passes end only when somebody waits for them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, is_device: bool = True) -> None:
        self.order: list[str] = []
        self.tokens: dict[int, int] = {}
        self.spoiled: int | None = None
        self.failing: int | None = None
        started_of = Started.of

        def of(batch: PairBatch, logps: SequenceLogps) -> Started:
            started = started_of(batch, logps)
            number = self.num_launched - 1
            if not is_device:
                self.order.append(f"read {number}")
                return started
            final, values = started.values[0], torch.full_like(started.values[0], 7.0)

            def wait() -> None:
                self.order.append(f"read {number}")
                values.copy_(final)

            return replace(started, values=(values, started.values[1]), event=type("Event", (), {"synchronize": wait}))

        monkeypatch.setattr(Started, "of", staticmethod(of))

    @property
    def num_launched(self) -> int:
        return sum(event.startswith("launch") for event in self.order)

    def score(self, batch: PairBatch) -> SequenceLogps:
        number = self.num_launched
        if number == self.failing:
            raise RuntimeError("out of memory")
        self.order.append(f"launch {number}")
        self.tokens[number] = int(batch.inputs["attention_mask"].sum())
        ids = [torch.full((length,), -(abs(high) % 1000 + 1) / 7) for (high, _), length in
               zip(batch.content_ids(), batch.lengths(), strict=True)]  # fmt: skip
        per_token = torch.cat(ids)
        if number == self.spoiled:
            per_token[-1] = float("nan")
        return SequenceLogps(per_token=per_token, sequence=batch.sequence, num_sequences=batch.num_sequences)


def expected() -> dict[ContentId, Tensor]:
    batch = PairBatch.from_tensors(PaddedLayout(0)(DATA.to_list()))
    return {
        key: torch.full((length,), -(abs(key[0]) % 1000 + 1) / 7)
        for key, length in zip(batch.content_ids(), batch.lengths(), strict=True)
    }


def stored(root: Path) -> dict[ContentId, Tensor]:
    store = LogpStore.open(root, KEY)
    return store.get(expected())


FILLS: dict[str, Callable[..., Any]] = {"claims": filled_by_claims, "lockstep": filled_in_lockstep}


@pytest.mark.parametrize("fill", FILLS)
def test_the_next_batch_is_launched_before_one_is_read(
    fill: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events, checks = Events(monkeypatch), []
    with LogpStore.open(tmp_path, KEY) as store:
        done = list(FILLS[fill](store, completions(), events.score, "it", nothing, lambda: checks.append(1)))
    num = events.num_launched
    assert num > 3
    wanted = ["launch 0"]
    for number in range(1, num):
        wanted += [f"launch {number}", f"read {number - 1}"]
    assert events.order == [*wanted, f"read {num - 1}"]
    assert [tokens for _, tokens in done] == [events.tokens[number] for number in range(num)]
    assert sum(count for count, _ in done) == len(expected())
    found = stored(tmp_path)
    assert found.keys() == expected().keys()
    assert all(torch.equal(found[key], value) for key, value in expected().items())
    if fill == "claims":
        assert len(checks) >= num


@pytest.mark.parametrize("fill", FILLS)
def test_on_a_cpu_each_batch_is_read_at_once(fill: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events = Events(monkeypatch, is_device=False)
    with LogpStore.open(tmp_path, KEY) as store:
        for number, _ in enumerate(FILLS[fill](store, completions(), events.score, "it", nothing, nothing)):
            assert events.order[-2:] == [f"launch {number}", f"read {number}"]
            assert store.num_completions > 0


def test_a_block_is_written_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before the next block is claimed, the last batch of the one before is read, and its shard is on disk."""
    events, on_disk = Events(monkeypatch), []
    claimed = filling.claimed_blocks

    def blocks(store: LogpStore, ids: Any, **options: Any) -> Any:
        for block in claimed(store, ids, num_per_block=6, **options):
            on_disk.append((len(stored(tmp_path)), events.order[-1:]))
            yield block

    monkeypatch.setattr(filling, "claimed_blocks", blocks)
    with LogpStore.open(tmp_path, KEY) as store:
        list(filled_by_claims(store, completions(), events.score, "it", nothing, nothing))
    assert [count for count, _ in on_disk] == [0, 6, 12, 18][: len(on_disk)]
    assert all(event[0].startswith("read") for _, event in on_disk[1:])
    assert len(stored(tmp_path)) == len(expected())


def test_an_error_of_the_next_batch_keeps_the_one_in_flight(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events = Events(monkeypatch)
    events.failing = 3
    with LogpStore.open(tmp_path, KEY) as store, pytest.raises(RuntimeError, match="out of memory"):
        list(filled_by_claims(store, completions(), events.score, "it", nothing, nothing))
    assert events.order[-2:] == ["read 1", "read 2"]
    kept, events.failing = len(stored(tmp_path)), None
    with LogpStore.open(tmp_path, KEY) as store:
        done = list(filled_by_claims(store, completions(), events.score, "it", nothing, nothing))
    assert sum(count for count, _ in done) == len(expected()) - kept
    assert stored(tmp_path).keys() == expected().keys()


def test_an_error_names_the_batch_that_it_is_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The log-prob of the second batch is NaN, which is found when the third was launched already; the first and the
    third are kept."""
    events = Events(monkeypatch)
    events.spoiled = 1
    batches: list[PairBatch] = []

    def score(batch: PairBatch) -> SequenceLogps:
        batches.append(batch)
        return events.score(batch)

    with LogpStore.open(tmp_path, KEY) as store:
        with pytest.raises(ValueError, match=r"\(it\) gave a log-prob of nan in completion (\d+)") as raised:
            list(filled_by_claims(store, completions(), score, "it", nothing, nothing))
        assert f"completion {batches[1].num_sequences - 1} of" in str(raised.value)
    assert stored(tmp_path).keys() == {*batches[0].content_ids(), *batches[2].content_ids()}


def test_a_process_that_is_asked_to_end_reads_what_is_in_flight(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events = Events(monkeypatch)
    monkeypatch.setattr(filling, "is_asked", lambda: events.num_launched == 3)
    with LogpStore.open(tmp_path, KEY) as store:

        def check() -> None:
            if events.num_launched == 3:
                store.flush()
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            list(filled_by_claims(store, completions(), events.score, "it", nothing, check))
    assert events.order == ["launch 0", "launch 1", "read 0", "launch 2", "read 1", "read 2"]
    assert len(stored(tmp_path)) > 0


def test_pairs_in_flight_are_not_scored_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two neighbours that are the same: the second finds the first on its way."""
    events = Events(monkeypatch)
    batch = PairBatch.from_tensors(PaddedLayout(0)(DATA.to_list()[:2]))

    class Twice:
        def batches(self, blocks: Any, missing: Any, deal: Any = None) -> Any:
            for _ in range(2):
                if missing(batch.content_ids()):
                    yield batch

    with LogpStore.open(tmp_path, KEY) as store:
        data: Any = Twice()
        list(filled_by_claims(store, data, events.score, "it", nothing, nothing))
    assert events.order == ["launch 0", "read 0"]
