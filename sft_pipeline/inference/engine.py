"""Text generation with a causal language model: token ids in, token ids out, with continuous batching.

    completions = generate(model, [[1, 2, 3], [4, 5]], stop_ids=[0], settings=SamplingParams(max_new_tokens=64))

Sequences are decoded in a batch. When a sequence ends, the next prompt takes its slot at once, and its prefill shares
forward passes with the decoding of the other sequences, so that the batch stays full until no prompts are left. The
common prefix of all prompts is read once. Draft tokens from prompt lookup (`prompt_lookup.py`) are verified in the same
forward pass and kept where they equal the tokens the model chooses. The result is that of decoding each prompt alone,
token by token, up to fp32 rounding.
"""

from collections import deque
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, takewhile
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from sft_pipeline.inference.eval_mode import use_inference_mode
from sft_pipeline.inference.kv_cache import KVCache
from sft_pipeline.inference.prompt_lookup import PromptLookup
from sft_pipeline.inference.sampling import SamplingParams, choose_tokens
from sft_pipeline.inference.stop_criteria import StopCriteria
from sft_pipeline.utils.errors import SFTError

MAX_PROMPT_TOKENS_PER_STEP = 512  # bounds a step's memory, and how long a long prompt delays the other sequences
MAX_DRAFT_TOKENS_PER_STEP = 16  # over all sequences; more would take more time than they save


@dataclass(frozen=True)
class Completion:
    """The generated tokens of one prompt.

    `ids` excludes the stop token; `logprobs` has the model's log-probability of each id, in nats. `text` is the decoded
    answer up to the stop string, if `decode` was passed.
    """

    ids: list[int]
    logprobs: list[float]
    finish_reason: Literal["stop", "length", "error"]
    error: str | None = None
    text: str | None = None


@dataclass
class ActiveSequence:
    """A sequence that is being read or decoded: `past` tokens are in the cache, `pending` are not yet."""

    index: int  # of its prompt
    generator: torch.Generator
    past: int
    pending: list[int]
    seen: Tensor | None  # (vocabulary,) bool mask of the ids in prompt and answer, for the repetition penalty
    lookup: PromptLookup
    drafts: list[int] = field(default_factory=list)  # the draft tokens of this step
    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)

    def accept_draft(self, index: int) -> bool:
        """Accept draft `index` if it equals the token just chosen; return whether it does.

        The key and value of an accepted token are in the cache already.
        """
        accepted = bool(self.pending) and self.pending == self.drafts[index : index + 1]
        if accepted:
            self.past += 1
            self.pending = []
        else:
            self.lookup.update_num_draft_tokens(len(self.drafts), index)
        return accepted


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
    """Generate one completion per prompt, in the order of the prompts.

    The model's mode and configuration are restored afterwards; global random states are not used.

    A sequence holds at most `max_length` tokens, prompt and answer together (default: the model's maximum). A prompt
    that is empty, does not fit or has an id outside the vocabulary gives a completion with finish_reason "error"; the
    other prompts are still answered. `stop_strings` require `decode`: the token that completes a stop string ends the
    answer and stays in `ids`, and `text` is cut before the string. `seeds` are per prompt (default: `settings.seed` +
    the prompt's index). `on_token(index, id)` is called for every token except stop tokens, and
    `on_done(index, completion)` when a sequence ends, in the order they end; both run in torch's inference mode.

    Memory per sequence: its tokens times `kv_cache.compute_bytes_per_token`. Raises SFTError for an invalid argument,
    and for a model with layers that do not attend through transformers' attention interface (recurrent and
    convolutional layers, ALiBi).
    """
    prompt_ids = [list(prompt) for prompt in prompts]
    _check_arguments(model, batch_size, stop_strings, decode, seeds, len(prompt_ids))
    seeds = seeds if seeds is not None else range(settings.seed, settings.seed + len(prompt_ids))
    limit = _get_max_length(model, max_length)
    errors = [_find_prompt_error(ids, settings.max_new_tokens, limit, model) for ids in prompt_ids]
    completions = {i: Completion([], [], "error", error) for i, error in enumerate(errors) if error}
    for index, completion in completions.items():
        _call(on_done, index, completion)
    waiting = [(i, ids, seeds[i]) for i, ids in enumerate(prompt_ids) if i not in completions]
    if waiting:
        stop_criteria = StopCriteria(frozenset(stop_ids), tuple(stop_strings), decode)
        _Batch(model, waiting, stop_criteria, settings, batch_size, on_token, on_done).run(completions)
    return [completions[i] for i in range(len(prompt_ids))]


