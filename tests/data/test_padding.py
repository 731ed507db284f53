"""Padding: to the right, by length, with the labels under both keys."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sft_pipeline.data.padding import PaddingCollator

PAD = 2
IDS = st.lists(st.integers(0, 4), min_size=1, max_size=20)  # the pad id occurs in most rows


def build_row(ids: list[int]) -> dict[str, list[int]]:
    return {"input_ids": ids, "labels": [*ids[1:], -100]}


@settings(deadline=None, max_examples=60)
@given(st.lists(IDS, min_size=1, max_size=5), st.integers(1, 9))
def test_padding_is_right_and_by_length(rows, multiple):
    batch = PaddingCollator(PAD, multiple)([build_row(ids) for ids in rows])
    longest = max(map(len, rows))
    width = batch["input_ids"].shape[1]
    assert width % multiple == 0 and longest <= width < longest + multiple
    for index, ids in enumerate(rows):
        padding = width - len(ids)
        assert batch["input_ids"][index].tolist() == ids + [PAD] * padding
        assert batch["attention_mask"][index].tolist() == [1] * len(ids) + [0] * padding
        assert batch["labels"][index].tolist() == [*ids[1:], -100] + [-100] * padding


def test_a_row_that_ends_in_the_pad_id_keeps_it():
    """The pad id is often the stop id: a mask made from ids would remove the stop token from training."""
    batch = PaddingCollator(PAD, 4)([build_row([5, PAD]), build_row([5, 6, 7])])
    assert batch["attention_mask"].tolist() == [[1, 1, 0, 0], [1, 1, 1, 0]]
    assert batch["labels"].tolist() == [[PAD, -100, -100, -100], [6, 7, -100, -100]]


def test_labels_are_one_tensor_under_both_keys():
    batch = PaddingCollator(PAD)([build_row([5, 6]), build_row([7])])
    assert batch["labels"] is batch["shift_labels"]
    assert set(batch) == {
        "input_ids", "attention_mask", "labels", "shift_labels", "target_positions", "target_counts"
    }  # fmt: skip
    assert {value.dtype for value in batch.values()} == {torch.int64}
    assert batch["labels"].shape == (2, 8)


def test_every_sequence_of_a_row_is_a_line():
    rows = [
        {"input_ids": [5, 6, 7, 5, 8], "labels": [-100, 7, -100, 8, -100], "sequence_lengths": [3, 2]},
        {"input_ids": [9, 6, 7, 4], "labels": [-100] * 4},
    ]
    batch = PaddingCollator(PAD, 1)(rows)
    assert batch["input_ids"].tolist() == [[5, 6, 7, PAD], [5, 8, PAD, PAD], [9, 6, 7, 4]]
    assert batch["labels"].tolist() == [[-100, 7, -100, -100], [8, -100, -100, -100], [-100] * 4]
    assert batch["attention_mask"].sum(1).tolist() == [3, 2, 4] and batch["target_counts"].tolist() == [2, 0]


@pytest.mark.parametrize("convert", [torch.tensor, list])
def test_rows_may_be_lists_or_tensors(convert):
    rows = [{key: convert(value) for key, value in build_row([5, 6, 7]).items()}]
    assert PaddingCollator(PAD, 1)(rows)["input_ids"].tolist() == [[5, 6, 7]]


def test_transformers_counts_every_target_and_shifts_nothing(tiny_model):
    """transformers' loss predicts `labels[t]` at position t."""
    rows = [build_row([5, 6, 7, 8, 9]), build_row([10, 11, 12])]
    batch = PaddingCollator(PAD)(rows)
    tiny_model.eval()
    with torch.no_grad():
        loss = tiny_model(**batch).loss
        sums = []
        for columns in rows:
            logits = tiny_model(torch.tensor([columns["input_ids"]])).logits[0, :-1]
            targets = torch.tensor(columns["input_ids"][1:])
            sums.append(torch.nn.functional.cross_entropy(logits, targets, reduction="sum"))
    assert loss.item() == pytest.approx(sum(sums).item() / 6, rel=1e-6)
