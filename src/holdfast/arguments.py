"""The trainer's arguments, checked against each other before anything is loaded."""

import copy
import os
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from datasets import Dataset, IterableDataset
from torch import nn
from transformers import PreTrainedModel

from holdfast.config import DPOConfig
from holdfast.data.mixing.source_column import sources_with_metrics
from holdfast.internals.transformers import check_trainer, loaded_from
from holdfast.losses.options import nearest
from holdfast.options.combinations import check_batches, check_evaluation
from holdfast.options.metric_names import EVAL_METRICS, LOSS_TERM, METRICS_BY_SOURCE, metric_of_source
from holdfast.policy.independence import Dependence
from holdfast.policy.malloc import keep_freed_memory
from holdfast.reference.load import RefModel, check_ref_models, ref_model_entries
from holdfast.scoring.router import adds_up
from holdfast.training_arguments import check_metrics, check_stream

_BY_METRIC = ("reduce_lr_on_plateau", "greedy")
"""Schedules that go by a metric."""


def checked_arguments(
    args: DPOConfig | None,
    model: str | nn.Module | None,
    ref_model: RefModel | Sequence[RefModel],
    train_dataset: Any,
    eval_dataset: Any = None,
    data_collator: Any = None,
    compute_metrics: Any = None,
    callbacks: Any = None,
) -> DPOConfig:
    """The options of the run: `args`, or the defaults where it is None. They are checked again as they are now.

    Raises ValueError or TypeError on missing or contradicting arguments and on an output folder that cannot be written.
    """
    check_trainer()
    check_kind(args)
    if args is None:
        args = DPOConfig(output_dir=default_output_dir(model))
    args.check()
    if train_dataset is None:
        raise ValueError(
            "`train_dataset` is required, and none was given. Pass a `datasets.Dataset` of preference pairs."
        )
    if not isinstance(train_dataset, Dataset | IterableDataset):
        raise TypeError(
            f"`train_dataset` is a {type(train_dataset).__name__}; pass a `datasets.Dataset` or `IterableDataset`: "
            'one split (`dataset["train"]`), or `Dataset.from_list(rows)`.'
        )
    if data_collator is not None and (args.layout != "auto" or args.padding_free):
        option = "padding_free=True" if args.padding_free else f"layout={args.layout!r}"
        raise ValueError(
            f"{option} was asked for together with a `data_collator`, which lays the rows out itself. Drop one of them."
        )
    check_batches(args)
    check_evaluation(args, has_eval_data=eval_dataset is not None)
    if not compute_metrics and not callbacks:
        check_best_metric(args, eval_dataset)
    check_metrics(args, compute_metrics)
    check_stream(args, train_dataset)
    check_ref_models(ref_model, args)
    if isinstance(model, nn.Module) and any(entry is model for entry in ref_model_entries(ref_model)):
        raise ValueError(
            "`ref_model` is the same object as `model`, so the reference would train along with the policy. Leave "
            "`ref_model` out: by default the reference is the policy as it starts to train."
        )
    _check_writable(str(args.output_dir))
    if getattr(args, "enable_jit_checkpoint", False):  # every run does it; a second handler would end it as finished
        args = copy.copy(args)
        args.enable_jit_checkpoint = False
    return args


def check_kind(args: Any) -> None:
    """TypeError where `args` is neither a `holdfast.DPOConfig` nor None; it says whose config it is."""
    if args is None or isinstance(args, DPOConfig):
        return
    kind = type(args)
    peers = [each for each in kind.__mro__ if each.__name__ == "DPOConfig" and each.__module__.startswith("trl.")]
    if kind in peers:
        found = "`trl.DPOConfig`; import DPOConfig from holdfast as well (`from holdfast import DPOConfig, DPOTrainer`)"
    elif peers:
        found = (
            f"`{kind.__module__}.{kind.__name__}`, a subclass of `trl.DPOConfig`; make `holdfast.DPOConfig` its base "
            "class (`from holdfast import DPOConfig`)"
        )
    elif isinstance(args, int | float | str):
        found = (
            f"{type(args).__name__} ({args!r}); name the arguments after `ref_model` (args=..., train_dataset=...), "
            "and pass a `holdfast.DPOConfig`"
        )
    else:
        found = f"{kind.__name__}; pass a `holdfast.DPOConfig`"
    raise TypeError(f"`args` is a {found}, which takes the same arguments and more.")


def check_best_metric(args: DPOConfig, eval_dataset: Any) -> None:
    """ValueError where the metric that the run goes by is none of those that an evaluation gives."""
    name = args.metric_for_best_model
    goes_by_it = args.load_best_model_at_end or args.save_strategy == "best" or args.lr_scheduler_type in _BY_METRIC
    if name is None or not goes_by_it:
        return
    parts = eval_dataset if isinstance(eval_dataset, Mapping) else {"": eval_dataset}
    names = [f"{part}_{name}" if part else name for part, data in parts.items() for name in _metrics_of(data, args)]
    asked = name.removeprefix("eval_")
    of_source = metric_of_source(asked)
    if asked in names or (of_source is not None and isinstance(parts.get(of_source.part), IterableDataset)):
        return  # the sources of a stream are not known
    near = nearest(asked, names)
    hint = f" Did you mean {near!r}?" if near is not None else ""
    first = next(iter(parts))
    raise ValueError(
        f"metric_for_best_model={name!r} was asked for, but an evaluation here gives no such metric.{hint} Without "
        f"`compute_metrics` there are {', '.join(EVAL_METRICS)}"
        f"{f', each after the name of its data ({first}_loss)' if first else ''}"
        f"{_by_source(parts.values())}."
    )


