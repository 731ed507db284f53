"""Choose the next tokens, greedily or by sampling, from a batch of logits.

The parameters have the names and meanings of transformers' `GenerationConfig`. Each row samples from its own generator,
so its token depends only on its seed and its logits, not on the other rows, its index in the batch or the batch size.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from sft_pipeline.utils.errors import SFTError

NUCLEUS_CANDIDATES = 2048  # tokens; contains most nuclei, and is far cheaper to sort than the vocabulary


@dataclass(frozen=True)
class SamplingParams:
    """Sampling parameters, the same for every row of a call.

    `max_new_tokens` includes the stop token, as in transformers. The other parameters, except `repetition_penalty`,
    apply only with `do_sample`. Row i samples with the seed `seed + i`. Raises SFTError for a value outside its range.
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
            "temperature": (self.temperature > 0, "above 0; for greedy decoding leave do_sample false"),
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
    """Choose the next token of each row; return the ids and their log-probabilities.

    `logits` is (rows, vocabulary). `seen` is a bool mask of the same shape, true for the ids of the row's prompt and
    answer; it is needed only with a repetition penalty. Returns ids (rows,) and log-probabilities in nats (rows,). The
    log-probabilities are the model's own, before the penalty, temperature and filters, so that they can be compared
    between settings.
    """
    logits = logits.float()
    scores = logits if seen is None else apply_repetition_penalty(logits, seen, settings.repetition_penalty)
    ids = sample_tokens(filter_logits(scores, settings), generators) if settings.do_sample else scores.argmax(-1)
    return ids, -cross_entropy(logits, ids, reduction="none")


def apply_repetition_penalty(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Make the ids in `seen` less likely, for a penalty above 1.

    Source: CTRL, https://arxiv.org/abs/1909.05858, section 4.1.
    """
    return torch.where(seen, torch.where(logits < 0, logits * penalty, logits / penalty), logits)


def filter_logits(logits: Tensor, settings: SamplingParams) -> Tensor:
    """Apply the temperature, then set scores below the row's top-k, top-p and min-p threshold to -inf.

    `logits` and the result are (rows, vocabulary).
    """
    scores = logits / settings.temperature
    vocabulary = scores.shape[-1]
    top_k = min(settings.top_k or vocabulary, vocabulary)
    best = scores.amax(-1, keepdim=True)
    threshold = torch.full_like(best, -torch.inf)
    if top_k < vocabulary:
        top = scores.topk(top_k).values
        threshold = top[:, -1:]
        if settings.top_p < 1:
            threshold = compute_nucleus_threshold(top, top.logsumexp(-1, keepdim=True), settings.top_p)
    elif settings.top_p < 1:
        threshold = compute_wide_nucleus_threshold(scores, settings.top_p)
    if settings.min_p:
        threshold = torch.maximum(threshold, best + torch.tensor(settings.min_p).log())
    return scores.masked_fill(scores < threshold, -torch.inf)


def compute_wide_nucleus_threshold(scores: Tensor, top_p: float) -> Tensor:
    """Compute the nucleus threshold over the whole vocabulary, (rows, 1).

    The vocabulary is sorted only if a row's nucleus has more than NUCLEUS_CANDIDATES tokens.
    """
    total = scores.logsumexp(-1, keepdim=True)
    top = scores.topk(min(NUCLEUS_CANDIDATES, scores.shape[-1])).values
    if bool(((top - total).exp().sum(-1) < top_p).any()):
        top = scores.sort(descending=True).values
    return compute_nucleus_threshold(top, total, top_p)


def compute_nucleus_threshold(top: Tensor, total: Tensor, top_p: float) -> Tensor:
    """Return the lowest score in the nucleus, (rows, 1).

    The nucleus is the smallest set of most likely tokens whose probability sums to at least `top_p`. `top` holds scores
    in descending order, (rows, candidates); `total` is the logsumexp that normalizes them, (rows, 1).
    """
    probs = (top - total).exp()
    preceding_probs = probs.cumsum(-1) - probs
    nucleus_size = (preceding_probs < top_p).sum(-1, keepdim=True).clamp(min=1)
    return top.gather(-1, nucleus_size - 1)


def sample_tokens(scores: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
    """Sample one id per row with probability softmax(scores); returns ids (rows,).

    Uses the Gumbel-max trick: the argmax of score - log(Exp(1)). The noise is tied to token ids, so rounding in
    `scores` (which differs with the batch size) changes the result only where two tokens almost tie. With inverse
    transform sampling, rounding of any score in the cumulative sum could change it. The noise is generated on the CPU,
    so that a seed gives the same noise on every device.
    """
    tiny = torch.finfo(torch.float32).tiny  # noise of exactly 0 would give inf - inf
    noise = torch.stack([torch.empty(scores.shape[-1]).exponential_(generator=generator) for generator in generators])
    return (scores - noise.clamp_(min=tiny).log_().to(scores.device)).argmax(-1)
