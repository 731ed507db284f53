"""Results of one model on a prompt set and on the checkable instructions, one per row; stored as JSON."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from transformers import PreTrainedModel

from sft_pipeline.data.messages import Conversation, Message, add_system_prompt
from sft_pipeline.data.template import Template
from sft_pipeline.evaluation.eval_loss import RowLoss, compute_reference_losses
from sft_pipeline.evaluation.harness import TaskScore
from sft_pipeline.evaluation.metrics.instruction_following import Instruction, load_instructions
from sft_pipeline.evaluation.metrics.tool_calls import match_tool_calls
from sft_pipeline.evaluation.prompt_set import PromptSet, add_examples
from sft_pipeline.inference.answers import Answer, answer_prompts
from sft_pipeline.utils.errors import SFTError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ModelResults:
    """losses, answers, calls_match: one per row of the prompt set. instruction_answers: one per checkable instruction.

    calls_match: of `match_tool_calls`; None also for a row without an answer. instruction_answers: none if instructions
    were not asked. task_scores, task_samples: of `run_tasks`.
    """

    name: str
    losses: list[RowLoss | None]
    answers: list[Answer]
    calls_match: list[bool | None]
    instruction_answers: list[Answer]
    task_scores: list[TaskScore] = field(default_factory=list)
    task_samples: list[dict[str, Any]] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        return asdict(self)

    @property
    def instructions(self) -> Sequence[Instruction]:
        """The checkable instructions that were asked."""
        return load_instructions() if self.instruction_answers else []

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> ModelResults:
        return cls(
            content["name"],
            [loss and RowLoss(**loss) for loss in content["losses"]],
            [Answer(**answer) for answer in content["answers"]],
            content["calls_match"],
            [Answer(**answer) for answer in content["instruction_answers"]],
            [TaskScore(**score) for score in content["task_scores"]],
            content["task_samples"],
        )


@dataclass(frozen=True)
class EvaluatedModel:
    """A model with its template and system prompt. `model` must have been through `patch_loss_forward`."""

    name: str
    model: PreTrainedModel
    template: Template
    system_prompt: str | None

    def build_prompts(self, conversations: list[Conversation], examples: list[list[Message]]) -> list[Conversation]:
        """Add the system prompt, then the examples behind it, to each conversation."""
        return [add_examples(add_system_prompt(row, self.system_prompt), examples) for row in conversations]


def run_prompt_set(
    evaluated: EvaluatedModel, prompts: PromptSet, max_new_tokens: int, few_shot: bool = False
) -> ModelResults:
    """Compute the losses and answers of a model; `few_shot` puts the examples of the prompt set into every prompt."""
    examples = prompts.examples if few_shot else []
    rows = evaluated.build_prompts(prompts.rows, examples)
    conversations = evaluated.build_prompts([*prompts.prompts, *_build_instruction_prompts()], examples)
    name = evaluated.name + (f", {len(examples)} examples" if few_shot else "")
    logger.info("%s: loss of %s rows, %s answers", name, len(rows), len(conversations))
    losses = compute_reference_losses(evaluated.model, evaluated.template, rows) if rows else []
    answers = answer_prompts(evaluated.model, evaluated.template, conversations, max_new_tokens)
    calls_match = [
        None if answer.error else match_tool_calls(evaluated.template, row, answer.text)
        for row, answer in zip(rows, answers)
    ]
    return ModelResults(name, losses, answers[: len(rows)], calls_match, answers[len(rows) :])


def check_context_length(evaluated: EvaluatedModel, prompts: PromptSet, max_new_tokens: int) -> None:
    """Raise SFTError if the examples leave no room for a prompt and its answer."""
    conversations = evaluated.build_prompts([*prompts.prompts, *_build_instruction_prompts()], prompts.examples)
    limit = getattr(evaluated.model.config.get_text_config(), "max_position_embeddings", None)
    longest = max(len(evaluated.template.encode_prompt(prompt)) for prompt in conversations)
    if limit is not None and longest + max_new_tokens > limit:
        raise SFTError(
            f"few_shot {len(prompts.examples)}: with the examples a prompt of {longest} tokens and an answer of "
            f"{max_new_tokens} exceed the {limit} positions of {evaluated.name}; use fewer examples"
        )


def _build_instruction_prompts() -> list[Conversation]:
    """Return the checkable instructions as conversations."""
    return [{"messages": [{"role": "user", "content": instruction.prompt}]} for instruction in load_instructions()]
