"""The benchmarks' inputs: pairs of real conversations in two length profiles, a tokenizer for them, and a model.

The `dialogue` profile cuts each text so that prompts have 116 tokens on average, chosen answers 37 and rejected ones
49, with the template. Lengths then spread like those of real dialogue: log-normally, in the order of the texts' own
lengths. `as_is` takes the rows as they are. The tokenizer is trained on the same text, so it has as many tokens as the
model has rows in its head, if the text has so many. Weights are random: speed and memory do not depend on them.

Given up: natural endings. A cut text ends in the middle of a sentence.
"""

import itertools
import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

Pair = dict[str, list[dict[str, str]]]

DATA = Path(__file__).parents[2] / "shared" / "data" / "preference_pairs_en.jsonl"
PROFILES = ("dialogue", "as_is")
PREPARED_PROFILES = (*PROFILES, "turns")
"""Those in which rows are prepared: in `turns` completions go on for two more exchanges of the dialogue profile."""
SIDES = ("prompt", "chosen", "rejected")
ROLES = {"prompt": "user", "chosen": "assistant", "rejected": "assistant"}

DIALOGUE_MEANS = {"prompt": 116, "chosen": 37, "rejected": 49}
DIALOGUE_SPREAD = 0.8
"""Standard deviation of the logarithm of a length: 4 padded pairs have about 3.1 times the tokens that they need."""

PAD, START, END = "<|pad|>", "<|im_start|>", "<|im_end|>"
CHAT_TEMPLATE = (
    "{%- for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{%- if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """The shape of a Llama."""

    hidden: int
    layers: int
    heads: int
    key_heads: int
    intermediate: int
    vocabulary: int
    is_tied: bool = False

    def config(self) -> Any:
        """The `LlamaConfig` of this size."""
        from transformers import LlamaConfig

        return LlamaConfig(
            vocab_size=self.vocabulary, hidden_size=self.hidden, intermediate_size=self.intermediate,
            num_hidden_layers=self.layers, num_attention_heads=self.heads, num_key_value_heads=self.key_heads,
            max_position_embeddings=4096, tie_word_embeddings=self.is_tied, pad_token_id=0, bos_token_id=1,
            eos_token_id=2,
        )  # fmt: skip

    def facts(self) -> dict[str, Any]:
        """The fields of this size, for a result."""
        return asdict(self)


SIZES = {
    "tiny": Size(hidden=64, layers=2, heads=2, key_heads=2, intermediate=176, vocabulary=2048),
    "small": Size(hidden=256, layers=4, heads=4, key_heads=4, intermediate=688, vocabulary=16_384),
    "dialogue": Size(hidden=384, layers=6, heads=6, key_heads=6, intermediate=1024, vocabulary=16_384),
    "medium": Size(hidden=512, layers=6, heads=8, key_heads=8, intermediate=1376, vocabulary=32_768),
    "large": Size(hidden=1024, layers=8, heads=16, key_heads=16, intermediate=2752, vocabulary=32_768),
    "0.5b": Size(
        hidden=896, layers=24, heads=14, key_heads=2, intermediate=4864, vocabulary=151_936, is_tied=True
    ),
    "1.5b": Size(
        hidden=1536, layers=28, heads=12, key_heads=2, intermediate=8960, vocabulary=151_936, is_tied=True
    ),
    "8b": Size(hidden=4096, layers=32, heads=32, key_heads=8, intermediate=14_336, vocabulary=128_256),
}  # fmt: skip

DRAWN = ("8b",)
"""Sizes whose weights are drawn where they are needed: a file of them would take longer than the measurement."""


def read_pairs(path: Path) -> list[Pair]:
    """The rows of a JSONL file with `prompt`, `chosen` and `rejected` as messages. ValueError where there is none."""
    if not path.is_file():
        raise ValueError(
            f"preference pairs were to be read from {path}, which is not a file. Name a JSONL file of conversations "
            "(`prompt`, `chosen`, `rejected`, each a list of messages) with --data."
        )
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    for number, row in enumerate(rows, 1):
        if any(not isinstance(row.get(side), list) for side in SIDES):
            raise ValueError(
                f"preference pairs were to be read from {path}, but line {number} has not `prompt`, `chosen` and "
                f"`rejected` as lists of messages; found {sorted(row)}. Give conversations."
            )
    return [{side: row[side] for side in SIDES} for row in rows]


def make_tokenizer(pairs: Sequence[Pair], vocabulary: int) -> Any:
    """A byte-level BPE tokenizer with a chat template, of at most `vocabulary` tokens, trained on the pairs' text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=[PAD, START, END], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    texts = (message["content"] for pair in pairs for side in SIDES for message in pair[side])
    backend.train_from_iterator(texts, trainer)
    made = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token=PAD, bos_token=START, eos_token=END)
    made.chat_template = CHAT_TEMPLATE
    return made


