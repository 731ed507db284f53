"""A model as lm-evaluation-harness asks it, over this package's own generation and loss.

    lm_eval.evaluate(HarnessLM(model, template, system_prompt), tasks, apply_chat_template=True)

The harness renders a prompt to text and hands that text back with each request. Here the text stands for the
conversation that it was rendered from, and a request gets exactly the ids under which an answer to that conversation
is trained (data/template.py): nothing at the border of prompt and answer is tokenized otherwise. The harness' own HFLM
moves white space from the prompt's end to the answer.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import numpy as np
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from sft_pipeline.data.collators import choose_collator
from sft_pipeline.data.encode import build_input_ids_and_labels
from sft_pipeline.data.messages import Conversation, add_system_prompt, replace_messages
from sft_pipeline.data.prefix_tree import count_common_prefix
from sft_pipeline.data.template import Template
from sft_pipeline.data.text_encoder import encode_as_text
from sft_pipeline.evaluation.eval_loss import compute_row_sums
from sft_pipeline.inference.engine import generate
from sft_pipeline.inference.sampling import SamplingParams
from sft_pipeline.utils.constants import IGNORED
from sft_pipeline.utils.errors import SFTError

logger = logging.getLogger(__name__)

TOKENS_PER_BATCH = 4096  # computed in a forward pass
MAX_GEN_TOKS = 256  # the harness' own default
SAMPLING_KEYS = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")

EncodedRow = dict[str, list[int]]  # input_ids and shifted labels


class HarnessLM(LM):
    """`model` with its template and the system prompt of conversations without one, as an `LM` of the harness.

    `model` must have been through `patch_loss_forward`. count_stop_token: whether a log-likelihood includes the stop
    token after the answer, as the held-out loss does. The harness' own models do not count it. collate: makes batches
    of rows; by default the one that `choose_collator` chooses for the model.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        template: Template,
        system_prompt: str | None = None,
        *,
        batch_size: int = 8,
        count_stop_token: bool = False,
        disable_tqdm: bool = False,
        collate: Callable[..., dict[str, Any]] | None = None,
    ) -> None:
        super().__init__()
        self.model, self.template, self.system_prompt = model, template, system_prompt
        self.batch_size, self.count_stop_token, self.disable_tqdm = batch_size, count_stop_token, disable_tqdm
        self.collate = collate
        # Rendered prompt -> its conversation, and the beginning of the answer that the task gives.
        self._prompts: dict[str, tuple[Conversation, str]] = {}
        self._max_length: int | None = getattr(model.config.get_text_config(), "max_position_embeddings", None)

    # Prompts

    @property
    def tokenizer_name(self) -> str:
        return str(self.template.tokenizer.name_or_path).replace("/", "__")

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        return self.template.chat_template

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Render a conversation; without `add_generation_prompt` its last message is the beginning of the answer."""
        prefix = "" if add_generation_prompt else chat_history[-1]["content"]
        messages = chat_history if add_generation_prompt else chat_history[:-1]
        conversation = add_system_prompt(cast(Conversation, {"messages": messages}), self.system_prompt)
        tokens = self.template.tokenizer.convert_ids_to_tokens
        text = "".join(
            piece.text if piece.token_id is None else str(tokens(piece.token_id))
            for piece in self.template.split_prompt(conversation)
        )
        self._prompts[text + prefix] = conversation, prefix
        return text + prefix

    def _encode(self, text: str) -> list[int]:
        return encode_as_text(self.template.tokenizer, [text])[0]

    def _encode_context(self, context: str) -> list[int]:
        """Return the ids of a prompt. A text that was not rendered here is encoded as it is, after the prefix token."""
        if context in self._prompts:
            conversation, prefix = self._prompts[context]
            return self.template.encode_prompt(conversation) + self._encode(prefix)
        return [self._prefix_token_id, *self._encode(context)]

    @property
    def _prefix_token_id(self) -> int:
        """The token before a text without a prompt, as in the harness: bos, or else eos."""
        tokenizer = self.template.tokenizer
        ids = (tokenizer.bos_token_id, tokenizer.eos_token_id, self.template.stop_token_id)
        return next(token for token in ids if token is not None)

    # Log-likelihoods

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """Return the log-likelihood of each answer, and whether it is the greedy one."""
        rows = [self._encode_answer(*request.args) for request in requests]
        return [(-nll, correct == tokens) for nll, tokens, correct in self._compute_sums(rows, "log-likelihoods")]

    def loglikelihood_rolling(self, requests: list[Instance]) -> list[float]:
        """Return the log-likelihood of each text after the prefix token, in windows of all positions."""
        rows: list[EncodedRow] = []
        owners: list[int] = []
        for index, request in enumerate(requests):
            ids = self._encode(request.args[0])
            windows = get_rolling_token_windows(ids, self._prefix_token_id, self._max_length or len(ids) or 1, 1)
            for context, targets in map(make_disjoint_window, windows):
                rows.append(build_row(context, targets))
                owners.append(index)
        totals = [0.0] * len(requests)
        for index, (nll, _, _) in zip(owners, self._compute_sums(rows, "texts")):
            totals[index] -= nll
        return totals

    def _encode_answer(self, context: str, answer: str) -> EncodedRow:
        """Encode a prompt and an answer to it, whose tokens are the targets."""
        if context not in self._prompts:
            return build_row(self._encode_context(context), self._encode(answer))
        conversation, prefix = self._prompts[context]
        ids, labels = self._encode_turn(conversation, prefix + answer)
        if prefix:
            begun = np.array([label for label in self._encode_turn(conversation, prefix)[1] if label != IGNORED])
            targets = [position for position, label in enumerate(labels) if label != IGNORED]
            shared = count_common_prefix(begun, np.array([labels[position] for position in targets]))
            for position in targets[:shared]:
                labels[position] = IGNORED
        return {"input_ids": ids, "labels": labels}

    def _encode_turn(self, conversation: Conversation, answer: str) -> tuple[list[int], list[int]]:
        """Return ids and labels of a conversation with its answer, as it is trained."""
        messages = [*conversation["messages"], {"role": "assistant", "content": answer}]
        [[sequence]] = self.template.render([replace_messages(conversation, messages)], "last")
        ids, labels = build_input_ids_and_labels(sequence)
        end = -1 if self.count_stop_token else -2  # the last token predicts nothing, the one before it the stop token
        return ids[:end], labels[:end]

    def _compute_sums(self, rows: list[EncodedRow], description: str) -> list[list[float]]:
        """Return for each row the summed nll in nats, its targets, and those that are the model's most likely token."""
        rows = self._cut_beginnings(rows)
        collate = self.collate
        if collate is None:
            longest = max((len(row["input_ids"]) for row in rows), default=1)
            collate, _ = choose_collator(self.model, longest, self.template.stop_token_id)
        sums = [[0.0, 0.0, 0.0]] * len(rows)
        with tqdm(total=len(rows), desc=description, leave=False, delay=0, disable=self.disable_tqdm) as bar:
            for batch in batch_rows(rows, packed=getattr(collate, "share_prefixes", False)):
                row_sums = compute_row_sums(self.model, collate([rows[index] for index in batch]))
                for index, values in zip(batch, row_sums):
                    sums[index] = values
                bar.update(len(batch))
        return sums

    def _cut_beginnings(self, rows: list[EncodedRow]) -> list[EncodedRow]:
        """Cut off the beginning of rows that exceed the model's positions, as the harness does; log their number."""
        limit = self._max_length
        if limit is None:
            return rows
        too_long = [row for row in rows if len(row["input_ids"]) > limit]
        if any(label != IGNORED for row in too_long for label in row["labels"][:-limit]):
            raise SFTError(f"an answer of a task exceeds the {limit} positions of the model; remove the task")
        _log_cut(len(too_long), len(rows), limit)
        return [{name: ids[-limit:] for name, ids in row.items()} for row in rows]

    # Generation

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """Return the text generated for each prompt, up to a stop token or one of the task's stop strings (`until`)."""
        groups: dict[str, list[int]] = {}
        for index, request in enumerate(requests):
            groups.setdefault(json.dumps(request.args[1], sort_keys=True), []).append(index)
        texts = [""] * len(requests)
        with tqdm(total=len(requests), desc="answers", leave=False, delay=0, disable=self.disable_tqdm) as bar:
            for indices in groups.values():
                contexts = [requests[index].args[0] for index in indices]
                for index, text in zip(indices, self._generate(contexts, requests[indices[0]].args[1], bar)):
                    texts[index] = text
        return texts

    def _generate(self, contexts: list[str], generation_kwargs: dict[str, Any], bar: Any) -> list[str]:
        """Generate answers to prompts that have the same `generation_kwargs` of a task."""
        settings, until = read_generation_kwargs(generation_kwargs)
        prompts = [self._encode_context(context) for context in contexts]
        if self._max_length is not None:
            limit = self._max_length - settings.max_new_tokens
            if limit < 1:
                raise SFTError(
                    f"a task's max_gen_toks of {settings.max_new_tokens} leaves no room for a prompt in the "
                    f"{self._max_length} positions of the model; reduce it in the task's generation_kwargs"
                )
            _log_cut(sum(len(ids) > limit for ids in prompts), len(prompts), limit)
            prompts = [ids[-limit:] for ids in prompts]
        # A control token is not part of the decoded text, so it stops by its id.
        controls = {token.content: i for i, token in self.template.tokenizer.added_tokens_decoder.items()}
        completions = generate(
            self.model,
            prompts,
            {*self.template.stop_token_ids, *(controls[text] for text in until if text in controls)},
            settings,
            batch_size=self.batch_size,
            stop_strings=until,
            decode=lambda ids: str(self.template.tokenizer.decode(ids, skip_special_tokens=True)),
            on_done=lambda index, completion: bar.update(),
        )
        if error := next((completion.error for completion in completions if completion.error), None):
            raise SFTError(f"a prompt of a task has no answer: {error}")
        return [completion.text or "" for completion in completions]


