"""What one model did with the questions and the checkable instructions, item by item; kept as JSON."""

from __future__ import annotations

import logging
from dataclasses import asdict, dataclass
from typing import Any

from transformers import PreTrainedModel

from sft_pipeline.data.templates import Message, Template, with_system_prompt
from sft_pipeline.errors import SFTError
from sft_pipeline.evaluation.answers import Answer, answer
from sft_pipeline.evaluation.instructions import load_instructions
from sft_pipeline.evaluation.questions import Questions, with_examples
from sft_pipeline.evaluation.reference_loss import RowLoss, reference_losses

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Record:
    """One value a row of the questions, and one a checkable instruction, in their order."""

    name: str
    losses: list[RowLoss | None]
    answers: list[Answer]
    instruction_answers: list[Answer]

    def as_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> Record:
        return cls(
            content["name"],
            [one and RowLoss(**one) for one in content["losses"]],
            [Answer(**one) for one in content["answers"]],
            [Answer(**one) for one in content["instruction_answers"]],
        )


@dataclass(frozen=True)
class Contestant:
    """A model with the way it is asked. It has been through `supervise`."""

    name: str
    model: PreTrainedModel
    template: Template
    system_prompt: str | None


def record(one: Contestant, questions: Questions, max_new_tokens: int, few_shot: bool = False) -> Record:
    """Ask everything, with the questions' examples in every prompt if `few_shot`.

    Raises SFTError where the examples leave no room for a question and its answer.
    """
    examples = questions.examples if few_shot else []
    rows = [with_examples(with_system_prompt(row, one.system_prompt), examples) for row in questions.rows]
    tasks = [[{"role": "user", "content": instruction.prompt}] for instruction in load_instructions()]
    tasks = [with_examples(with_system_prompt(task, one.system_prompt), examples) for task in tasks]
    prompts = [row[:-1] for row in rows]
    if few_shot:
        _check_room(one, [*prompts, *tasks], max_new_tokens, len(examples))
    name = one.name + (f", {len(examples)} examples" if few_shot else "")
    logger.info("%s: loss of %s rows, %s answers", name, len(rows), len(prompts) + len(tasks))
    losses = reference_losses(one.model, one.template, rows) if rows else []
    answers = answer(one.model, one.template, prompts + tasks, max_new_tokens)
    return Record(name, losses, answers[: len(prompts)], answers[len(prompts) :])


def _check_room(one: Contestant, prompts: list[list[Message]], max_new_tokens: int, examples: int) -> None:
    limit = getattr(one.model.config.get_text_config(), "max_position_embeddings", None)
    longest = max(len(one.template.prompt(prompt)) for prompt in prompts)
    if limit is not None and longest + max_new_tokens > limit:
        raise SFTError(
            f"few_shot {examples}: with the examples a prompt of {longest} tokens and an answer of {max_new_tokens} exceed the "
            f"{limit} positions of {one.name}; use fewer examples"
        )
