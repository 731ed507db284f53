"""How well a model predicts held-out answers: metrics from summed negative log-likelihoods and counts.

`nll_nats` is the sum of -ln p over the supervised tokens, a number or one a row; counts likewise. Rows are summed
before dividing, so every token weighs the same however the rows were batched. A `nan` stays a `nan`: a run that
diverged should show it.
"""

import math
from collections.abc import Sequence

import numpy as np

from sft_pipeline.utils.errors import SFTError

Amounts = float | Sequence[float] | np.ndarray


def nll_nats_per_token(nll_nats: Amounts, tokens: Amounts) -> float:
    """Held-out loss: mean negative log-likelihood of a supervised token, in nats. Raises SFTError without tokens."""
    return _total(nll_nats) / _positive(tokens, "supervised tokens")


def perplexity(nll_nats: Amounts, tokens: Amounts) -> float:
    """exp of the nats a token: the number of equally likely tokens the model hesitates between; `inf` on overflow."""
    try:
        return math.exp(nll_nats_per_token(nll_nats, tokens))
    except OverflowError:
        return math.inf


def bits_per_byte(nll_nats: Amounts, utf8_bytes: Amounts) -> float:
    """Negative log-likelihood in bits for each UTF-8 byte of the supervised text: compares across tokenizers.

    `utf8_bytes` counts the answers' text alone; the stop token costs bits and has no bytes, which is the price of
    saying where the text ends. Raises SFTError without bytes.
    """
    return _total(nll_nats) / math.log(2) / _positive(utf8_bytes, "bytes of supervised text")


def token_accuracy(correct: Amounts, tokens: Amounts) -> float:
    """Share (0 to 1) of supervised tokens that were the model's most likely token. Raises SFTError without tokens."""
    return _total(correct) / _positive(tokens, "supervised tokens")


def utf8_bytes(text: str) -> int:
    """Length of `text` in UTF-8 bytes, the denominator of `bits_per_byte`."""
    return len(text.encode("utf-8"))


def _total(amounts: Amounts) -> float:
    return float(np.sum(np.asarray(amounts, dtype=np.float64)))


def _positive(amounts: Amounts, name: str) -> float:
    total = _total(amounts)
    if not total > 0:
        raise SFTError(f"no {name} to average over: the held-out set is empty or every answer in it was cut off")
    return total
