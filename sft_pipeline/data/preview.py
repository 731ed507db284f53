"""Show a row as it is trained: its sequences, the token that each position predicts, and where the loss is.

    sft-pipeline preview configs/quickstart.yaml --row 3
    sft-pipeline preview configs/quickstart.yaml --row 3 --json

A run saves the same of its first row (`build_preview`) for its report.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from datasets import Dataset
from rich.console import Console
from rich.table import Table
from rich.text import Text
from transformers import PreTrainedTokenizerBase

from sft_pipeline.data.encode import count_sequence_tokens
from sft_pipeline.data.padding import split_sequences
from sft_pipeline.data.prefix_tree import count_common_prefix
from sft_pipeline.utils.constants import IGNORED
from sft_pipeline.utils.sanitize import format_json_line, format_line, replace_control_characters

TRAINED_STYLE, UNTRAINED_STYLE, SHARED_STYLE = "green", "", "bright_black"
BARS = 40  # maximum number of bars of the histogram of sequence lengths


class PreviewSequence(NamedTuple):
    """A sequence of a row. shared: the tokens at its beginning that an earlier sequence of the row begins with too."""

    input_ids: list[int]
    labels: list[int]
    shared: int


def list_sequences(row: dict[str, Any]) -> list[PreviewSequence]:
    """List the sequences of an encoded row."""
    sequences: list[PreviewSequence] = []
    for ids, labels in split_sequences(row):
        shared = max((count_common_prefix(ids, np.array(earlier.input_ids)) for earlier in sequences), default=0)
        sequences.append(PreviewSequence(ids.tolist(), labels.tolist(), shared))
    return sequences


def format_row_json(row: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> str:
    """Format a row as one line of JSON.

    `sequences` is a list of objects with `input_ids`, `labels` (shifted, -100 where nothing is trained) and `text`. If
    there is only one, its three values are also beside the list.
    """
    sequences = [
        {"input_ids": ids.tolist(), "labels": labels.tolist(), "text": tokenizer.decode(ids)}
        for ids, labels in split_sequences(row)
    ]
    return format_json_line({**(sequences[0] if len(sequences) == 1 else {}), "sequences": sequences})


def print_row(row: dict[str, Any], tokenizer: PreTrainedTokenizerBase, title: str, console: Console) -> None:
    """Print the sequences of a row as text, colored by what is trained, each with its first and last trained token."""
    sequences = list_sequences(row)
    for number, sequence in enumerate(sequences, 1):
        text = Text()
        for position, token_text in enumerate(decode_tokens(sequence.input_ids, tokenizer)):
            text.append(replace_control_characters(token_text), style=_choose_style(sequence, position))
        # Assembled, not parsed as markup, because a file's name may contain brackets.
        console.print(
            Text.assemble((format_line(title), "bold"), *_describe_sequence(sequence, number, len(sequences)))
        )
        console.print(text)
        if positions := np.flatnonzero(find_trained_tokens(sequence.labels)).tolist():
            console.print(
                _describe_trained_span(positions[0], positions[-1], sequence.input_ids, tokenizer), highlight=False
            )


def _choose_style(sequence: PreviewSequence, position: int) -> str:
    if position and sequence.labels[position - 1] != IGNORED:
        return TRAINED_STYLE
    return SHARED_STYLE if position < sequence.shared else UNTRAINED_STYLE


def _describe_sequence(sequence: PreviewSequence, number: int, count: int) -> Iterator[str | tuple[str, str]]:
    """Yield the parts of a sequence's headline, with their styles."""
    trained = sum(label != IGNORED for label in sequence.labels)
    yield f", sequence {number} of {count}: " if count > 1 else ": "
    yield f"{len(sequence.input_ids)} tokens, "
    if sequence.shared:
        yield f"{sequence.shared} shared with an earlier one ("
        yield ("grey", SHARED_STYLE)
        yield "), "
    yield f"{trained} trained ("
    yield (TRAINED_STYLE, TRAINED_STYLE)
    yield ")"


def find_trained_tokens(labels: list[int]) -> list[bool]:
    """Return for each token of a row whether it is trained: whether the previous position has it as its target."""
    return [False, *(label != IGNORED for label in labels[:-1])]


def build_preview(rows: Dataset, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Build what a report shows of the training rows: the first row and a histogram of sequence lengths.

    `first_row` lists its sequences. `lengths.rows[i]` is the number of sequences with at least `lengths.edges[i]` and
    fewer than `lengths.edges[i + 1]` tokens.
    """
    lengths = count_sequence_tokens(rows)
    # Whole numbers as edges: with fractional ones some bars would cover more lengths than others.
    shortest, longest = int(lengths.min()), int(lengths.max())
    width = max(1, -(-(longest + 1 - shortest) // BARS))
    counts, edges = np.histogram(lengths, np.arange(shortest, longest + width + 1, width))
    first_row = [
        {"tokens": decode_tokens(ids, tokenizer), "trained": find_trained_tokens(labels), "shared": shared}
        for ids, labels, shared in list_sequences(rows[0])
    ]
    return {"first_row": first_row, "lengths": {"edges": edges.tolist(), "rows": counts.tolist()}}


def _describe_trained_span(first: int, last: int, ids: list[int], tokenizer: PreTrainedTokenizerBase) -> Text:
    """Describe the tokens at the first and the last trained position, and whether the last is the stop token."""
    texts = decode_tokens(ids, tokenizer, parts=True)
    end = "the stop token" if ids[last] == tokenizer.eos_token_id else "no stop token: the row is cut"
    return Text(f"first trained token {texts[first]!r}, last {texts[last]!r} ({end})")


def print_positions(row: dict[str, Any], tokenizer: PreTrainedTokenizerBase, console: Console) -> None:
    """Print one line per position: its token, the token that it predicts, and whether that prediction is trained.

    Positions that a sequence shares with an earlier one and that predict nothing are left out.
    """
    for sequence in list_sequences(row):
        table = Table("position", "id", "token", "target", "trained", box=None, header_style="bold")
        texts = [repr(text)[1:-1] for text in decode_tokens(sequence.input_ids, tokenizer, parts=True)]
        for position, (token, label) in enumerate(zip(sequence.input_ids, sequence.labels)):
            if label == IGNORED and position + 1 < sequence.shared:
                continue
            target = texts[position + 1] if position + 1 < len(texts) else ""
            trained, style = ("yes", TRAINED_STYLE) if label != IGNORED else ("no", "dim")
            # Text, because a plain string would be parsed as markup.
            cells = [Text(cell) for cell in (str(position), str(token), texts[position], target, trained)]
            table.add_row(*cells, style=style)
        console.print(table)


def decode_tokens(ids: list[int], tokenizer: PreTrainedTokenizerBase, parts: bool = False) -> list[str]:
    """Return the text that each token adds.

    A character of several tokens is the text of its last token, and the tokens before that have empty texts; with
    `parts` each of its tokens has the character and its part number, as 瓜(1/2), 瓜(2/2).
    """
    texts: list[str] = []
    start = 0
    for end in range(1, len(ids) + 1):
        text = str(tokenizer.decode(ids[start:end]))
        # An incomplete character decodes to U+FFFD. A character has at most four bytes: more tokens are invalid UTF-8.
        if text.endswith("\ufffd") and end - start < 4 and end < len(ids):
            continue
        size = end - start
        if parts and size > 1:
            texts += [f"{text}({part}/{size})" for part in range(1, size + 1)]
        else:
            texts += [""] * (size - 1) + [text]
        start = end
    return texts
