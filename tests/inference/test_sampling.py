"""Choosing tokens: filters against transformers' own processors, samples against the probabilities."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.generation.logits_process import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from sft_pipeline.inference import sampling
from sft_pipeline.inference.sampling import (
    SamplingParams,
    apply_repetition_penalty,
    choose_tokens,
    filter_logits,
    sample_tokens,
)
from sft_pipeline.utils.errors import SFTError


def make_generators(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def make_logits(rows: int, vocabulary: int, seed: int) -> torch.Tensor:
    return 3 * torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(seed))


def filter_with_transformers(scores: torch.Tensor, params: SamplingParams) -> torch.Tensor:
    """Apply transformers' processors to the scores, in its order."""
    ids = torch.zeros(len(scores), 1, dtype=torch.long)
    scores = TemperatureLogitsWarper(params.temperature)(ids, scores)
    if params.top_k:
        scores = TopKLogitsWarper(params.top_k)(ids, scores)
    if params.top_p < 1:
        scores = TopPLogitsWarper(params.top_p)(ids, scores)
    return MinPLogitsWarper(params.min_p)(ids, scores) if params.min_p else scores


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 10_000),
    temperature=st.floats(0.2, 3),
    top_k=st.sampled_from([None, 0, 1, 5, 40, 1000]),
    top_p=st.sampled_from([1.0, 0.99, 0.9, 0.5, 0.01]),
    min_p=st.sampled_from([None, 0.0, 0.05, 0.5, 1.0]),
)
def test_filters_are_those_of_transformers(seed, temperature, top_k, top_p, min_p):
    params = SamplingParams(do_sample=True, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    scores = make_logits(3, 60, seed)
    torch.testing.assert_close(filter_logits(scores, params), filter_with_transformers(scores, params))


@pytest.mark.parametrize("top_p", [0.3, 0.9, 0.999])
def test_nucleus_wider_than_the_candidates(top_p, monkeypatch):
    monkeypatch.setattr(sampling, "NUCLEUS_CANDIDATES", 4)
    params = SamplingParams(do_sample=True, top_k=0, top_p=top_p)
    scores = make_logits(4, 300, 1)
    torch.testing.assert_close(filter_logits(scores, params), filter_with_transformers(scores, params))


def test_repetition_penalty_is_that_of_transformers():
    scores, ids = make_logits(2, 20, 3), torch.tensor([[1, 2, 2], [7, 0, 19]])
    seen = torch.zeros(2, 20, dtype=torch.bool).scatter_(1, ids, True)
    torch.testing.assert_close(
        apply_repetition_penalty(scores, seen, 1.3), RepetitionPenaltyLogitsProcessor(1.3)(ids, scores.clone())
    )


def test_draws_follow_the_probabilities():
    probabilities = torch.tensor([0.5, 0.3, 0.15, 0.05, 0.0])
    draws = sample_tokens(probabilities.log().expand(4000, -1), make_generators(*range(4000)))
    frequencies = draws.bincount(minlength=5) / 4000
    assert (frequencies - probabilities).abs().max() < 0.03  # four standard deviations are 0.032 at one half
    assert frequencies[4] == 0


def test_a_row_draws_the_same_whatever_its_neighbours():
    scores, params = make_logits(5, 200, 4), SamplingParams(do_sample=True, top_k=0)
    together, _ = choose_tokens(scores, params, make_generators(0, 1, 2, 3, 4))
    order = [3, 0, 4]
    subset, _ = choose_tokens(scores[order], params, make_generators(*order))
    assert subset.tolist() == together[order].tolist()


def test_seeds_differ_and_repeat():
    scores, params = torch.zeros(1, 1000), SamplingParams(do_sample=True, top_k=0)
    drawn = [choose_tokens(scores, params, make_generators(seed))[0].item() for seed in (1, 2, 1)]
    assert drawn[0] == drawn[2] != drawn[1]


@pytest.mark.parametrize("do_sample", [False, True])
def test_logprobs_are_the_models_own(do_sample):
    scores = make_logits(3, 50, 5)
    seen = torch.ones(3, 50, dtype=torch.bool)
    params = SamplingParams(do_sample=do_sample, temperature=0.5, top_k=5, repetition_penalty=2.0)
    ids, logprobs = choose_tokens(scores, params, make_generators(0, 1, 2), seen)
    torch.testing.assert_close(logprobs, scores.log_softmax(-1).gather(1, ids[:, None])[:, 0])


def test_greedy_takes_the_best_after_the_penalty():
    scores = torch.tensor([[2.0, 1.5, -1.0], [-1.0, -1.5, -9.0]])
    seen = torch.tensor([[True, False, False], [True, False, False]])
    plain, _ = choose_tokens(scores, SamplingParams(), make_generators(0, 0))
    penalized, _ = choose_tokens(scores, SamplingParams(repetition_penalty=2.0), make_generators(0, 0), seen)
    assert plain.tolist() == [0, 0] and penalized.tolist() == [1, 1]


def test_global_random_state_is_not_used():
    state = torch.get_rng_state()
    choose_tokens(make_logits(2, 50, 6), SamplingParams(do_sample=True), make_generators(0, 1))
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_new_tokens", 0),
        ("temperature", 0.0),
        ("top_k", -1),
        ("top_p", 0.0),
        ("top_p", 1.5),
        ("min_p", -0.1),
        ("repetition_penalty", 0.0),
    ],
)
def test_values_out_of_range(name, value):
    with pytest.raises(SFTError, match=f"{name}: {value} must be"):
        SamplingParams(**{name: value})
