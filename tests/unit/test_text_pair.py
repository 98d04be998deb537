"""Text has the bos token and the eos token once, whatever the tokenizer adds and the text has already."""

from typing import Any

import pytest
from tokenizers import processors

import tiny
from holdfast.data.batch_tokenizer import BatchTokenizer, EncodedPair
from holdfast.data.formats import read_preference
from holdfast.data.text_pair import with_eos
from holdfast.data.tokenize import tokenize
from holdfast.data.turns.sentences import ENDED_PROMPT

BOS, EOS, PAD = tiny.START, tiny.END, tiny.PAD


def adding(before: str, after: str) -> Any:
    """A tokenizer that adds these tokens to a text."""
    made = tiny.tokenizer()
    tokens = [(token, made.convert_tokens_to_ids(token)) for token in (BOS, EOS, PAD)]
    made.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{before} $A {after}".strip(), special_tokens=tokens
    )
    return made


@pytest.mark.parametrize(
    ("before", "after", "prompt", "chosen", "expected"),
    [
        ("", "", "Which sea?", " The bay.", ("Which sea?", f" The bay.{EOS}")),
        (BOS, "", "Which sea?", " The bay.", (f"{BOS}Which sea?", f" The bay.{EOS}")),
        (BOS, EOS, "Which sea?", " The bay.", (f"{BOS}Which sea?", f" The bay.{EOS}")),
        ("", EOS, "Which sea?", " The bay.", ("Which sea?", f" The bay.{EOS}")),
        ("", PAD, "Which sea?", " The bay.", ("Which sea?", f" The bay.{EOS}{PAD}")),
        (BOS, EOS, f"{BOS}Which sea?", " The bay.", (f"{BOS}Which sea?", f" The bay.{EOS}")),
        ("", "", f"{BOS}Which sea?", " The bay.", (f"{BOS}Which sea?", f" The bay.{EOS}")),
        (BOS, "", "", "The bay.", (BOS, f"The bay.{EOS}")),
        ("", "", "Which sea?", f" The bay.{EOS}", ("Which sea?", f" The bay.{EOS}")),
        (BOS, EOS, "Which sea?", f" The bay.{EOS}\n", (f"{BOS}Which sea?", f" The bay.{EOS}")),
        ("", "", "Which sea?", f" The bay.{EOS} {EOS} \n", ("Which sea?", f" The bay.{EOS}")),
        ("", "", "Which sea?", f" The bay. {EOS}", ("Which sea?", f" The bay. {EOS}")),
        ("", "", f"Which sea?{EOS}\n", "The bay.", (f"Which sea?{EOS}\n", f"The bay.{EOS}")),
    ],
)
def test_each_comes_once(before: str, after: str, prompt: str, chosen: str, expected: tuple[str, str]) -> None:
    tokenizer = adding(before, after)
    preference = read_preference({"prompt": prompt, "chosen": chosen, "rejected": " No."})
    pair = tokenize(preference, tokenizer)
    assert (tokenizer.decode(pair.prompt_ids), tokenizer.decode(pair.chosen_ids)) == expected
    assert pair.prompt_is_prefix
    assert {note.kind for note in pair.notes} == ({ENDED_PROMPT} if prompt.rstrip().endswith(EOS) else set())
    assert BatchTokenizer(tokenizer, None)._together([preference]) == [EncodedPair.of(pair)]


@pytest.mark.parametrize(
    ("text", "expected"),
    [("", EOS), (" ", f" {EOS}"), (EOS, EOS), (f"a{EOS}b", f"a{EOS}b{EOS}"), (f"a{EOS}{EOS}", f"a{EOS}")],
)
def test_one_eos_at_the_end(text: str, expected: str) -> None:
    assert with_eos(text, EOS) == expected


def test_templates_write_their_own() -> None:
    """A tokenizer that adds bos and eos to text adds none to what a template renders."""
    tokenizer = adding(BOS, EOS)
    tokenizer.chat_template = "{{ bos_token }}{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}"
    row = {
        side: [{"role": "assistant" if side != "prompt" else "user", "content": side}]
        for side in ("prompt", "chosen", "rejected")
    }
    pair = tokenize(read_preference(row), tokenizer)
    assert tokenizer.decode(pair.prompt_ids + pair.chosen_ids) == f"{BOS}prompt{EOS}chosen{EOS}"
    assert BatchTokenizer(tokenizer, None)._together([read_preference(row)]) == [EncodedPair.of(pair)]
