"""Steps and micro-batches: every row once an epoch, the same steps on any number of processes, budgets and balance."""

import math

import pytest
import torch
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st

from sft_pipeline.data.batch_sampler import (
    MICRO_BATCHES,
    EpochDataLoader,
    StepBatchSampler,
    count_row_tokens,
    divide_rows,
)
from sft_pipeline.data.packing import pack_best_fit, pack_rows
from sft_pipeline.data.padding import PaddingCollator
from sft_pipeline.utils.constants import IGNORED

lengths_of_rows = st.lists(st.integers(1, 30), min_size=1, max_size=60)
modes = st.fixed_dictionaries({"rows": st.integers(1, 5), "packed": st.booleans()})
budgets = st.fixed_dictionaries({"rows": st.integers(1, 12), "tokens": st.integers(30, 90)})
spread = {"accumulation": st.integers(1, 4), "processes": st.integers(1, 3), "seed": st.integers(0, 5)}


def list_batches(lengths, epoch, processes=1, **keys) -> list[list]:
    """Return the batches of each process."""
    shares = []
    for process in range(processes):
        sampler = StepBatchSampler(lengths, processes=processes, process=process, **keys)
        sampler.set_epoch(epoch)
        shares.append(list(sampler))
        assert len(shares[-1]) == len(sampler)
    return shares


def group_into_steps(shares: list[list[list[int]]], accumulation: int) -> list[set[int]]:
    """Return the rows of each optimizer step as `Trainer` takes them: `accumulation` micro-batches of each process."""
    starts = range(0, len(shares[0]), accumulation)
    return [{row for share in shares for batch in share[i : i + accumulation] for row in batch} for i in starts]


@settings(deadline=None, max_examples=150)
@given(lengths=lengths_of_rows, mode=modes, epoch=st.integers(0, 2), **spread)
def test_an_epoch_has_every_row_once(lengths, mode, epoch, **keys):
    shares = list_batches(lengths, epoch, **mode, **keys)
    assert sorted(row for share in shares for batch in share for row in batch) == list(range(len(lengths)))
    assert len({len(share) for share in shares}) == 1, "all processes run as many forward passes"
    for batches in zip(*shares):
        assert any(batches), "no forward pass in which all processes have no rows"


