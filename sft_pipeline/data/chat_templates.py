"""Build the template that a config names, and the jinja text that it uses."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from sft_pipeline.data.jinja_template import ChatTemplate
from sft_pipeline.data.role_template import RoleTemplate
from sft_pipeline.data.template import Template
from sft_pipeline.utils.errors import SFTError

TEMPLATES: dict[str, type[Template]] = {"role": RoleTemplate, "chat": ChatTemplate}


def build_template(
    name: str,
    tokenizer: PreTrainedTokenizerBase,
    chat_template: str | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> Template:
    """Build the template `name` ("role" or "chat").

    chat_template: a jinja file, or the name of one of the tokenizer's templates, in place of the tokenizer's default;
    `tokenizer.chat_template` is set to its text. Raises SFTError if the tokenizer does not support the template.
    """
    if not tokenizer.is_fast:
        raise SFTError(f"{type(tokenizer).__name__} is not a fast tokenizer; convert it to a tokenizer.json first")
    if name == "role":
        if chat_template:
            raise SFTError("chat_template: `template: role` reads none; remove it or use `template: chat`")
    else:
        tokenizer.chat_template = load_chat_template(tokenizer, chat_template)
    return TEMPLATES[name](tokenizer, chat_template_kwargs)


def load_chat_template(tokenizer: PreTrainedTokenizerBase, chat_template: str | None) -> str:
    """Return the jinja text of a file, of a named template of the tokenizer, or of its default template."""
    template: Any = tokenizer.chat_template
    named = template if isinstance(template, dict) else {"default": template} if template else {}
    if chat_template in named:
        return named[chat_template]
    names = ", ".join(named) or "none"
    if chat_template is None:
        if "default" in named:
            return named["default"]
        remedy = f"name one with chat_template: {names}" if named else "set chat_template, or use `template: role`"
        raise SFTError(
            f"template chat: the tokenizer has no chat template{' of the name default' * bool(named)}; {remedy}"
        )
    path = Path(chat_template).expanduser()
    if not path.is_file():
        raise SFTError(
            f"chat_template {chat_template}: no such file, nor a template of the tokenizer (it has: {names})"
        )
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise SFTError(f"chat_template {chat_template}: not UTF-8 at byte {error.start}; save it as UTF-8") from error
