"""The role template: plain text headers, for base models whose tokenizer has no chat template."""

from __future__ import annotations

import itertools
import json
from collections.abc import Collection, Mapping
from typing import Any

from transformers import PreTrainedTokenizerBase

from sft_pipeline.data.messages import Conversation, Message, replace_messages
from sft_pipeline.data.template import Template, TemplatePiece, Turn
from sft_pipeline.utils.errors import SFTError

ROLE_HEADERS = {"system": "\n#SYSTEM:", "user": "\n#USER:", "assistant": "\n#ASSISTANT:"}


class RoleTemplate(Template):
    """`<|im_start|>`, then each text after `\\n#SYSTEM:`, `\\n#USER:` or `\\n#ASSISTANT:`; `<|im_end|>` ends an answer.

    If the tokenizer has no `<|im_start|>` or `<|im_end|>`, its bos or eos token is used instead. A developer message is
    written as a system message; tools, tool calls and reasoning raise SFTError.
    """

    name = "role"
    role_headers = tuple(ROLE_HEADERS.values())

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, chat_template_kwargs: Mapping[str, Any] | None = None
    ) -> None:
        super().__init__(tokenizer, chat_template_kwargs)
        if chat_template_kwargs:
            raise SFTError("chat_template_kwargs: `template: role` takes none; remove them or use `template: chat`")
        vocab = tokenizer.get_vocab()
        self.start_token_id = vocab.get("<|im_start|>", tokenizer.bos_token_id)
        stop_token_id = vocab.get("<|im_end|>", tokenizer.eos_token_id)
        if stop_token_id is None:
            raise SFTError(
                "template role: the tokenizer has neither <|im_end|> nor an eos token to end an answer with; "
                "set eos_token in its tokenizer_config.json"
            )
        self.stop_token_ids = [stop_token_id]
        self.chat_template = self._build_jinja()

    def split_turns(self, conversation: Conversation, trained: Collection[int]) -> list[Turn]:
        _check_plain(conversation)
        context = [] if self.start_token_id is None else [TemplatePiece("", self.start_token_id)]
        turns: list[Turn] = []
        for index, message in enumerate(conversation["messages"]):
            if message["role"] == "assistant":
                context.append(TemplatePiece(ROLE_HEADERS["assistant"], None))
                target = [TemplatePiece(message["content"], None), TemplatePiece("", self.stop_token_id)]
                turns.append(Turn(index, bool(turns), context, target))
                context = []
            else:
                role = "system" if message["role"] == "developer" else message["role"]
                context.append(TemplatePiece(ROLE_HEADERS[role] + message["content"], None))
        return turns

    def split_prompt(self, conversation: Conversation) -> list[TemplatePiece]:
        # A text of the next answer is needed to get its prompt, whatever it is.
        answer: Message = {"role": "assistant", "content": ""}
        turns = self.split_turns(replace_messages(conversation, [*conversation["messages"], answer]), ())
        pieces = itertools.chain.from_iterable([*turn.context, *(turn.target or ())] for turn in turns[:-1])
        return [*pieces, *turns[-1].context]

    def _build_jinja(self) -> str:
        """Build the jinja chat template that renders the same text, for tools that only support chat templates."""
        start = "" if self.start_token_id is None else self.tokenizer.convert_ids_to_tokens(self.start_token_id)
        stop = self.tokenizer.convert_ids_to_tokens(self.stop_token_id)
        headers = "{% set headers = " + json.dumps({**ROLE_HEADERS, "developer": ROLE_HEADERS["system"]}) + " %}"
        assistant = json.dumps(ROLE_HEADERS["assistant"])
        return (
            f"{headers}{{{{ {json.dumps(start)} }}}}{{% for message in messages %}}"
            f"{{{{ headers[message['role']] + message['content'] }}}}"
            f"{{% if message['role'] == 'assistant' %}}{{{{ {json.dumps(stop)} }}}}{{% endif %}}"
            f"{{% endfor %}}{{% if add_generation_prompt %}}{{{{ {assistant} }}}}{{% endif %}}"
        )


def _check_plain(conversation: Conversation) -> None:
    """Raise SFTError for what the role template does not write."""
    remedy = "use `template: chat` with a chat template that does"
    for key in ("tools", "chat_template_kwargs"):
        if conversation.get(key):
            raise SFTError(f"`template: role` does not write {key}; {remedy}")
    for index, message in enumerate(conversation["messages"]):
        role = message["role"]
        parts = [f"the role {role}"] * (role not in ROLE_HEADERS and role != "developer")
        parts += [key for key in ("tool_calls", "reasoning_content") if message.get(key)]
        if parts:
            raise SFTError(f"messages[{index}]: `template: role` does not write {parts[0]}; {remedy}")
