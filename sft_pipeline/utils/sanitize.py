"""Text from outside, as it may be shown: it steers no terminal, forges no line, and holds no password.

Rows, answers, file and column names, and what a server says all end in a log, a table or an error. A terminal obeys
the control characters in them: colours, the window's title, on some the keyboard's input.
"""

import json
import logging
import re
from typing import Any

# C0 (but for tab and line end) and DEL as their pictures; C1, which begins sequences too, and halves of characters,
# which no output can encode, as escapes.
PICTURES = {code: chr(0x2400 + code) for code in range(32) if chr(code) not in "\t\n"} | {127: "\u2421"}
PICTURES |= {code: f"\\x{code:02x}" for code in range(0x80, 0xA0)}
PICTURES |= {code: f"\\u{code:04x}" for code in range(0xD800, 0xE000)}
IN_A_LINE = PICTURES | {ord("\t"): "\u2409", ord("\n"): "\u240a", 0x2028: "\\u2028", 0x2029: "\\u2029"}
# JSON's own escapes for what `json.dumps` leaves as it is.
IN_JSON = {code: f"\\u{code:04x}" for code in (*range(0x7F, 0xA0), *range(0xD800, 0xE000))}
PASSWORD = re.compile(r"(?<=://)[^/\s@]+@")


def replace_control_characters(text: str) -> str:
    """`text` with its control characters as pictures; lines and tabs stay."""
    return text.translate(PICTURES)


def format_line(text: str) -> str:
    """As `visible`, in one line, and without the user and password that a URL may hold."""
    return PASSWORD.sub("***@", text.translate(IN_A_LINE))


class EscapingFormatter(logging.Formatter):
    """Log lines as `visible`."""

    def format(self, record: logging.LogRecord) -> str:
        return replace_control_characters(super().format(record))


def format_json_line(content: Any) -> str:
    """JSON for a terminal or a pipe: the same content, every control character escaped."""
    return json.dumps(content, ensure_ascii=False).translate(IN_JSON)
