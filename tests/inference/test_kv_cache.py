"""Key-value cache: the memory that a row takes."""

import torch

from sft_pipeline.inference.kv_cache import KVCache, compute_bytes_per_token


def test_memory_of_a_row():
    cache = KVCache(3)
    cache.capacity = 64
    key = torch.zeros(1, 2, 5, 8)
    for layer in range(2):
        cache.prepare([0, 0, 0], [1, 1, 3], torch.device("cpu"))
        cache._write(layer, key, key)
    total = sum(tensor.nbytes for pair in cache.layers.values() for tensor in pair)
    assert total == 3 * 64 * compute_bytes_per_token(layers=2, key_value_heads=2, head_dim=8)
    assert compute_bytes_per_token(30, 3, 64) == 46_080
