"""Loss of reference answers, per row: the input of the held-out metrics."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from sft_pipeline.data.collators import choose_collator
from sft_pipeline.data.encode import build_input_ids_and_labels
from sft_pipeline.data.messages import Conversation
from sft_pipeline.data.template import Template, TokenSequence
from sft_pipeline.evaluation.metrics.words import count_utf8_bytes
from sft_pipeline.model.module_utils import use_eval_mode


@dataclass(frozen=True)
class RowLoss:
    """One reference answer: its summed negative log-likelihood in nats, its tokens with the stop token, those that are
    the model's most likely token, and the bytes of its text, reasoning and tool calls included."""

    nll_nats: float
    tokens: int
    correct: int
    utf8_bytes: int


def compute_reference_losses(
    model: PreTrainedModel, template: Template, conversations: list[Conversation], batch_size: int = 8
) -> list[RowLoss | None]:
    """Return the loss of each conversation's last answer, given the messages that precede it.

    `model` must have been through `patch_loss_forward`. None for a row that exceeds the model's positions, and for one
    whose last answer is excluded from training.
    """
    losses: list[RowLoss | None] = [None] * len(conversations)
    # With "last" a conversation has one sequence at most.
    sequences = {i: row[0] for i, row in enumerate(template.render(conversations, "last")) if row}
    rows = {
        i: dict(zip(("input_ids", "labels"), build_input_ids_and_labels(sequence))) for i, sequence in sequences.items()
    }
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    fitting = [i for i, row in rows.items() if limit is None or len(row["input_ids"]) <= limit]
    # Rows of similar length in a batch need less padding.
    fitting.sort(key=lambda i: len(rows[i]["input_ids"]))
    longest = max((len(rows[i]["input_ids"]) for i in fitting), default=0)
    # The collator computes a prefix that all rows share once per batch. Padding is masked, so any id may pad.
    collate, _ = choose_collator(model, longest, template.stop_token_id)
    for start in range(0, len(fitting), batch_size):
        indices = fitting[start : start + batch_size]
        sums = compute_row_sums(model, collate([rows[i] for i in indices]))
        for i, (nll_nats, tokens, correct) in zip(indices, sums):
            losses[i] = RowLoss(nll_nats, int(tokens), int(correct), _count_supervised_bytes(sequences[i], template))
    return losses


def _count_supervised_bytes(sequence: TokenSequence, template: Template) -> int:
    """Count the UTF-8 bytes of the supervised text, without control tokens."""
    ids = [token for span in sequence.spans if span.supervised for token in span.ids]
    return count_utf8_bytes(str(template.tokenizer.decode(ids, skip_special_tokens=True)))


def compute_row_sums(model: PreTrainedModel, batch: dict[str, Any]) -> list[list[float]]:
    """Return (rows, 3): summed nll in nats, targets, targets that are the model's most likely token.

    `model` must have been through `patch_loss_forward`.
    """
    batch = {name: value.to(model.device) if isinstance(value, Tensor) else value for name, value in batch.items()}
    with use_eval_mode(model):
        return model(**batch, return_row_losses=True).logits.tolist()