class _Batch:
    """The batch of sequences being decoded; `sequences[s]` is in slot s of the cache, and slots are filled from 0."""

    def __init__(
        self,
        model: PreTrainedModel,
        waiting: list[tuple[int, list[int], int]],
        stop_criteria: StopCriteria,
        settings: SamplingParams,
        batch_size: int,
        on_token: Callable[[int, int], None] | None,
        on_done: Callable[[int, Completion], None] | None,
    ) -> None:
        """`waiting` holds (index, prompt, seed) of each prompt."""
        self.model, self.stop_criteria, self.settings = model, stop_criteria, settings
        self.on_token, self.on_done = on_token, on_done
        self.device = _get_embedding(model).weight.device
        self.prefix = _find_common_prefix([prompt for _, prompt, _ in waiting])
        self.waiting = deque(waiting)
        self.cache = KVCache(min(batch_size, len(waiting)))
        self.sequences: list[ActiveSequence] = []

    def run(self, completions: dict[int, Completion]) -> None:
        """Decode all prompts; write each completion to `completions` under its prompt's index."""
        with use_inference_mode(self.model, self.cache.attend):
            self._read_prefix()
            self.sequences = [self._create_sequence() for _ in range(self.cache.slots)]
            while self.sequences:
                for sequence, completion in self._run_step():
                    completions[sequence.index] = completion
                    self._replace_sequence(sequence)
                    _call(self.on_done, sequence.index, completion)

    def _read_prefix(self) -> None:
        """Read the common prefix in slot 0 and copy it to all slots."""
        for start in range(0, len(self.prefix), MAX_PROMPT_TOKENS_PER_STEP):
            self._forward([self.prefix[start : start + MAX_PROMPT_TOKENS_PER_STEP]], [start], [1])
        if self.prefix:
            self.cache.copy_prefix(len(self.prefix))

    def _create_sequence(self) -> ActiveSequence:
        """Create the sequence of the next waiting prompt."""
        index, prompt, seed = self.waiting.popleft()
        past = len(self.prefix)
        seen = None
        if self.settings.repetition_penalty != 1:
            seen = torch.zeros(self.model.get_output_embeddings().weight.shape[0], dtype=torch.bool, device=self.device)
            seen[prompt] = True
        generator = torch.Generator().manual_seed(seed)
        return ActiveSequence(index, generator, past, prompt[past:], seen, PromptLookup(prompt))

    def _replace_sequence(self, sequence: ActiveSequence) -> None:
        """Give the slot of a finished sequence to the next prompt, or to the last sequence if no prompt waits."""
        slot, last = self.sequences.index(sequence), len(self.sequences) - 1
        if self.waiting:
            self.sequences[slot] = self._create_sequence()
            return
        if slot != last:
            self.cache.copy_slot(last, slot, self.sequences[last].past)
        self.sequences[slot] = self.sequences[last]
        self.sequences.pop()

    def _run_step(self) -> list[tuple[ActiveSequence, Completion]]:
        """Run one forward pass for all sequences; return those that ended with their completions."""
        budget, new = MAX_PROMPT_TOKENS_PER_STEP, []
        for sequence in self.sequences:
            new.append(sequence.pending[: max(budget, 1)])
            budget -= len(new[-1])
        past = [sequence.past for sequence in self.sequences]
        for sequence, tokens in zip(self.sequences, new):
            sequence.past += len(tokens)
            del sequence.pending[: len(tokens)]
        self._set_drafts(sum(map(len, new)))
        num_logits = [1 + len(sequence.drafts) for sequence in self.sequences]
        inputs = [tokens + sequence.drafts for tokens, sequence in zip(new, self.sequences)]
        logits = self._forward(inputs, past, num_logits)
        starts = accumulate(num_logits, initial=0)
        ready = [(sequence, start) for sequence, start in zip(self.sequences, starts) if not sequence.pending]
        return self._append_tokens(ready, logits)

    def _set_drafts(self, num_tokens: int) -> None:
        """Set the draft tokens of each sequence for a forward pass that reads `num_tokens` tokens without them.

        A sequence whose prompt is not read completely gets none.
        """
        budget = MAX_DRAFT_TOKENS_PER_STEP
        for sequence in self.sequences:
            limit = min(budget, self.settings.max_new_tokens - len(sequence.ids) - 1)
            sequence.drafts = [] if sequence.pending else sequence.lookup.get_draft_tokens(limit, num_tokens)
            budget -= len(sequence.drafts)
            num_tokens += len(sequence.drafts)

    def _append_tokens(
        self, ready: list[tuple[ActiveSequence, int]], logits: Tensor
    ) -> list[tuple[ActiveSequence, Completion]]:
        """Append the next token to each sequence, and one more per accepted draft; return those that ended.

        `ready` pairs each sequence with the index of its first row of `logits`; the rows of its drafts follow.
        """
        ended, depth = [], 0
        while ready:
            rows = [start + depth for _, start in ready]
            ended += self._choose_tokens([sequence for sequence, _ in ready], logits[rows])
            ready = [(sequence, start) for sequence, start in ready if sequence.accept_draft(depth)]
            depth += 1
        return ended

    def _forward(self, new: list[list[int]], past: list[int], num_logits: list[int]) -> Tensor:
        """Run the model on the new tokens of each slot s.

        Returns the logits of the last `num_logits[s]` tokens of each slot, (sum of num_logits, vocabulary).
        """
        plan = self.cache.prepare(past, [len(tokens) for tokens in new], self.device)
        ids = torch.tensor([[token for tokens in new for token in tokens]], device=self.device)
        ends = accumulate(map(len, new))
        indices = [index for end, n in zip(ends, num_logits) for index in range(end - n, end)]
        logits_to_keep = torch.tensor(indices, device=self.device)
        output = self.model(
            input_ids=ids, position_ids=plan.positions[None], use_cache=False, logits_to_keep=logits_to_keep
        )
        _check_layers(self.model, self.cache)
        return output.logits[0]

    def _choose_tokens(
        self, sequences: list[ActiveSequence], logits: Tensor
    ) -> list[tuple[ActiveSequence, Completion]]:
        """Append the next token to each sequence, from logits (sequences, vocabulary); return those that ended."""
        seen = [sequence.seen for sequence in sequences if sequence.seen is not None]
        generators = [sequence.generator for sequence in sequences]
        ids, logprobs = choose_tokens(logits, self.settings, generators, torch.stack(seen) if seen else None)
        ended = []
        for sequence, token, logprob in zip(sequences, ids.tolist(), logprobs.tolist()):
            reason = self._append_token(sequence, token, logprob)
            if reason:
                text = self.stop_criteria.decode_answer(sequence.ids)
                ended.append((sequence, Completion(sequence.ids, sequence.logprobs, reason, text=text)))
        return ended

    def _append_token(self, sequence: ActiveSequence, token: int, logprob: float) -> Literal["stop", "length"] | None:
        """Append the token unless it is a stop token; return the finish reason, or None if the sequence goes on."""
        if token in self.stop_criteria.ids:
            return "stop"
        sequence.ids.append(token)
        sequence.logprobs.append(logprob)
        sequence.lookup.append(token)
        if sequence.seen is not None:
            sequence.seen[token] = True
        _call(self.on_token, sequence.index, token)
        if self.stop_criteria.has_stop_string(sequence.ids):
            return "stop"
        if len(sequence.ids) == self.settings.max_new_tokens:
            return "length"
        sequence.pending = [token]
        return None


