"""The output file of `generate`, written so that a run interrupted at any moment can be continued.

    FILE            the answers in the order of the prompts; written complete, at the end
    FILE.errors     the prompts without an answer, and why; only if there are any. The suffix keeps it out of training
    FILE.partial    until then: a first line with the settings that answers depend on, then the answers as they finish

Each answer is written to the system as soon as it is complete, so a killed process loses unfinished answers only. An
incomplete last line is removed when the file is opened again. The file is synced to disk every SYNC_SECONDS, which is
what a power failure can cost.
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

AnswerKey = tuple[int, int]  # (index of the prompt, index of the sample)
AnswerRecord = dict[str, Any]

SYNC_SECONDS = 5.0


def check_output_file(output: Path, overwrite: bool) -> None:
    """Create the folder of `output`. Raises SFTError if it cannot be written, is not .jsonl, or exists already."""
    if output.is_dir():
        raise SFTError(f"output {output}: is a folder; name a file in it")
    if output.suffix != ".jsonl":
        raise SFTError(f"output {output}: must end in .jsonl, as train_data requires")
    if output.exists() and not overwrite:
        raise SFTError(f"output {output}: already exists; choose another name, or add --overwrite to replace it")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SFTError(f"output {output}: cannot create its folder ({error.strerror})") from error


class AnswerFile:
    """The answers so far, in `records` and in the partial file, until `write_output` replaces that by the output.

    settings: everything that the answers depend on, as JSON. A partial file that was written with different settings
    raises SFTError, or is replaced with `overwrite`. So does a disk that cannot be written to.
    """

    def __init__(self, output: Path, settings: dict[str, Any], overwrite: bool = False) -> None:
        self.output = output
        self.errors, self.partial = (output.with_name(f"{output.name}.{suffix}") for suffix in ("errors", "partial"))
        self.records: dict[AnswerKey, AnswerRecord] = {}
        header = {"generate": json.loads(json.dumps(settings))}
        try:
            self._open(header, overwrite)
        except OSError as error:
            raise self._convert_error(error) from error

    def add(self, key: AnswerKey, record: AnswerRecord) -> None:
        """Append an answer to the partial file."""
        self.records[key] = record
        try:
            self._file.write(_encode_line([*key, record]))
            self._file.flush()
            if time.monotonic() - self._sync_time > SYNC_SECONDS:
                self._sync()
        except OSError as error:
            raise self._convert_error(error) from error

    def write_output(self) -> None:
        """Write FILE, replacing an earlier one, and FILE.errors if a prompt has no answer; delete FILE.partial."""
        records = [self.records[key] for key in sorted(self.records)]
        failed = [record for record in records if "error" in record]
        try:
            if failed:
                _write_lines(self.errors, failed)
            else:
                self.errors.unlink(missing_ok=True)
            _write_lines(self.output, [record for record in records if "error" not in record])
            self.partial.unlink()
        except OSError as error:
            raise self._convert_error(error) from error

    def close(self) -> None:
        self._file.close()

    def _open(self, header: dict[str, Any], overwrite: bool) -> None:
        """Read the records of an existing partial file and open it behind the last complete one, or begin a new one."""
        content = self.partial.read_bytes() if self.partial.exists() else b""
        header_line = _encode_line(header)
        if header_line.startswith(content):  # no file, or interrupted within its first line
            content = b""
        elif conflict := self._find_conflict(content, header):
            if not overwrite:
                raise SFTError(conflict)
            content = b""
        size = self._read_records(content)
        self._file = self.partial.open("r+b" if content else "wb")
        self._file.seek(size)
        self._file.truncate()
        if not content:
            self._file.write(header_line)
        self._sync()

    def _find_conflict(self, content: bytes, header: dict[str, Any]) -> str | None:
        """Return why the partial file cannot be continued with these settings, or None if it can."""
        try:
            previous, current = json.loads(content.partition(b"\n")[0])["generate"], header["generate"]
            names = [name for name in current if name not in previous or previous[name] != current[name]]
        except (ValueError, KeyError, TypeError):
            return f"{self.partial}: is not a partial file of generate; move it, or add --overwrite to replace it"
        if not names:
            return None
        return (
            f"{self.partial}: was started with different settings ({', '.join(names)}); use those again to continue, "
            "choose another output, or add --overwrite to start again"
        )

    def _read_records(self, content: bytes) -> int:
        """Add the complete lines after the header to `records`; return the size of header and lines in bytes."""
        size = content.find(b"\n") + 1
        while end := content.find(b"\n", size) + 1:
            try:
                key, record = _parse_record(*json.loads(content[size:end]))
            except (ValueError, TypeError, RecursionError):
                break
            self.records[key] = record
            size = end
        return size

    def _sync(self) -> None:
        self._file.flush()
        os.fsync(self._file.fileno())
        self._sync_time = time.monotonic()

    def _convert_error(self, error: OSError) -> SFTError:
        return SFTError(
            f"output {self.output}: cannot be written ({error.strerror}); fix that and run again to continue"
        )


def _parse_record(prompt: Any, sample: Any, record: Any) -> tuple[AnswerKey, AnswerRecord]:
    """Check a line's values against what `AnswerFile.add` writes; raises TypeError for anything else."""
    if type(prompt) is not int or type(sample) is not int or not isinstance(record, dict):
        raise TypeError("not an answer")
    return (prompt, sample), record


def _write_lines(file: Path, records: Iterable[AnswerRecord]) -> None:
    """Write a JSONL file that is on the disk, complete, before it gets its name."""
    with write_aside(file) as staging, staging.open("wb") as stream:
        stream.writelines(map(_encode_line, records))
        stream.flush()
        os.fsync(stream.fileno())


def _encode_line(content: Any) -> bytes:
    # UTF-8 cannot encode a lone surrogate; backslashreplace writes it as \udXXX, which is JSON's own escape.
    return json.dumps(content, ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n"
