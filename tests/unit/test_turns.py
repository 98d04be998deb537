"""Who is scored in a row of messages, what is said of the row, and what is refused."""

import logging
from typing import Any

import pytest
from datasets import Dataset

import template_table
import tiny
from holdfast.data.batch_tokenizer import BatchTokenizer, EncodedPair
from holdfast.data.columns import MASK_COLUMNS
from holdfast.data.formats import read_preference
from holdfast.data.prepare import prepare_dataset
from holdfast.data.tokenize import TokenizedPair, tokenize
from holdfast.data.turns.masks_of_turns import TurnMasks
from holdfast.data.turns.sentences import ENDS_WITH_OTHER, NO_END, NOBODY_SPEAKS, NOT_TO_SCORE, PREFILL

TOKENIZER: Any = tiny.tokenizer()
HEADER, STOP = "<|im_start|>assistant\n", "<|im_end|>"
LOGGER = "holdfast.data.prepare"


def user(content: Any, **others: Any) -> dict[str, Any]:
    return {"role": "user", "content": content, **others}


def assistant(content: Any, **others: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **others}


def row(chosen: list[Any], rejected: list[Any] | None = None, prompt: list[Any] | None = None) -> dict[str, Any]:
    return {
        "prompt": [user("Which sea?")] if prompt is None else prompt,
        "chosen": chosen,
        "rejected": [assistant("No.")] if rejected is None else rejected,
    }


def pair_of(one: dict[str, Any], tokenizer: Any = TOKENIZER, **options: Any) -> TokenizedPair:
    """The row by itself, which is the same as together with others."""
    masks = TurnMasks(tokenizer, None, **{"assistant_only": True, **options})
    preference = read_preference(one)
    pair = tokenize(preference, tokenizer, turn_masks=masks)
    together = BatchTokenizer(tokenizer, None, **{"assistant_only": True, **options})._together([preference])
    assert together == [EncodedPair.of(pair)]
    return pair


def scored(pair: TokenizedPair, side: str, tokenizer: Any = TOKENIZER) -> list[str]:
    """The texts that are scored, one after the other."""
    ids, mask = getattr(pair, f"{side}_ids"), getattr(pair, f"{side}_mask")
    runs: list[list[int]] = [[]]
    for token, flag in zip(ids, [1] * len(ids) if mask is None else mask, strict=True):
        if flag:
            runs[-1].append(token)
        elif runs[-1]:
            runs.append([])
    return [tokenizer.decode(run) for run in runs if run]


def kinds(pair: TokenizedPair) -> set[str]:
    return {note.kind for note in pair.notes}


TURNS = [assistant("The bay."), user("Why?"), assistant("It rained.")]
BAY, RAIN, NO = f"The bay.{STOP}", f"It rained.{STOP}", f"No.{STOP}"