def build_row(context: Sequence[int], targets: Sequence[int]) -> EncodedRow:
    """Build the row of a context, of at least one token, and the tokens to predict after it.

    The last one is no input: so the choices of a question that are one token each need no token of their own.
    """
    return {"input_ids": [*context, *targets[:-1]], "labels": [*[IGNORED] * (len(context) - 1), *targets]}


def batch_rows(rows: list[EncodedRow], packed: bool) -> Iterator[list[int]]:
    """Yield the indices of the rows of each batch, which computes at most TOKENS_PER_BATCH tokens or one row.

    Rows without a target are left out.

    Packed batches compute a shared beginning once, so rows with equal beginnings, such as the choices of a question,
    come together; padded ones have rows of similar length.
    """
    ids = [np.array(row["input_ids"]) for row in rows]
    with_targets = [index for index, row in enumerate(rows) if any(label != IGNORED for label in row["labels"])]
    order = sorted(with_targets, key=lambda index: rows[index]["input_ids"] if packed else len(ids[index]))
    batch: list[int] = []
    tokens = 0
    for index in order:
        length = len(ids[index])
        new = length - count_common_prefix(ids[batch[-1]], ids[index]) if packed and batch else length
        total = tokens + new if packed else length * (len(batch) + 1)
        if batch and total > TOKENS_PER_BATCH:
            yield batch
            batch, total = [], length
        batch.append(index)
        tokens = total
    if batch:
        yield batch


