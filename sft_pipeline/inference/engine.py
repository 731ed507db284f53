"""Answers from a causal language model: ids in, ids out, with a decoding loop and a key-value cache of our own.

    completions = generate(model, [[1, 2, 3], [4, 5]], stop_ids=[0], settings=Sampling(max_new_tokens=64))

Rows are decoded side by side; a row that is done leaves its slot to the next prompt at once, whose reading shares a
forward with the other rows' decoding, so the batch runs at full width until the prompts run out. The common prefix of
all prompts is read once. What a row's own text lets guess is read ahead (`prompt_lookup.py`), and kept where
the guess was right. The result is that of decoding each prompt alone, token by token, up to the rounding of fp32.
"""

from collections import deque
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, takewhile
from typing import Literal, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from sft_pipeline.inference.eval_mode import use_inference_mode
from sft_pipeline.inference.kv_cache import KVCache
from sft_pipeline.inference.prompt_lookup import PromptLookup
from sft_pipeline.inference.sampling import SamplingParams, choose_tokens
from sft_pipeline.inference.stop_criteria import StopCriteria
from sft_pipeline.utils.errors import SFTError

PROMPT_TOKENS_A_STEP = 512  # bounds a forward's memory, and how long a long prompt can hold up the other rows
GUESSES_A_STEP = 16  # more would take more time than they save


@dataclass(frozen=True)
class Completion:
    """One answer: `ids` without the stop token, the model's log-probability of each in nats, and why it ended.

    `text` is the decoded answer up to the stop string, where a `decode` was given.
    """

    ids: list[int]
    logprobs: list[float]
    finish_reason: Literal["stop", "length", "error"]
    error: str | None = None
    text: str | None = None


@dataclass
class ActiveSequence:
    """A prompt on its way: `past` tokens are in the cache, `pending` ones are not yet."""

    index: int
    generator: torch.Generator
    past: int
    pending: list[int]
    seen: Tensor | None
    guesses: PromptLookup
    guess: list[int] = field(default_factory=list)  # the tokens read ahead in this step
    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)

    def foresaw(self, depth: int) -> bool:
        """Whether the token just chosen is the one read ahead at `depth`; then it is in the cache already."""
        right = bool(self.pending) and self.pending == self.guess[depth : depth + 1]
        if right:
            self.past += 1
            self.pending = []
        else:
            self.guesses.learn(len(self.guess), depth)
        return right


def generate(
    model: PreTrainedModel,
    prompts: Iterable[Sequence[int]],
    stop_ids: Collection[int],
    settings: SamplingParams,
    *,
    batch_size: int = 16,
    max_length: int | None = None,
    stop_strings: Sequence[str] = (),
    decode: Callable[[list[int]], str] | None = None,
    seeds: Sequence[int] | None = None,
    on_token: Callable[[int, int], None] | None = None,
    on_done: Callable[[int, Completion], None] | None = None,
) -> list[Completion]:
    """One completion a prompt, in the prompts' order. The model is left as it was, and so is every random state.

    A row holds at most `max_length` tokens, prompt and answer together (default: the model's positions); a prompt that
    is empty, does not fit or holds an unknown id gives a completion with finish_reason "error" and the others go on.
    A stop string needs `decode`; the token that completes it ends the answer and stays in `ids`, `text` is cut before
    it. `seeds` are the rows' own (default: `settings.seed` + the row's number). `on_token(row, id)` is called for every
    token that is not a stop token, `on_done(row, completion)` when a row ends, in the order they end;
    both run in torch's inference mode.

    Memory a row: its tokens times `kv_cache.bytes_per_token`. Raises SFTError for a model whose layers do not all
    attend through transformers' attention interface (recurrent and convolutional layers, ALiBi), and for a wrong
    argument.
    """
    rows = [list(prompt) for prompt in prompts]
    _check(model, batch_size, stop_strings, decode, seeds, len(rows))
    seeds = seeds if seeds is not None else range(settings.seed, settings.seed + len(rows))
    limit = _row_limit(model, max_length)
    errors = [_refusal(row, settings.max_new_tokens, limit, model) for row in rows]
    completions = {i: Completion([], [], "error", error) for i, error in enumerate(errors) if error}
    for index, completion in completions.items():
        _call(on_done, index, completion)
    waiting = [(i, row, seeds[i]) for i, row in enumerate(rows) if i not in completions]
    if waiting:
        stops = StopCriteria(frozenset(stop_ids), tuple(stop_strings), decode)
        _Batch(model, waiting, stops, settings, batch_size, on_token, on_done).run(completions)
    return [completions[i] for i in range(len(rows))]


