"""Sanitized text: control characters and line ends of any kind become visible."""

import json
import logging
import os

from support.hostile import ESCAPES, SEEN, refusal

from sft_pipeline.data.sources import load_source
from sft_pipeline.utils.errors import SFTError
from sft_pipeline.utils.sanitize import EscapingFormatter, format_line


def test_log_lines_and_errors_steer_no_terminal(tmp_path, caplog):
    record = logging.LogRecord("a", logging.INFO, "a.py", 1, "%s", (f"x{ESCAPES}\ny",), None)
    assert EscapingFormatter("%(message)s").format(record) == f"x{SEEN}\ny"
    assert str(SFTError(f"x{ESCAPES}\n\ty")) == f"x{SEEN}\u240a\u2409y" == format_line(format_line(f"x{ESCAPES}\n\ty"))
    file = tmp_path / "a\x1b[2J\n.jsonl"
    file.write_text(json.dumps({"prompt": "Hi", "completion": "Yes?", "more\n\x1b[2J": 1}))
    with caplog.at_level(logging.INFO):
        assert load_source(str(file))[0]["origin"] == ["a\u241b[2J\u240a.jsonl line 1"]
    assert "not read: more\u240a\u241b[2J" in caplog.text
    os.close(os.open(os.fsencode(tmp_path) + b"/\xff.jsonl", os.O_CREAT))
    refusal(lambda: load_source(os.fsdecode(os.fsencode(tmp_path) + b"/\xff.jsonl")), "\\udcff.jsonl: no rows")


def test_line_ends_of_other_kinds_make_no_second_line():
    assert str(SFTError("a\u2028b\u2029c\x85d")) == "a\\u2028b\\u2029c\\x85d"
