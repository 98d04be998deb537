"""The tokenizer of a run, and the token that fills rows up."""

from typing import Any

from torch import nn
from transformers import (
    AutoTokenizer,
    PreTrainedTokenizerBase,
    ProcessorMixin,
)

from holdfast.internals.transformers import loaded_from
from holdfast.policy.load import PolicyOptions
from holdfast.policy.reading import reading


def load_tokenizer(
    processing_class: Any, policy: nn.Module, args: PolicyOptions
) -> tuple[Any, PreTrainedTokenizerBase]:
    """The processing class and its tokenizer. None means the one in the folder that the policy was loaded from."""
    if processing_class is None:
        path = loaded_from(policy.config)
        if not path:
            raise ValueError(
                "No `processing_class` was given, and the model was not loaded from a path where its tokenizer could "
                "be. Pass the tokenizer as `processing_class`."
            )
        init_kwargs = args.model_init_kwargs if isinstance(args.model_init_kwargs, dict) else {}
        location = {key: init_kwargs[key] for key in ("revision", "subfolder") if key in init_kwargs}
        processing_class = read_tokenizer(
            path,
            trust_remote_code=args.trust_remote_code,
            advice="Pass the tokenizer as `processing_class`, or mend that folder.",
            **location,
        )
    tokenizer = processing_class.tokenizer if isinstance(processing_class, ProcessorMixin) else processing_class
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise TypeError(
            f"`processing_class` is a {type(processing_class).__name__}; pass a tokenizer or a processor with one."
        )
    return processing_class, tokenizer


def read_tokenizer(path: str, *, trust_remote_code: bool, advice: str, **location: Any) -> PreTrainedTokenizerBase:
    """The tokenizer of a local folder or hub id. ValueError, which ends in `advice`, where it cannot be loaded."""
    request = f"the tokenizer was to be loaded from {path!r}, which failed:"
    with reading(request, path, noun="tokenizer", advice=advice, subfolder=location.get("subfolder")):
        return AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code, **location)


def padding_id(tokenizer: PreTrainedTokenizerBase, pad_token: str | None) -> int:
    """The id of the token that fills rows up: `pad_token`, else the tokenizer's padding token, else its end-of-sequence
    token. Filled positions are never attended to and never scored."""
    token = pad_token or tokenizer.pad_token or tokenizer.eos_token
    if token is None:
        raise ValueError(
            "Rows are padded, but the tokenizer has neither a padding nor an end-of-sequence token. "
            "Set `tokenizer.pad_token`, or `pad_token` in DPOConfig."
        )
    if token not in tokenizer.get_vocab():
        raise ValueError(
            f"pad_token={token!r} was asked for, but the tokenizer ({type(tokenizer).__name__}) has no such token. "
            "Name one of its tokens, or add it and resize the model's embeddings."
        )
    return tokenizer.get_vocab()[token]
