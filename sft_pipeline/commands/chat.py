"""Chat with a model in the terminal.

    sft-pipeline chat outputs/quickstart
    echo "Who are you?" | sft-pipeline chat outputs/quickstart

Answers are streamed. If standard input is a pipe, each of its lines is one message of the same conversation.
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

HELP = "/reset starts a new conversation, /system TEXT starts one with this system prompt, /quit exits"


def chat(name_or_path: str, max_new_tokens: int, trust_remote_code: bool = False, revision: str | None = None) -> None:
    """Answer the lines of standard input until it ends or a line is /quit."""
    SamplingParams(max_new_tokens=max_new_tokens)  # raises SFTError for an invalid number before the model is loaded
    loaded = load_trained(name_or_path, trust_remote_code=trust_remote_code, revision=revision)
    conversation = Conversation(*loaded, max_new_tokens)
    is_terminal = sys.stdin.isatty()
    if is_terminal:
        print(HELP)
    for line in _read_lines("> " if is_terminal else ""):
        if line == "/quit":
            break
        conversation.handle_line(line)


def _read_lines(prompt: str) -> Iterator[str]:
    """Yield the stripped lines of standard input, without empty ones; Ctrl-C ends them as the end of input does."""
    while True:
        try:
            line = input(prompt).strip()
        except (EOFError, KeyboardInterrupt):
            return
        except UnicodeDecodeError as error:
            raise SFTError("standard input is not UTF-8; convert it, as with `iconv -t UTF-8`") from error
        if line:
            yield line


class AnswerStreamer(TextStreamer):
    """Print text as it is generated, with control characters replaced: a model cannot send escapes to the terminal."""

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        super().on_finalized_text(replace_control_characters(text), stream_end)


class Conversation:
    """A conversation with a model: its messages so far, and the system prompt."""

    def __init__(
        self, model: PreTrainedModel, template: Template, system_prompt: str | None, max_new_tokens: int
    ) -> None:
        self.model, self.template, self.system_prompt = model, template, system_prompt
        self.max_new_tokens = max_new_tokens
        self.messages: list[Message] = []

    def handle_line(self, line: str) -> None:
        """Run a command (see HELP), or answer a message."""
        command, _, argument = line.partition(" ")
        if command == "/reset":
            self.messages = []
        elif command == "/system":
            self.system_prompt, self.messages = argument.strip() or None, []
        elif command.startswith("/") and command[1:].isalpha():
            print(f"{command}: no such command; {HELP}", file=sys.stderr)
        else:
            self._stream_answer(line)

    def _stream_answer(self, line: str) -> None:
        """Print the answer while it is generated; remove a message again that could not be answered."""
        self.messages.append({"role": "user", "content": line})
        streamer = AnswerStreamer(self.template.tokenizer, skip_special_tokens=True)
        [answer] = generate_answers(
            self.model,
            self.template,
            [self._encode_prompt()],
            SamplingParams(max_new_tokens=self.max_new_tokens),
            on_token=lambda row, token: streamer.put(torch.tensor([token])),
        )
        streamer.end()
        if answer.error:
            self.messages.pop()
            print(f"no answer: {answer.error}", file=sys.stderr)
            return
        self.messages.append({"role": "assistant", "content": answer.text})

    def _encode_prompt(self) -> list[int]:
        """Return the ids of the conversation, removing its oldest exchanges if the context length cannot hold it."""
        limit = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        while True:
            ids = self.template.encode_prompt(add_system_prompt(self.messages, self.system_prompt))
            if limit is None or len(ids) + self.max_new_tokens <= limit or len(self.messages) == 1:
                return ids
            del self.messages[:2]
