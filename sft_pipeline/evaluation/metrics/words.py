"""Cut text into words without a tokenizer, so metrics of models with different tokenizers compare, in any language.

Chinese writes no spaces: each Han character or kana is a word of its own, as in BERT's and mT5's evaluations. Other
scripts are cut at whatever is not a letter or a digit. On ASCII text `words` gives what ROUGE's tokenizer gives.
"""

import re
import unicodedata

HAN = r"\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
_SINGLE = HAN + r"\u3040-\u30ff\uff66-\uff9f"  # kana, full and half width, are cut singly too
_WORD = rf"[{_SINGLE}]|[^\W_{_SINGLE}]+"
_WORDS = re.compile(_WORD)
_UNITS = re.compile(rf"{_WORD}|[^\w\s]|_")
_HAN = re.compile(f"[{HAN}]")


def words(text: str) -> list[str]:
    """Lower-cased words and single CJK characters, without punctuation: `"Hi, 你好!"` -> `["hi", "你", "好"]`."""
    return _WORDS.findall(_canonical(text))


def units(text: str) -> list[str]:
    """`words` and every punctuation mark or symbol by itself: a model may get stuck on those as well."""
    return _UNITS.findall(_canonical(text))


def count_han(text: str) -> int:
    """Number of Chinese characters, without punctuation."""
    return len(_HAN.findall(text))


def _canonical(text: str) -> str:
    """Lower case, with letters and their accents composed, since a lone combining mark is no letter to `re`."""
    return unicodedata.normalize("NFC", text).lower()
