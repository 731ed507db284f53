"""Held-out prompts answered by the model as it is now."""

from __future__ import annotations

from dataclasses import dataclass

from transformers import PreTrainedModel

from sft_pipeline.data.templates import Message, Template
from sft_pipeline.model.generation import generate
from sft_pipeline.model.sampling import Sampling


@dataclass(frozen=True)
class Answer:
    """stopped: the model ended the answer itself; otherwise the token limit cut it off. error: why there is none."""

    text: str
    stopped: bool
    tokens: int
    error: str | None = None


def answer(
    model: PreTrainedModel, template: Template, prompts: list[list[Message]], max_new_tokens: int, batch_size: int = 8
) -> list[Answer]:
    """Greedy answers to conversations that end with a user message, in their order."""
    ids = [template.prompt(messages) for messages in prompts]
    settings = Sampling(max_new_tokens=max_new_tokens)
    completions = generate(model, ids, [template.stop_token_id], settings, batch_size=batch_size)
    return [
        Answer(template.parse(done.ids), done.finish_reason == "stop", len(done.ids), done.error)
        for done in completions
    ]