@settings(deadline=None, max_examples=150)
@given(
    lengths=lengths_of_rows, mode=modes, seed=st.integers(0, 5), epoch=st.integers(0, 2), processes=st.integers(1, 3)
)
def test_the_rows_of_a_step_are_the_same_for_any_spread(lengths, mode, seed, epoch, processes):
    """Six micro-batches a step, or of six times `rows` rows; also with a budget of tokens."""
    sampler = StepBatchSampler(lengths, seed=seed, accumulation=6, **mode)
    expected = [set(step) for step in sampler.split_epoch(epoch)]
    assert [row for step in sampler.split_epoch(epoch) for row in step] == sampler.shuffle_rows(epoch).tolist()
    spreads = [(6, 1, 1), (1, 2, 3), (2, 3, 1), (1, 1, 6), (6 // processes, processes, 1)]
    for accumulation, process_count, times in spreads:
        keys = mode | {"rows": mode["rows"] * times, "accumulation": accumulation, "seed": seed}
        assert group_into_steps(list_batches(lengths, epoch, process_count, **keys), accumulation) == expected
        shares = list_batches(lengths, epoch, process_count, **keys | {"tokens": 40, "packed": True})
        steps = [[row for share in step for rows in share for row in rows] for step in zip(*shares)]
        assert [set(step) for step in steps] == expected


@settings(deadline=None, max_examples=150)
@given(lengths=lengths_of_rows, budget=budgets, **spread)
def test_a_budget_holds_in_as_few_micro_batches_as_best_fit_needs(lengths, budget, **keys):
    for step in zip(*list_batches(lengths, 0, **budget, **keys)):
        micro_batches = [rows for share in step for rows in share]
        assert len({len(share) for share in step}) == 1, "all processes run as many forward passes"
        assert all(sum(lengths[row] for row in rows) <= budget["tokens"] for rows in micro_batches)
        rows = [row for rows in micro_batches for row in rows]
        needed = len(pack_best_fit([lengths[row] for row in rows], budget["tokens"]))
        assert 0 <= len(micro_batches) - needed < keys["processes"]


def test_a_row_above_the_budget_is_a_micro_batch_alone():
    lengths = [5, 50, 5, 5]
    [[[*micro_batches]]] = list_batches(lengths, 0, seed=0, rows=4, tokens=10)
    assert [1] in micro_batches and len(micro_batches) == 3
    assert all(sum(lengths[row] for row in rows) <= 10 for rows in micro_batches if rows != [1])


@settings(deadline=None, max_examples=100)
@given(lengths=lengths_of_rows, mode=st.one_of(modes, budgets), epoch=st.integers(0, 2), **spread)
def test_equal_seeds_give_equal_batches(lengths, mode, epoch, **keys):
    assert list_batches(lengths, epoch, **mode, **keys) == list_batches(lengths, epoch, **mode, **keys)


def test_epochs_and_seeds_shuffle_differently():
    samplers = [StepBatchSampler([1] * 50, seed=seed, rows=5) for seed in (0, 1)]
    orders = [tuple(sampler.shuffle_rows(epoch)) for sampler in samplers for epoch in range(3)]
    assert len(set(orders)) == 6 and tuple(range(50)) not in orders
    assert StepBatchSampler([1] * 50, seed=0, rows=5, shuffle=False).split_epoch(4)[1].tolist() == [5, 6, 7, 8, 9]


def test_every_row_is_as_likely_in_every_step():
    """Row lengths must not decide when a row is trained: 400 epochs of long and short rows."""
    lengths = [40] * 4 + [4] * 12
    sampler = StepBatchSampler(lengths, seed=0, rows=4)
    first = [row for epoch in range(400) for row in sampler.split_epoch(epoch)[0]]
    counts = torch.bincount(torch.tensor(first), minlength=16)
    assert counts.min() > 60 and counts.max() < 140  # 100 expected, 4.6 standard deviations on either side


@settings(deadline=None, max_examples=150)
@given(lengths=st.lists(st.integers(1, 200), min_size=1, max_size=60), count=st.integers(1, 12))
def test_divided_rows_are_balanced(lengths, count):
    bins = divide_rows(lengths, count)
    assert sorted(row for rows in bins for row in rows) == list(range(len(lengths)))
    assert len(bins) == count and sum(not rows for rows in bins) == max(0, count - len(lengths))
    assert max(sum(lengths[row] for row in rows) for rows in bins) <= math.ceil(sum(lengths) / count) + max(lengths)


@settings(deadline=None, max_examples=150)
@given(lengths=st.lists(st.integers(1, 40), min_size=1, max_size=40), budget=st.integers(1, 80))
def test_divided_rows_keep_a_budget_that_best_fit_can_keep(lengths, budget):
    count = len(pack_best_fit(lengths, budget))
    bins = divide_rows(lengths, count, budget)
    assert len(bins) == count
    assert all(sum(lengths[row] for row in rows) <= budget or len(rows) == 1 for rows in bins)


def test_divided_rows_of_a_usual_batch_are_nearly_even():
    """80 rows of 20 to 600 tokens in 10 micro-batches: within 2% of the mean."""
    random = torch.Generator().manual_seed(0)
    lengths = torch.randint(20, 600, (80,), generator=random).tolist()
    largest = max(sum(lengths[row] for row in rows) for rows in divide_rows(lengths, 10))
    assert largest <= 1.02 * sum(lengths) / 10


@settings(deadline=None, max_examples=60)
@given(lengths=lengths_of_rows, rows=st.integers(1, 5), **spread)
def test_padded_batches_have_rows_in_equal_number(lengths, rows, **keys):
    for step in zip(*list_batches(lengths, 0, rows=rows, packed=False, **keys)):
        sizes = [len(batch) for batch in step]
        assert max(sizes) <= rows and max(sizes) - min(sizes) <= 1


def test_lengths_are_those_of_the_rows_as_selected():
    rows = Dataset.from_dict({"input_ids": [[1], [1, 2, 3], [1, 2]], "labels": [[1], [1, 2, 3], [1, 2]]})
    assert count_row_tokens(rows.select([2, 1])).tolist() == [2, 3]


def test_computed_tokens_are_those_of_the_rows_tree():
    rows = Dataset.from_dict({"input_ids": [[1, 2, 1, 2, 3], [1, 2]], "computed_tokens": [3, 2]})
    assert count_row_tokens(rows, share_prefixes=True).tolist() == [3, 2]
    assert count_row_tokens(rows).tolist() == [5, 2]
    assert count_row_tokens(rows.remove_columns("computed_tokens"), share_prefixes=True).tolist() == [5, 2]


@pytest.mark.parametrize("collate", [PaddingCollator(0), pack_rows], ids=["padded", "packed"])
@pytest.mark.parametrize("workers", [0, 1])
def test_the_loader_reads_an_empty_batch_as_two_tokens_without_a_target(collate, workers):
    rows = Dataset.from_dict({"input_ids": [[1, 2, 3]], "labels": [[2, 3, IGNORED]]})
    sampler = StepBatchSampler([3], seed=0, rows=1, processes=2, process=1)
    [batch] = EpochDataLoader(rows, batch_sampler=sampler, collate_fn=collate, num_workers=workers)
    assert (batch["shift_labels"] == IGNORED).all()
    assert batch.get("attention_mask", torch.ones_like(batch["input_ids"])).sum() == 2
    assert batch["target_counts"].tolist() == [0] and batch.get("token_counts", torch.tensor([2])).tolist() == [2]


@pytest.mark.parametrize("workers", [0, 1])
def test_the_loader_collates_each_micro_batch_of_a_budget(workers):
    ids = [[1, 2, 3], [4, 5, 6, 7], [1, 2], [8, 9, 10, 11]]
    rows = Dataset.from_dict({"input_ids": ids, "labels": [[*row[1:], IGNORED] for row in ids]})
    sampler = StepBatchSampler(count_row_tokens(rows), seed=0, rows=4, tokens=8)
    [batch] = EpochDataLoader(rows, batch_sampler=sampler, collate_fn=pack_rows, num_workers=workers)
    [step] = list(sampler)
    assert len(step) == 2
    for micro_batch, indices in zip(batch[MICRO_BATCHES], step, strict=True):
        expected = pack_rows([rows[index] for index in indices])
        assert torch.equal(micro_batch["input_ids"], expected["input_ids"])
        assert torch.equal(micro_batch["shift_labels"], expected["shift_labels"])
    assert sorted(batch["shift_labels"][0].tolist()) == sorted(token for row in ids for token in row[1:])
    assert batch["input_ids"].shape == (1, sum(part["input_ids"].shape[1] for part in batch[MICRO_BATCHES]))
    sampler.tokens = 100
    [batch] = EpochDataLoader(rows, batch_sampler=sampler, collate_fn=pack_rows)
    assert MICRO_BATCHES not in batch, "one micro-batch is the batch itself"


def test_the_loader_hands_the_epoch_on():
    sampler = StepBatchSampler([1] * 20, seed=0, rows=20)
    loader = EpochDataLoader(range(20), batch_sampler=sampler, collate_fn=list)
    first = next(iter(loader))
    loader.set_epoch(1)
    assert next(iter(loader)) != first == sampler.shuffle_rows(0).tolist()
