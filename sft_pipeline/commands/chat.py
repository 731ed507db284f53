"""Talk to a fine-tuned model.

    sft-pipeline chat outputs/quickstart
    echo "Who are you?" | sft-pipeline chat outputs/quickstart

Answers are streamed to a terminal; with a pipe on standard input each line is answered by itself.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator

import torch
from transformers import PreTrainedModel, TextStreamer

from sft_pipeline.data.chat_templates import Template
from sft_pipeline.data.messages import Message, add_system_prompt
from sft_pipeline.inference.answers import generate_answers
from sft_pipeline.inference.sampling import SamplingParams
from sft_pipeline.runs.trained_model import load_trained
from sft_pipeline.utils.errors import SFTError
from sft_pipeline.utils.sanitize import replace_control_characters

HELP = "/reset forgets the conversation, /system TEXT sets the system prompt, /quit ends"


def chat(name_or_path: str, max_new_tokens: int) -> None:
    """Answer standard input: a conversation in a terminal, and a line each from a pipe (of the same conversation)."""
    SamplingParams(max_new_tokens=max_new_tokens)  # a number that it refuses is refused before the model is loaded
    conversation = Conversation(*load_trained(name_or_path), max_new_tokens)
    interactive = sys.stdin.isatty()
    if interactive:
        print(HELP)
    for line in _read_lines(interactive):
        if line == "/quit":
            break
        conversation.take(line)


def _read_lines(interactive: bool) -> Iterator[str]:
    """What is said, without empty lines."""
    while True:
        try:
            line = input("> " if interactive else "").strip()
        except (EOFError, KeyboardInterrupt):
            return
        except UnicodeDecodeError as error:
            raise SFTError("standard input is not UTF-8; convert it, as with `iconv -t UTF-8`") from error
        if line:
            yield line


class AnswerStreamer(TextStreamer):
    """Writes an answer as it comes; a model that has learned control characters does not steer the terminal."""

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        super().on_finalized_text(replace_control_characters(text), stream_end)


class Conversation:
    """What was said so far, and the model that goes on with it."""

    def __init__(
        self, model: PreTrainedModel, template: Template, system_prompt: str | None, max_new_tokens: int
    ) -> None:
        self.model, self.template, self.system_prompt = model, template, system_prompt
        self.max_new_tokens = max_new_tokens
        self.messages: list[Message] = []

    def take(self, line: str) -> None:
        """One line of the user's: a command, or a message to answer."""
        command, _, rest = line.partition(" ")
        if command == "/reset":
            self.messages = []
        elif command == "/system":
            self.system_prompt, self.messages = rest.strip() or None, []
        elif command.startswith("/") and command[1:].isalpha():
            print(f"{command}: no such command; {HELP}", file=sys.stderr)
        else:
            self._answer(line)

    def _answer(self, line: str) -> None:
        """Stream the answer; a message that gets none is taken back."""
        self.messages.append({"role": "user", "content": line})
        streamer = AnswerStreamer(self.template.tokenizer, skip_special_tokens=True)
        [done] = generate_answers(
            self.model,
            self.template,
            [self._prompt()],
            SamplingParams(max_new_tokens=self.max_new_tokens),
            on_token=lambda row, token: streamer.put(torch.tensor([token])),
        )
        streamer.end()
        if done.error:
            self.messages.pop()
            print(f"no answer: {done.error}", file=sys.stderr)
            return
        self.messages.append({"role": "assistant", "content": done.text})

    def _prompt(self) -> list[int]:
        """The conversation's ids, less its oldest exchanges where the model's positions do not hold them."""
        limit = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        while True:
            ids = self.template.encode_prompt(add_system_prompt(self.messages, self.system_prompt))
            if limit is None or len(ids) + self.max_new_tokens <= limit or len(self.messages) == 1:
                return ids
            del self.messages[:2]
