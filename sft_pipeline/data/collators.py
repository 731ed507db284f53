"""Choose between packed and padded batches, for training and evaluation."""

from __future__ import annotations

from transformers import PreTrainedModel

from sft_pipeline.data.packing import PackedCollator
from sft_pipeline.data.padding import PaddingCollator
from sft_pipeline.model.packed_attention import find_packing_obstacle, use_packed_attention


def choose_collator(
    model: PreTrainedModel, longest: int, pad_token_id: int, pad_to_multiple_of: int = 8, packing: bool = True
) -> tuple[PackedCollator | PaddingCollator, str | None]:
    """Return (collator, reason): a PackedCollator and None, or a PaddingCollator and the reason against packing.

    Packing is chosen if `model` computes the same for packed rows as for single ones; the model is then set to
    use packed attention. longest: number of tokens of the longest row.
    """
    reason = find_packing_obstacle(model, longest) if packing else "packing: false"
    if reason:
        return PaddingCollator(pad_token_id, pad_to_multiple_of), reason
    use_packed_attention(model)
    return PackedCollator(), None
