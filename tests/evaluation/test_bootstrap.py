"""Paired bootstrap: against a plain reference, determinism, coverage, and errors."""

import random
from statistics import NormalDist, fmean

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sft_pipeline.evaluation import bootstrap
from sft_pipeline.evaluation.bootstrap import compute_paired_difference
from sft_pipeline.utils.errors import SFTError

values = st.lists(st.floats(-1e6, 1e6), min_size=2, max_size=30)


@settings(deadline=None, max_examples=50)
@given(values, st.integers(0, 9))
def test_identical_inputs_differ_by_exactly_nothing(a, seed):
    weights = [abs(x) + 1 for x in a]
    for extra in ({}, {"a_weights": weights, "b_weights": weights}):
        found = compute_paired_difference(a, list(a), resamples=50, seed=seed, **extra)
        assert (found.difference, found.low, found.high) == (0, 0, 0)
        assert not found.excludes_zero
        assert found.mean_a == found.mean_b


@settings(deadline=None, max_examples=50)
@given(values)
def test_a_constant_shift_is_found_with_no_width(a):
    found = compute_paired_difference(a, [x + 1024 for x in a], resamples=50)
    assert found.difference == pytest.approx(1024, abs=1e-6)
    assert found.low == pytest.approx(1024, abs=1e-6) and found.high == pytest.approx(1024, abs=1e-6)
    assert found.excludes_zero
    assert found.mean_a == pytest.approx(fmean(a), abs=1e-6) and found.items == len(a)


def plain_interval(numerators, denominators, resamples, confidence):
    """The definition, item by item, with another random generator."""
    generator = random.Random(1)
    items = range(len(numerators[0]))
    found = []
    for _ in range(resamples):
        drawn = [generator.choice(items) for _ in items]
        pairs = zip(numerators, denominators, strict=True)
        a, b = (sum(top[i] for i in drawn) / sum(bottom[i] for i in drawn) for top, bottom in pairs)
        found.append(b - a)
    found.sort()
    tail = (1 - confidence) / 2
    return found[round(tail * (resamples - 1))], found[round((1 - tail) * (resamples - 1))]


@pytest.mark.parametrize("weighted", [False, True])
def test_agrees_with_the_definition(weighted):
    generator = np.random.default_rng(0)
    tokens = generator.integers(1, 100, 40)
    a, b = generator.gamma(2, 20, 40), generator.gamma(2, 15, 40)
    weights = [tokens, tokens + 3] if weighted else [np.ones(40)] * 2
    extra = {"a_weights": weights[0], "b_weights": weights[1]} if weighted else {}
    found = compute_paired_difference(a, b, confidence=0.9, **extra)
    low, high = plain_interval([a, b], weights, 4000, 0.9)
    assert found.mean_a == pytest.approx(a.sum() / weights[0].sum())
    assert found.difference == pytest.approx(b.sum() / weights[1].sum() - a.sum() / weights[0].sum())
    assert (found.low, found.high) == pytest.approx((low, high), abs=0.06 * (high - low))


def test_interval_of_a_mean_agrees_with_the_normal_one():
    difference = np.random.default_rng(3).normal(0.3, 1, 2000)
    found = compute_paired_difference(np.zeros(2000), difference, resamples=4000)
    half = NormalDist().inv_cdf(0.975) * difference.std() / 2000**0.5
    assert found.low == pytest.approx(difference.mean() - half, abs=0.1 * half)
    assert found.high == pytest.approx(difference.mean() + half, abs=0.1 * half)


def test_coverage():
    """Of 400 experiments at 90%, with 50 items each, the true difference of 0.5 lies inside about 90%."""
    generator = np.random.default_rng(5)
    inside = 0
    for seed in range(400):
        item = generator.normal(size=50)  # shared by both sides: pairing takes it out
        found = compute_paired_difference(
            item + generator.normal(0, 0.2, 50), item + generator.normal(0.5, 0.2, 50),
            resamples=400, seed=seed, confidence=0.9,
        )  # fmt: skip
        inside += found.low <= 0.5 <= found.high
    assert 0.85 <= inside / 400 <= 0.94


def test_same_seed_same_interval_and_blocks_cover_all_resamples(monkeypatch):
    a, b = np.random.default_rng(0).normal(size=(2, 30))
    first = compute_paired_difference(a, b, seed=4, resamples=1000)
    assert first == compute_paired_difference(a, b, seed=4, resamples=1000)
    assert first != compute_paired_difference(a, b, seed=5, resamples=1000)
    drawn = []
    means = bootstrap._compute_means
    monkeypatch.setattr(bootstrap, "_compute_means", lambda table, rows: drawn.append(rows.shape) or means(table, rows))
    monkeypatch.setattr(bootstrap, "_CELLS_AT_A_TIME", 300)
    compute_paired_difference(a, b, seed=4, resamples=25)
    assert drawn == [(30,), (10, 30), (10, 30), (5, 30)]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"a": [1, 2], "b": [1]}, r"a, b and their weights must have equal lengths, got \[2, 1, 2, 2\]"),
        ({"a": [1], "b": [1]}, "at least 2 paired items, got 1"),
        ({"a": [], "b": []}, "at least 2 paired items, got 0"),
        ({"a": [1, 2], "b": [1, float("nan")]}, r"b\[1\] is nan; remove that item on both sides"),
        ({"a": [float("inf"), 2], "b": [1, 1]}, r"a\[0\] is inf"),
        ({"a": [[1, 2]], "b": [1, 2]}, r"a must be a flat list with one value per item, got shape \(1, 2\)"),
        ({"a": [1, 2], "b": [1, 2], "a_weights": [1, 1]}, "a_weights and b_weights; give both or neither"),
        ({"a": [1, 2], "b": [1, 2], "a_weights": [1, 1], "b_weights": [1, 0]}, "weights must be positive"),
        ({"a": [1, 2], "b": [1, 2], "resamples": 0}, "resamples must be 1 or more .* got 0 and 0.95"),
        ({"a": [1, 2], "b": [1, 2], "confidence": 95}, "confidence between 0 and 1, got 10000 and 95"),
    ],
)
def test_errors(call, message):
    with pytest.raises(SFTError, match=message):
        compute_paired_difference(**call)
