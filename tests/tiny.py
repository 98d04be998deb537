"""Tiny parts for tests, built in memory in milliseconds: a byte-level BPE tokenizer with a chat template, and rows.

Nothing is downloaded and nothing is random but by seed, so that two tests that ask for the same part get equal parts.
"""

import random
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

PROSE = """\
The keeper of the lighthouse kept two books. In the first he wrote down what the sea did: the height of the water at
noon, the wind, the colour of the sky before the sun went under. In the second he wrote down what he thought the sea
would do tomorrow, and he never let himself change a word of it once the day had come. On quiet evenings he read the
two books side by side and counted how often he had been wrong.

When his daughter was nine she asked him why he wrote the second book at all, if it was wrong so often. He said that a
guess which is not written down is worth nothing, because by the morning you will remember having known it all along.
She thought about that for a long time. Then she took a pencil and wrote under his line for the next day: rain before
breakfast, and then a clear afternoon. He laughed, because there was not one cloud over the whole bay.

It rained before breakfast. The afternoon was so clear that they could see the mill on the far side of the water, the
white road behind it, and a cart going up the road with a load of apples. From then on they each had a column. She
looked at different things than he did. He measured the water; she watched the gulls, the spiders under the stairs and
the smoke from the chimney of the inn. Some weeks her column was better and some weeks his, but the column that was
best of all was the one they wrote together, after they had argued over supper and neither of them had won.

Years later, when she had a boat of her own, people in the harbour asked her how she always knew when to stay at home.
She told them that she did not know, that she only kept count. What can a person do who wants to be less wrong? Write
down what you expect, and do not touch it. Look at what happens, and write that down as well. Keep both books on the
same shelf, and read them when you are tired and honest. Most people keep one book only, and they mend it every night.

What should I pack for a walk by the sea? Take good shoes, a coat against the wind, some bread and an apple, and tell
somebody which way you are going. How do I make tea for six people? Boil the water, warm the pot, put in one spoon of
leaves for each person and one more for the pot, and wait four minutes. Who wrote the first book about the tides? I am
not sure, and I would rather say so than give you a name. Can you help me with a letter to my landlord? Of course: tell
me what is broken, since when, and what you have already asked for, and I will write it plainly and politely.
"""

PAD, START, END = "<|pad|>", "<|im_start|>", "<|im_end|>"

CHAT_TEMPLATE = (
    "{%- if tools %}<|im_start|>system\nTools: {{ tools | tojson }}<|im_end|>\n{% endif %}"
    "{%- if style is defined %}<|im_start|>system\nStyle: {{ style }}<|im_end|>\n{% endif %}"
    "{%- for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% endif %}"
    "{% if 'tool_calls' in message %}{{ message['tool_calls'] | tojson }}{% endif %}<|im_end|>\n{% endfor %}"
    "{%- if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""ChatML with tools, tool calls and one variable of its own, `style`."""


def tokenizer(
    texts: list[str] | None = None, vocab_size: int = 512, chat_template: bool = True
) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer trained on `texts` (the prose above by default), with pad, bos and eos tokens."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[PAD, START, END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(PROSE.splitlines() if texts is None else texts, trainer)
    made = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token=PAD, bos_token=START, eos_token=END)
    made.chat_template = CHAT_TEMPLATE if chat_template else None
    return made


def preference_rows(n: int, seed: int = 0) -> list[dict[str, Any]]:
    """`n` conversational rows with an explicit prompt of one or three messages, drawn from the prose."""
    draw = random.Random(seed)
    words = PROSE.split()

    def message(role: str, shortest: int, longest: int) -> dict[str, str]:
        length = draw.randint(shortest, longest)
        start = draw.randrange(len(words) - length)
        return {"role": role, "content": " ".join(words[start : start + length])}

    rows = []
    for _ in range(n):
        prompt = [message("user", 3, 9)]
        if draw.random() < 0.3:
            prompt += [message("assistant", 3, 9), message("user", 3, 9)]
        chosen, rejected = message("assistant", 3, 12), message("assistant", 3, 12)
        if chosen == rejected:
            rejected["content"] += " no"
        rows.append({"prompt": prompt, "chosen": [chosen], "rejected": [rejected]})
    return rows
