"""Sanitize untrusted text before it is printed: control characters, line breaks and passwords.

Rows, answers, file and column names and server responses are printed in logs, tables and errors. A terminal executes
the control characters in them, which can set colors and the window title, and on some terminals type keyboard input.
"""

import json
import logging
import re
from typing import Any

# C0 control characters except tab and line feed, and DEL, become Unicode control pictures. C1 control characters, which
# also start escape sequences, and lone surrogates, which UTF-8 cannot encode, become backslash escapes.
REPLACEMENTS = {code: chr(0x2400 + code) for code in range(32) if chr(code) not in "\t\n"} | {127: "\u2421"}
REPLACEMENTS |= {code: f"\\x{code:02x}" for code in range(0x80, 0xA0)}
REPLACEMENTS |= {code: f"\\u{code:04x}" for code in range(0xD800, 0xE000)}
LINE_REPLACEMENTS = REPLACEMENTS | {ord("\t"): "\u2409", ord("\n"): "\u240a", 0x2028: "\\u2028", 0x2029: "\\u2029"}
# JSON escapes for the control characters that `json.dumps` does not escape.
JSON_ESCAPES = {code: f"\\u{code:04x}" for code in (*range(0x7F, 0xA0), *range(0xD800, 0xE000))}
CREDENTIALS = re.compile(r"(?<=://)[^/\s@]+@")


def replace_control_characters(text: str) -> str:
    """Replace control characters by visible ones; line feeds and tabs stay."""
    return text.translate(REPLACEMENTS)


def format_line(text: str) -> str:
    """Replace control characters, line breaks and tabs by visible ones, and mask the user and password of URLs."""
    return CREDENTIALS.sub("***@", text.translate(LINE_REPLACEMENTS))


class EscapingFormatter(logging.Formatter):
    """Log formatter that replaces control characters by visible ones."""

    def format(self, record: logging.LogRecord) -> str:
        return replace_control_characters(super().format(record))


def format_json_line(content: Any) -> str:
    """Format `content` as one line of JSON with every control character escaped, for a terminal or a pipe."""
    return json.dumps(content, ensure_ascii=False).translate(JSON_ESCAPES)
