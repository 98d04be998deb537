"""Keys of a run file that contradict each other, or the files that they name: found before anything is loaded.

`DPOConfig` checks its own options. Here is what it cannot see: which data, which reference, which files.
"""

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from holdfast.cli.text import shortened
from holdfast.cli.text_file import UnreadableError, text_of
from holdfast.cli.yaml_document import Document

if TYPE_CHECKING:
    from holdfast.cli.runfile import RunFile
    from holdfast.config import DPOConfig

_FILES = ("accelerator_config", "deepspeed", "fsdp_config")
"""Options that are a mapping, or the path of a JSON file that holds it."""


def check_json_options(document: Document, values: Mapping[str, Any], names: Collection[str]) -> None:
    """RunFileError where an option among `names` is text, but neither a mapping in JSON nor, for those that take one,
    the path of a file with one."""
    for name in names:
        text = values.get(name)
        if not isinstance(text, str):
            continue
        key = f"training.{name}"
        if text.startswith("{"):
            _check_mapping(document, key, text, "it")
        elif name in _FILES:
            try:
                _check_mapping(document, key, text_of(Path(text)), f"the file {text}")
            except (FileNotFoundError, UnreadableError) as error:
                reason = error if isinstance(error, UnreadableError) else "there is no such file"
                raise document.error(key, f"`{key}` names the file {text}: {reason}. Write a mapping.") from error
        else:
            raise document.error(key, f"`{key}` must be a mapping; found the string {shortened(repr(text))}.")


def _check_mapping(document: Document, key: str, text: str, noun: str) -> None:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise document.error(key, f"`{key}` must be a mapping, but {noun} is not JSON: {error}.") from error
    if not isinstance(value, dict):
        raise document.error(key, f"`{key}` must be a mapping, but {noun} holds a {type(value).__name__} in JSON.")


def check_agreement(run: "RunFile", args: "DPOConfig") -> None:
    """RunFileError where the options of a run do not fit its data or its reference."""
    if run["data.eval"] is None:
        _check_no_evaluation(run.document, args)
    else:
        _check_metric(run.document, args, run["data.eval"])
    if run["data.train"].is_stream:
        _check_stream(run.document, args)
    if run["data.stopping"] is not None and getattr(run["data.train"], "weights", None) is None:
        raise run.document.error(
            "data.stopping",
            f"`data.stopping` is {run['data.stopping']!r}, which says where a mixture with weights ends, and "
            "`data.train` has no weights. Give each of its datasets a `weight`, or remove the key.",
        )
    _check_reference(run, args)


def _check_no_evaluation(document: Document, args: "DPOConfig") -> None:
    is_asked = {
        "eval_strategy": args.eval_strategy != "no",
        "eval_on_start": args.eval_on_start,
        "load_best_model_at_end": args.load_best_model_at_end,
        "save_strategy": args.save_strategy == "best",
        "lr_scheduler_type": args.lr_scheduler_type in ("reduce_lr_on_plateau", "greedy"),
    }
    name = next(filter(is_asked.get, is_asked), None)
    if name is not None:
        value = getattr(args, name)
        raise document.error(
            f"training.{name}",
            f"`training.{name}` is {getattr(value, 'value', value)!r}, which needs an evaluation, and there is no "
            "`data.eval`. Name the pairs to evaluate on as `data.eval`, or remove the key.",
        )


def _check_metric(document: Document, args: "DPOConfig", sources: Any) -> None:
    """With several evaluation sets, a metric has the name of its set in front."""
    metric, key = args.metric_for_best_model, "training.metric_for_best_model"
    if not isinstance(sources, dict) or metric is None:
        return
    if not any(metric.removeprefix("eval_").startswith(f"{name}_") for name in sources):
        raise document.error(
            key,
            f"`{key}` is {metric!r}, and `data.eval` has several sets, whose metrics begin with their names. Write, "
            f"for example, `{key}: {next(iter(sources))}_loss`.",
        )


def _check_stream(document: Document, args: "DPOConfig") -> None:
    what = "`data.train` is a stream"
    if args.max_steps <= 0:
        raise document.error("training.max_steps", f"{what}, which has no length. Write `training.max_steps`.")
    if args.ignore_data_skip:
        key = "training.ignore_data_skip"
        raise document.error(key, f"{what}, whose place a checkpoint records. Leave `{key}` out.")
    if args.train_sampling_strategy == "group_by_length":
        key = "training.train_sampling_strategy"
        raise document.error(key, f"{what}, whose pairs come in its own order. Leave `{key}` out.")


def _check_reference(run: "RunFile", args: "DPOConfig") -> None:
    from holdfast.arguments import check_metrics
    from holdfast.reference.build import WAYS
    from holdfast.reference.load import check_ref_models

    source = run["reference.model"]
    inside = set(WAYS) - {"model"} | {"none"}
    if source is not None and (args.reference in inside or args.ref_adapter_name):
        option = (
            f"`training.ref_adapter_name` is {args.ref_adapter_name!r}" if args.ref_adapter_name
            else f"`reference.kind` is {args.reference!r}"
        )  # fmt: skip
        raise run.document.error(
            "reference.model",
            f"`reference.model` is another model than the policy, but {option}. Drop one of them.",
        )
    try:
        check_ref_models(None if source is None else source.path, args)
        check_metrics(args, None)
    except (ValueError, TypeError) as error:
        raise run.document.refusal("training", "the training arguments were refused", error) from error
