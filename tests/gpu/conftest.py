"""Tests of what a GPU computes: on a CPU with tiny batches; with CUDA where there is a device, skipped elsewhere."""

from __future__ import annotations

import pytest
import torch

NO_CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA device")
# Compilers and kernels warn of what concerns no result, such as the precision of float32 products.
NO_ERRORS = pytest.mark.filterwarnings("default")
CUDA = pytest.param("cuda", marks=[pytest.mark.gpu, NO_CUDA, NO_ERRORS])


@pytest.fixture(params=["cpu", CUDA])
def device(request) -> torch.device:
    """A device for what both compute alike."""
    return torch.device(request.param)


@pytest.fixture(params=[CUDA])
def cuda(request) -> torch.device:
    """A CUDA device, for what a CPU does not have."""
    return torch.device(request.param)
