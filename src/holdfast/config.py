"""`DPOConfig`: every option of a run, documented once, checked when it is made.

A subclass of `transformers.TrainingArguments`, with the names that users of the common DPO trainer know. Options that
contradict each other are refused here, before any model is loaded; none is accepted and ignored.
"""

import warnings
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar, cast, get_args

from transformers import TrainingArguments
from transformers.utils import is_torch_bf16_gpu_available

from holdfast.data.dates import check_date
from holdfast.data.layouts.choose import LAYOUTS
from holdfast.internals.transformers import dict_fields
from holdfast.losses import LOSSES, LossOptions, ModifierOptions, check_losses
from holdfast.options.combinations import check_combinations, check_losses_compare, refused_by_transformers
from holdfast.options.construction import ConfigClass, refuse_unknown_attributes
from holdfast.options.data import DataOptions
from holdfast.options.metric_names import heed_direction
from holdfast.options.names import check_names
from holdfast.options.processes import ProcessOptions
from holdfast.options.ranges import normalise_numbers
from holdfast.options.rehearsal import rehearse
from holdfast.options.resuming import ResumeOptions
from holdfast.options.run_record import RecordOptions
from holdfast.options.samples import SampleOptions
from holdfast.peers.joining import joining
from holdfast.reference.build import WAY_NAMES, ReferenceOptions
from holdfast.reference.run_folder import RunFolder
from holdfast.reference.scorers.mixture import check_shares
from holdfast.reference.tensor_file import SnapshotDevice
from holdfast.secrets import MASK, masked_inside, pickled_state, secrets_in
from holdfast.training_arguments import check_heeded, check_noise, checked_gathering

LAYOUT_NAMES = ("auto", *LAYOUTS)


def _option(help: str, **kwargs: Any) -> Any:
    return field(metadata={"help": help}, **kwargs)