def lengths(pairs: Sequence[Pair], tokenizer: Any) -> dict[str, list[int]]:
    """Tokens of each prompt, chosen and rejected completion, template included."""
    prompts = [_num_tokens(tokenizer, pair["prompt"], add_generation_prompt=True) for pair in pairs]
    found = {"prompt": prompts}
    for side in SIDES[1:]:
        whole = [_num_tokens(tokenizer, pair["prompt"] + pair[side]) for pair in pairs]
        found[side] = [num_tokens - prompt for num_tokens, prompt in zip(whole, prompts, strict=True)]
    return found


def _num_tokens(tokenizer: Any, messages: list[dict[str, str]], **options: Any) -> int:
    return len(tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True, **options)["input_ids"])


# --- profiles ---------------------------------------------------------------------------------------------------------


def in_profile(pairs: Sequence[Pair], profile: str, tokenizer: Any) -> list[Pair]:
    """The pairs in one of `PREPARED_PROFILES`."""
    if profile == "as_is":
        return list(pairs)
    if profile == "turns":
        return with_turns(in_profile(pairs, "dialogue", tokenizer))
    texts = {side: ["\n".join(message["content"] for message in pair[side]) for pair in pairs] for side in SIDES}
    columns = {side: _cut_column(texts[side], side, tokenizer) for side in SIDES}
    return [
        {side: [{"role": ROLES[side], "content": columns[side][row]}] for side in SIDES} for row in range(len(pairs))
    ]


def with_turns(pairs: Sequence[Pair]) -> list[Pair]:
    """The pairs, each with the next two as further turns of both completions."""
    made: list[Pair] = []
    for row, pair in enumerate(pairs):
        following = [pairs[(row + step) % len(pairs)] for step in (1, 2)]
        turns = {
            side: [*pair[side], *(m for each in following for m in each["prompt"] + each[side])] for side in SIDES[1:]
        }
        made.append({"prompt": pair["prompt"], **turns})
    return made


def _cut_column(texts: Sequence[str], side: str, tokenizer: Any) -> list[str]:
    """The texts cut to log-normal lengths of the wanted mean, in the order of their own lengths."""
    encoded = [tokenizer(text, add_special_tokens=False, return_offsets_mapping=True) for text in texts]
    ends = [[end for _, end in each["offset_mapping"]] for each in encoded]
    mean = DIALOGUE_MEANS[side] - _overhead(side, tokenizer)
    order = sorted(range(len(texts)), key=lambda row: (len(ends[row]), row))
    shape = [0.0] * len(texts)
    for rank, row in enumerate(order):
        z = statistics.NormalDist().inv_cdf((rank + 0.5) / len(texts))
        shape[row] = math.exp(DIALOGUE_SPREAD * z - DIALOGUE_SPREAD**2 / 2)
    scale = float(mean)
    for _ in range(20):  # texts shorter than their share pull the mean down, and the others make up for it
        wanted = [min(max(1, round(scale * part)), len(own)) for part, own in zip(shape, ends, strict=True)]
        scale *= mean / statistics.mean(wanted)
    return [text[: own[count - 1]] if count else "" for text, own, count in zip(texts, ends, wanted, strict=True)]


def _overhead(side: str, tokenizer: Any) -> int:
    """The number of tokens that the template adds to a message of this side."""
    nothing: Pair = {name: [{"role": ROLES[name], "content": ""}] for name in SIDES}
    return lengths([nothing], tokenizer)[side][0]


