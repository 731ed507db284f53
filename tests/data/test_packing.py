"""Packing: bins within the budget, and the packed batch against its rows."""

import math
import pickle

import pytest
import torch
from accelerate.utils import send_to_device
from hypothesis import given, settings
from hypothesis import strategies as st
from support.processes import CONTEXT
from support.trees import build_row, build_visibility, rows_of_sequences
from torch.distributed.utils import _apply_to_tensors, _to_kwargs
from torch.utils.data import DataLoader
from transformers import BloomConfig, BloomForCausalLM

from sft_pipeline.data.packing import PackingCollator, describe_savings, pack_best_fit, pack_rows
from sft_pipeline.data.padding import split_sequences
from sft_pipeline.utils.constants import IGNORED
from sft_pipeline.utils.errors import SFTError


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


def build_simple_row(ids, first_target):
    """Build a row of one sequence with targets from position `first_target` on."""
    return build_row((ids, [index >= first_target for index in range(len(ids))]))


@settings(deadline=None, max_examples=100)
@given(rows_of_sequences(), st.booleans())
def test_a_packed_batch_has_every_target_in_the_order_of_the_rows(rows, share):
    batch = pack_rows(rows, share)
    assert batch["labels"] is batch["shift_labels"] and batch["labels"].shape[0] == 1
    visible = build_visibility(batch["prefix_tree"].subtree_end)
    pairs = list(zip(batch["target_positions"].tolist(), batch["labels"][0].tolist(), strict=True))
    counts = batch["target_counts"].tolist()
    assert batch["token_counts"].tolist() == [len(row["input_ids"]) for row in rows] and len(counts) == len(rows)
    for row, count in zip(rows, counts):
        expected = [
            (ids[: index + 1].tolist(), label)
            for ids, labels in split_sequences(row)
            for index, label in enumerate(labels)
            if label != IGNORED
        ]
        actual = [(batch["input_ids"][0, visible[position]].tolist(), label) for position, label in pairs[:count]]
        assert actual == expected
        pairs = pairs[count:]
    assert not pairs
    assert batch["input_ids"].shape == batch["position_ids"].shape == (1, len(visible))
    if not share:
        assert len(visible) == sum(len(row["input_ids"]) for row in rows)


def test_a_position_may_have_several_targets():
    first, second = ([1, 2, 3, 4, 5, last] for last in (8, 9))
    batch = pack_rows([build_simple_row(first, 5), build_simple_row(second, 5)])
    assert batch["input_ids"].tolist() == [[1, 2, 3, 4, 5, 8, 9]]
    assert batch["target_positions"].tolist() == [4, 4] and batch["labels"].tolist() == [[8, 9]]


def test_an_empty_micro_batch_is_two_tokens_without_a_target():
    batch = pack_rows([])
    assert batch["input_ids"].shape == (1, 2) and batch["labels"].shape == (1, 0)
    assert batch["target_counts"].tolist() == [0]


def test_the_collator_is_pickled_without_its_model(tiny_model):
    """As a data loader does that starts its workers by spawning."""
    rows = [build_simple_row([1, 2, 3, 4], 4), build_simple_row([1, 2, 3, 5, 6], 4)]
    pickled = pickle.dumps(PackingCollator(tiny_model))
    assert len(pickled) < 200
    assert describe_batch(pickle.loads(pickled)(rows)) == describe_batch(pack_rows(rows))


def describe_batch(batch):
    """Return the tensors of a packed batch as lists, and the segments of its tree."""
    tree = batch["prefix_tree"]
    tensors = {key: value.tolist() for key, value in batch.items() if value is not tree}
    return tensors | {"segments": tree.segments, "depths": tree.depths.tolist(), "ends": tree.subtree_end.tolist()}


ROWS = [build_simple_row([1, 2, 3, 4], 4), build_simple_row([1, 2, 3, 5, 6], 4)]


# The second pickles what it sends, as spawning does.
@pytest.mark.parametrize("context", ["fork", CONTEXT], ids=["fork", "forkserver"])
def test_workers_of_a_data_loader_send_whole_batches(context):
    [batch] = DataLoader(ROWS, 2, collate_fn=pack_rows, num_workers=1, multiprocessing_context=context)
    assert describe_batch(batch) == describe_batch(pack_rows(ROWS))


def test_the_tree_of_a_batch_stays_the_object_that_it_is():
    """`Trainer`, accelerate and FSDP move and cast the tensors of a batch; what was made from its tree is found again
    by the tree's identity."""
    batch = pack_rows(ROWS)
    moved = [
        send_to_device(batch, torch.device("meta")),
        _apply_to_tensors(lambda tensor: tensor.to("meta"), batch),
        *_to_kwargs((), batch, torch.device("meta"), False)[1],
    ]
    for other in moved:
        assert other["prefix_tree"] is batch["prefix_tree"] and other["input_ids"].device.type == "meta"


def test_the_collator_refuses_a_model_that_packing_would_change():
    model = BloomForCausalLM(BloomConfig(vocab_size=64, hidden_size=32, n_layer=2, n_head=4))
    with pytest.raises(SFTError, match="^BloomForCausalLM does not use transformers' attention interface$"):
        PackingCollator(model)


def test_the_collator_uses_no_random_numbers():
    previous = torch.get_rng_state()
    pack_rows([build_simple_row([1, 2, 3], 2)] * 3)
    assert torch.equal(previous, torch.get_rng_state())


@pytest.mark.parametrize("make", [list, torch.tensor])
@pytest.mark.parametrize("has_lengths", [True, False])
def test_rows_may_be_lists_or_tensors_with_or_without_sequence_lengths(make, has_lengths):
    row = build_simple_row([1, 2, 3], 2)
    if not has_lengths:
        del row["sequence_lengths"]
    batch = pack_rows([{key: make(value) for key, value in row.items()}] * 2)
    assert batch["target_positions"].dtype == batch["labels"].dtype == torch.int64
    assert batch["token_counts"].tolist() == [3, 3] and batch["labels"].tolist() == [[3, 3]]


def test_savings_count_what_a_padded_batch_would_compute():
    def build_long_row(*lengths):
        return build_row(*(([*range(8), *range(8, length)], [False] * 8 + [True] * (length - 8)) for length in lengths))

    # Padded: 3 x 40 tokens; rows: 40 + 10 + 20; packed: the longest alone; targets: 32 + 2 + 12.
    rows = [build_long_row(40, 20), build_long_row(10)]
    line = describe_savings(rows, [[1, 0], []])
    assert f"saves {1 - 70 / 120:.0%} of the tokens of padded" in line
    assert f"shared prefixes computed once (saves {1 - 40 / 70:.0%} of the rest)" in line
    assert f"lm_head at {46 / 40:.0%} of the positions" in line
    assert "share_prefixes: false (saves 0% of the rest)" in describe_savings(rows, [[1, 0]], share_prefixes=False)
