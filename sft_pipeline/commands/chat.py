"""Chat with a model in the terminal.

    sft-pipeline chat outputs/quickstart
    echo "Who are you?" | sft-pipeline chat outputs/quickstart
    sft-pipeline chat outputs/agent --tools tools.json

Answers are streamed. If standard input is a pipe, each of its lines is one message of the same conversation. After an
answer that calls tools the next lines are the results of the calls, in their order; then the model goes on.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, TextStreamer

from sft_pipeline.data.messages import Conversation, Message, add_system_prompt
from sft_pipeline.data.template import Template
from sft_pipeline.data.tool_calls import convert_tools
from sft_pipeline.inference.answers import generate_answers
from sft_pipeline.inference.sampling import SamplingParams
from sft_pipeline.runs.trained_model import load_trained
from sft_pipeline.utils.errors import SFTError, format_error
from sft_pipeline.utils.sanitize import format_line, replace_control_characters

HELP = "/reset starts a new conversation, /system TEXT starts one with this system prompt, /quit exits"


def chat(
    name_or_path: str,
    max_new_tokens: int,
    tools: str | None = None,
    trust_remote_code: bool = False,
    revision: str | None = None,
) -> None:
    """Answer the lines of standard input until it ends or a line is /quit. tools: the file of `load_tools`."""
    SamplingParams(max_new_tokens=max_new_tokens)  # raises SFTError for an invalid number before the model is loaded
    tool_list = load_tools(Path(tools)) if tools else []
    model, template, system_prompt = load_trained(name_or_path, trust_remote_code=trust_remote_code, revision=revision)
    session = ChatSession(model, template, system_prompt, max_new_tokens, tool_list)
    if tool_list:
        try:
            template.encode_prompt(session.build_prompt([{"role": "user", "content": "Hi"}]))
        except SFTError as error:  # not every template writes tools
            raise SFTError(f"tools {tools}: {error}") from error
    is_terminal = sys.stdin.isatty()
    if is_terminal:
        print(HELP)
    for line in _read_lines(lambda: session.input_prompt if is_terminal else ""):
        if line == "/quit":
            break
        session.handle_line(line)


def load_tools(file: Path) -> list[dict[str, Any]]:
    """Load tools from a JSON file with a list of them, or with one a line. Raises SFTError naming the file."""
    try:
        return convert_tools(_parse_tools(file.expanduser().read_text(encoding="utf-8-sig")))
    except UnicodeDecodeError as error:
        raise SFTError(f"tools {file}: not UTF-8 at byte {error.start}; save it as UTF-8") from error
    except OSError as error:
        raise SFTError(f"tools {file}: cannot be read ({error.strerror}); check the path") from error
    except SFTError as error:
        raise SFTError(f"tools {file}: {error}") from error


def _parse_tools(text: str) -> Any:
    """Parse a JSON value; if it is none, return the lines, each of which is to be the JSON text of a tool."""
    if text.strip() in ("", "[]"):
        raise SFTError("no tools in it; write a JSON list of tools, or one a line")
    try:
        return json.loads(text)
    except ValueError as error:
        lines = [line for line in text.splitlines() if line.strip()]
        if len(lines) > 1 and lines[0].strip().endswith("}"):
            return lines
        raise SFTError(f"not JSON ({format_error(error)}); write a JSON list of tools, or one a line") from error


def _read_lines(get_prompt: Callable[[], str]) -> Iterator[str]:
    """Yield the stripped lines of standard input, without empty ones; Ctrl-C ends them as the end of input does."""
    while True:
        try:
            line = input(get_prompt()).strip()
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


class ChatSession:
    """A conversation with a model: its messages so far, the calls whose results are missing, and the system prompt."""

    def __init__(
        self,
        model: PreTrainedModel,
        template: Template,
        system_prompt: str | None,
        max_new_tokens: int,
        tools: list[dict[str, Any]],
    ) -> None:
        self.model, self.template, self.system_prompt, self.tools = model, template, system_prompt, tools
        self.max_new_tokens = max_new_tokens
        self._start([])

    @property
    def input_prompt(self) -> str:
        """What a terminal shows before the next line."""
        if not self.pending_calls:
            return "> "
        return f"result of {format_line(self.pending_calls[0]['function']['name'])}: "

    def handle_line(self, line: str) -> None:
        """Run a command (see HELP), or answer a message or the last missing result of a tool."""
        command, _, argument = line.partition(" ")
        if command == "/reset":
            self._start([])
        elif command == "/system":
            self.system_prompt = argument.strip() or None
            self._start([])
        elif command.startswith("/") and command[1:].isalpha():
            print(f"{command}: no such command; {HELP}", file=sys.stderr)
        elif self.pending_calls:
            call = self.pending_calls.pop(0)
            name = call["function"]["name"]
            self.messages.append({"role": "tool", "content": line, "tool_call_id": call["id"], "name": name})
            if not self.pending_calls:
                self._stream_answer()
        else:
            self.messages.append({"role": "user", "content": line})
            self._stream_answer()

    def build_prompt(self, messages: list[Message]) -> Conversation:
        """Return these messages with the tools and the system prompt."""
        conversation: Conversation = {"messages": messages}
        if self.tools:
            conversation["tools"] = self.tools
        return add_system_prompt(conversation, self.system_prompt)

    def _start(self, messages: list[Message]) -> None:
        self.messages = messages
        self.pending_calls: list[dict[str, Any]] = []

    def _stream_answer(self) -> None:
        """Print the answer while it is generated; remove a message again that could not be answered."""
        streamer = AnswerStreamer(self.template.tokenizer, skip_special_tokens=True)
        try:
            [answer] = generate_answers(
                self.model,
                self.template,
                [self._encode_prompt()],
                SamplingParams(max_new_tokens=self.max_new_tokens),
                on_token=lambda row, token: streamer.put(torch.tensor([token])),
            )
            problem = answer.error
        except SFTError as error:  # a template may refuse the history, such as its tool calls
            problem = str(error)
        streamer.end()
        if problem:
            self._start(self.messages[: self._list_exchanges()[-1]])
            print(f"no answer: {problem}", file=sys.stderr)
            return
        message = answer.message or {"role": "assistant", "content": answer.text}
        if calls := message.get("tool_calls"):
            # Some templates write the ids of calls, and accept only nine letters and digits.
            numbers = range(len(self.messages), len(self.messages) + len(calls))
            message["tool_calls"] = [{"id": f"call{number:05}", **call} for number, call in zip(numbers, calls)]
            self.pending_calls = list(message["tool_calls"])
        self.messages.append(message)

    def _encode_prompt(self) -> list[int]:
        """Return the ids of the conversation, removing its oldest exchanges if the context length cannot hold it."""
        limit = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        while True:
            ids = self.template.encode_prompt(self.build_prompt(self.messages))
            exchanges = self._list_exchanges()
            if limit is None or len(ids) + self.max_new_tokens <= limit or len(exchanges) == 1:
                return ids
            del self.messages[: exchanges[1]]

    def _list_exchanges(self) -> list[int]:
        """List where exchanges begin: the indices of the user messages."""
        return [index for index, message in enumerate(self.messages) if message["role"] == "user"]