def sample(pairs: Sequence[Pair], profile: str, count: int, tokenizer: Any, max_length: int) -> list[Pair]:
    """`count` of the pairs in one of `PROFILES`, evenly spaced in the order of their lengths, in the order of the data.

    Only pairs whose completions differ and have a token left within `max_length`: others train nothing, and each
    package leaves them out in a way of its own. ValueError where there are fewer.
    """
    prompts = lengths(pairs, tokenizer)["prompt"]
    fits = [profile == "dialogue" or prompt < max_length for prompt in prompts]
    rows = [row for row, pair in enumerate(pairs) if fits[row] and pair["chosen"] != pair["rejected"]]
    if count > len(rows):
        raise ValueError(f"{count} pairs were asked for, and the data have {len(rows)}. Ask for fewer steps or rows.")
    rows.sort(key=lambda row: (sum(len(m["content"]) for side in SIDES for m in pairs[row][side]), row))
    chosen = sorted(rows[int((n + 0.5) * len(rows) / count)] for n in range(count))
    return in_profile([pairs[row] for row in chosen], profile, tokenizer)


def four_completions(pairs: Sequence[Pair]) -> list[Pair]:
    """All six pairs of four completions for each prompt: its own two, and those of the next row cut to their length."""
    made = []
    for pair, other in zip(pairs, [*pairs[1:], pairs[0]], strict=True):
        own = [pair["chosen"], pair["rejected"]]
        cut = [
            [{**message, "content": message["content"][: len(like[-1]["content"])]} for message in completion]
            for completion, like in zip((other["chosen"], other["rejected"]), own, strict=True)
        ]
        unlike = [*own, *(completion for completion in cut if completion not in own)]
        made += [
            {"prompt": pair["prompt"], "chosen": chosen, "rejected": rejected}
            for chosen, rejected in itertools.combinations(unlike, 2)
            if chosen != rejected
        ]
    return made


def facts(pairs: Sequence[Pair], tokenizer: Any, batch: int, max_length: int) -> dict[str, Any]:
    """Lengths of the pairs, and the tokens of padded batches of consecutive pairs over the needed ones."""
    found = lengths(pairs, tokenizer)
    rows = list(zip(*(found[side] for side in SIDES), strict=True))
    padded = needed = 0
    for start in range(0, len(rows) - batch + 1, batch):
        part = [(p, min(c, max_length - p), min(r, max_length - p)) for p, c, r in rows[start : start + batch]]
        part = [row for row in part if min(row[1:]) > 0]
        padded += 2 * len(part) * max((p + max(c, r) for p, c, r in part), default=0)
        needed += sum(sum(row) for row in part)
    return {
        "num_pairs": len(rows),
        **{f"{side}_tokens_mean": round(statistics.mean(found[side]), 1) for side in SIDES},
        "padded_tokens_over_needed": round(padded / max(needed, 1), 2),
    }


# --- the files in a measurement's folder ------------------------------------------------------------------------------


def write_model(folder: Path, size: Size, tokenizer: Any) -> None:
    """Writes a model with random weights, and the tokenizer, as `from_pretrained` reads them; of the sizes in `DRAWN`
    no weights."""
    import torch
    from transformers import LlamaForCausalLM

    if any(size is SIZES[name] for name in DRAWN):
        size.config().save_pretrained(folder)
    else:
        torch.manual_seed(0)
        LlamaForCausalLM(size.config()).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def model_in(folder: Path, device: str) -> Any:
    """What a trainer gets as its model: the folder's path where it has weights, else an fp32 model drawn on `device`
    by its config."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    if any(folder.glob("*.safetensors")):
        return str(folder)
    torch.manual_seed(0)
    with torch.device(device):
        return AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder), dtype=torch.float32)


def write_pairs(file: Path, pairs: Sequence[Pair]) -> None:
    """Writes the pairs as JSONL."""
    file.write_text("".join(json.dumps(pair) + "\n" for pair in pairs), encoding="utf-8")
