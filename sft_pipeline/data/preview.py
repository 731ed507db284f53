"""Show a row as it is trained: its tokens, the token that each position predicts, and where the loss is.

    sft-pipeline preview configs/quickstart.yaml --row 3
    sft-pipeline preview configs/quickstart.yaml --row 3 --json

A run saves the same of its first row (`build_preview`) for its report.
"""

from __future__ import annotations

import numpy as np
from datasets import Dataset
from rich.console import Console
from rich.table import Table
from rich.text import Text
from transformers import PreTrainedTokenizerBase

from sft_pipeline.data.batch_sampler import count_row_tokens
from sft_pipeline.utils.constants import IGNORED
from sft_pipeline.utils.sanitize import format_json_line, format_line, replace_control_characters

TRAINED_STYLE, UNTRAINED_STYLE = "green", "dim"
BARS = 40  # maximum number of bars of the histogram of row lengths


def format_row_json(row: dict[str, list[int]], tokenizer: PreTrainedTokenizerBase) -> str:
    """Format a row as one line of JSON: `input_ids`, `labels` (shifted, -100 where nothing is trained) and `text`."""
    return format_json_line({**row, "text": tokenizer.decode(row["input_ids"])})


def print_row(row: dict[str, list[int]], tokenizer: PreTrainedTokenizerBase, title: str, console: Console) -> None:
    """Print a row as text, colored by what is trained, with its first and last trained token."""
    ids, is_trained = row["input_ids"], find_trained_tokens(row["labels"])
    text = Text()
    for token_text, trained in zip(decode_tokens(ids, tokenizer), is_trained):
        text.append(replace_control_characters(token_text), style=TRAINED_STYLE if trained else UNTRAINED_STYLE)
    summary = f": {len(ids)} tokens, {sum(is_trained)} trained ("
    # Assembled, not parsed as markup, because a file's name may contain brackets.
    console.print(Text.assemble((format_line(title), "bold"), summary, (TRAINED_STYLE, TRAINED_STYLE), ")"))
    console.print(text)
    if any(is_trained):
        positions = [position for position, trained in enumerate(is_trained) if trained]
        console.print(_describe_trained_span(positions[0], positions[-1], ids, tokenizer), highlight=False)


def find_trained_tokens(labels: list[int]) -> list[bool]:
    """Return for each token of a row whether it is trained: whether the previous position has it as its target."""
    return [False, *(label != IGNORED for label in labels[:-1])]


def build_preview(rows: Dataset, tokenizer: PreTrainedTokenizerBase) -> dict[str, dict[str, list]]:
    """Build what a report shows of the training rows: the tokens of the first row and a histogram of row lengths.

    `lengths.rows[i]` is the number of rows with at least `lengths.edges[i]` and fewer than `lengths.edges[i + 1]`
    tokens.
    """
    first, lengths = rows[0], count_row_tokens(rows)
    # Whole numbers as edges: with fractional ones some bars would cover more lengths than others.
    shortest, longest = int(lengths.min()), int(lengths.max())
    width = max(1, -(-(longest + 1 - shortest) // BARS))
    counts, edges = np.histogram(lengths, np.arange(shortest, longest + width + 1, width))
    return {
        "first_row": {
            "tokens": decode_tokens(first["input_ids"], tokenizer),
            "trained": find_trained_tokens(first["labels"]),
        },
        "lengths": {"edges": edges.tolist(), "rows": counts.tolist()},
    }


def _describe_trained_span(first: int, last: int, ids: list[int], tokenizer: PreTrainedTokenizerBase) -> Text:
    """Describe the tokens at the first and the last trained position, and whether the last is the stop token."""
    texts = decode_tokens(ids, tokenizer, parts=True)
    end = "the stop token" if ids[last] == tokenizer.eos_token_id else "no stop token: the row is cut"
    return Text(f"first trained token {texts[first]!r}, last {texts[last]!r} ({end})")


def print_positions(row: dict[str, list[int]], tokenizer: PreTrainedTokenizerBase, console: Console) -> None:
    """Print one line per position: its token, the token that it predicts, and whether that prediction is trained."""
    texts = [repr(text)[1:-1] for text in decode_tokens(row["input_ids"], tokenizer, parts=True)]
    table = Table("position", "id", "token", "target", "trained", box=None, header_style="bold")
    for position, (token, label) in enumerate(zip(row["input_ids"], row["labels"])):
        target = texts[position + 1] if position + 1 < len(texts) else ""
        trained, style = ("yes", TRAINED_STYLE) if label != IGNORED else ("no", UNTRAINED_STYLE)
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
