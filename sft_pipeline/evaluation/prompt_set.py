"""What the models of a comparison are asked: rows of held-out data, and other rows as examples before them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from sft_pipeline.data.messages import Message
from sft_pipeline.data.splits import hash_row
from sft_pipeline.utils.errors import SFTError


@dataclass(frozen=True)
class PromptSet:
    """Conversations that end with the reference answer, and exchanges (user, assistant) that none of them holds."""

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
    """The first `num_prompts` rows, a question that comes again left out, and `few_shot` of the rows behind them.

    Fewer rows than wanted are all asked, the examples' apart. Raises SFTError where no row is left to ask.
    """
    distinct: dict[int, list[Message]] = {}
    for row in conversations:
        distinct.setdefault(hash_row(row[:-1]), row)
    rows = list(distinct.values())
    asked = rows[: max(0, min(num_prompts, len(rows) - few_shot))]
    known = {get_first_exchange(row)[0]["content"] for row in asked}
    examples = [
        get_first_exchange(row) for row in rows[len(asked) :] if get_first_exchange(row)[0]["content"] not in known
    ][:few_shot]
    if not asked or len(examples) < few_shot:
        raise SFTError(
            f"few_shot {few_shot}: the data has {len(rows)} different rows, too few to ask any beside the examples"
        )
    return PromptSet(asked, examples)


def get_first_exchange(row: list[Message]) -> list[Message]:
    """The first exchange, which needs nothing before it."""
    start = row[0]["role"] == "system"
    return row[start : start + 2]


def add_examples(messages: list[Message], examples: list[list[Message]]) -> list[Message]:
    """`messages` with the examples as earlier exchanges, behind the system message."""
    start = messages[0]["role"] == "system"
    return [*messages[:start], *(message for example in examples for message in example), *messages[start:]]
