"""The prompts that all models of a comparison answer: held-out rows, and other rows as few-shot examples."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from sft_pipeline.data.messages import (
    SYSTEM_ROLES,
    Conversation,
    Message,
    list_questions,
    replace_messages,
    split_answer,
)
from sft_pipeline.data.splits import hash_row
from sft_pipeline.evaluation.readable_messages import format_message, format_prompt
from sft_pipeline.utils.errors import SFTError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class PromptSet:
    """rows: conversations that end with the reference answer. examples: exchanges (user, assistant) whose user message
    is in none of the rows. sets: the held-out set of each row, if the sets have names."""

    rows: list[Conversation]
    examples: list[list[Message]]
    sets: list[str] = field(default_factory=list)

    @property
    def prompts(self) -> list[Conversation]:
        """The rows without their reference answers."""
        return [split_answer(row)[0] for row in self.rows]

    @property
    def texts(self) -> list[str]:
        """The last user message of each row, and what follows it up to the answer."""
        return [format_prompt(prompt["messages"]) for prompt in self.prompts]

    @property
    def references(self) -> list[str]:
        return [format_message(row["messages"][-1]) for row in self.rows]


def drop_texts(conversations: list[Conversation], name: str) -> list[Conversation]:
    """Return the conversations without the texts of a source, which have no prompt; log how many those are.

    Raises SFTError if no other is left.
    """
    rows = [conversation for conversation in conversations if "messages" in conversation]
    if not rows:
        raise SFTError(f"{name}: its rows are texts without a prompt to answer; give rows of messages")
    if len(rows) < len(conversations):
        logger.info("%s: %s texts have no prompt and are left out", name, f"{len(conversations) - len(rows):,}")
    return rows


def select_prompts(conversations: list[Conversation], num_prompts: int, few_shot: int) -> PromptSet:
    """Return the first `num_prompts` questions (`list_questions`) with distinct prompts, and `few_shot` of those after
    them as examples.

    Examples come from rows without tools. With too few rows, all but the examples' are prompts. Raises SFTError if no
    row remains as a prompt or if the examples are too few.
    """
    distinct: dict[int, Conversation] = {}
    for row in itertools.chain.from_iterable(map(list_questions, conversations)):
        distinct.setdefault(hash_row(split_answer(row)[0]), row)
    rows = list(distinct.values())
    exchanges = {index: exchange for index, row in enumerate(rows) if (exchange := get_first_exchange(row))}
    last_exchanges = list(exchanges)[-few_shot:] if few_shot else []
    indices = [index for index in range(len(rows)) if index not in last_exchanges][:num_prompts]
    prompts = [rows[index] for index in indices]
    questions = {message["content"] for row in prompts for message in row["messages"] if message["role"] == "user"}
    candidates = [exchange for index, exchange in exchanges.items() if index not in indices]
    examples = [exchange for exchange in candidates if exchange[0]["content"] not in questions][:few_shot]
    if not prompts or len(examples) < few_shot:
        plain = f" ({len(exchanges)} without tools)" if len(exchanges) < len(rows) else ""
        raise SFTError(
            f"few_shot {few_shot}: the data has {len(rows)} different rows{plain}, too few for prompts besides the "
            "examples; use fewer examples"
        )
    return PromptSet(prompts, examples)


def find_sets(rows: Sequence[Conversation], sets: Mapping[str | None, Sequence[Conversation]]) -> list[str]:
    """Return the name of the held-out set that each question is of; an empty list for one set without a name."""
    names: dict[int, str] = {}
    for name, conversations in sets.items():
        for row in itertools.chain.from_iterable(map(list_questions, conversations)):
            if name is not None:
                names.setdefault(hash_row(row), name)
    return [names[hash_row(row)] for row in rows] if names else []


def get_first_exchange(row: Conversation) -> list[Message] | None:
    """Return the first user message and its answer, which do not depend on earlier messages; reasoning is left out.

    None for a row with tools, and for one that does not begin with a user message and its answer.
    """
    messages = row["messages"]
    question, answer = ([*messages[messages[0]["role"] in SYSTEM_ROLES :], None, None])[:2]
    if not question or not answer or (question["role"], answer["role"]) != ("user", "assistant"):
        return None
    if row.get("tools") or answer.get("tool_calls"):
        return None
    return [{"role": message["role"], "content": message["content"]} for message in (question, answer)]


def add_examples(conversation: Conversation, examples: list[list[Message]]) -> Conversation:
    """Insert the examples as earlier exchanges, after the system message."""
    messages = conversation["messages"]
    start = messages[0]["role"] in SYSTEM_ROLES
    inserted = [message for example in examples for message in example]
    return replace_messages(conversation, [*messages[:start], *inserted, *messages[start:]])