def _metrics_of(dataset: Any, args: DPOConfig) -> list[str]:
    """The metrics that an evaluation on the dataset gives, those of its sources and of the loss's terms too."""
    sources = sources_with_metrics(dataset)
    terms = [f"{LOSS_TERM}{name}" for name in args.loss_types] if len(args.loss_types) > 1 else []
    return [*EVAL_METRICS, *terms, *(f"{metric}/{source}" for source in sources for metric in METRICS_BY_SOURCE)]


def _by_source(datasets: Iterable[Any]) -> str:
    sources = sorted({source for dataset in datasets for source in sources_with_metrics(dataset)})
    return f"; most of them also for each source, after a slash: {', '.join(sources)}" if sources else ""


def default_output_dir(model: str | nn.Module | None) -> str:
    """`<model name>-DPO`, for a run without a config."""
    path = loaded_from(model.config) if isinstance(model, nn.Module) else model or ""
    return f"{os.path.basename(path.rstrip('/')) or 'model'}-DPO"


def _check_writable(folder: str) -> None:
    try:
        os.makedirs(folder, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ValueError(
            f"output_dir={folder!r} was asked for, and cannot be written: {error}. Choose a folder with write access "
            "and room."
        ) from error


def prepare_device(args: DPOConfig) -> None:
    """Makes the process ready to train on the device of `args`. ValueError where it sees several GPUs:
    `nn.DataParallel` would score with stale replicas."""
    if args.n_gpu > 1:
        raise ValueError(
            f"One process sees {args.n_gpu} GPUs, for which transformers would use `nn.DataParallel`. Launch with "
            "`accelerate launch` or `torchrun`, or make one GPU visible with CUDA_VISIBLE_DEVICES."
        )
    if args.device.type == "cpu":
        keep_freed_memory()


def router_aux_loss_coef(causal_lm: PreTrainedModel, args: DPOConfig) -> float:
    """The weight of the load-balancing loss: the option's, else the model's own; 0 for a model without experts.
    ValueError where the option does not fit the model or the other options, or where that loss is no function of sums
    that several processes can add up."""
    config = causal_lm.config.get_text_config()
    has_router = hasattr(config, "output_router_logits")
    if args.router_aux_loss_coef and not has_router:
        raise ValueError(
            f"router_aux_loss_coef={args.router_aux_loss_coef} was asked for, but {type(causal_lm).__name__} is not a "
            "Mixture-of-Experts model that returns router logits. Drop the option."
        )
    if not has_router:
        return 0.0
    own = getattr(config, "router_aux_loss_coef", 0.0)
    coefficient = float(own if args.router_aux_loss_coef is None else args.router_aux_loss_coef)
    if coefficient != 0 and args.tokens_per_batch is not None:
        raise ValueError(
            f"tokens_per_batch={args.tokens_per_batch} was asked for, but the load-balancing loss of "
            f"{type(causal_lm).__name__} is a mean over all tokens of a batch. Set router_aux_loss_coef=0, or drop it."
        )
    if coefficient != 0 and args.world_size > 1 and not adds_up(causal_lm):
        raise ValueError(
            f"A load-balancing loss (weight {coefficient}) was asked for on {args.world_size} processes, but that of "
            f"{type(causal_lm).__name__} is not the common one, whose sums can be added up over processes: each would "
            "balance its own rows only. Set router_aux_loss_coef=0, or train in one process."
        )
    return coefficient


def check_same_batches(dependence: Dependence | None, args: DPOConfig) -> None:
    """ValueError where the model's log-probs depend on the batch, and a run of `args` would score other batches than
    those that the policy trains on."""
    if dependence is None:
        return
    reference_options = {
        "precompute_ref_log_probs=True": args.computes_ahead,
        f"reference_window={args.reference_window}": (args.reference_window or 1) > 1,
        f"snapshot_device={args.snapshot_device!r} without reference_window=1": args.snapshot_device != "device"
        and args.reference_window is None,
    }
    is_set = (reference_options if args.needs_reference or args.asks_for_reference else {}) | {
        f"tokens_per_batch={args.tokens_per_batch}": args.tokens_per_batch is not None
    }
    option = next(filter(is_set.get, is_set), None)
    if option is not None:
        raise ValueError(
            f"{option} was asked for, which scores rows in other batches than the policy's, but {dependence.reason}: "
            "the numbers would be those of another batch. Drop it, so that the reference is asked batch by batch "
            "(reference='model' or 'adapter')."
        )
