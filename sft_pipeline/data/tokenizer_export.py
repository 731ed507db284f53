"""Build the tokenizer to save with a trained model, with which other tools (`pipeline`, `transformers serve`, ...) get
the same ids as training.

    build_saved_tokenizer(template, system_prompt).save_pretrained(folder)
    differing = count_id_differences(template, conversations, system_prompt)

Such tools render the saved chat template and tokenize its whole text at once, while training tokenizes each piece
separately. The headers of the role template are not control tokens, and a tokenizer may merge a full stop or newline
before a header with the newline that the header begins with. So the pre-tokenizer in the saved `tokenizer.json` first
splits at the headers, which for byte-level BPE gives the ids of the pieces. The ids still differ where a message spells
a control token (text in training, the token itself when the whole text is tokenized) and, with the tokenizer's own chat
template, where an earlier answer begins or ends with white space.
"""

from __future__ import annotations

import itertools
import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import PreTokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from sft_pipeline.data.messages import SYSTEM_ROLES, Conversation, add_system_prompt
from sft_pipeline.data.role_template import ROLE_HEADERS
from sft_pipeline.data.template import Template
from sft_pipeline.data.text_encoder import list_components


def build_saved_chat_template(template: Template, system_prompt: str | None) -> str:
    """Return the jinja text to save.

    It adds the system prompt of training to conversations without one, and has its template arguments as defaults.
    """
    prefix = "".join(
        f"{{%- if {name} is not defined %}}{{%- set {name} = {_format_literal(value)} %}}{{%- endif %}}"
        for name, value in template.chat_template_kwargs.items()
    )
    if system_prompt:
        system = json.dumps({"role": "system", "content": system_prompt}, ensure_ascii=False)
        prefix += "{%- if not messages or messages[0]['role'] not in " + json.dumps(SYSTEM_ROLES) + " %}"
        prefix += "{%- set messages = [" + system + "] + messages %}{%- endif %}"
    # A trained model that is trained again or exported already has the prefix.
    return template.chat_template if template.chat_template.startswith(prefix) else prefix + template.chat_template


def _format_literal(value: Any) -> str:
    """Format a JSON value as a literal of jinja, which are the same but for null."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(key)}: {_format_literal(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_format_literal, value)) + "]"
    return "none" if value is None else json.dumps(value, ensure_ascii=False)


def build_saved_tokenizer(
    template: Template, system_prompt: str | None, trust_remote_code: bool = False
) -> PreTrainedTokenizerBase:
    """Return a copy of the tokenizer as other tools will load it.

    Its chat template adds the system prompt, and its pre-tokenizer splits at the role headers. With `trust_remote_code`
    it may have a class of its own.
    """
    with tempfile.TemporaryDirectory() as folder:
        with _split_at_role_headers(template):
            template.tokenizer.save_pretrained(folder)
        if template.role_headers:
            # A model's own tokenizer class may rebuild its pre-tokenizer; this class uses tokenizer.json unchanged.
            file = Path(folder) / "tokenizer_config.json"
            config = json.loads(file.read_text(encoding="utf-8")) | {"tokenizer_class": "TokenizersBackend"}
            file.write_text(json.dumps(config, ensure_ascii=False), encoding="utf-8")
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    tokenizer.chat_template = build_saved_chat_template(template, system_prompt)
    return tokenizer


@contextmanager
def _split_at_role_headers(template: Template) -> Iterator[None]:
    """Let the template's own tokenizer split at the role headers within this block."""
    backend = template.tokenizer.backend_tokenizer
    original = backend.pre_tokenizer
    if template.role_headers:
        backend.pre_tokenizer = _build_pre_tokenizer(original, template.role_headers)
    try:
        yield
    finally:
        backend.pre_tokenizer = original


def _build_pre_tokenizer(original: PreTokenizer | None, headers: tuple[str, ...]) -> PreTokenizer:
    """Build a pre-tokenizer that splits before each header, then applies `original`.

    It also splits after the assistant's header, because the answer that follows is a separate piece.
    """
    splits = [
        {
            "type": "Split",
            "pattern": {"String": header},
            "behavior": "Isolated" if header == ROLE_HEADERS["assistant"] else "MergedWithNext",
            "invert": False,
        }
        for header in headers
    ]
    components = [*splits, *(part for part in list_components(original) if part not in splits)]
    # Components can only be built from their JSON as part of a tokenizer: use one with an empty vocabulary.
    content = json.loads(Tokenizer(BPE()).to_str())
    content |= {"pre_tokenizer": {"type": "Sequence", "pretokenizers": components}}
    return Tokenizer.from_str(json.dumps(content)).pre_tokenizer


def count_id_differences(template: Template, conversations: list[Conversation], system_prompt: str | None) -> int:
    """Count the conversations for which the saved chat template gives other ids than training for the last sequence."""
    chat_template = build_saved_chat_template(template, system_prompt)
    rows = template.render([add_system_prompt(conversation, system_prompt) for conversation in conversations])
    count = 0
    with _split_at_role_headers(template):
        for sequences, conversation in zip(rows, conversations):
            if not sequences or not sequences[-1].turns:
                continue
            expected = list(itertools.chain.from_iterable(span.ids for span in sequences[-1].spans))
            tools: Any = conversation.get("tools")
            ids = template.tokenizer.apply_chat_template(
                conversation["messages"][: sequences[-1].turns[-1] + 1],
                tools=tools,
                chat_template=chat_template,
                return_dict=False,
                **conversation.get("chat_template_kwargs", {}),
            )
            count += ids[: len(expected)] != expected
    return count