def marked(**others: Any) -> list[dict[str, Any]]:
    """The turns, the first with these keys."""
    return [{**TURNS[0], **others}, *TURNS[1:]]


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        *(({key: yes}, [BAY, RAIN]) for key in ("train", "loss", "weight") for yes in (True, 1, 1.0, None)),
        *(({key: no}, [RAIN]) for key in ("train", "loss", "weight") for no in (False, 0, 0.0)),
        ({"train": False, "weight": 0}, [RAIN]),
        ({"train": None, "weight": 0}, [RAIN]),
    ],
)
def test_a_message_says_whether_it_is_scored(keys: dict[str, Any], expected: list[str]) -> None:
    """And the template does not see how: the ids are those of the row without these keys."""
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = tokenizer.chat_template.replace(
        "<|im_end|>\n{% endfor %}",
        "{% for k in message if k not in ('role', 'content') %}{{ k }}{% endfor %}<|im_end|>\n{% endfor %}",
    )
    pair, plain = pair_of(row(marked(**keys)), tokenizer), pair_of(row(TURNS), tokenizer)
    assert scored(pair, "chosen", tokenizer) == expected
    assert (pair.chosen_ids, pair.prompt_ids) == (plain.chosen_ids, plain.prompt_ids)
    assert pair.notes == ()


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (
            {"weight": 0.5},
            r"'weight' of a message says whether it is scored, .*found 0.5 in a message of the role 'assi",
        ),
        ({"train": "no"}, r"'train' of a message .*with true \(or 1\) and false \(or 0\); found 'no'.*drop the key"),
        ({"train": True, "weight": 0}, r"contradict each other: \{'train': True, 'weight': False\}. Keep one of them"),
    ],
)
def test_other_weights_are_refused(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pair_of(row(marked(**keys)))


def test_one_turn_has_no_mask_and_a_pair_has_one_rule() -> None:
    """A completion of one message counts to its end, unless the other one has several: then both stop alike."""
    one = pair_of(row([assistant("The bay.", train=True)]))
    assert (one.chosen_mask, one.rejected_mask) == (None, None)
    assert scored(one, "chosen") == [BAY + "\n"]
    both = pair_of(row(TURNS))
    assert (scored(both, "chosen"), scored(both, "rejected")) == ([BAY, RAIN], [NO])


def test_all_is_scored_where_that_is_asked() -> None:
    pair = pair_of(row(TURNS), assistant_only=False)
    assert (pair.chosen_mask, pair.rejected_mask, pair.notes) == (None, None, ())
    with pytest.raises(ValueError, match=r"left out of the scoring by one of .*assistant_only=False all.*Drop these"):
        pair_of(row(marked(train=False)), assistant_only=False)


CALL = {"tool_calls": [{"type": "function", "function": {"name": "tide", "arguments": {}}}]}


@pytest.mark.parametrize(
    ("one", "prompt_end", "chosen", "rejected", "notes"),
    [
        (
            row([assistant(" bay.")], [assistant(" sea.")], [user("Which?"), assistant("The")]),
            HEADER + "The", [f" bay.{STOP}\n"], [f" sea.{STOP}\n"], {PREFILL},
        ),
        (
            row([assistant(" bay."), *TURNS[1:]], [assistant(" sea.")], [user("Which?"), assistant("The")]),
            HEADER + "The", [f" bay.{STOP}", RAIN], [f" sea.{STOP}"], {PREFILL},
        ),
        (
            row([assistant(" bay.")], [assistant(" sea.")], [assistant("The")]),
            HEADER + "The", [f" bay.{STOP}\n"], [f" sea.{STOP}\n"], {PREFILL},
        ),
        (row([*TURNS, user("Thanks.")]), HEADER, [BAY, RAIN], [NO], {ENDS_WITH_OTHER}),
        (row(TURNS, [user("No.")]), None, [BAY, RAIN], [], {NOBODY_SPEAKS}),
        (
            row([user("Why?"), assistant("It rained.")], [user("Why?"), assistant("No.")]),
            f"Which sea?{STOP}\n", [RAIN], [NO], set(),
        ),
        (
            row([user("Why?"), assistant("It rained.")], [user("Why?"), assistant("No.")], [user("Hi"), TURNS[0]]),
            BAY + "\n", [RAIN], [NO], set(),
        ),
        (row(TURNS, prompt=[user("Which sea?", train=True)]), HEADER, [BAY, RAIN], [NO], {NOT_TO_SCORE}),
        (row([TURNS[0], user("Why?", weight=1), TURNS[2]]), HEADER, [BAY, RAIN], [NO], {NOT_TO_SCORE}),
        (row([TURNS[0], user("Why?", weight=0), TURNS[2]]), HEADER, [BAY, RAIN], [NO], set()),
        (row([assistant("The bay.", train=False)]), HEADER, [], [NO], set()),
    ],
)  # fmt: skip
def test_what_becomes_of_a_row(
    one: dict[str, Any], prompt_end: str | None, chosen: list[str], rejected: list[str], notes: set[str]
) -> None:
    """Without an end, the prompt is cut where the headers of the completions part."""
    pair = pair_of(one)
    assert kinds(pair) == notes
    assert (scored(pair, "chosen"), scored(pair, "rejected")) == (chosen, rejected)
    assert pair.prompt_is_prefix == (prompt_end is not None)
    assert TOKENIZER.decode(pair.prompt_ids).endswith(prompt_end or "<|im_start|>")


def test_the_role_that_gemma_gives_its_model() -> None:
    tokenizer = template_table.tokenizer_of("gemma")
    turns = [{**TURNS[0], "role": "model"}, TURNS[1], {**TURNS[2], "role": "model"}]
    assert scored(pair_of(row(turns), tokenizer), "chosen", tokenizer) == scored(
        pair_of(row(TURNS), tokenizer), "chosen", tokenizer
    )


def test_whole_conversations_have_no_prefill() -> None:
    """Two messages of the assistant in a row stay two where they stand in whole conversations."""
    begin = [user("Which sea?"), assistant("Well.")]
    pair = pair_of({"chosen": [*begin, assistant("The bay.")], "rejected": [*begin, assistant("No.")]})
    assert TOKENIZER.decode(pair.prompt_ids).endswith(f"Well.{STOP}\n{HEADER}")
    assert kinds(pair) == set()


@pytest.mark.parametrize(
    ("one", "message"),
    [
        (
            row([assistant(" bay.")], prompt=[assistant("The", **CALL)]),
            r"continues it; .*since it calls tools. Move tha",
        ),
        (
            row([assistant(" bay.", name="Ann")], prompt=[assistant("The", name="Bob")]),
            r"both have other values of \['name'\]",
        ),
    ],
)
def test_what_cannot_be_continued(one: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pair_of(one)


@pytest.mark.parametrize(
    ("content", "assistant_only", "error"),
    [
        ("c.split(' ')[-1]", True, "does not print it so that it can be continued"),
        ("c | upper if ' bay' in c else c", False, "The', which is no beginning of what it makes of the whole"),
    ],
)
def test_a_template_that_does_not_print_the_prefill(content: str, assistant_only: bool, error: str) -> None:
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{% set c = m.content if m.content is string else raise_exception('text') %}"
        "{{ " + content + " }}{% endfor %}"
    )
    message = row([assistant(" bay.")], prompt=[user("Which?"), assistant("The")])
    with pytest.raises(ValueError, match=rf"which the completions continue; the chat template .*{error}.*Move that"):
        pair_of(message, tokenizer, assistant_only=assistant_only)


def test_turns_that_cannot_be_told_are_an_error() -> None:
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.content }} {% endfor %}{{ messages | length }}{{ eos_token }}"
        "{% if messages | length > 2 %}{% for m in messages %}{{ m.content | length }}{% endfor %}{% endif %}"
    )
    with pytest.raises(
        ValueError, match=r"turns cannot be told apart .*\['user', 'assistant', 'user', 'assistant'\]. Us"
    ):
        tokenize(read_preference(row(TURNS)), tokenizer)
    pair = pair_of(row(TURNS), tokenizer, assistant_only=False)
    assert pair.chosen_mask is None


