"""The file that answers are written to, so that a run cut off at any moment goes on where it was.

    FILE            the answers in the prompts' order; it appears whole, at the end
    FILE.errors     the prompts that got none, and why; only if there are such. Its name keeps it out of training
    FILE.partial    until then: a line for what the answers depend on, then the answers as they finish

A line is handed to the system when its answer is done, so a killed process loses the unfinished answers alone; a line
that was cut is taken away when the file is opened again. The disk is waited for every few seconds: a machine that
stops costs those.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from sft_pipeline.utils.errors import SFTError
from sft_pipeline.utils.files import write_aside

AnswerKey = tuple[int, int]  # the prompt's number, the sample's
AnswerRecord = dict[str, Any]

SYNC_SECONDS = 5.0


def check_output_file(output: Path, overwrite: bool) -> None:
    """Raise SFTError for an output that can't be written or would not be read again, or that is there already."""
    if output.is_dir():
        raise SFTError(f"output {output}: is a folder; name a file in it")
    if output.suffix != ".jsonl":
        raise SFTError(f"output {output}: must end in .jsonl, by which train_data knows it")
    if output.exists() and not overwrite:
        raise SFTError(f"output {output}: is complete already; choose another name, or add --overwrite to replace it")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SFTError(f"output {output}: its folder cannot be made ({error.strerror})") from error


class AnswerFile:
    """The answers so far, `done`, and the file that keeps them until `finish`.

    `settings` is all that the answers depend on, as JSON; a partial file of others is refused, or replaced with
    `overwrite`. Raises SFTError where the disk does not take what is written.
    """

    def __init__(self, output: Path, settings: dict[str, Any], overwrite: bool = False) -> None:
        self.output = output
        self.errors, self.partial = (output.with_name(f"{output.name}.{end}") for end in ("errors", "partial"))
        self.done: dict[AnswerKey, AnswerRecord] = {}
        header = {"generate": json.loads(json.dumps(settings))}
        try:
            self._open(header, overwrite)
        except OSError as error:
            raise self._not_written(error) from error

    def add(self, key: AnswerKey, row: AnswerRecord) -> None:
        """Keep one answer, from now on."""
        self.done[key] = row
        try:
            self._file.write(_encode_line([*key, row]))
            self._file.flush()
            if time.monotonic() - self._synced > SYNC_SECONDS:
                self._sync()
        except OSError as error:
            raise self._not_written(error) from error

    def finish(self) -> None:
        """Write FILE, and FILE.errors if a prompt got no answer; what was there before is replaced."""
        rows = [self.done[key] for key in sorted(self.done)]
        bad = [row for row in rows if "error" in row]
        try:
            if bad:
                _write_whole(self.errors, bad)
            else:
                self.errors.unlink(missing_ok=True)
            _write_whole(self.output, [row for row in rows if "error" not in row])
            self.partial.unlink()
        except OSError as error:
            raise self._not_written(error) from error

    def close(self) -> None:
        self._file.close()

    def _open(self, header: dict[str, Any], overwrite: bool) -> None:
        content = self.partial.read_bytes() if self.partial.exists() else b""
        begin = _encode_line(header)
        if begin.startswith(content):  # nothing there, or cut off within the first line
            content = b""
        elif problem := self._other(content, header):
            if not overwrite:
                raise SFTError(problem)
            content = b""
        kept = self._read(content)
        self._file = self.partial.open("r+b" if content else "wb")
        self._file.seek(kept)
        self._file.truncate()
        if not content:
            self._file.write(begin)
        self._sync()

    def _other(self, content: bytes, header: dict[str, Any]) -> str | None:
        """Why the partial file is not the beginning of this run, or None."""
        try:
            begun, now = json.loads(content.partition(b"\n")[0])["generate"], header["generate"]
            names = [name for name in now if name not in begun or begun[name] != now[name]]
        except (ValueError, KeyError, TypeError):
            return f"{self.partial}: is no partial file of generate; move it away, or add --overwrite to replace it"
        if not names:
            return None
        return (
            f"{self.partial}: was begun with other {', '.join(names)}; go on with those, choose another output, or "
            "add --overwrite to begin anew"
        )

    def _read(self, content: bytes) -> int:
        """Take in the whole lines of a partial file; returns the bytes up to the first that is not whole."""
        size = content.find(b"\n") + 1
        while end := content.find(b"\n", size) + 1:
            try:
                (prompt, sample), row = _parse_record(*json.loads(content[size:end]))
            except (ValueError, TypeError, RecursionError):
                break
            self.done[prompt, sample] = row
            size = end
        return size

    def _sync(self) -> None:
        self._file.flush()
        os.fsync(self._file.fileno())
        self._synced = time.monotonic()

    def _not_written(self, error: OSError) -> SFTError:
        return SFTError(f"output {self.output}: cannot be written ({error.strerror}); mend that and run again to go on")


def _parse_record(prompt: Any, sample: Any, row: Any) -> tuple[AnswerKey, AnswerRecord]:
    """An answer as `add` writes it; else raises TypeError."""
    if type(prompt) is not int or type(sample) is not int or not isinstance(row, dict):
        raise TypeError("not an answer")
    return (prompt, sample), row


def _write_whole(file: Path, rows: Iterable[AnswerRecord]) -> None:
    """Written aside and renamed, so that a file is whole or absent."""
    with write_aside(file) as aside, aside.open("wb") as out:
        out.writelines(map(_encode_line, rows))
        out.flush()
        os.fsync(out.fileno())


def _encode_line(content: Any) -> bytes:
    # Half a character, which UTF-8 does not hold, becomes JSON's own escape.
    return json.dumps(content, ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n"
