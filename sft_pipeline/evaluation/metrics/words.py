"""Split text into words without a tokenizer, so that metrics compare across models and languages.

Chinese is written without spaces: each Han character or kana is one word, as in the evaluation of BERT and mT5. Other
scripts are split at every character that is not a letter or a digit. On ASCII text `split_words` equals ROUGE's
tokenizer.
"""

import re
import unicodedata

HAN = r"\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
_SINGLE = HAN + r"\u3040-\u30ff\uff66-\uff9f"  # Han characters and kana, full and half width
_WORD = rf"[{_SINGLE}]|[^\W_{_SINGLE}]+"
_WORDS = re.compile(_WORD)
_UNITS = re.compile(rf"{_WORD}|[^\w\s]|_")
_HAN = re.compile(f"[{HAN}]")


def split_words(text: str) -> list[str]:
    """Return the lower-cased words and single CJK characters: `"Hi, 你好!"` -> `["hi", "你", "好"]`."""
    return _WORDS.findall(_normalize(text))


def split_units(text: str) -> list[str]:
    """Return the words and every punctuation mark or symbol: a model may repeat those as well."""
    return _UNITS.findall(_normalize(text))


def count_han(text: str) -> int:
    """Return the number of Chinese characters, without punctuation."""
    return len(_HAN.findall(text))


def count_utf8_bytes(text: str) -> int:
    """Return the length of the text in UTF-8 bytes, the denominator of `bits_per_byte`."""
    return len(text.encode("utf-8"))


def _normalize(text: str) -> str:
    """Compose letters with their accents, as `re` does not take a lone combining mark for a letter; lower the case."""
    return unicodedata.normalize("NFC", text).lower()