def test_a_turn_is_left_out_of_marks_too() -> None:
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}{% generation %}{{ m.content }}"
        "{% endgeneration %}{% else %}{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    pair = pair_of(row(marked(train=False)), tokenizer)
    assert (scored(pair, "chosen"), scored(pair, "rejected")) == (["It rained."], ["No."])
    assert scored(pair_of(row(TURNS), tokenizer), "chosen") == ["The bay.", "It rained."]


def test_text_that_spells_out_tokens_moves_no_turn() -> None:
    turns = [TURNS[0], user(f"Why?{STOP}\n{HEADER}No"), TURNS[2]]
    pair = tokenize(read_preference(row(turns)), TOKENIZER)
    assert pair.as_text == STOP
    assert scored(pair, "chosen") == [BAY, RAIN]


def test_private_characters_in_a_row_are_no_marks() -> None:
    turns = [assistant("\U00100001 The bay.\U00100000"), user("\U00100000"), assistant("\U00100002")]
    pair = pair_of(row(turns))
    assert scored(pair, "chosen") == [f"\U00100001 The bay.\U00100000{STOP}", f"\U00100002{STOP}"]


@pytest.mark.parametrize(
    ("end", "has_end"), [("<|im_end|>", True), ("<|im_end|>\n", True), ("{{ eos_token }} ", True), ("\n###", False)]
)
def test_a_template_without_an_end_is_said(end: str, has_end: bool) -> None:
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}" + end + "{% endfor %}"
    assert kinds(pair_of(row([assistant("The bay.")]), tokenizer)) == (set() if has_end else {NO_END})


# --- datasets ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_proc", [None, 2, "stream"])
def test_masks_are_columns(num_proc: Any, caplog: pytest.LogCaptureFixture) -> None:
    rows = [row(TURNS), row([assistant("The bay.")]), row([*TURNS, user("Thanks.")]), row(TURNS, [user("No.")])]
    data: Any = Dataset.from_list(rows)
    if num_proc == "stream":
        prepared = list(prepare_dataset(data.to_iterable_dataset(), TOKENIZER))
    else:
        prepared = list(prepare_dataset(data, TOKENIZER, num_proc=num_proc))
    assert len(prepared) == 3  # in the last row nothing is scored
    for found, one in zip(prepared, rows[:3], strict=True):
        pair = pair_of(one)
        assert {name: found[name] for name in MASK_COLUMNS} == {name: getattr(pair, name) for name in MASK_COLUMNS}
    said = "\n".join(caplog.messages)
    where = "in at least one row" if num_proc == "stream" else r"in 1 of 4 rows (25.0 %)"
    roles = "chosen has the roles ['assistant', 'user', 'assistant', 'user']"
    assert f"ends with a message that is not the assistant's, {where}: in row 2, {roles}" in said
    assert f"has no message of the assistant, {where}: in row 3, rejected has the roles ['user']" in said


def test_columns_of_rows_without_masks_are_as_before() -> None:
    prepared: Any = prepare_dataset(Dataset.from_list([row([assistant("The bay.")])]), TOKENIZER)
    assert set(MASK_COLUMNS).isdisjoint(prepared.column_names)


def test_what_is_scored_is_part_of_the_cache(tmp_path: Any, caplog: pytest.LogCaptureFixture) -> None:
    Dataset.from_list([row(TURNS)]).save_to_disk(str(tmp_path))
    caplog.set_level(logging.WARNING, LOGGER)
    found = []
    for assistant_only in (True, False, True):
        data: Any = Dataset.load_from_disk(str(tmp_path))
        prepared: Any = prepare_dataset(data, TOKENIZER, assistant_only=assistant_only)
        found.append("chosen_mask" in prepared.column_names)
    assert found == [True, False, True]
