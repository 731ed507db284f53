"""The tokenizer that is saved with a trained model, so that tools which know nothing of this project ask it as it was
trained: `pipeline`, `transformers serve` and others.

    saved_tokenizer(template, system_prompt).save_pretrained(folder)
    others = count_other_ids(template, conversations, system_prompt)

Such tools render the saved chat template and tokenize its text in one go, where training tokenizes each piece alone.
The role template's marks are no control tokens, and a tokenizer may join the full stop or the line end before a mark
with the mark's own line end. So the saved `tokenizer.json` cuts at the marks, before its own pre-tokenization; for
BPE over bytes this gives the pieces' ids. Other ids remain where a message spells a control token (text here, the
token itself to whoever tokenizes the whole) and, with the tokenizer's own chat template, where an earlier answer
begins or ends with white space.
"""

from __future__ import annotations

import itertools
import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import PreTokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from sft_pipeline.data.chat_templates import MARKS, Template
from sft_pipeline.data.messages import Message, add_system_prompt
from sft_pipeline.data.text_encoder import list_components


def build_saved_chat_template(template: Template, system_prompt: str | None) -> str:
    """The jinja text to save, which puts in the system prompt that the model was trained with."""
    if not system_prompt:
        return template.chat_template
    system = json.dumps({"role": "system", "content": system_prompt}, ensure_ascii=False)
    unless = "{%- if not messages or messages[0]['role'] != 'system' %}"
    lead = unless + "{%- set messages = [" + system + "] + messages %}{%- endif %}"
    # A model that is trained on, or exported, has it already.
    return template.chat_template if template.chat_template.startswith(lead) else lead + template.chat_template


def build_saved_tokenizer(template: Template, system_prompt: str | None) -> PreTrainedTokenizerBase:
    """A copy of the tokenizer as other tools will load it: chat template with the system prompt, cuts at marks."""
    with tempfile.TemporaryDirectory() as folder:
        with _cut_at_marks(template):
            template.tokenizer.save_pretrained(folder)
        if template.marks:
            # A model's own class may build its pre-tokenizer anew; this one takes tokenizer.json as it is.
            file = Path(folder) / "tokenizer_config.json"
            settings = json.loads(file.read_text(encoding="utf-8")) | {"tokenizer_class": "TokenizersBackend"}
            file.write_text(json.dumps(settings, ensure_ascii=False), encoding="utf-8")
        tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = build_saved_chat_template(template, system_prompt)
    return tokenizer


@contextmanager
def _cut_at_marks(template: Template) -> Iterator[None]:
    """Within this block the template's own tokenizer cuts at the marks."""
    backend = template.tokenizer.backend_tokenizer
    own = backend.pre_tokenizer
    if template.marks:
        backend.pre_tokenizer = _cutting(own, template.marks)
    try:
        yield
    finally:
        backend.pre_tokenizer = own


def _cutting(own: PreTokenizer | None, marks: tuple[str, ...]) -> PreTokenizer:
    """`own` behind a cut before each mark, and one behind the assistant's, whose answer is a piece of its own."""
    cuts = [
        {
            "type": "Split",
            "pattern": {"String": mark},
            "behavior": "Isolated" if mark == MARKS["assistant"] else "MergedWithNext",
            "invert": False,
        }
        for mark in marks
    ]
    parts = [*cuts, *(part for part in list_components(own) if part not in cuts)]
    # Parts are made of what tokenizer.json says of them by way of a tokenizer without words.
    content = json.loads(Tokenizer(BPE()).to_str()) | {"pre_tokenizer": {"type": "Sequence", "pretokenizers": parts}}
    return Tokenizer.from_str(json.dumps(content)).pre_tokenizer


def count_id_differences(template: Template, conversations: list[list[Message]], system_prompt: str | None) -> int:
    """How many conversations the saved chat template gives other ids than training does."""
    jinja = build_saved_chat_template(template, system_prompt)
    rows = template.render([add_system_prompt(messages, system_prompt) for messages in conversations])
    others = 0
    with _cut_at_marks(template):
        for runs, messages in zip(rows, conversations):
            trained = list(itertools.chain.from_iterable(run.ids for run in runs))
            saved = template.tokenizer.apply_chat_template(messages, chat_template=jinja, return_dict=False)
            others += saved[: len(trained)] != trained
    return others
