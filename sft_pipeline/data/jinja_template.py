"""The tokenizer's own chat template (ChatML and others), rendered by transformers in its jinja sandbox.

A template is a program that may leave out whatever it likes: a role, the tools, the reasoning. So it is checked that
everything is written: of the template once, on a short conversation (`TemplateFeatures`), and of each conversation.
"""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Callable, Collection, Mapping
from functools import cached_property
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from sft_pipeline.data.messages import SYSTEM_ROLES, Conversation, Message
from sft_pipeline.data.template import Template, TemplatePiece, Turn
from sft_pipeline.data.tool_calls import extract_tool_calls
from sft_pipeline.utils.errors import SFTError, format_error

# Replaces a control token's spelling in a message while jinja renders the conversation. The delimiters are private-use
# characters, which no tokenizer has as a special token.
PLACEHOLDER = "\ue000sft{}\ue001"
PLACEHOLDER_PATTERN = re.compile(PLACEHOLDER.format("([0-9]+)"))
REASONING_KEYS = ("reasoning_content", "thinking", "reasoning")  # in which templates look for an answer's reasoning
RESERVED_KWARGS = frozenset(inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters)
SHOWN_CHARACTERS = 30  # of two texts in an error, from where they differ
OTHER_TEMPLATE = "remove it from the row, or give a chat_template that does"


class RenderedTurn(NamedTuple):
    """The text of an assistant's turn, placeholders included: see `Turn`."""

    message_index: int
    prompt: str
    target: str | None