@dataclass
class DPOConfig(
    LossOptions,
    ModifierOptions,
    ResumeOptions,
    DataOptions,
    ProcessOptions,
    RecordOptions,
    SampleOptions,
    TrainingArguments,
    metaclass=ConfigClass,
):
    """Options of `DPOTrainer`. `LossOptions` and `ModifierOptions` (in `losses`) declare those of the losses,
    `DataOptions`, `ResumeOptions`, `ProcessOptions`, `RecordOptions` and `SampleOptions` (in `options`) those about
    data, checkpoints, processes, the record and samples. All others that are not listed here come from
    `transformers.TrainingArguments`.

    Defaults that differ from `TrainingArguments`: `learning_rate` 1e-6, `logging_steps` 10, activation (gradient)
    checkpointing on, and `bf16` on where the accelerator computes in it (never by default on a CPU). Two more keep the
    host from waiting for the device: `logging_nan_inf_filter` is off (what is not finite stops the run), and batches
    are copied asynchronously where memory is pinned (`accelerator_config["non_blocking"]`).

    Raises ValueError on values out of range and on combinations without a meaning; each message names the way out.
    """

    _VALID_DICT_FIELDS: ClassVar[list[str]] = [
        *dict_fields(),
        "model_init_kwargs",
        "ref_model_init_kwargs",
        "columns",
    ]

    learning_rate: float = _option("Initial learning rate of AdamW.", default=1e-6)
    logging_steps: float = _option("Log every so many optimizer steps; a fraction below 1 is of the run.", default=10)
    logging_nan_inf_filter: bool = _option("Refused: a loss that is NaN or infinite stops the run.", default=False)
    gradient_checkpointing: bool = _option("Recompute activations in the backward pass.", default=True)
    bf16: bool | None = _option("bf16 autocast. Default: on where the accelerator supports it.", default=None)

    # The model
    model_init_kwargs: dict[str, Any] | str | None = _option(
        "Keyword arguments of `from_pretrained` for a `model` given by name or path.", default=None
    )
    ref_model_init_kwargs: dict[str, Any] | str | None = _option(
        "The same for a `ref_model` given by name or path. Default: `model_init_kwargs` less `revision`, `subfolder`.",
        default=None,
    )
    trust_remote_code: bool = _option("Run code that ships with a model or tokenizer. Off unless asked.", default=False)
    disable_dropout: bool = _option(
        "Switch off dropout of every kind in the policy. The reference never has any.", default=True
    )
    router_aux_loss_coef: float | None = _option(
        "Weight of a Mixture-of-Experts model's load-balancing loss. Default: the model's own; 0 switches it off.",
        default=None,
    )
    activation_offloading: bool = _option(
        "Keep activations in host memory between forward and backward; weights stay where they are.", default=False
    )
    frozen_weights_dtype: str = _option(
        "How frozen fp32 weights of linear layers are held while a run computes under autocast: `auto` in autocast's "
        "dtype, in half the memory and with the same numbers, `as_loaded` in fp32.",
        default="auto",
    )

    # The data. What is read of them is inherited from `DataOptions`.
    layout: str = _option(
        "How sequences are laid out in rows: "
        + "".join(f"`{layout.name}` ({layout.summary}), " for layout in LAYOUTS.values())
        + "or `auto`, the first that computes the models right.",
        default="auto",
    )
    tokens_per_batch: int | None = _option(
        "Tokens that the policy computes at a time, padding included. A batch of more is computed in parts, to the "
        "same loss and gradient in less memory, each once more in the backward pass. Default: all at once.",
        default=None,
    )
    padding_free: bool = _option("Refuse to fall back to padded rows where `layout` is `auto`.", default=False)
    pad_to_multiple_of: int | str | None = _option("Pad rows to a multiple of this many tokens.", default=None)
    pad_token: str | None = _option("Padding token. Default: the tokenizer's, else its end-of-sequence.", default=None)

    # The losses. Their own options are inherited from `LossOptions`, those of modifiers from `ModifierOptions`.
    # A factory, since `HfArgumentParser` reads no other default of a list.
    loss_type: list[str] | str = _option(
        f"One or several of: {', '.join(LOSSES)}.", default_factory=lambda: ["sigmoid"]
    )
    loss_weights: list[float] | None = _option("One weight per loss. Default: 1 each.", default=None)

    # The reference
    reference: str = _option(
        f"How the reference is held: {', '.join(WAY_NAMES)}. `auto` goes by the kind of model and the flags below.",
        default="auto",
    )
    model_adapter_name: str | None = _option(
        "The adapter of a PEFT policy that trains. Default: the active one; for a fresh one, its name.", default=None
    )
    ref_adapter_name: str | None = _option(
        'The adapter of the policy that is the reference; "__base__" names the bare base. Default: the policy as it '
        "starts to train.",
        default=None,
    )
    snapshot_device: str = _option(
        "Where reference='snapshot' keeps the first values of the trainable tensors: `device` (the policy's), `cpu` or "
        "`disk` (in output_dir).",
        default="device",
    )
    reference_window: int | None = _option(
        "Optimizer steps whose batches the reference scores together, ahead of their turn; a window ends at the next "
        "sync. 1 asks batch by batch. Default: 1 where asking costs no exchange of weights, else as long as one is "
        "worth; with log-probs ahead, up to the next sync.",
        default=None,
    )
    ref_model_weights: list[float] | None = _option(
        "Weights of several references (`ref_model` is a list), positive and of sum 1. Default: equal ones.",
        default=None,
    )
    reference_audit: bool = _option(
        "Check before the first step that a fresh reference gives the policy's own log-probs.", default=True
    )
    precompute_ref_log_probs: bool = _option(
        "Score the datasets with the reference before training, and let go of it.", default=False
    )
    precompute_ref_batch_size: int | None = _option(
        "Pairs per device while doing so. Default: the training or evaluation batch size.", default=None
    )
    reference_store: str | None = _option(
        "Folder in which log-probs that were computed ahead are kept for later runs. Default: `$HOLDFAST_HOME/store`, "
        "else a folder among the platform's caches.",
        default=None,
    )
    reference_store_versions: bool = _option(
        "Keep the stored log-probs of a moving reference's past versions, which are removed otherwise.", default=False
    )
    sync_ref_model: bool = _option("Move the reference towards the policy while training (TR-DPO).", default=False)
    ref_model_mixup_alpha: float = _option("alpha: ref <- alpha * policy + (1 - alpha) * ref.", default=0.6)
    ref_model_sync_steps: int = _option("tau: optimizer steps between two such moves.", default=512)

    def __post_init__(self) -> None:
        normalise_numbers(self)
        check_names(self)
        if self.bf16 is None:
            self.bf16 = not self.fp16 and not self.use_cpu and is_torch_bf16_gpu_available()
        heed_direction(self)
        is_copied_ahead = self.accelerator_config is None
        self._post_init_of_transformers()
        self.dataloader_pin_memory = self.dataloader_pin_memory and self.device.type != "cpu"  # nothing to copy to
        if is_copied_ahead:
            accelerator_config: Any = self.accelerator_config
            accelerator_config.non_blocking = self.dataloader_pin_memory
        if isinstance(self.loss_type, str):
            self.loss_type = [self.loss_type]
        self.check()
        check_losses_compare(self)

    def _post_init_of_transformers(self) -> None:
        """What `TrainingArguments` makes of its options. ValueError where it refuses one, by whatever error."""
        if self.report_to is None:
            self.report_to = "none"
        try:
            with warnings.catch_warnings(), joining(self):
                # The name that scripts use; newer versions of transformers call it `activation_checkpointing`, which
                # wins where it is set.
                warnings.filterwarnings("ignore", message="`gradient_checkpointing", category=FutureWarning)
                super().__post_init__()
        except (
            ValueError,
            TypeError,
            LookupError,
            AttributeError,
            ArithmeticError,
            OSError,
            ImportError,
            NotImplementedError,
        ) as error:
            raise refused_by_transformers(error) from error

    def check(self) -> None:
        """ValueError where the options, as they are now, cannot be right. A trainer asks again, since a script may have
        set some after they were made; whether log-probs are computed ahead is then for the reference to say."""
        refuse_unknown_attributes(self)
        normalise_numbers(self)
        check_names(self)
        check_heeded(self)
        check_noise(self)
        self._check_ranges()
        check_combinations(self)
        self.accelerator_config = checked_gathering(self)
        self._check_losses()
        self._check_reference()
        rehearse(self)

    def to_dict(self) -> dict[str, Any]:
        """The options by name, as trackers record them; without secrets, also inside of mappings."""
        return {name: masked_inside(value) for name, value in super().to_dict().items()}

    def __str__(self) -> str:
        text = super().__str__()
        for secret in secrets_in(vars(self)):
            text = text.replace(secret, MASK)
        return text

    __repr__ = __str__

    def __getstate__(self) -> dict[str, Any]:
        return pickled_state(vars(self))

    @property
    def loss_types(self) -> list[str]:
        """The losses by name; `loss_type` as a list."""
        return [self.loss_type] if isinstance(self.loss_type, str) else list(self.loss_type)

    @property
    def loss_options(self) -> LossOptions:
        """The options of the losses, as the losses read them."""
        return LossOptions(**{f.name: getattr(self, f.name) for f in fields(LossOptions)})

    @property
    def needs_reference(self) -> bool:
        """Whether any of the losses compares with a reference."""
        return any(LOSSES[name].needs_reference for name in self.loss_types)

    @property
    def asks_for_reference(self) -> bool:
        """Whether the options name a reference. Beside losses that need none, it is kept for metrics and samples."""
        names_way = self.reference not in ("auto", "none")
        return names_way or self.ref_adapter_name is not None or self.computes_ahead

    @property
    def computes_ahead(self) -> bool:
        """Whether the reference's log-probs are computed before training: by the flag, or by the way it is held."""
        return self.precompute_ref_log_probs or self.reference == "precomputed"

    def reference_options(self, *, is_stream: bool, has_ref_model: bool = False) -> ReferenceOptions:
        """Which reference the options ask for. `is_stream`: whether the training data are a stream. `has_ref_model`:
        whether the trainer was given a `ref_model`, which asks for one."""
        is_kept = self.needs_reference or self.asks_for_reference or has_ref_model
        return ReferenceOptions(
            way=self.reference if is_kept else "none",
            adapter=self.ref_adapter_name,
            is_ahead=self.precompute_ref_log_probs,
            window=self.reference_window,
            is_stream=is_stream,
            sync_steps=self.ref_model_sync_steps if self.sync_ref_model else None,
            mixup_alpha=self.ref_model_mixup_alpha if self.sync_ref_model else 0.0,
            shares=self.ref_model_weights,
            keeps_versions=self.reference_store_versions,
            store=Path(self.reference_store) if self.reference_store is not None else None,
            snapshot_device=cast(SnapshotDevice, self.snapshot_device),
            folder=RunFolder(self.reference_folder),
        )

    @property
    def reference_folder(self) -> Path:
        """The folder of references that are held on disk; each has a folder of its own in it."""
        return Path(str(self.output_dir)) / "_reference"

    def _check_ranges(self) -> None:
        if self.template_date is not None:
            check_date(self.template_date)
        if self.layout not in LAYOUT_NAMES:
            raise ValueError(
                f"layout={self.layout!r} was asked for; the layouts are {', '.join(LAYOUT_NAMES)}. Choose one of them."
            )
        if self.padding_free and self.layout in LAYOUTS and not LAYOUTS[self.layout].fills_rows:
            raise ValueError(
                f"padding_free=True was asked for with layout={self.layout!r}, whose rows are padded. Drop one of them."
            )
        choices = {
            "truncation_mode": ("keep_start", "keep_end"),
            "special_tokens_in_text": ("text", "token"),
            "frozen_weights_dtype": ("auto", "as_loaded"),
        }
        for name, (first, second) in choices.items():
            if (value := getattr(self, name)) not in (first, second):
                raise ValueError(f"{name}={value!r} was asked for; it is {first!r} or {second!r}. Choose one of them.")

    def _check_losses(self) -> None:
        check_losses(
            self.loss_types,
            self.loss_weights if self.loss_weights is not None else [1.0] * len(self.loss_types),
            self.loss_options,
            ld_alpha=self.ld_alpha,
            use_weighting=self.use_weighting,
            weight_column=self.weight_column,
            margin_column=self.margin_column,
        )

    def _check_reference(self) -> None:
        self._check_way()
        self._check_snapshot()
        self._check_store()
        if self.ref_model_weights is not None:
            check_shares(self.ref_model_weights)
        self._check_ref_adapter()

    def _check_way(self) -> None:
        if self.reference not in WAY_NAMES:
            raise ValueError(
                f"reference={self.reference!r} was asked for; the ways to hold a reference are {', '.join(WAY_NAMES)}. "
                "Choose one of them."
            )

    def _check_snapshot(self) -> None:
        devices = get_args(SnapshotDevice)
        if self.snapshot_device not in devices:
            raise ValueError(
                f"snapshot_device={self.snapshot_device!r} was asked for; a snapshot is held on {', '.join(devices)}. "
                "Choose one of them."
            )
        if self.snapshot_device != devices[0] and self.reference != "snapshot":
            raise ValueError(
                f"snapshot_device={self.snapshot_device!r} was asked for with reference={self.reference!r}, which "
                "keeps no snapshot. Use reference='snapshot', or drop it."
            )

    def _check_store(self) -> None:
        """Options of the store need log-probs that are computed ahead. One of them also needs a reference that
        moves."""
        if self.reference_store and not self.computes_ahead:
            raise ValueError(
                f"reference_store={self.reference_store!r} was asked for, but no log-probs are computed ahead. Set "
                "precompute_ref_log_probs=True, or drop it."
            )
        if self.reference_store_versions and not (self.computes_ahead and self.sync_ref_model):
            raise ValueError(
                f"reference_store_versions={self.reference_store_versions!r} was asked for, but no log-probs of a "
                "moving reference are computed ahead. Set precompute_ref_log_probs=True, or drop it."
            )

    def _check_ref_adapter(self) -> None:
        """An adapter that is the reference is fixed and inside the policy, so other ways and syncs are refused."""
        if self.ref_adapter_name is None:
            return
        if self.sync_ref_model or self.reference in ("model", "snapshot", "none"):
            other = "sync_ref_model=True" if self.sync_ref_model else f"reference={self.reference!r}"
            raise ValueError(
                f"ref_adapter_name={self.ref_adapter_name!r} was asked for together with {other}: the first is weights "
                "inside the policy that stay as they are, the second is not. Drop one of them."
            )
