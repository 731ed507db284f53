"""Choose between packed and padded batches, for training and evaluation."""

from __future__ import annotations

from transformers import PreTrainedModel

from sft_pipeline.data.packing import PackingCollator
from sft_pipeline.data.padding import PaddingCollator
from sft_pipeline.utils.errors import SFTError


def choose_collator(
    model: PreTrainedModel,
    longest: int,
    pad_token_id: int,
    pad_to_multiple_of: int = 8,
    packing: bool = True,
    share_prefixes: bool = True,
) -> tuple[PackingCollator | PaddingCollator, str | None]:
    """Return (collator, reason): a PackingCollator and None, or a PaddingCollator and the reason against packing.

    Packing is chosen if `model` computes the same for packed rows as for single ones; the model is then set to
    use packed attention. longest: number of tokens of the longest sequence. share_prefixes: for
    packed batches.
    """
    reason = "packing: false"
    if packing:
        try:
            return PackingCollator(model, longest, share_prefixes), None
        except SFTError as error:
            reason = str(error)
    return PaddingCollator(pad_token_id, pad_to_multiple_of), reason
