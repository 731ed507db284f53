"""A row as it will be trained, for people: which token predicts which, and where the loss is.

    sft-pipeline preview configs/quickstart.yaml --row 3
    sft-pipeline preview configs/quickstart.yaml --row 3 --json

A run keeps the same of its first row (`record`), for its page.
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

TRAINED, GIVEN = "green", "dim"
BARS = 40  # most bars of the histogram of lengths


def format_row_json(row: dict[str, list[int]], tokenizer: PreTrainedTokenizerBase) -> str:
    """One line: `input_ids`, `labels` (shifted, -100 where nothing is trained) and `text`."""
    return format_json_line({**row, "text": tokenizer.decode(row["input_ids"])})


def print_row(row: dict[str, list[int]], tokenizer: PreTrainedTokenizerBase, title: str, console: Console) -> None:
    """The row as running text and its ends, as at the start of a run."""
    ids, labels = row["input_ids"], row["labels"]
    texts = decode_tokens(ids, tokenizer)
    trained = find_trained_tokens(labels)
    line = Text()
    for text, flag in zip(texts, trained):
        line.append(replace_control_characters(text), style=TRAINED if flag else GIVEN)
    count = sum(trained)
    # No markup: a file's name may hold brackets.
    console.print(
        Text.assemble((format_line(title), "bold"), f": {len(ids)} tokens, {count} trained (", (TRAINED, TRAINED), ")")
    )
    console.print(line)
    if count:
        console.print(_ends([i for i, flag in enumerate(trained) if flag], ids, tokenizer), highlight=False)


def find_trained_tokens(labels: list[int]) -> list[bool]:
    """Of each token of a row. It is trained if the position before it has it for a target."""
    return [False, *(label != IGNORED for label in labels[:-1])]


def build_preview(rows: Dataset, tokenizer: PreTrainedTokenizerBase) -> dict[str, dict[str, list]]:
    """What a report shows of the training rows: the first one's tokens, and how many rows (`rows[i]`) have from
    `edges[i]` up to, not including, `edges[i + 1]` tokens."""
    first, lengths = rows[0], count_row_tokens(rows)
    # Whole numbers as edges: between them a bar would hold more lengths than its neighbours.
    least, most = int(lengths.min()), int(lengths.max())
    width = max(1, -(-(most + 1 - least) // BARS))
    counts, edges = np.histogram(lengths, np.arange(least, most + width + 1, width))
    return {
        "first_row": {
            "tokens": decode_tokens(first["input_ids"], tokenizer),
            "trained": find_trained_tokens(first["labels"]),
        },
        "lengths": {"edges": edges.tolist(), "rows": counts.tolist()},
    }


def _ends(trained: list[int], ids: list[int], tokenizer: PreTrainedTokenizerBase) -> Text:
    """First and last trained token, and whether the row teaches to stop."""
    texts = decode_tokens(ids, tokenizer, parts=True)
    first, last = (repr(texts[at]) for at in (trained[0], trained[-1]))
    stops = ids[trained[-1]] == tokenizer.eos_token_id
    end = "the stop token" if stops else "no stop token: the row is cut"
    return Text(f"first trained token {first}, last {last} ({end})")


def print_positions(row: dict[str, list[int]], tokenizer: PreTrainedTokenizerBase, console: Console) -> None:
    """A line a position: its token, the token it has to predict, and whether that is trained."""
    texts = [repr(text)[1:-1] for text in decode_tokens(row["input_ids"], tokenizer, parts=True)]
    table = Table("position", "id", "token", "target", "trained", box=None, header_style="bold")
    for at, (token, label) in enumerate(zip(row["input_ids"], row["labels"])):
        target = texts[at + 1] if at + 1 < len(texts) else ""
        style = TRAINED if label != IGNORED else GIVEN
        trained = "yes" if label != IGNORED else "no"
        cells = [Text(cell) for cell in (str(at), str(token), texts[at], target, trained)]
        table.add_row(*cells, style=style)
    console.print(table)


def decode_tokens(ids: list[int], tokenizer: PreTrainedTokenizerBase, parts: bool = False) -> list[str]:
    """What each token adds to the text. A character spelled by several tokens stands whole: at its last token and
    nothing before it, or with `parts` at each of them with its number, as 瓜(1/2), 瓜(2/2)."""
    texts: list[str] = []
    start = 0
    for end in range(1, len(ids) + 1):
        text = str(tokenizer.decode(ids[start:end]))
        # An unfinished character decodes to U+FFFD; four bytes are the longest, so more tokens are no character.
        if text.endswith("\ufffd") and end - start < 4 and end < len(ids):
            continue
        size = end - start
        whole = [f"{text}({i + 1}/{size})" for i in range(size)] if parts and size > 1 else [""] * (size - 1) + [text]
        texts += whole
        start = end
    return texts
