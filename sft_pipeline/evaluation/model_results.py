"""What one model did with the questions and the checkable instructions, item by item; kept as JSON."""

from __future__ import annotations

import logging
from dataclasses import asdict, dataclass
from typing import Any

from transformers import PreTrainedModel

from sft_pipeline.data.chat_templates import Template
from sft_pipeline.data.messages import Message, add_system_prompt
from sft_pipeline.evaluation.eval_loss import RowLoss, compute_reference_losses
from sft_pipeline.evaluation.metrics.instruction_following import load_instructions
from sft_pipeline.evaluation.prompt_set import PromptSet, add_examples
from sft_pipeline.inference.answers import Answer, answer_prompts
from sft_pipeline.utils.errors import SFTError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ModelResults:
    """One value a row of the questions, and one a checkable instruction, in their order."""

    name: str
    losses: list[RowLoss | None]
    answers: list[Answer]
    instruction_answers: list[Answer]

    def as_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> ModelResults:
        return cls(
            content["name"],
            [one and RowLoss(**one) for one in content["losses"]],
            [Answer(**one) for one in content["answers"]],
            [Answer(**one) for one in content["instruction_answers"]],
        )


@dataclass(frozen=True)
class EvaluatedModel:
    """A model with the way it is asked. It has been through `supervise`."""

    name: str
    model: PreTrainedModel
    template: Template
    system_prompt: str | None


def run_prompt_set(
    one: EvaluatedModel, questions: PromptSet, max_new_tokens: int, few_shot: bool = False
) -> ModelResults:
    """Ask everything, with the questions' examples in every prompt if `few_shot`."""
    examples = questions.examples if few_shot else []
    rows = _as_asked(one, questions.rows, examples)
    prompts = [*(row[:-1] for row in rows), *_as_asked(one, _tasks(), examples)]
    name = one.name + (f", {len(examples)} examples" if few_shot else "")
    logger.info("%s: loss of %s rows, %s answers", name, len(rows), len(prompts))
    losses = compute_reference_losses(one.model, one.template, rows) if rows else []
    answers = answer_prompts(one.model, one.template, prompts, max_new_tokens)
    return ModelResults(name, losses, answers[: len(rows)], answers[len(rows) :])


def check_context_length(one: EvaluatedModel, questions: PromptSet, max_new_tokens: int) -> None:
    """Raise SFTError where the examples leave no room for a question and its answer."""
    prompts = _as_asked(one, [*(row[:-1] for row in questions.rows), *_tasks()], questions.examples)
    limit = getattr(one.model.config.get_text_config(), "max_position_embeddings", None)
    longest = max(len(one.template.encode_prompt(prompt)) for prompt in prompts)
    if limit is not None and longest + max_new_tokens > limit:
        raise SFTError(
            f"few_shot {len(questions.examples)}: with the examples a prompt of {longest} tokens and an answer of "
            f"{max_new_tokens} exceed the {limit} positions of {one.name}; use fewer examples"
        )


def _tasks() -> list[list[Message]]:
    """The checkable instructions as conversations."""
    return [[{"role": "user", "content": instruction.prompt}] for instruction in load_instructions()]


def _as_asked(
    one: EvaluatedModel, conversations: list[list[Message]], examples: list[list[Message]]
) -> list[list[Message]]:
    return [add_examples(add_system_prompt(messages, one.system_prompt), examples) for messages in conversations]
