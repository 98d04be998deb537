"""The model of the quickstart: a tokenizer and a Llama of 0.4 million parameters, trained from nothing on the village.

It stands for the model after supervised fine-tuning. First it learns the facts from right answers, then for a short
time the village's talk, which is often wrong and mostly padded: by plain maximum likelihood on the answers. So it knows
what is right, and says something else in four of ten answers. One thread is used, so that a seed gives the same model
wherever the kernels are the same.
"""

import math
import random
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Int
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from holdfast.quickstart.village import SHARE_RIGHT, answer, questions

PAD, START, END = "<|pad|>", "<|im_start|>", "<|im_end|>"
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
NUM_STEPS_OF_FACTS, NUM_STEPS_OF_TALK = 300, 60
_TEXTS_PER_STEP = 64


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE of the village's words, with ChatML as its chat template."""
    draw = random.Random(0)
    texts = [f"system user assistant {question.text} {answer(question, draw)}" for question in questions()]
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=640,
        special_tokens=[PAD, START, END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token=PAD, eos_token=END, padding_side="left")
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def make_model(
    tokenizer: PreTrainedTokenizerFast,
    *,
    seed: int = 0,
    num_steps: tuple[int, int] = (NUM_STEPS_OF_FACTS, NUM_STEPS_OF_TALK),
    on_step: Callable[[], None] = lambda: None,
) -> LlamaForCausalLM:
    """A model that has learnt the village's facts, then its talk, in so many steps; `on_step` is called after each."""
    ids: Any = [tokenizer.convert_tokens_to_ids(token) for token in (PAD, END)]
    pad, end = ids
    with _one_thread(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=len(tokenizer),
                hidden_size=128,
                intermediate_size=256,
                num_hidden_layers=2,
                num_attention_heads=4,
                num_key_value_heads=4,
                max_position_embeddings=512,
                tie_word_embeddings=True,
                pad_token_id=pad,
                bos_token_id=None,
                eos_token_id=end,
            )
        )
        draw = random.Random(seed)
        facts, talk = num_steps
        _learn(model, _batches(tokenizer, facts, draw, share_right=1.0), facts, 5e-3, on_step)
        _learn(model, _batches(tokenizer, talk, draw), talk, 1e-3, on_step)
    return model.eval()


def _learn(
    model: LlamaForCausalLM,
    batches: Iterable[tuple[Int[Tensor, "S T"], Int[Tensor, "S T"]]],
    num_steps: int,
    learning_rate: float,
    on_step: Callable[[], None],
) -> None:
    """AdamW with a warmup of a twentieth, then a cosine to zero."""
    num_warmup = max(1, num_steps // 20)
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / num_warmup, 0.5 * (1 + math.cos(math.pi * step / num_steps)))
    )
    model.train()
    for tokens, targets in batches:
        logits = model(input_ids=tokens[:, :-1], use_cache=False).logits
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), targets[:, 1:].flatten(), ignore_index=-100)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        on_step()


def _batches(
    tokenizer: PreTrainedTokenizerFast, num_steps: int, draw: random.Random, *, share_right: float = SHARE_RIGHT
) -> Iterator[tuple[Int[Tensor, "S T"], Int[Tensor, "S T"]]]:
    """Token ids of conversations, padded on the right, and the targets: the ids of the answers, else -100."""
    asked = list(questions())
    prompts: list[Any] = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": question.text}], add_generation_prompt=True, tokenize=False
        )
        for question in asked
    ]
    prompt_ids = _ids(tokenizer, prompts)
    padding: Any = tokenizer.pad_token_id
    for _ in range(num_steps):
        chosen = draw.choices(range(len(asked)), k=_TEXTS_PER_STEP)
        replies = [f"{answer(asked[index], draw, share_right=share_right)}{END}" for index in chosen]
        reply_ids = _ids(tokenizer, replies)
        rows = [(prompt_ids[index], ids) for index, ids in zip(chosen, reply_ids, strict=True)]
        tokens = [torch.tensor(prompt + reply) for prompt, reply in rows]
        targets = [torch.tensor([-100] * len(prompt) + reply) for prompt, reply in rows]
        yield (
            nn.utils.rnn.pad_sequence(tokens, batch_first=True, padding_value=padding),
            nn.utils.rnn.pad_sequence(targets, batch_first=True, padding_value=-100),
        )


def _ids(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> list[list[int]]:
    """The token ids of each text, with no special tokens but those that it spells."""
    ids: Any = tokenizer(texts, add_special_tokens=False)["input_ids"]
    return ids


@contextmanager
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
