"""Prompts to be answered: a text file with one a line, or any source of rows. What is wrong with a row stays with it.

    load_prompts("questions.txt")
    load_prompts("alpaca.json")

The last answer of a row is its reference and is not shown to the model.
"""

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from sft_pipeline.data.formats import RowFormat, convert_to_prompt, detect_format
from sft_pipeline.data.messages import Message
from sft_pipeline.data.readers import LocatedRow
from sft_pipeline.data.sources import read_raw_rows
from sft_pipeline.utils.errors import SFTError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Prompt:
    """A conversation that ends with a user message; a bad row has a `problem` in its place."""

    origin: str
    messages: list[Message]
    reference: str | None = None
    problem: str | None = None


def load_prompts(name_or_path: str) -> list[Prompt]:
    """The prompts of a text file (.txt, one a line, empty lines left out) or of a source of rows as `load_source` reads
    it, in their order. The first row decides on the shape.

    Raises SFTError: missing source, file that does not parse, unknown columns, no prompts.
    """
    path = Path(name_or_path).expanduser()
    if path.suffix.lower() == ".txt":
        prompts, said = list(_lines(path)), "a prompt a line"
    else:
        rows = list(read_raw_rows(name_or_path))
        columns = next((list(row) for _, row in rows if isinstance(row, Mapping)), None)
        shape = detect_format(columns, name_or_path, answered=False) if columns is not None else None
        prompts = [_examined(row, shape) for row in rows] if shape else []
        said = f"read as {shape.name}" if shape else ""
    if not prompts:
        raise SFTError(f"{name_or_path}: no prompts")
    logger.info("%s: %s prompts, %s", name_or_path, f"{len(prompts):,}", said)
    return prompts


def _lines(path: Path) -> Iterator[Prompt]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise SFTError(f"{path}: not UTF-8 at byte {error.start}; save the file as UTF-8") from error
    except OSError as error:
        raise SFTError(f"{path}: cannot be read ({error.strerror}); check the path") from error
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            yield Prompt(f"{path.name} line {number}", [{"role": "user", "content": line.strip()}])


def _examined(placed: LocatedRow, shape: RowFormat) -> Prompt:
    origin, row = placed
    try:
        return Prompt(origin, *convert_to_prompt(row, shape))
    except SFTError as error:
        return Prompt(origin, [], problem=str(error))
