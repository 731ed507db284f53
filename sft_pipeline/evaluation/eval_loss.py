"""The loss of reference answers, row by row: what the metrics of `likelihood.py` are made of."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel

from sft_pipeline.data.chat_templates import Template
from sft_pipeline.data.collators import choose_collator
from sft_pipeline.data.encode import build_input_ids_and_labels
from sft_pipeline.data.messages import Message
from sft_pipeline.evaluation.metrics.likelihood import utf8_bytes
from sft_pipeline.model.module_utils import use_eval_mode


@dataclass(frozen=True)
class RowLoss:
    """One reference answer: its summed nll in nats, its tokens (the stop token included), those that were the model's
    likeliest, and the bytes of its text."""

    nll_nats: float
    tokens: int
    correct: int
    utf8_bytes: int


def compute_reference_losses(
    model: PreTrainedModel, template: Template, conversations: list[list[Message]], batch_size: int = 8
) -> list[RowLoss | None]:
    """The loss of each conversation's last answer, given what stands before it.

    `model` has been through `supervise`. None for a row that is longer than the model's positions.
    """
    rows = [
        dict(zip(("input_ids", "labels"), build_input_ids_and_labels(runs)))
        for runs in template.render(conversations, "last")
    ]
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    # Rows of like length side by side need less padding.
    fitting = [at for at, row in enumerate(rows) if limit is None or len(row["input_ids"]) <= limit]
    fitting.sort(key=lambda at: len(rows[at]["input_ids"]))
    losses: list[RowLoss | None] = [None] * len(rows)
    longest = max((len(rows[at]["input_ids"]) for at in fitting), default=0)
    # Examples that all rows share are computed once a batch. Which id pads is of no consequence: padding is masked.
    collate, _ = choose_collator(model, longest, template.stop_token_id)
    for start in range(0, len(fitting), batch_size):
        part = fitting[start : start + batch_size]
        for at, (nll, tokens, correct) in zip(part, _sums(model, collate([rows[at] for at in part]))):
            losses[at] = RowLoss(nll, int(tokens), int(correct), utf8_bytes(conversations[at][-1]["content"]))
    return losses


def _sums(model: PreTrainedModel, batch: dict[str, Any]) -> list[list[float]]:
    """(rows, 3): nll, targets, targets that were the likeliest."""
    batch = {name: tensor.to(model.device) for name, tensor in batch.items()}
    with use_eval_mode(model):
        return model(**batch, return_row_losses=True).logits.tolist()
