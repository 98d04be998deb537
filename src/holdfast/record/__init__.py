"""The record of a run: `<output_dir>/record/`, what a run was made of and what it logged, as JSON alone.

`facts` says what a run was made of: model, reference, data, layout, memory, options. `entries` are what happens in it:
logs, events, samples; `alarm` says when logs are alarming. `writer` writes both while the run trains, `reading` reads
them. `read(output_dir)` is all that a report needs: no model is loaded and nothing of torch is imported. A kill at any
instant leaves a record that is read.
"""

from holdfast.record.alarm import Alarm, Alarms, alarms, training_logs
from holdfast.record.entries import Event, Log, Sample
from holdfast.record.facts import (
    Audit,
    Dataset,
    Facts,
    Layout,
    Memory,
    Model,
    Reference,
    Resumption,
)
from holdfast.record.reading import Record, has_record, read
from holdfast.record.writer import RecordWriter

__all__ = [
    "Alarm",
    "Alarms",
    "Audit",
    "Dataset",
    "Event",
    "Facts",
    "Layout",
    "Log",
    "Memory",
    "Model",
    "Record",
    "RecordWriter",
    "Reference",
    "Resumption",
    "Sample",
    "alarms",
    "has_record",
    "read",
    "training_logs",
]
