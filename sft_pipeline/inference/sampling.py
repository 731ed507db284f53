"""Choosing the next token: greedy or sampled, from a batch of logits.

The names and their meaning are those of transformers' `GenerationConfig`. Every row draws from a generator of its own,
so what a row gets depends on its seed and its logits alone, never on its neighbours, its place in the batch or the
batch's size.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from sft_pipeline.utils.errors import SFTError

NUCLEUS_CANDIDATES = 2048  # enough for most nuclei: sorting this many is far cheaper than sorting a vocabulary


@dataclass(frozen=True)
class SamplingParams:
    """How answers are drawn; the same for every row of a call.

    `max_new_tokens` counts the stop token, as in transformers. The rest, `repetition_penalty` apart, matters only with
    `do_sample`. Row i draws with the seed `seed + i`. Raises SFTError for a value outside its range.
    """

    max_new_tokens: int = 256
    do_sample: bool = False
    temperature: float = 1.0
    top_k: int | None = 50
    top_p: float = 1.0
    min_p: float | None = None
    repetition_penalty: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        ranges = {
            "max_new_tokens": (self.max_new_tokens >= 1, "at least 1"),
            "temperature": (self.temperature > 0, "above 0; greedy decoding takes none"),
            "top_k": (self.top_k is None or self.top_k >= 0, "at least 1, or 0 for no limit"),
            "top_p": (0 < self.top_p <= 1, "above 0 and at most 1"),
            "min_p": (self.min_p is None or 0 <= self.min_p <= 1, "between 0 and 1"),
            "repetition_penalty": (self.repetition_penalty > 0, "above 0"),
        }
        for name, (valid, rule) in ranges.items():
            if not valid:
                raise SFTError(f"{name}: {getattr(self, name)} must be {rule}")


def choose_tokens(
    logits: Tensor, settings: SamplingParams, generators: Sequence[torch.Generator], seen: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The next token of each row and its log-probability.

    `logits` is (rows, vocabulary); `seen` is a bool mask of its shape, true for the ids of the row's prompt and answer,
    needed with a repetition penalty alone. Returns ids (rows,) and log-probabilities in nats (rows,): those of the
    model itself, before the penalty, the temperature and the cuts, so that they compare between settings.
    """
    logits = logits.float()
    scores = logits if seen is None else apply_repetition_penalty(logits, seen, settings.repetition_penalty)
    ids = draw_tokens(filter_logits(scores, settings), generators) if settings.do_sample else scores.argmax(-1)
    return ids, -cross_entropy(logits, ids, reduction="none")


def apply_repetition_penalty(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Make the ids of `seen` less likely for a penalty above 1 (CTRL, https://arxiv.org/abs/1909.05858, section
    4.1)."""
    return torch.where(seen, torch.where(logits < 0, logits * penalty, logits / penalty), logits)


def filter_logits(logits: Tensor, settings: SamplingParams) -> Tensor:
    """Temperature, then top-k, top-p and min-p: what falls under a row's threshold becomes -inf. (rows, vocabulary)."""
    scores = logits / settings.temperature
    width = scores.shape[-1]
    kept = min(settings.top_k or width, width)
    best = scores.amax(-1, keepdim=True)
    threshold = torch.full_like(best, -torch.inf)
    if kept < width:
        top = scores.topk(kept).values
        threshold = top[:, -1:]
        if settings.top_p < 1:
            threshold = compute_nucleus_threshold(top, top.logsumexp(-1, keepdim=True), settings.top_p)
    elif settings.top_p < 1:
        threshold = compute_wide_nucleus_threshold(scores, settings.top_p)
    if settings.min_p:
        threshold = torch.maximum(threshold, best + torch.tensor(settings.min_p).log())
    return scores.masked_fill(scores < threshold, -torch.inf)


def compute_wide_nucleus_threshold(scores: Tensor, top_p: float) -> Tensor:
    """Nucleus threshold over the whole vocabulary, which is sorted only if a nucleus exceeds NUCLEUS_CANDIDATES."""
    total = scores.logsumexp(-1, keepdim=True)
    top = scores.topk(min(NUCLEUS_CANDIDATES, scores.shape[-1])).values
    if bool(((top - total).exp().sum(-1) < top_p).any()):
        top = scores.sort(descending=True).values
    return compute_nucleus_threshold(top, total, top_p)


def compute_nucleus_threshold(top: Tensor, total: Tensor, top_p: float) -> Tensor:
    """The least score of the smallest set of best tokens with at least `top_p` of the probability. (rows, 1).

    `top` holds scores, best first; `total` is the logarithm of the sum that makes them probabilities, (rows, 1).
    """
    probabilities = (top - total).exp()
    before = probabilities.cumsum(-1) - probabilities
    inside = (before < top_p).sum(-1, keepdim=True).clamp(min=1)
    return top.gather(-1, inside - 1)


def draw_tokens(scores: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
    """One id a row with probability softmax(scores), by the exponential race: the largest of score - log(Exp(1)).

    The noise belongs to token ids, so rounding in `scores` (which differs with the batch's size) changes the winner
    only where two tokens tie; inverting the cumulative sum would let each of the vocabulary's roundings move the draw.
    Drawn on the CPU, so that a seed gives the same noise on every device. Returns ids (rows,).
    """
    tiny = torch.finfo(torch.float32).tiny  # a draw of exactly 0 would make inf - inf
    noise = torch.stack([torch.empty(scores.shape[-1]).exponential_(generator=g) for g in generators])
    return (scores - noise.clamp_(min=tiny).log_().to(scores.device)).argmax(-1)