class _Batch:
    """The rows being decoded: `rows[s]` is in slot s of the cache, and slots are filled from 0."""

    def __init__(
        self,
        model: PreTrainedModel,
        waiting: list[tuple[int, list[int], int]],
        stops: StopCriteria,
        settings: SamplingParams,
        batch_size: int,
        on_token: Callable[[int, int], None] | None,
        on_done: Callable[[int, Completion], None] | None,
    ) -> None:
        """`waiting` holds the prompts with their row's number before and its seed after."""
        self.model, self.stops, self.settings = model, stops, settings
        self.on_token, self.on_done = on_token, on_done
        self.device = _embedding(model).weight.device
        self.prefix = _common_prefix([prompt for _, prompt, _ in waiting])
        self.waiting = deque(waiting)
        self.cache = KVCache(min(batch_size, len(waiting)))
        self.rows: list[ActiveSequence] = []

    def run(self, completions: dict[int, Completion]) -> None:
        """Decode until no row waits; puts each row's completion under its index."""
        with use_inference_mode(self.model, self.cache.attend):
            self._read_prefix()
            self.rows = [self._next_row() for _ in range(self.cache.slots)]
            while self.rows:
                for row, completion in self._step():
                    completions[row.index] = completion
                    self._replace(row)
                    _call(self.on_done, row.index, completion)

    def _read_prefix(self) -> None:
        for start in range(0, len(self.prefix), PROMPT_TOKENS_A_STEP):
            self._forward([self.prefix[start : start + PROMPT_TOKENS_A_STEP]], [start], [1])
        if self.prefix:
            self.cache.share(len(self.prefix))

    def _next_row(self) -> ActiveSequence:
        index, prompt, seed = self.waiting.popleft()
        past = len(self.prefix)
        seen = None
        if self.settings.repetition_penalty != 1:
            seen = torch.zeros(self.model.get_output_embeddings().weight.shape[0], dtype=torch.bool, device=self.device)
            seen[prompt] = True
        return ActiveSequence(
            index, torch.Generator().manual_seed(seed), past, prompt[past:], seen, PromptLookup(prompt)
        )

    def _replace(self, row: ActiveSequence) -> None:
        """Give a finished row's slot to the next prompt, or to the last row when none waits, so that no slot is
        idle."""
        slot, last = self.rows.index(row), len(self.rows) - 1
        if self.waiting:
            self.rows[slot] = self._next_row()
            return
        if slot != last:
            self.cache.move(last, slot, self.rows[last].past)
        self.rows[slot] = self.rows[last]
        self.rows.pop()

    def _step(self) -> list[tuple[ActiveSequence, Completion]]:
        """One forward for all rows; returns the rows that ended with it."""
        budget, new = PROMPT_TOKENS_A_STEP, []
        for row in self.rows:
            new.append(row.pending[: max(budget, 1)])
            budget -= len(new[-1])
        past = [row.past for row in self.rows]
        for row, tokens in zip(self.rows, new):
            row.past += len(tokens)
            del row.pending[: len(tokens)]
        self._guess(sum(map(len, new)))
        kept = [1 + len(row.guess) for row in self.rows]
        logits = self._forward([tokens + row.guess for tokens, row in zip(new, self.rows)], past, kept)
        starts = accumulate(kept, initial=0)
        return self._follow([(row, start) for row, start in zip(self.rows, starts) if not row.pending], logits)

    def _guess(self, tokens: int) -> None:
        """Decide what is read ahead for each row, beside the `tokens` that must be read: nothing for a row whose prompt
        is not read yet."""
        budget = GUESSES_A_STEP
        for row in self.rows:
            most = min(budget, self.settings.max_new_tokens - len(row.ids) - 1)
            row.guess = [] if row.pending else row.guesses.next(most, tokens)
            budget -= len(row.guess)
            tokens += len(row.guess)

    def _follow(
        self, ready: list[tuple[ActiveSequence, int]], logits: Tensor
    ) -> list[tuple[ActiveSequence, Completion]]:
        """Give each row its next token, and one more for each token that was rightly guessed; returns the rows that
        ended. With a row comes the place of its first logits; those after the tokens read ahead lie behind it."""
        ended, depth = [], 0
        while ready:
            ended += self._choose([row for row, _ in ready], logits[[start + depth for _, start in ready]])
            ready = [(row, start) for row, start in ready if row.foresaw(depth)]
            depth += 1
        return ended

    def _forward(self, new: list[list[int]], past: list[int], kept: list[int]) -> Tensor:
        """Logits after the last `kept[s]` new tokens of each slot s, (sum of kept, vocabulary)."""
        plan = self.cache.prepare(past, [len(tokens) for tokens in new], self.device)
        ids = torch.tensor([[token for tokens in new for token in tokens]], device=self.device)
        ends = accumulate(map(len, new))
        at = torch.tensor([place for end, n in zip(ends, kept) for place in range(end - n, end)], device=self.device)
        output = self.model(input_ids=ids, position_ids=plan.positions[None], use_cache=False, logits_to_keep=at)
        _check_layers(self.model, self.cache)
        return output.logits[0]

    def _choose(self, rows: list[ActiveSequence], logits: Tensor) -> list[tuple[ActiveSequence, Completion]]:
        """Give each row its next token, from logits (rows, vocabulary); returns the rows that ended."""
        seen = [row.seen for row in rows if row.seen is not None]
        generators = [row.generator for row in rows]
        ids, logprobs = choose_tokens(logits, self.settings, generators, torch.stack(seen) if seen else None)
        ended = []
        for row, token, logprob in zip(rows, ids.tolist(), logprobs.tolist()):
            reason = self._accept(row, token, logprob)
            if reason:
                ended.append((row, Completion(row.ids, row.logprobs, reason, text=self.stops.before(row.ids))))
        return ended

    def _accept(self, row: ActiveSequence, token: int, logprob: float) -> Literal["stop", "length"] | None:
        """Add the token to the row; returns why the row ends, if it does."""
        if token in self.stops.ids:
            return "stop"
        row.ids.append(token)
        row.logprobs.append(logprob)
        row.guesses.append(token)
        if row.seen is not None:
            row.seen[token] = True
        _call(self.on_token, row.index, token)
        if self.stops.found(row.ids):
            return "stop"
        if len(row.ids) == self.settings.max_new_tokens:
            return "length"
        row.pending = [token]
        return None


