"""Prompts answered by a model: the one way from conversations to text, for `chat`, `generate` and the evaluation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tqdm.auto import tqdm
from transformers import PreTrainedModel

from sft_pipeline.data.chat_templates import Template
from sft_pipeline.data.messages import Message
from sft_pipeline.inference.engine import Completion, generate
from sft_pipeline.inference.sampling import SamplingParams


@dataclass(frozen=True)
class Answer:
    """stopped: the model (or a stop string) ended the answer; otherwise the token limit cut it off. error: why there is
    none. logprob: of all its tokens together, in nats."""

    text: str
    stopped: bool
    tokens: int
    error: str | None = None
    logprob: float = 0.0

    @property
    def finish_reason(self) -> str:
        """Why the answer ended, as generation says it: "stop", "length" or "error"."""
        return "error" if self.error else "stop" if self.stopped else "length"


def answer_prompts(
    model: PreTrainedModel,
    template: Template,
    prompts: list[list[Message]],
    max_new_tokens: int,
    batch_size: int = 8,
    disable_tqdm: bool = False,
) -> list[Answer]:
    """Greedy answers to conversations that end with a user message, in their order, with a bar."""
    ids = [template.encode_prompt(messages) for messages in prompts]
    settings = SamplingParams(max_new_tokens=max_new_tokens)
    # The first answer may take long, so the bar does not wait for it to appear.
    with tqdm(total=len(ids), desc="answers", leave=False, delay=0, dynamic_ncols=True, disable=disable_tqdm) as bar:
        return generate_answers(
            model, template, ids, settings, batch_size=batch_size, on_done=lambda row, answer: bar.update()
        )


def generate_answers(
    model: PreTrainedModel,
    template: Template,
    prompts: list[list[int]],
    settings: SamplingParams,
    *,
    batch_size: int = 8,
    max_length: int | None = None,
    stop_strings: Sequence[str] = (),
    seeds: Sequence[int] | None = None,
    on_token: Callable[[int, int], None] | None = None,
    on_done: Callable[[int, Answer], None] | None = None,
) -> list[Answer]:
    """Answers to what `template.prompt` made, in their order. The arguments are those of `generation.generate`, but
    that `on_done` is given the answer."""
    completions = generate(
        model,
        prompts,
        [template.stop_token_id],
        settings,
        batch_size=batch_size,
        max_length=max_length,
        stop_strings=stop_strings,
        decode=lambda ids: str(template.tokenizer.decode(ids, skip_special_tokens=True)),
        seeds=seeds,
        on_token=on_token,
        on_done=on_done and (lambda row, done: on_done(row, _read(done))),
    )
    return [_read(done) for done in completions]


def _read(done: Completion) -> Answer:
    text = (done.text or "").strip()
    return Answer(text, done.finish_reason == "stop", len(done.ids), done.error, sum(done.logprobs))
