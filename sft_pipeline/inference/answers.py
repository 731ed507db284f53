"""Generate text answers to conversations or encoded prompts; used by `chat`, `generate` and the evaluation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tqdm.auto import tqdm
from transformers import PreTrainedModel

from sft_pipeline.data.messages import Conversation, Message
from sft_pipeline.data.template import Template
from sft_pipeline.inference.engine import Completion, generate
from sft_pipeline.inference.sampling import SamplingParams


@dataclass(frozen=True)
class Answer:
    """The answer to a prompt."""

    text: str  # as the model wrote it, with reasoning and tool calls
    stopped: bool  # ended by a stop token or stop string; otherwise cut off at the token limit
    tokens: int  # without the stop token
    error: str | None = None  # why the prompt has no answer
    logprob: float = 0.0  # sum over the tokens, in nats
    message: Message | None = None  # what the template reads from the text; None without an answer

    @property
    def finish_reason(self) -> str:
        """Why generation ended: "stop", "length" or "error"."""
        return "error" if self.error else "stop" if self.stopped else "length"


def answer_prompts(
    model: PreTrainedModel,
    template: Template,
    prompts: list[Conversation],
    max_new_tokens: int,
    batch_size: int = 8,
    disable_tqdm: bool = False,
) -> list[Answer]:
    """Generate greedy answers to conversations that end with a user message or a tool's, with a progress bar.

    The answers are in the order of `prompts`.
    """
    ids = [template.encode_prompt(prompt) for prompt in prompts]
    settings = SamplingParams(max_new_tokens=max_new_tokens)
    # No delay: the first answer may take long, and the bar should be visible until then.
    with tqdm(total=len(ids), desc="answers", leave=False, delay=0, dynamic_ncols=True, disable=disable_tqdm) as bar:
        return generate_answers(
            model, template, ids, settings, batch_size=batch_size, on_done=lambda index, answer: bar.update()
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
    """Generate answers to prompts encoded by `template.encode_prompt`, in their order.

    The arguments are those of `engine.generate`, except that `on_done` is called with an Answer.
    """
    completions = generate(
        model,
        prompts,
        template.stop_token_ids,
        settings,
        batch_size=batch_size,
        max_length=max_length,
        stop_strings=stop_strings,
        decode=lambda ids: str(template.tokenizer.decode(ids, skip_special_tokens=True)),
        seeds=seeds,
        on_token=on_token,
        on_done=on_done and (lambda index, completion: on_done(index, _build_answer(completion, template))),
    )
    return [_build_answer(completion, template) for completion in completions]


def _build_answer(completion: Completion, template: Template) -> Answer:
    text = (completion.text or "").strip()
    message = None if completion.error else template.parse_text(text)
    stopped = completion.finish_reason == "stop"
    return Answer(text, stopped, len(completion.ids), completion.error, sum(completion.logprobs), message)
