"""The facts of a small run, for tests of its record and of what is said of it."""

from holdfast.record import Audit, Dataset, Facts, Layout, Memory, Model, Reference

FACTS = Facts(
    versions={"holdfast": "0.1.0"},
    started="2026-01-02T03:04:05+00:00",
    command=("holdfast", "train", "run.yaml"),
    model=Model(name="base", class_name="LlamaForCausalLM", num_parameters=7, num_trainable=3, dtype="float32"),
    reference=Reference(description="a copy", kind="model", held_bytes=28),
    audit=Audit(line="equal", mean_gap_nats=0.0, largest_gap_nats=0.0),
    layout=Layout(name="padded"),
    data={"train": Dataset(num_rows=3, num_used=2, left_out={"too long": 1}, sources={"a": 2}), "eval": Dataset()},
    memory=Memory(weights=28, reference=28, gradients=12, optimizer=24),
    loss_types=("sigmoid",),
    beta=0.1,
    options={"seed": 3, "columns": {"prompt": "question"}},
    num_processes=1,
    device="cpu",
    max_steps=4,
    num_epochs=2.0,
)
