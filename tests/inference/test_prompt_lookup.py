"""Prompt lookup: which tokens are proposed as drafts, and how many."""

from hypothesis import given
from hypothesis import strategies as st

from sft_pipeline.inference.prompt_lookup import PromptLookup


@given(
    ids=st.lists(st.integers(0, 2), max_size=30),
    limit=st.integers(-1, 20),
    num_tokens=st.integers(1, 20),
    num_draft_tokens=st.integers(1, 16),
)
def test_drafts_are_the_tokens_after_the_latest_matching_ngram(ids, limit, num_tokens, num_draft_tokens):
    lookup = PromptLookup(ids)
    lookup.num_draft_tokens = num_draft_tokens
    expected: list[int] = []
    for size in range(4, (1 if num_tokens < 8 else 2 if num_tokens < 16 else 4) - 1, -1):
        matches = [end for end in range(size, len(ids)) if ids[end - size : end] == ids[-size:]]
        if matches:
            expected = (ids[matches[-1] :] * 20)[: max(min(limit, num_draft_tokens), 0)]
            break
    assert lookup.get_draft_tokens(limit, num_tokens) == expected


def test_accepted_drafts_raise_their_number_and_rejected_drafts_lower_it():
    lookup, counts = PromptLookup([1]), []
    for proposed, accepted in [(2, 2), (4, 4), (8, 8), (16, 16), (16, 5), (0, 0), (5, 0)]:
        lookup.update_num_draft_tokens(proposed, accepted)
        counts.append(lookup.num_draft_tokens)
    assert counts == [4, 8, 16, 16, 5, 5, 1]