class ChatTemplate(Template):
    """The tokenizer's chat template. Raises SFTError if it writes no stop token after an answer."""

    name = "chat"

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, chat_template_kwargs: Mapping[str, Any] | None = None
    ) -> None:
        super().__init__(tokenizer, chat_template_kwargs)
        self.chat_template = str(tokenizer.chat_template)
        self._control_ids = {t.content: i for i, t in tokenizer.added_tokens_decoder.items() if t.special}
        longest_first = sorted(self._control_ids, key=len, reverse=True)
        self._control_pattern = (
            re.compile("(" + "|".join(map(re.escape, longest_first)) + ")") if longest_first else None
        )
        # A message may contain the placeholders' first character, so that is replaced by a placeholder too.
        self._spellings = [*longest_first, PLACEHOLDER[0]]
        self._placeholders = {text: PLACEHOLDER.format(index) for index, text in enumerate(self._spellings)}
        self._spelling_pattern = re.compile("|".join(map(re.escape, self._spellings)))
        self.features = TemplateFeatures(lambda messages, tools: self._render(messages, False, tools, {}))
        self.stop_token_ids = self._find_stop_tokens()

    def split_turns(self, conversation: Conversation, trained: Collection[int]) -> list[Turn]:
        return self._split_turns(self._render_turns(conversation, trained))

    def split_prompt(self, conversation: Conversation) -> list[TemplatePiece]:
        messages, tools, kwargs = self._prepare(conversation)
        prompt = self._render(messages, True, tools, kwargs)
        self._check_context(messages, 0, len(messages), prompt, tools)
        history = self._render_turns(conversation, ())
        pieces: list[TemplatePiece] = []
        for turn in self._split_turns([*history, RenderedTurn(len(messages), prompt, None)]):
            pieces = [*(pieces if turn.continues else []), *turn.context, *(turn.target or [])]
        return pieces

    def parse_text(self, text: str) -> Message:
        """Convert the text of an answer to a message, with its reasoning and tool calls if the template writes such."""
        message: Message = {"role": "assistant", "content": text}
        if self.features.reasoning_key and "</think>" in text:
            reasoning, _, message["content"] = text.partition("</think>")
            if reasoning := reasoning.strip().removeprefix("<think>").strip():
                message["reasoning_content"] = reasoning
        if self.features.arguments_form:
            message["content"], calls = extract_tool_calls(message["content"])
            if calls:
                message["tool_calls"] = calls
        message["content"] = message["content"].strip()
        return message

    # Rendering

    def _render_turns(self, conversation: Conversation, trained: Collection[int]) -> list[RenderedTurn]:
        """Render prompt and target of each assistant message.

        A turn that is not trained has no target, or is left out, where the template does not write it as an answer.
        """
        messages, tools, kwargs = self._prepare(conversation)
        turns, checked = [], 0
        for index, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            try:
                prompt = self._render(messages[:index], True, tools, kwargs)
                answered = self._render(messages[: index + 1], False, tools, kwargs)
                has_reasoning = "reasoning_content" in conversation["messages"][index]
                target = self._find_target(prompt, answered, index, has_reasoning)
            except SFTError:
                if index in trained:
                    raise
                continue
            if index in trained:
                self._check_context(messages, checked, index, prompt, tools)
                self._check_answer(conversation["messages"][index], index, target)
                checked = index
            turns.append(RenderedTurn(index, prompt, target))
        return turns

    def _find_target(self, prompt: str, answered: str, index: int, has_reasoning: bool) -> str:
        """Return what follows the prompt in the conversation with its answer, up to the last stop token."""
        if not answered.startswith(prompt):
            start = next(i for i, (a, b) in enumerate(zip(prompt + "\0", answered + "\0")) if a != b)
            texts = [
                repr(self._restore_spellings(text[start : start + SHOWN_CHARACTERS])) for text in (prompt, answered)
            ]
            remedy = (
                "let chat_template_kwargs not switch its reasoning off" if has_reasoning else "use `template: role`"
            )
            raise SFTError(
                f"the chat template has no place where the answer messages[{index}] begins: its prompt goes on with "
                f"{texts[0]} where the conversation has {texts[1]}; give another chat_template, or {remedy}"
            )
        target = answered[len(prompt) :]
        stop = self._find_last_stop(target)
        if stop is None:
            raise SFTError(
                f"the chat template writes no stop token ({self._describe_stops()}) after messages[{index}]; give "
                "another chat_template, or `template: role`"
            )
        return target[:stop]

    def _find_last_stop(self, text: str) -> int | None:
        """Return the end of the last stop token in the text, or None."""
        matches = self._control_pattern.finditer(text) if self._control_pattern else ()
        ends = [match.end() for match in matches if self._control_ids[match[0]] in self.stop_token_ids]
        return ends[-1] if ends else None

    def _prepare(self, conversation: Conversation) -> tuple[list[Message], Any, dict[str, Any]]:
        """Return messages and tools as the template reads them, with spellings replaced, and the template arguments."""
        tools = conversation.get("tools")
        if tools and not self.features.writes_tools:
            raise SFTError(f"the chat template does not write tools; {OTHER_TEMPLATE}")
        try:
            messages = [self._prepare_message(message) for message in conversation["messages"]]
            kwargs = self._replace_spellings(conversation.get("chat_template_kwargs", {}))
            return messages, tools and self._replace_spellings(tools), kwargs
        except RecursionError as error:
            raise SFTError("its tools or arguments are nested too deeply; write the inner ones as text") from error

    def _prepare_message(self, message: Message) -> Message:
        role = message["role"]
        if role == "developer" and not self.features.knows_developer:
            role = "system"
        prepared: Message = {"role": role, "content": self._replace_spellings(message["content"])}
        if reasoning := message.get("reasoning_content"):
            prepared[self.features.reasoning_key or REASONING_KEYS[0]] = self._replace_spellings(reasoning)
        if calls := message.get("tool_calls"):
            prepared["tool_calls"] = [self.features.format_call(call) for call in self._replace_spellings(calls)]
        for key in ("tool_call_id", "name"):
            if key in message:
                prepared[key] = self._replace_spellings(message[key])
        return prepared

    def _render(
        self, messages: list[Message], add_generation_prompt: bool, tools: Any, kwargs: Mapping[str, Any]
    ) -> str:
        """Render in transformers' sandbox, where a template has access to neither files nor code."""
        kwargs = {**self.chat_template_kwargs, **kwargs}
        if reserved := sorted(RESERVED_KWARGS & set(kwargs)):
            raise SFTError(f"chat_template_kwargs: {reserved[0]} is not an argument of the template; remove it")
        try:
            return str(
                self.tokenizer.apply_chat_template(
                    messages,
                    tools=tools,
                    chat_template=self.chat_template,
                    add_generation_prompt=add_generation_prompt,
                    tokenize=False,
                    **kwargs,
                )
            )
        except Exception as error:  # a template is a program and may raise anything
            reason = format_error(error)
            raise SFTError(
                f"the chat template cannot render the conversation ({type(error).__name__}: {reason}); "
                "fix the row or the chat template, or use `template: role`"
            ) from error

    # Control tokens

    def _split_turns(self, turns: list[RenderedTurn]) -> list[Turn]:
        """Split the texts of turns into pieces."""
        split, previous = [], ""
        for index, prompt, target in turns:
            continues = prompt.startswith(previous)
            context = self._split_control_tokens(prompt[len(previous) :] if continues else prompt)
            split.append(
                Turn(index, continues, context, None if target is None else self._split_control_tokens(target))
            )
            previous = prompt + (target or "")
        return split

    def _split_control_tokens(self, text: str) -> list[TemplatePiece]:
        """Split the text at control tokens, and restore the spellings in the text between them."""
        parts = self._control_pattern.split(text) if self._control_pattern else [text]
        return [
            TemplatePiece("", self._control_ids[part])
            if part in self._control_ids
            else TemplatePiece(self._restore_spellings(part), None)
            for part in parts
            if part
        ]

    def _replace_spellings(self, value: Any) -> Any:
        """Replace every control token's spelling in the texts of a JSON value, so that only the template's are left."""
        if isinstance(value, str):
            return self._spelling_pattern.sub(lambda match: self._placeholders[match[0]], value)
        if isinstance(value, Mapping):
            return {self._replace_spellings(key): self._replace_spellings(item) for key, item in value.items()}
        return [self._replace_spellings(item) for item in value] if isinstance(value, list) else value

    def _restore_spellings(self, text: str) -> str:
        """Undo `_replace_spellings`."""
        return PLACEHOLDER_PATTERN.sub(lambda match: self._spellings[int(match[1])], text)

    def _find_stop_tokens(self) -> list[int]:
        """Return the ids that end an answer of text and one of tool calls.

        The first is the first control token that the template writes after a text. After a call there may be others
        that belong to it, so that its stop token is the last one, or the last that is a stop token already: a template
        that opens the next answer unasked writes that one's header.
        """
        text = self._render([QUESTION, {"role": "assistant", "content": "sft-answer"}], False, None, {})
        control_ids = self._list_control_ids(text.rpartition("sft-answer")[2])
        if not control_ids:
            raise SFTError(
                "the chat template writes no stop token after an answer, so a model trained on it would never stop; "
                "use `template: role` or a chat template that ends answers with the eos token"
            )
        stops = control_ids[:1]
        if self.features.arguments_form:
            call = self.features.format_call(CALL)
            text = self._render([QUESTION, {"role": "assistant", "content": "", "tool_calls": [call]}], False, None, {})
            control_ids = self._list_control_ids(text.rpartition("sft_value")[2])
            stop_ids = [token for token in control_ids if token in (*stops, self.tokenizer.eos_token_id)]
            stops += (stop_ids or control_ids)[-1:]
        return list(dict.fromkeys(stops))

    def _list_control_ids(self, text: str) -> list[int]:
        return [piece.token_id for piece in self._split_control_tokens(text) if piece.token_id is not None]

    def _describe_stops(self) -> str:
        return " or ".join(map(str, self.tokenizer.convert_ids_to_tokens(self.stop_token_ids)))

    # What is written

    def _check_context(self, messages: list[Message], start: int, end: int, prompt: str, tools: Any) -> None:
        """Raise SFTError if the prompt lacks a message or the tool calls of an answer from `start` to `end`, or a tool.

        The content and the reasoning of earlier answers may be left out.
        """
        for index in range(start, end):
            role, content = messages[index]["role"], messages[index]["content"]
            if role == "tool" and not self.features.writes_tool_results:
                raise SFTError(f"messages[{index}]: the chat template does not write tool results; {OTHER_TEMPLATE}")
            if role != "assistant" and not _is_written(content, prompt):
                # A developer message may have been given as a system message.
                name = "system or developer" if role in SYSTEM_ROLES else role
                raise SFTError(
                    f"messages[{index}]: the chat template does not write this {name} message; {OTHER_TEMPLATE}"
                )
            calls = [call["function"]["name"] for call in messages[index].get("tool_calls", ())]
            if not all(_is_written(name, prompt) for name in calls):
                raise SFTError(f"messages[{index}]: the chat template does not write its tool calls; {OTHER_TEMPLATE}")
        for tool in tools if tools and start == 0 else ():
            if not _is_written(tool["function"]["name"], prompt):
                name = self._restore_spellings(tool["function"]["name"])
                raise SFTError(f"the chat template does not write the tool {name}; {OTHER_TEMPLATE}")

    def _check_answer(self, message: Message, index: int, target: str) -> None:
        """Raise SFTError if the target lacks a part of the answer."""
        target = self._restore_spellings(target)
        calls = [call["function"] for call in message.get("tool_calls", ())]
        parts = {
            "content": [message["content"]],
            "reasoning": [message.get("reasoning_content", "")],
            "tool calls": [text for call in calls for text in (call["name"], *call["arguments"])],
        }
        for name, texts in parts.items():
            if not all(_is_written(text, target) for text in texts):
                raise SFTError(f"messages[{index}]: the chat template does not write its {name}; {OTHER_TEMPLATE}")


