"""Names of the common trainer's package that scripts import beside `DPOTrainer`: handed on where it is installed.

So `from holdfast import DPOConfig, DPOTrainer, ModelConfig, TrlParser` works as it did with the other package's name.
`from holdfast import *` imports none of them. Given up: names that only a future version of that package has.
"""

from collections.abc import Collection, Mapping
from importlib import import_module
from types import MappingProxyType
from typing import Any

from holdfast.options.script import names_of_import

PACKAGE = "trl"

NAMES = frozenset(
    (
        "AlignPropConfig", "AlignPropTrainer", "AllTrueJudge", "AutoModelForCausalLMWithValueHead",
        "AutoModelForSeq2SeqLMWithValueHead", "BCOConfig", "BCOTrainer", "BEMACallback", "BaseBinaryJudge", "BaseJudge",
        "BasePairwiseJudge", "BaseRankJudge", "BestOfNSampler", "CPOConfig", "CPOTrainer", "DDPOConfig", "DDPOTrainer",
        "DPODataCollatorWithPadding", "DPOScriptArguments", "DataCollatorForCompletionOnlyLM", "DatasetMixtureConfig",
        "DefaultDDPOStableDiffusionPipeline", "DistillationConfig", "DistillationTrainer", "DpoArgumentParser",
        "DpoScriptArguments", "FDivergenceConstants", "FDivergenceType", "GKDConfig", "GKDTrainer", "GRPOConfig",
        "GRPOTrainer", "HfPairwiseJudge", "IterativeSFTConfig", "IterativeSFTTrainer", "KTOConfig", "KTOTrainer",
        "LogCompletionsCallback", "MergeModelCallback", "ModelConfig", "NashMDConfig", "NashMDTrainer", "ORPOConfig",
        "ORPOTrainer", "OnlineDPOConfig", "OnlineDPOTrainer", "OpenAIPairwiseJudge", "PPOConfig", "PPOTrainer",
        "PPOv2Config", "PPOv2Trainer", "PRMConfig", "PRMTrainer", "PairRMJudge", "PreTrainedModelWrapper", "RLOOConfig",
        "RLOOTrainer", "RewardConfig", "RewardTrainer", "RichProgressCallback", "RunningMoments", "SFTConfig",
        "SFTScriptArguments", "SFTTrainer", "ScriptArguments", "SftArgumentParser", "SftScriptArguments",
        "SyncRefModelCallback", "TextEnvironment", "TextHistory", "TrlParser", "WeaveCallback",
        "XPOConfig", "XPOTrainer", "add_response_schema", "apply_chat_template", "clone_chat_template",
        "create_reference_model", "extract_prompt", "get_dataset", "get_kbit_device_map", "get_peft_config",
        "get_quantization_config", "get_training_chat_template", "init_zero_verbose", "is_conversational",
        "is_conversational_from_value", "is_peft_available", "maybe_apply_chat_template", "maybe_convert_to_chatml",
        "maybe_extract_prompt", "maybe_unpair_preference_dataset", "pack_dataset", "pack_examples",
        "prepare_multimodal_messages", "set_seed", "setup_chat_format", "supports_tool_calling", "truncate_dataset",
        "unpair_preference_dataset",
    )
)  # fmt: skip
"""The names that the package has, or had in an earlier version."""

INSTEAD: Mapping[str, str] = MappingProxyType(
    {
        "get_kbit_device_map": 'write device_map={"": accelerate.PartialState().process_index}',
        "FDivergenceType": 'write its value as text, f_divergence_type="js_divergence"',
        "FDivergenceConstants": "write f_alpha_divergence_coef=...",
        "DPOScriptArguments": "write ScriptArguments",
        "DpoScriptArguments": "write ScriptArguments",
        "SFTScriptArguments": "write ScriptArguments",
        "DpoArgumentParser": "write TrlParser",
        "DPODataCollatorWithPadding": "write DataCollatorForPreference, which holdfast has",
        "create_reference_model": "leave ref_model out: the reference is the policy as it starts to train",
        "get_peft_config": "write peft.LoraConfig(...)",
        "get_quantization_config": "write transformers.BitsAndBytesConfig(...)",
        "setup_chat_format": "set tokenizer.chat_template",
        "set_seed": "import it from transformers",
        "is_peft_available": "import it from transformers.utils",
        "TrlParser": "write transformers.HfArgumentParser",
    }
)
"""What to write instead of a name where the package has it no longer, or is not installed."""


def from_other_package(name: str, own_names: Collection[str]) -> Any:
    """What the package has by this name. ImportError where it is not installed or has it no longer; the message names
    all names of the script's import statement that holdfast, which has `own_names`, does not have."""
    try:
        package = import_module(PACKAGE)
    except ImportError as error:
        reason = (
            f"is not installed here. Install it (`pip install {PACKAGE}`) and keep `from {PACKAGE} import`"
            if getattr(error, "name", None) == PACKAGE
            else f"cannot be imported here ({error}). Mend it, and keep `from {PACKAGE} import`"
        )
        asked = [each for each in names_of_import("holdfast", name) if each not in own_names]
        raise ImportError(_message(asked, reason, own_names)) from error
    try:
        return getattr(package, name)
    except (AttributeError, ImportError) as error:
        asked = [
            each for each in names_of_import("holdfast", name) if each not in own_names and not _has(package, each)
        ]
        version = getattr(package, "__version__", "?")
        raise ImportError(_message(asked, f"has none of them in its version {version}", own_names)) from error


def _has(package: Any, name: str) -> bool:
    try:
        return hasattr(package, name)
    except ImportError:
        return False


def _message(names: Collection[str], reason: str, own_names: Collection[str]) -> str:
    advice = "; ".join(f"instead of {name}, {INSTEAD[name]}" for name in names if name in INSTEAD)
    of_holdfast = ", ".join(sorted(name for name in own_names if not name.startswith("_")))
    return (
        f"{', '.join(names)}: not of holdfast but of the package {PACKAGE}, which {reason}"
        f"{f'; {advice}' if advice else ''}. holdfast itself has {of_holdfast}."
    )