def _check(
    model: PreTrainedModel,
    batch_size: int,
    stop_strings: Sequence[str],
    decode: Callable[[list[int]], str] | None,
    seeds: Sequence[int] | None,
    rows: int,
) -> None:
    if batch_size < 1:
        raise SFTError(f"batch_size: {batch_size} must be at least 1")
    if isinstance(stop_strings, str) or "" in stop_strings:
        raise SFTError("stop_strings: give a list of strings, none of them empty")
    if stop_strings and decode is None:
        raise SFTError("stop_strings: need decode, a function from ids to text, such as tokenizer.decode")
    if seeds is not None and len(seeds) != rows:
        raise SFTError(f"seeds: {len(seeds)} for {rows} prompts; give one a prompt")
    if model.config.is_encoder_decoder or not model._supports_attention_backend:
        raise SFTError(
            f"{type(model).__name__}: generation serves decoders with transformers' attention interface alone"
        )


def _check_layers(model: PreTrainedModel, cache: KVCache) -> None:
    """Raise SFTError if a layer did not attend through the cache: its state, whatever it is, would be lost."""
    expected = set(range(model.config.get_text_config().num_hidden_layers))
    missing = sorted(expected.symmetric_difference(cache.layers))
    if missing:
        raise SFTError(f"{type(model).__name__}: layers {missing} keep a state that generation does not serve")


def _row_limit(model: PreTrainedModel, max_length: int | None) -> int | None:
    """Tokens a row may hold: the model's positions or `max_length`, whichever is less. None: no limit is known."""
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return min((limit for limit in (positions, max_length) if limit is not None), default=None)


def _refusal(prompt: list[int], max_new_tokens: int, limit: int | None, model: PreTrainedModel) -> str | None:
    """Why the prompt can't be answered, or None."""
    vocabulary = _embedding(model).num_embeddings
    if not prompt:
        return "the prompt is empty: give at least one token"
    if not 0 <= min(prompt) <= max(prompt) < vocabulary:
        return f"the prompt has an id outside the model's vocabulary of {vocabulary}: use the model's own tokenizer"
    if limit is not None and len(prompt) + max_new_tokens > limit:
        return f"{len(prompt)} prompt tokens and {max_new_tokens} new ones exceed {limit}: shorten either"
    return None


def _embedding(model: PreTrainedModel) -> nn.Embedding:
    return cast(nn.Embedding, model.get_input_embeddings())


def _common_prefix(prompts: list[list[int]]) -> list[int]:
    """What all prompts begin with, less than the shortest of them, so that each has a token to predict from."""
    if len(prompts) == 1:
        return []
    # What the least and the greatest share, all between them share too.
    shared = takewhile(lambda pair: pair[0] == pair[1], zip(min(prompts), max(prompts)))
    return [token for token, _ in shared][: min(map(len, prompts)) - 1]


def _call(callback: Callable[..., None] | None, *arguments: object) -> None:
    if callback is not None:
        callback(*arguments)
