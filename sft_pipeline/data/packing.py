"""Pack the rows of a micro-batch into one line of tokens without padding, with their shared prefixes computed once.

The sequences of all rows are merged into a tree (prefix_tree.py): system prompts, tools, few-shot examples, several
answers to one prompt, the turns of one conversation. The tree is all that attention needs to let each sequence attend
only to itself. A token may be followed by different ones in several branches, so targets are pairs of a position
and an id. Nothing here uses random numbers, so a run can resume anywhere.
"""

import bisect
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from sft_pipeline.data.padding import DUMMY_ROW, count_targets, split_sequences
from sft_pipeline.data.prefix_tree import build_prefix_tree
from sft_pipeline.kernels.cpu_attention import build_attention_tree
from sft_pipeline.model.loss_forward import patch_loss_forward
from sft_pipeline.model.packed_attention import find_packing_obstacle, use_packed_attention
from sft_pipeline.utils.constants import IGNORED
from sft_pipeline.utils.errors import SFTError


def pack_best_fit(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Pack rows of the given lengths (tokens) into bins of at most `budget` tokens; return lists of row indices.

    Best fit decreasing: longest rows first, each into the fullest bin that still has space for it. A row over the
    budget gets a bin of its own (the length limit is applied before packing). Rows keep their order within a bin, and
    bins are ordered by their first row, so equal input gives equal output in every process.
    """
    free: list[tuple[int, int]] = []  # (free tokens, bin), sorted
    bins: list[list[int]] = []
    for row in sorted(range(len(lengths)), key=lambda row: (-lengths[row], row)):
        index = bisect.bisect_left(free, (lengths[row], -1))
        if index == len(free):
            bins.append([])
            free_tokens, bin_index = budget, len(bins) - 1
        else:
            free_tokens, bin_index = free.pop(index)
        bins[bin_index].append(row)
        if lengths[row] < free_tokens:
            bisect.insort(free, (free_tokens - lengths[row], bin_index))
    return sorted((sorted(rows) for rows in bins), key=lambda rows: rows[0])


class PackingCollator:
    """Collate rows to a packed batch, for `model`, which is set to attend within each sequence and to return losses.

    Raises SFTError with the reason if `model` would not compute the same as for single sequences.
    longest: number of tokens of the longest sequence; a sliding window or chunk at least as long hides nothing.
    share_prefixes: whether shared prefixes are computed once.
    """

    def __init__(self, model: PreTrainedModel, longest: int | None = None, share_prefixes: bool = True) -> None:
        if reason := find_packing_obstacle(model, longest):
            raise SFTError(reason)
        patch_loss_forward(model)
        use_packed_attention(model)
        self.share_prefixes = share_prefixes

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
        return pack_rows(rows, self.share_prefixes)


def pack_rows(rows: Sequence[dict[str, Any]], share_prefixes: bool = True) -> dict[str, Any]:
    """Collate dataset rows (`input_ids`, shifted `labels`, `sequence_lengths` of several) into one packed batch, int64.

    The batch has the tokens of the tree, `input_ids` and `position_ids`, each (1, tokens), and `prefix_tree`, an
    AttentionTree, which stays on the host: nothing has to be read back from the device of the model. `labels` and
    `shift_labels` are the same tensor (1, targets) of ids; `Trainer` counts it, and transformers does not shift it.
    `target_positions` (targets,) are their positions in the line, which may repeat; targets come in the order of the
    rows, `target_counts` (rows,) of each row. `token_counts` (rows,) are the tokens of each row's sequences.
    Without `share_prefixes` the sequences lie side by side.
    """
    rows_of_sequences = [split_sequences(row) for row in rows or [DUMMY_ROW]]
    sequences = [sequence for row in rows_of_sequences for sequence in row]
    tree = build_prefix_tree([ids for ids, _ in sequences], share_prefixes)
    has_target = [labels != IGNORED for _, labels in sequences]
    targets = torch.from_numpy(np.concatenate([labels[has] for (_, labels), has in zip(sequences, has_target)]))
    targets = targets.long()[None]
    positions = np.concatenate([positions[has] for positions, has in zip(tree.positions, has_target)])
    return {
        "input_ids": torch.from_numpy(tree.input_ids)[None],
        "position_ids": torch.from_numpy(tree.depths)[None],
        "prefix_tree": build_attention_tree(tree.subtree_end),
        "labels": targets,
        "shift_labels": targets,
        "target_positions": torch.from_numpy(positions),
        "target_counts": count_targets(rows_of_sequences),
        "token_counts": torch.tensor([sum(len(ids) for ids, _ in row) for row in rows_of_sequences]),
    }


def describe_savings(rows: Sequence[dict[str, Any]], batches: Iterable[list[int]], share_prefixes: bool = True) -> str:
    """Describe in one line what packing saves compared with padding the same micro-batches (lists of row indices)."""
    padded_tokens = row_tokens = packed_tokens = targets = 0
    for indices in filter(None, batches):
        batch = [rows[index] for index in indices]
        lengths = [len(ids) for row in batch for ids, _ in split_sequences(row)]
        packed = pack_rows(batch, share_prefixes)
        padded_tokens += max(lengths) * len(lengths)
        row_tokens += sum(lengths)
        packed_tokens += packed["input_ids"].numel()
        targets += len(packed["target_positions"])
    sharing = "shared prefixes computed once" if share_prefixes else "share_prefixes: false"
    return (
        f"packed rows: no padding (saves {1 - row_tokens / padded_tokens:.0%} of the tokens of padded batches), "
        f"{sharing} (saves {1 - packed_tokens / row_tokens:.0%} of the rest), "
        f"lm_head at {targets / packed_tokens:.0%} of the positions"
    )
