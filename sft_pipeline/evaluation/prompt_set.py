"""The prompts that all models of a comparison answer: held-out rows, and other rows as few-shot examples."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from sft_pipeline.data.messages import Message
from sft_pipeline.data.splits import hash_row
from sft_pipeline.utils.errors import SFTError


@dataclass(frozen=True)
class PromptSet:
    """rows: conversations that end with the reference answer. examples: exchanges (user, assistant) whose user message
    opens none of the rows."""

    rows: list[list[Message]]
    examples: list[list[Message]]

    @property
    def texts(self) -> list[str]:
        """The last user message of each row."""
        return [row[-2]["content"] for row in self.rows]

    @property
    def references(self) -> list[str]:
        return [row[-1]["content"] for row in self.rows]


def select_prompts(conversations: Iterable[list[Message]], num_prompts: int, few_shot: int) -> PromptSet:
    """Return the first `num_prompts` rows with distinct prompts, and `few_shot` of the rows after them as examples.

    With too few rows, all but the examples' are prompts. Raises SFTError if no row remains as a prompt or if the
    examples are too few.
    """
    distinct: dict[int, list[Message]] = {}
    for row in conversations:
        distinct.setdefault(hash_row(row[:-1]), row)
    rows = list(distinct.values())
    count = max(0, min(num_prompts, len(rows) - few_shot))
    prompts, candidates = rows[:count], [get_first_exchange(row) for row in rows[count:]]
    openings = {get_first_exchange(row)[0]["content"] for row in prompts}
    examples = [exchange for exchange in candidates if exchange[0]["content"] not in openings][:few_shot]
    if not prompts or len(examples) < few_shot:
        raise SFTError(
            f"few_shot {few_shot}: the data has {len(rows)} different rows, too few for prompts besides the examples; "
            "use fewer examples"
        )
    return PromptSet(prompts, examples)


def get_first_exchange(row: list[Message]) -> list[Message]:
    """Return the first user message and its answer, which do not depend on earlier messages."""
    start = row[0]["role"] == "system"
    return row[start : start + 2]


def add_examples(messages: list[Message], examples: list[list[Message]]) -> list[Message]:
    """Insert the examples as earlier exchanges, after the system message."""
    start = messages[0]["role"] == "system"
    return [*messages[:start], *(message for example in examples for message in example), *messages[start:]]
