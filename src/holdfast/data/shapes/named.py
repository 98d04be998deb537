"""Public formats of preferences by name: which column is what. A new format is a line here.

Formats of chats make messages of texts (`as_messages`); those of other texts leave them as they are. Columns that are
`optional` may be missing, but for the prompt's further texts, which always may.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, final

_PAIR = {"chosen": "chosen", "rejected": "rejected"}
_AS_MESSAGES = {"as_messages": True}
_SYSTEM = {"system": "system"}


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class NamedFormat:
    """A format: a mapping as a user would write it, which of its keys a dataset may lack, and whose format it is. It is
    guessed where its columns are there, and those that it is `guessed_with`."""

    columns: Mapping[str, Any]
    of: str
    optional: tuple[str, ...] = ("system", "history", "tools")
    guessed_with: tuple[str, ...] = ()


NAMED_FORMATS: Mapping[str, NamedFormat] = {
    "sharegpt": NamedFormat(
        of="LLaMA-Factory: `conversations`, `chosen` and `rejected` with `from` and `value`",
        columns={"prompt": "conversations", **_PAIR, **_SYSTEM, "tools": "tools", **_AS_MESSAGES},
    ),
    "messages": NamedFormat(
        of="axolotl's `chat_template.default`: `messages`, and one message each in `chosen` and `rejected`",
        columns={"prompt": "messages", **_PAIR, **_SYSTEM, "tools": "tools", **_AS_MESSAGES},
    ),
    "swift": NamedFormat(
        of="ms-swift: `messages`, the last of which is chosen, and `rejected_response`",
        columns={"prompt_and_chosen": "messages", "rejected": "rejected_response", "tools": "tools"},
    ),
    "swift-query": NamedFormat(
        of="older ms-swift: `query`, `response`, `rejected_response`, `system`, `history`",
        columns={
            "prompt": "query",
            "chosen": "response",
            "rejected": "rejected_response",
            **_SYSTEM,
            "history": "history",
            **_AS_MESSAGES,
        },
    ),
    "openai": NamedFormat(
        of="OpenAI's preference files: `input.messages`, `preferred_output`, `non_preferred_output`",
        columns={
            "prompt": "input.messages",
            "chosen": "preferred_output",
            "rejected": "non_preferred_output",
            **_AS_MESSAGES,
        },
    ),
    "orca": NamedFormat(
        of="Intel's Orca pairs, axolotl's `chatml.intel`: `system`, `question`, `chosen`, `rejected`",
        columns={"prompt": "question", **_PAIR, **_SYSTEM, **_AS_MESSAGES},
        guessed_with=("system",),
    ),
    "alpaca": NamedFormat(
        of="LLaMA-Factory: `instruction`, `input`, `chosen`, `rejected`, `system`, `history`",
        columns={"prompt": ["instruction", "input"], **_PAIR, **_SYSTEM, "history": "history", **_AS_MESSAGES},
        guessed_with=("input",),
    ),
    "argilla": NamedFormat(
        of="axolotl's `chatml.argilla`: `instruction`, `chosen_response`, `rejected_response`",
        columns={
            "prompt": "instruction",
            "chosen": "chosen_response",
            "rejected": "rejected_response",
            **_SYSTEM,
            **_AS_MESSAGES,
        },
    ),
    "distilabel": NamedFormat(
        of="axolotl's `chatml.icr`, argilla's Orca pairs: `system`, `input`, `chosen`, `rejected`",
        columns={"prompt": "input", **_PAIR, **_SYSTEM, **_AS_MESSAGES},
        guessed_with=("system",),
    ),
    "prompt-pairs": NamedFormat(
        of="axolotl's `chatml.prompt_pairs`: `system`, `prompt`, `chosen`, `rejected`",
        columns={"prompt": "prompt", **_PAIR, **_SYSTEM, **_AS_MESSAGES},
        guessed_with=("system",),
    ),
    "ultrafeedback": NamedFormat(
        of="UltraFeedback: `instruction`, and `completions` with `response` and `overall_score`",
        columns={
            "prompt": "instruction",
            "responses": "completions.*.response",
            "scores": "completions.*.overall_score",
            **_AS_MESSAGES,
        },
    ),
    "nectar": NamedFormat(
        of="Nectar: `prompt`, and `answers` with `answer` and `rank`",
        columns={
            "prompt": "prompt",
            "responses": "answers.*.answer",
            "ranks": "answers.*.rank",
            "dialogues": True,
            **_AS_MESSAGES,
        },
    ),
    "nemo": NamedFormat(
        of="NeMo RL: `context`, and `completions` with `completion` and `rank`",
        columns={
            "prompt": "context",
            "responses": "completions.*.completion",
            "ranks": "completions.*.rank",
            **_AS_MESSAGES,
        },
    ),
    "helpsteer": NamedFormat(
        of="HelpSteer 2's preferences: `prompt`, `response_1`, `response_2`, `preference_strength`",
        columns={
            "prompt": "prompt",
            "responses": ["response_1", "response_2"],
            "preference": "preference_strength",
            **_AS_MESSAGES,
        },
    ),
    "helpsteer3": NamedFormat(
        of="HelpSteer 3: `context`, `response1`, `response2`, `overall_preference`",
        columns={
            "prompt": "context",
            "responses": ["response1", "response2"],
            "preference": "overall_preference",
            **_AS_MESSAGES,
        },
    ),
    "arena": NamedFormat(
        of="Chatbot Arena: `conversation_a`, `conversation_b`, `winner`",
        columns={"responses": ["conversation_a", "conversation_b"], "best": "winner"},
    ),
    "hh": NamedFormat(
        of='HH-RLHF: `chosen` and `rejected` are dialogues of "\\n\\nHuman: " and "\\n\\nAssistant: " in one text',
        columns={**_PAIR, "dialogues": True},
    ),
    "pku-saferlhf": NamedFormat(
        of="PKU-SafeRLHF: `prompt`, `response_0`, `response_1`, `better_response_id`",
        columns={"prompt": "prompt", "responses": ["response_0", "response_1"], "best": "better_response_id"},
    ),
    "shp": NamedFormat(
        of="SHP: `history`, `human_ref_A`, `human_ref_B`, `labels` (1 where A is preferred)",
        columns={"prompt": "history", "responses": ["human_ref_B", "human_ref_A"], "best": "labels"},
    ),
    "stack-exchange": NamedFormat(
        of="Stack Exchange pairs: `question`, `response_j`, `response_k`",
        columns={"prompt": "question", "chosen": "response_j", "rejected": "response_k"},
    ),
    "webgpt": NamedFormat(
        of="WebGPT comparisons: `question.full_text`, `answer_0`, `answer_1`, `score_0`, `score_1`",
        columns={
            "prompt": "question.full_text",
            "responses": ["answer_0", "answer_1"],
            "scores": ["score_0", "score_1"],
        },
    ),
    "summarize": NamedFormat(
        of="Summarize from feedback: `info.post`, `summaries` with `text`, `choice`",
        columns={"prompt": "info.post", "responses": "summaries.*.text", "best": "choice"},
    ),
}