def read_generation_kwargs(kwargs: dict[str, Any]) -> tuple[SamplingParams, list[str]]:
    """Return the settings and stop strings of a task's `generation_kwargs`.

    Raises SFTError for one that generation does not know, such as the number of beams.
    """
    options: dict[str, Any] = dict(normalize_gen_kwargs(kwargs, MAX_GEN_TOKS))
    until, max_new_tokens = [text for text in options.pop("until", []) if text], options.pop("max_gen_toks")
    do_sample = bool(options.pop("do_sample", False))
    if options.get("num_beams") == 1:
        del options["num_beams"]  # what generation does
    sampling = {key: options.pop(key) for key in SAMPLING_KEYS if key in options}
    if options:
        name = sorted(options)[0]
        raise SFTError(
            f"generation_kwargs have {name}: {options[name]}, which generation does not know; it knows until, "
            f"max_gen_toks, do_sample, {', '.join(SAMPLING_KEYS)}"
        )
    if not do_sample:
        sampling = {key: value for key, value in sampling.items() if key == "repetition_penalty"}
    return SamplingParams(max_new_tokens=max_new_tokens, do_sample=do_sample, **sampling), until


def _log_cut(count: int, total: int, limit: int) -> None:
    if count:
        counts = f"{count} of {total} prompts of a task exceed {limit} tokens"
        logger.warning("%s and lose their beginning, as in the harness", counts)
