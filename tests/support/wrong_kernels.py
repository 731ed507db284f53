"""Attention and head that are wrong in 16 bits alone, for the checks that have to find them."""

from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

import torch

from sft_pipeline.model import linear_cross_entropy, packed_attention


@contextmanager
def use_wrong_attention() -> Iterator[None]:
    """Packed rows in other dtypes than float32 attend to the wrong tokens."""
    attend = packed_attention._attend_sdpa
    with patch.object(packed_attention, "_attend_sdpa", lambda *args: attend(*args).roll(1, dims=1)):
        yield


@contextmanager
def use_wrong_head() -> Iterator[None]:
    compute = linear_cross_entropy._compute_chunk

    def compute_wrongly(*args):
        losses, grads = compute(*args)
        return (losses * 1.2, grads) if args[0].dtype == torch.bfloat16 else (losses, grads)

    with patch.object(linear_cross_entropy, "_compute_chunk", compute_wrongly):
        yield