def _check_arguments(
    model: PreTrainedModel,
    batch_size: int,
    stop_strings: Sequence[str],
    decode: Callable[[list[int]], str] | None,
    seeds: Sequence[int] | None,
    num_prompts: int,
) -> None:
    """Raise SFTError for an invalid argument of `generate`."""
    if batch_size < 1:
        raise SFTError(f"batch_size: {batch_size} must be at least 1")
    if isinstance(stop_strings, str) or "" in stop_strings:
        raise SFTError("stop_strings: give a list of non-empty strings")
    if stop_strings and decode is None:
        raise SFTError("stop_strings: need decode, a function from ids to text, such as tokenizer.decode")
    if seeds is not None and len(seeds) != num_prompts:
        raise SFTError(f"seeds: got {len(seeds)} for {num_prompts} prompts; give one seed per prompt")
    if model.config.is_encoder_decoder or not model.is_backend_compatible():
        raise SFTError(
            f"{type(model).__name__}: generation supports only decoder models with transformers' attention interface; "
            "use transformers' generate instead"
        )


def _check_layers(model: PreTrainedModel, cache: KVCache) -> None:
    """Raise SFTError if a layer did not attend through the cache, as its state would be lost."""
    expected = set(range(model.config.get_text_config().num_hidden_layers))
    missing = sorted(expected.symmetric_difference(cache.layers))
    if missing:
        raise SFTError(
            f"{type(model).__name__}: layers {missing} keep a state that generation does not support; "
            "use transformers' generate instead"
        )


