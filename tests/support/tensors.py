"""Comparison of tensors."""


def close(actual, expected, relative):
    return (actual - expected).abs().max() <= relative * expected.abs().max().clamp_min(1e-12)
