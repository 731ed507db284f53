"""Packing: bins within the budget, the common prefix, and the packed batch against its rows."""

import math
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import BloomConfig, BloomForCausalLM

from sft_pipeline.data.packing import PackingCollator, describe_savings, find_common_prefix, pack_best_fit, pack_rows
from sft_pipeline.utils.constants import IGNORED
from sft_pipeline.utils.errors import SFTError


def build_row(ids, first_target):
    """Build a dataset row with targets from position `first_target` on, shifted as encode.py does."""
    labels = [ids[t + 1] if t + 1 >= first_target else IGNORED for t in range(len(ids) - 1)] + [IGNORED]
    return {"input_ids": ids, "labels": labels}


rows_of_one_start = st.builds(
    lambda start, tails: [build_row(start + tail, len(start) + 1) for tail in tails],
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


@settings(deadline=None, max_examples=100)
@given(lengths=st.lists(st.integers(1, 40), min_size=1, max_size=40), budget=st.integers(40, 80))
def test_best_fit_needs_few_bins(lengths, budget):
    """Fewer than twice what the tokens ask for, since any two bins hold more than one could."""
    assert len(pack_best_fit(lengths, budget)) <= max(1, math.ceil(2 * sum(lengths) / budget) - 1)


def test_best_fit_takes_the_fullest_bin_that_holds_the_row():
    assert pack_best_fit([7, 6, 3, 4], 10) == [[0, 2], [1, 3]]
    assert pack_best_fit([5, 99, 5], 10) == [[0, 2], [1]]


@settings(deadline=None, max_examples=60)
@given(rows_of_one_start)
def test_a_packed_batch_holds_every_row_and_its_targets(rows):
    batch = pack_rows(rows)
    prefix, *remainders = batch["row_lengths"].tolist()
    assert len(remainders) == len(rows) and min(remainders) >= 1
    assert batch["labels"] is batch["shift_labels"]
    assert (batch["labels"][0, :prefix] == IGNORED).all()
    start = prefix
    for length, columns in zip(remainders, rows):
        for key, expected in [*columns.items(), ("position_ids", list(range(len(columns["input_ids"]))))]:
            packed = batch[key][0]
            assert torch.cat([packed[:prefix], packed[start : start + length]]).tolist() == expected
        start += length
    assert {batch[key].shape for key in ("input_ids", "position_ids", "labels")} == {(1, start)}


def test_the_prefix_is_what_all_rows_share_without_a_target():
    def get_length(*rows):
        return find_common_prefix(*([torch.tensor(r[key]) for r in rows] for key in ("input_ids", "labels")))

    first, second = [1, 2, 3, 4, 5], [1, 2, 3, 9]
    assert get_length(build_row(first, 4), build_row(second, 4)) == 3
    assert get_length(build_row(first, 2), build_row(second, 4)) == 1, "a target within the shared ids ends the prefix"
    assert get_length(build_row(first, 4)) == 0, "a single row has nothing to share"
    assert get_length(build_row(first, 9), build_row(first, 9)) == 4, "a row keeps a token of its own"
    assert get_length(build_row([1, *range(100, 119)], 99), build_row([1, *range(200, 219)], 99)) == 0, "under 5% saved"
    assert get_length(build_row([1, *range(100, 109)], 99), build_row([1, *range(200, 209)], 99)) == 1, "5% saved"


def test_the_collator_is_pickled_without_its_model(tiny_model):
    """As a data loader does that starts its workers by spawning."""
    rows = [build_row([1, 2, 3, 4], 4), build_row([1, 2, 3, 5, 6], 4)]
    pickled = pickle.dumps(PackingCollator(tiny_model))
    assert len(pickled) < 200
    batch = pickle.loads(pickled)(rows)
    assert {key: value.tolist() for key, value in batch.items()} == {
        key: value.tolist() for key, value in pack_rows(rows).items()
    }


def test_the_collator_refuses_a_model_that_packing_would_change():
    model = BloomForCausalLM(BloomConfig(vocab_size=64, hidden_size=32, n_layer=2, n_head=4))
    with pytest.raises(SFTError, match="^BloomForCausalLM does not use transformers' attention interface$"):
        PackingCollator(model)


def test_sharing_can_be_turned_off():
    rows = [build_row([1, 2, 3, 4], 4), build_row([1, 2, 3, 5, 6], 4)]
    batch = pack_rows(rows, share_prefix=False)
    assert batch["row_lengths"].tolist() == [0, 4, 5]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3, 0, 1, 2, 3, 4]]


def test_the_collator_uses_no_random_numbers():
    previous = torch.get_rng_state()
    pack_rows([build_row([1, 2, 3], 2)] * 3)
    assert torch.equal(previous, torch.get_rng_state())


@pytest.mark.parametrize("make", [list, torch.tensor])
def test_rows_may_be_lists_or_tensors(make):
    rows = [{key: make(value) for key, value in build_row([1, 2, 3], 2).items()} for _ in range(2)]
    assert pack_rows(rows)["row_lengths"].tolist() == [1, 2, 2]


def test_savings_count_what_a_padded_batch_would_compute():
    def build_long_row(length):
        return {"input_ids": [7, 7, *range(length - 2)], "labels": [-100] * 4 + [1] * (length - 4)}

    # Padded: 2 x 40 tokens; rows: 40 + 10; packed: those without the second prefix; targets: 36 + 6.
    rows = [build_long_row(40), build_long_row(10)]
    prefix = find_common_prefix(*([torch.tensor(r[k]) for r in rows] for k in ("input_ids", "labels")))
    packed = 50 - prefix
    line = describe_savings(rows, [[1, 0], []])
    assert f"saves {1 - 50 / 80:.0%} of the tokens of padded" in line
    assert f"saves {1 - packed / 50:.0%} of the rest" in line
    assert f"lm_head at {42 / packed:.0%} of the positions" in line
