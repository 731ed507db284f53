"""Held-out prompts answered by the model as it is now."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

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

    @property
    def finish_reason(self) -> str:
        """Why the answer ended, as generation says it: "stop", "length" or "error"."""
        return "error" if self.error else "stop" if self.stopped else "length"


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


def before_and_after(
    prompts: list[list[Message]], references: list[str], before: list[Answer], after: list[Answer]
) -> list[dict[str, Any]]:
    """The rows of results.json's `answers`."""
    return [
        {
            "prompt": prompt[-1]["content"],
            "reference": reference,
            "before": old.text,
            "after": new.text,
            "stopped": new.stopped,
            "stopped_before": old.stopped,
        }
        for prompt, reference, old, new in zip(prompts, references, before, after)
    ]


def as_dicts(answers: list[Answer]) -> list[dict[str, Any]]:
    return [asdict(one) for one in answers]
