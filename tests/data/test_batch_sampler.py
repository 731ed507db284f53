"""Steps and micro-batches: every row once an epoch, the same steps on any number of processes, budgets and balance."""

import math
from itertools import pairwise

import pytest
import torch
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st

from sft_pipeline.data.batch_sampler import EpochDataLoader, StepBatchSampler, count_row_tokens, divide_rows
from sft_pipeline.data.packing import pack_best_fit, pack_rows
from sft_pipeline.data.padding import PaddingCollator
from sft_pipeline.utils.constants import IGNORED

lengths_of_rows = st.lists(st.integers(1, 30), min_size=1, max_size=60)
counted = st.fixed_dictionaries({"rows": st.integers(1, 5), "packed": st.booleans()})
budgeted = st.fixed_dictionaries({"rows": st.just(1), "tokens": st.integers(30, 90), "epochs": st.integers(1, 3)})
modes = st.one_of(counted, budgeted)
spread = {"accumulation": st.integers(1, 4), "processes": st.integers(1, 3), "seed": st.integers(0, 5)}


def list_batches(lengths, epoch, processes=1, **keys) -> list[list[list[int]]]:
    """Return the micro-batches of each process."""
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
    shares = list_batches(lengths, epoch % mode.get("epochs", 3), **mode, **keys)
    assert sorted(row for share in shares for batch in share for row in batch) == list(range(len(lengths)))
    assert len({len(share) for share in shares}) == 1, "all processes run as many forward passes"
    for batches in zip(*shares):
        assert any(batches) or "tokens" in mode, "no forward pass in which all processes have no rows"


@settings(deadline=None, max_examples=150)
@given(
    lengths=lengths_of_rows, mode=modes, seed=st.integers(0, 5), epoch=st.integers(0, 2), processes=st.integers(1, 3)
)
def test_the_rows_of_a_step_are_the_same_for_any_spread(lengths, mode, seed, epoch, processes):
    """Six micro-batches a step, or of six times `rows` rows."""
    if "tokens" in mode:
        spreads = [(6, 1, 1), (3, 2, 1), (2, 3, 1), (1, 6, 1)]
    else:
        spreads = [(6, 1, 1), (1, 2, 3), (2, 3, 1), (1, 1, 6), (6 // processes, processes, 1)]
    sampler = StepBatchSampler(lengths, seed=seed, **mode | {"accumulation": 6})
    assert [row for step in sampler.split_epoch(epoch) for row in step] == sampler.shuffle_rows(epoch).tolist()
    for accumulation, process_count, times in spreads:
        keys = mode | {"rows": mode["rows"] * times, "accumulation": accumulation, "seed": seed}
        steps = group_into_steps(list_batches(lengths, epoch, process_count, **keys), accumulation)
        assert steps == [set(step) for step in sampler.split_epoch(epoch)]


@settings(deadline=None, max_examples=150)
@given(lengths=lengths_of_rows, mode=budgeted, **spread)
def test_a_budget_holds_and_every_epoch_has_as_many_steps(lengths, mode, **keys):
    for epoch in range(mode["epochs"]):
        [batches] = list_batches(lengths, epoch, **mode, **keys | {"processes": 1})
        assert all(sum(lengths[row] for row in batch) <= mode["tokens"] for batch in batches)
    sampler = StepBatchSampler(lengths, **mode, **keys)
    needed = [len(sampler._split_by_tokens(epoch)) for epoch in range(mode["epochs"])]
    assert {len(sampler.split_epoch(epoch)) for epoch in range(mode["epochs"])} == {max(needed)}
    assert len(sampler) == max(needed) * keys["accumulation"]


@settings(deadline=None, max_examples=60)
@given(lengths=lengths_of_rows, mode=budgeted, max_steps=st.integers(1, 40))
def test_a_budget_plans_for_all_epochs_that_max_steps_reach(lengths, mode, max_steps):
    sampler = StepBatchSampler(lengths, seed=0, max_steps=max_steps, **mode)
    for epoch in range(math.ceil(max_steps / len(sampler))):
        assert len(sampler.split_epoch(epoch)) == len(sampler)


def test_a_budgets_steps_are_full():
    """None could have the next one's first row too."""
    lengths = [(7 * row) % 23 + 5 for row in range(500)]
    steps = StepBatchSampler(lengths, seed=1, rows=1, accumulation=4, tokens=64).split_epoch(0)
    for step, following in pairwise(steps):
        assert len(pack_best_fit([lengths[row] for row in [*step, following[0]]], 64)) > 4
    assert sum(lengths) / (len(steps) * 4 * 64) > 0.9


def test_a_row_above_the_budget_is_a_batch_alone():
    [batches] = list_batches([5, 50, 5, 5], 0, seed=0, rows=1, tokens=10)
    assert [1] in batches and all(sum([5, 50, 5, 5][row] for row in batch) <= 10 for batch in batches if batch != [1])


@settings(deadline=None, max_examples=100)
@given(lengths=lengths_of_rows, mode=modes, epoch=st.integers(0, 2), **spread)
def test_equal_seeds_give_equal_batches(lengths, mode, epoch, **keys):
    epoch %= mode.get("epochs", 3)
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
def test_the_loader_reads_an_empty_batch_as_one_token_without_a_target(collate, workers):
    rows = Dataset.from_dict({"input_ids": [[1, 2, 3]], "labels": [[2, 3, IGNORED]]})
    sampler = StepBatchSampler([3], seed=0, rows=1, processes=2, process=1)
    [batch] = EpochDataLoader(rows, batch_sampler=sampler, collate_fn=collate, num_workers=workers)
    assert (batch["shift_labels"] == IGNORED).all()
    assert batch.get("attention_mask", batch["input_ids"].new_ones(1)).sum() == 1
    assert batch["target_counts"].tolist() == [0] and batch.get("token_counts", torch.tensor([1])).tolist() == [1]


def test_the_loader_hands_the_epoch_on():
    sampler = StepBatchSampler([1] * 20, seed=0, rows=20)
    loader = EpochDataLoader(range(20), batch_sampler=sampler, collate_fn=list)
    first = next(iter(loader))
    loader.set_epoch(1)
    assert next(iter(loader)) != first == sampler.shuffle_rows(0).tolist()
