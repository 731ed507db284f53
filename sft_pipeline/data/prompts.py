"""Load prompts to answer: a text file with one prompt per line, or any source of rows.

    load_prompts("questions.txt")
    load_prompts("alpaca.json")

The last answer of a row is its reference and is not part of the prompt. A bad row does not raise: its prompt has the
error as `problem`.
"""

import logging
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from sft_pipeline.data.formats import RowFormat, convert_to_prompt, detect_format, list_unread_names
from sft_pipeline.data.messages import Conversation, Message
from sft_pipeline.data.readers import SAVE_AS_UTF8, LocatedRow
from sft_pipeline.data.sources import describe_unread_names, read_raw_rows
from sft_pipeline.utils.errors import SFTError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Prompt:
    """A conversation without its next answer; a bad row has no messages and a `problem`."""

    origin: str
    conversation: Conversation
    reference: Message | None = None
    problem: str | None = None


def load_prompts(name_or_path: str) -> list[Prompt]:
    """Load the prompts of a text file (.txt, one per line, blank lines skipped) or of a source of `load_conversations`.

    The prompts are in the order of the rows. The first row that is an object determines the row format.

    Raises SFTError: missing source, file that does not parse, unknown row format, no prompts.
    """
    path = Path(name_or_path).expanduser()
    if path.suffix.lower() == ".txt":
        prompts, description = list(_read_lines(path)), "one per line"
    else:
        prompts, description = _convert_rows(list(read_raw_rows(name_or_path)), name_or_path)
    if not prompts:
        raise SFTError(f"{name_or_path}: no prompts")
    logger.info("%s: %s prompts, %s", name_or_path, f"{len(prompts):,}", description)
    return prompts


def _read_lines(path: Path) -> Iterator[Prompt]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise SFTError(f"{path}: not UTF-8 at byte {error.start}; {SAVE_AS_UTF8}") from error
    except OSError as error:
        raise SFTError(f"{path}: cannot be read ({error.strerror}); check the path") from error
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            yield Prompt(f"{path.name} line {number}", {"messages": [{"role": "user", "content": line.strip()}]})


def _convert_rows(rows: list[LocatedRow], name: str) -> tuple[list[Prompt], str]:
    """Convert rows to prompts; returns them with a description of the row format for the log."""
    columns = next((list(row) for _, row in rows if isinstance(row, Mapping)), None)
    if columns is None:
        return [], ""
    row_format = detect_format(columns, name, require_answer=False)
    unread = Counter(key for _, row in rows for key in list_unread_names(row, row_format))
    description = f"read as {row_format.name}" + (f"; not read: {describe_unread_names(unread)}" if unread else "")
    return [_convert_row(row, row_format) for row in rows], description


def _convert_row(located_row: LocatedRow, row_format: RowFormat) -> Prompt:
    origin, row = located_row
    try:
        return Prompt(origin, *convert_to_prompt(row, row_format))
    except SFTError as error:
        return Prompt(origin, {"messages": []}, problem=str(error))
