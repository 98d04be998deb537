"""Tokenizers of the kinds that models come with, tiny and built in memory, each with the chat template of `tiny`."""

from collections.abc import Callable
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from tokenizers import Regex as Pattern
from transformers import PreTrainedTokenizerFast

import tiny

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
    r"\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN = LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
O200K = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"
    r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPECIAL = (tiny.PAD, tiny.START, tiny.END)
TEXTS = [
    *tiny.PROSE.splitlines(),
    "don't DON'T we'll it's 1234 56",
    "a  b   c\n\n d",
    "naïve café über",
    "# ! ?! ...",
    *map(chr, range(33, 127)),
]


def _finished(backend: Tokenizer, **options: Any) -> PreTrainedTokenizerFast:
    made = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token=tiny.PAD, bos_token=tiny.START, eos_token=tiny.END, **options
    )
    made.chat_template = tiny.CHAT_TEMPLATE
    return made


def _byte_level(*steps: Any, normalizer: Any = None, special: Any = SPECIAL, **options: Any) -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.BPE(**options))
    backend.normalizer = normalizer
    backend.pre_tokenizer = pre_tokenizers.Sequence(list(steps)) if len(steps) > 1 else steps[0]
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=700,
        special_tokens=list(special),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(TEXTS, trainer)
    return _finished(backend)


def _split(pattern: str) -> Any:
    return pre_tokenizers.Split(Pattern(pattern), "isolated")


def _bytes(**options: Any) -> Any:
    return pre_tokenizers.ByteLevel(**{"add_prefix_space": False} | options)


def _sentencepiece(
    pre_tokenizer: Any, normalizer: Any = None, model: str = "BPE", special: Any = SPECIAL
) -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.BPE(unk_token="<unk>") if model == "BPE" else models.Unigram())
    backend.normalizer, backend.pre_tokenizer = normalizer, pre_tokenizer
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse()])
    special = ["<unk>", *special]
    trainer: Any = (
        trainers.BpeTrainer(vocab_size=400, special_tokens=special, show_progress=False)
        if model == "BPE"
        else trainers.UnigramTrainer(vocab_size=400, special_tokens=special, unk_token="<unk>", show_progress=False)
    )
    backend.train_from_iterator(TEXTS, trainer)
    return _finished(backend, unk_token="<unk>")


def _word_piece() -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    backend.normalizer, backend.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordPieceTrainer(vocab_size=500, special_tokens=["[UNK]", *SPECIAL], show_progress=False)
    backend.train_from_iterator(TEXTS, trainer)
    return _finished(backend)


def _with_bos() -> PreTrainedTokenizerFast:
    made = _byte_level(_bytes())
    made.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{tiny.START} $A", special_tokens=[(tiny.START, 1)]
    )
    return made


def _stripping() -> PreTrainedTokenizerFast:
    return _byte_level(
        _bytes(), special=[tiny.PAD, tiny.START, AddedToken(tiny.END, rstrip=True, special=True, normalized=False)]
    )


def _across() -> PreTrainedTokenizerFast:
    made = _byte_level(_bytes())
    made.add_tokens([AddedToken("user" + tiny.END, special=False, normalized=False), "water side"])
    return made


def _in_python() -> PreTrainedTokenizerFast:
    class Words:
        def pre_tokenize(self, text: Any) -> None:
            text.split(lambda _, part: part.split(" ", "merged_with_next"))

    made = _byte_level(_bytes())
    made.backend_tokenizer.pre_tokenizer = pre_tokenizers.PreTokenizer.custom(Words())
    return made


_BACKENDS: dict[str, Callable[..., PreTrainedTokenizerFast]] = {
    "GPT-2": lambda special: _byte_level(_bytes(), special=special),
    "Llama 3": lambda special: _byte_level(_split(LLAMA3), _bytes(use_regex=False), special=special),
    "Qwen": lambda special: _byte_level(
        _split(QWEN), _bytes(use_regex=False), normalizer=normalizers.NFC(), special=special
    ),
    "o200k": lambda special: _byte_level(_split(O200K), _bytes(use_regex=False), special=special),
    "Metaspace": lambda special: _sentencepiece(pre_tokenizers.Metaspace("▁", "first"), special=special),
}


def of_template(
    kind: str, template: str, bos: str, eos: str, others: tuple[str, ...], *, takes_white_space: bool = False
) -> PreTrainedTokenizerFast:
    """A tokenizer of one of five kinds with a chat template and its special tokens. With `takes_white_space` these take
    the white space after them."""
    tokens = [
        AddedToken(token, special=True, normalized=False, rstrip=takes_white_space)
        for token in dict.fromkeys((tiny.PAD, bos, eos, *others))
    ]
    backend = _BACKENDS[kind](tokens).backend_tokenizer
    made = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token=tiny.PAD, bos_token=bos, eos_token=eos)
    made.chat_template = template
    return made


WORDS, TOKENS, NOTHING = "words", "special tokens", "nothing"

KINDS: dict[str, tuple[Callable[[], PreTrainedTokenizerFast], str]] = {
    "GPT-2": (lambda: _byte_level(_bytes()), WORDS),
    "GPT-2 with a space in front": (lambda: _byte_level(_bytes(add_prefix_space=True)), TOKENS),
    "SmolLM": (lambda: _byte_level(pre_tokenizers.Digits(individual_digits=True), _bytes()), WORDS),
    "Llama 3": (lambda: _byte_level(_split(LLAMA3), _bytes(use_regex=False), ignore_merges=True), WORDS),
    "Qwen": (lambda: _byte_level(_split(QWEN), _bytes(use_regex=False), normalizer=normalizers.NFC()), WORDS),
    "o200k": (lambda: _byte_level(_split(O200K), _bytes(use_regex=False)), WORDS),
    "an unknown pattern": (lambda: _byte_level(_split(r"\S+ ?|\s+"), _bytes(use_regex=False)), TOKENS),
    "lower case": (lambda: _byte_level(_bytes(), normalizer=normalizers.Lowercase()), TOKENS),
    "BPE dropout": (lambda: _byte_level(_bytes(), dropout=1e-9), NOTHING),
    "a bos token": (_with_bos, WORDS),
    "an end that takes white space": (_stripping, TOKENS),
    "added tokens that run across": (_across, TOKENS),
    "a part in Python": (_in_python, NOTHING),
    "BERT": (_word_piece, TOKENS),
    "Llama 2": (
        lambda: _sentencepiece(
            None, normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]), "BPE"
        ),
        TOKENS,
    ),
    **{
        f"Metaspace, {scheme}, {model}": (
            lambda scheme=scheme, model=model: _sentencepiece(pre_tokenizers.Metaspace("▁", scheme), model=model),
            TOKENS,
        )
        for scheme in ("first", "always", "never")
        for model in ("BPE", "Unigram")
    },
}
"""By name: what makes the tokenizer, and into what its texts may be cut (`Encoder.granularity`)."""
