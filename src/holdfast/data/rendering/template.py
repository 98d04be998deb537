"""What a tokenizer's chat template makes of messages, as text and as token ids."""

import re
from collections.abc import Mapping
from functools import partial
from typing import Any

from transformers import PreTrainedTokenizerBase

from holdfast.data.dates import template_with_date
from holdfast.data.formats import Message, Preference
from holdfast.data.rendering.message_shapes import Render
from holdfast.data.turns.exchange import Exchange
from holdfast.data.turns.spans import Span
from holdfast.internals.transformers import apply_template, rendered_with_marks

_GENERATION = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")


def template_of(
    processing_class: PreTrainedTokenizerBase, options: Mapping[str, Any], template_date: str | None
) -> str:
    """The chat template for these template options, with the date where it prints one."""
    template = processing_class.get_chat_template(options.get("chat_template"), options.get("tools"))
    return template if template_date is None else template_with_date(template, template_date)


def template_options(
    preference: Preference, processing_class: PreTrainedTokenizerBase, template_date: str | None
) -> dict[str, Any]:
    """The arguments of `apply_chat_template` that a preference has."""
    options: dict[str, Any] = {"tools": preference.tools, **preference.chat_template_kwargs}
    if template_date is not None:
        options["chat_template"] = template_of(processing_class, options, template_date)
    return options


def rendered_text(
    preference: Preference,
    messages: list[Message],
    processing_class: PreTrainedTokenizerBase,
    template_date: str | None,
    *,
    add_generation_prompt: bool = False,
    continue_final_message: bool = False,
) -> str:
    """The text that the chat template makes of these messages. With `continue_final_message` it ends where the content
    of the last one does."""
    options = template_options(preference, processing_class, template_date)
    if continue_final_message:
        options["continue_final_message"] = True
    options["add_generation_prompt"] = add_generation_prompt
    text = apply_template(processing_class, messages, **options, tokenize=False)
    assert isinstance(text, str)
    return text


def rendered_prompt(
    exchange: Exchange, preference: Preference, processing_class: PreTrainedTokenizerBase, template_date: str | None
) -> str:
    """The text of the exchange's prompt, where `preference` has its messages in the shape that the template needs."""
    return rendered_text(
        preference,
        exchange.conversations(preference)[0],
        processing_class,
        template_date,
        add_generation_prompt=exchange.opens_turn,
        continue_final_message=exchange.prefill is not None,
    )


def renderer(processing_class: PreTrainedTokenizerBase, template_date: str | None) -> Render:
    """What makes the text of a whole conversation with these."""
    return partial(rendered_text, processing_class=processing_class, template_date=template_date)


def has_generation_marks(template: str) -> bool:
    """Whether a template marks what the assistant says, with `{% generation %}`."""
    return _GENERATION.search(template) is not None


def text_and_marks(
    preference: Preference,
    messages: list[Message],
    processing_class: PreTrainedTokenizerBase,
    template_date: str | None,
) -> tuple[str, list[Span]]:
    """The text that the chat template makes of these messages, and the characters between its generation marks."""
    options = template_options(preference, processing_class, template_date)
    template = template_of(processing_class, options, template_date)
    variables = {name: value for name, value in options.items() if name not in ("tools", "chat_template")}
    return rendered_with_marks(processing_class, template, messages, preference.tools, variables)


def cannot_continue(problem: str) -> str:
    """The message where a prompt's last message cannot be continued; `problem` is what the template does."""
    return (
        f"the prompt ends with an assistant's message, which the completions continue; the chat template {problem}. "
        "Move that message into `chosen` and `rejected`, or use a chat template that prints such messages as they are."
    )


def rendered_ids(
    messages: list[Message], processing_class: PreTrainedTokenizerBase, options: Mapping[str, Any]
) -> list[int]:
    """The token ids of these messages. Raises `ValueError` where the chat template refuses them."""
    try:
        return apply_template(processing_class, messages, **options, tokenize=True)
    except Exception as error:  # whatever the template's own code raises: a name that is missing, a division by zero
        if "continue_final_message" in options:
            problem = str(error).split("\n")[0].split("!")[0]
            raise ValueError(cannot_continue(f"does not print it so that it can be continued ({problem})")) from error
        raise ValueError(
            f"the chat template cannot render messages of the roles {[message['role'] for message in messages]}: "
            f"{error}. Correct the row, or use another chat template."
        ) from error