def _get_max_length(model: PreTrainedModel, max_length: int | None) -> int | None:
    """Return the maximum tokens of a sequence: the model's positions or `max_length`, whichever is smaller.

    None if the model has no maximum and none is set.
    """
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return min((limit for limit in (positions, max_length) if limit is not None), default=None)


def _find_prompt_error(prompt: list[int], max_new_tokens: int, limit: int | None, model: PreTrainedModel) -> str | None:
    """Return why the prompt can't be answered, or None."""
    embedding: Any = _get_embedding(model)
    vocabulary = getattr(embedding, "original_module", embedding).num_embeddings  # below a wrapper of peft
    if not prompt:
        return "the prompt is empty: give at least one token"
    if not 0 <= min(prompt) <= max(prompt) < vocabulary:
        return f"the prompt has an id outside the model's vocabulary of {vocabulary}: use the model's own tokenizer"
    if limit is not None and len(prompt) + max_new_tokens > limit:
        return (
            f"{len(prompt)} prompt tokens and {max_new_tokens} new tokens exceed the limit of {limit}: "
            "shorten the prompt or reduce max_new_tokens"
        )
    return None


def _get_embedding(model: PreTrainedModel) -> nn.Embedding:
    return cast(nn.Embedding, model.get_input_embeddings())


def _find_common_prefix(prompts: list[list[int]]) -> list[int]:
    """Return the longest common prefix that leaves each prompt at least one token to predict from."""
    if len(prompts) == 1:
        return []
    # A prefix that the smallest and the largest list share is shared by all lists between them.
    shared = takewhile(lambda pair: pair[0] == pair[1], zip(min(prompts), max(prompts)))
    return [token for token, _ in shared][: min(map(len, prompts)) - 1]


def _call(callback: Callable[..., None] | None, *args: object) -> None:
    if callback is not None:
        callback(*args)
