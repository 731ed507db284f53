"""Packing: bins within the budget, the common prefix, and the packed batch against its rows."""

import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sft_pipeline.data.packing import PackedCollator, describe_savings, find_common_prefix, pack_best_fit
from sft_pipeline.utils.constants import IGNORED


def row(ids, first_target):
    """A dataset row: targets from position `first_target` on, shifted, as encode makes them."""
    labels = [ids[t + 1] if t + 1 >= first_target else IGNORED for t in range(len(ids) - 1)] + [IGNORED]
    return {"input_ids": ids, "labels": labels}


rows_of_one_start = st.builds(
    lambda start, tails: [row(start + tail, len(start) + 1) for tail in tails],
    st.lists(st.integers(1, 9), max_size=12),
    st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=8), min_size=1, max_size=6),
)


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(1, 40), max_size=30), st.integers(1, 64))
def test_best_fit_keeps_every_row_within_the_budget(lengths, budget):
    bins = pack_best_fit(lengths, budget)
    assert sorted(number for rows in bins for number in rows) == list(range(len(lengths)))
    for rows in bins:
        assert sum(lengths[number] for number in rows) <= budget or len(rows) == 1
        assert rows == sorted(rows)
    # No two bins could have been one: best fit opens a bin only where a row fits nowhere.
    sizes = sorted(sum(lengths[number] for number in rows) for rows in bins)
    assert len(sizes) < 2 or sizes[0] + sizes[1] > budget


def test_best_fit_takes_the_fullest_bin_that_holds_the_row():
    assert pack_best_fit([7, 6, 3, 4], 10) == [[0, 2], [1, 3]]
    assert pack_best_fit([5, 99, 5], 10) == [[0, 2], [1]]


@settings(deadline=None, max_examples=60)
@given(rows_of_one_start)
def test_a_packed_batch_holds_every_row_and_its_targets(rows):
    batch = PackedCollator()(rows)
    prefix, *own = batch["row_lengths"].tolist()
    assert len(own) == len(rows) and min(own) >= 1
    assert batch["labels"] is batch["shift_labels"]
    assert (batch["labels"][0, :prefix] == IGNORED).all()
    at = prefix
    for length, one in zip(own, rows):
        for key, expected in [*one.items(), ("position_ids", list(range(len(one["input_ids"]))))]:
            line = batch[key][0]
            assert torch.cat([line[:prefix], line[at : at + length]]).tolist() == expected
        at += length
    assert {batch[key].shape for key in ("input_ids", "position_ids", "labels")} == {(1, at)}


def test_the_prefix_is_what_all_rows_share_without_a_target():
    def length(*rows):
        return find_common_prefix(*([torch.tensor(r[key]) for r in rows] for key in ("input_ids", "labels")))

    one, two = [1, 2, 3, 4, 5], [1, 2, 3, 9]
    assert length(row(one, 4), row(two, 4)) == 3
    assert length(row(one, 2), row(two, 4)) == 1, "a target within the shared ids ends the prefix"
    assert length(row(one, 4)) == 0, "one row shares with nobody"
    assert length(row(one, 9), row(one, 9)) == 4, "a row keeps a token of its own"
    assert length(row([1, *range(100, 119)], 99), row([1, *range(200, 219)], 99)) == 0, "under 5% saved"
    assert length(row([1, *range(100, 109)], 99), row([1, *range(200, 209)], 99)) == 1, "5% saved"


def test_sharing_can_be_switched_off_and_the_collator_goes_to_workers():
    rows = [row([1, 2, 3, 4], 4), row([1, 2, 3, 5, 6], 4)]
    collator = pickle.loads(pickle.dumps(PackedCollator(share_prefix=False)))
    batch = collator(rows)
    assert batch["row_lengths"].tolist() == [0, 4, 5]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3, 0, 1, 2, 3, 4]]


def test_the_collator_draws_no_random_numbers():
    before = torch.get_rng_state()
    PackedCollator()([row([1, 2, 3], 2)] * 3)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("make", [list, torch.tensor])
def test_rows_may_be_lists_or_tensors(make):
    rows = [{key: make(value) for key, value in row([1, 2, 3], 2).items()} for _ in range(2)]
    assert PackedCollator()(rows)["row_lengths"].tolist() == [1, 2, 2]


def test_savings_count_what_a_padded_batch_would_compute():
    def row(length):
        return {"input_ids": [7, 7, *range(length - 2)], "labels": [-100] * 4 + [1] * (length - 4)}

    # Padded: 2 x 40 tokens; real: 40 + 10; packed: those less the prefix of the second; targets: 36 + 6.
    rows = [row(40), row(10)]
    prefix = find_common_prefix(*([torch.tensor(r[k]) for r in rows] for k in ("input_ids", "labels")))
    computed = 50 - prefix
    line = describe_savings(rows, [[1, 0], []])
    assert f"saves {1 - 50 / 80:.0%} of the tokens of padded" in line
    assert f"saves {1 - computed / 50:.0%} of the rest" in line
    assert f"head at {42 / computed:.0%}" in line