QUESTION: Message = {"role": "user", "content": "sft-question"}
# Some templates accept only ids of nine letters and digits.
CALL = {
    "id": "sftcall01",
    "type": "function",
    "function": {"name": "sft_function", "arguments": {"sft_key": "sft_value"}},
}
TOOL = {
    "type": "function",
    "function": {
        "name": "sft_function",
        "description": "sft-description",
        "parameters": {"type": "object", "properties": {}},
    },
}


class TemplateFeatures:
    """What a chat template writes, found by rendering short conversations with marked texts.

    render: renders (messages, tools); raises SFTError.
    """

    def __init__(self, render: Callable[[list[Message], Any], str]) -> None:
        self._render = render

    @cached_property
    def knows_developer(self) -> bool:
        """Whether a developer message is written; where only a system message is, it is given as one."""
        messages = [{"role": "developer", "content": "sft-instructions"}, QUESTION]
        return self._is_written("sft-instructions", messages)

    @cached_property
    def reasoning_key(self) -> str | None:
        """The key of a message whose text is written as the reasoning of the last answer."""
        for key in REASONING_KEYS:
            answer = {"role": "assistant", "content": "sft-answer", key: "sft-reasoning"}
            if self._is_written("sft-reasoning", [QUESTION, answer]):
                return key
        return None

    @cached_property
    def arguments_form(self) -> str | None:
        """How the arguments of calls are given for the template to write them: as an "object" or as JSON "text".

        None if it does not write calls. An object that is written in Python's notation is given as text.
        """
        for form, call in (("object", CALL), ("text", format_arguments(CALL))):
            answer = {"role": "assistant", "content": "", "tool_calls": [call]}
            text = self._try([QUESTION, answer])
            if all(part in text for part in ("sft_function", "sft_key", "sft_value")) and "'sft_key'" not in text:
                return form
        return None

    @cached_property
    def writes_tool_results(self) -> bool:
        """Whether the message of a tool is written after a call."""
        answer = {"role": "assistant", "content": "", "tool_calls": [self.format_call(CALL)]}
        result = {"role": "tool", "content": "sft-result", "tool_call_id": "sftcall01", "name": "sft_function"}
        return self._is_written("sft-result", [QUESTION, answer, result])

    @cached_property
    def writes_tools(self) -> bool:
        """Whether the descriptions of tools are written."""
        return "sft-description" in self._try([QUESTION], [TOOL])

    def format_call(self, call: dict[str, Any]) -> dict[str, Any]:
        """Return a call as the template reads it."""
        return format_arguments(call) if self.arguments_form == "text" else call

    def _is_written(self, text: str, messages: list[Message]) -> bool:
        return text in self._try(messages)

    def _try(self, messages: list[Message], tools: Any = None) -> str:
        """Render, or return an empty text if the template refuses the conversation."""
        try:
            return self._render(messages, tools)
        except SFTError:
            return ""


def format_arguments(call: Mapping[str, Any]) -> dict[str, Any]:
    """Return a tool call with its arguments as JSON text."""
    arguments = json.dumps(call["function"]["arguments"], ensure_ascii=False)
    return {**call, "function": {**call["function"], "arguments": arguments}}


def _is_written(part: str, text: str) -> bool:
    """Return whether a template wrote `part`, as it is or as JSON text; white space does not count."""
    part = part.strip()
    if part in text or json.dumps(part, ensure_ascii=False)[1:-1] in text:
        return True
    return "".join(part.split()) in "".join(text.split())
