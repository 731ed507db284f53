"""Rows that are encoded already: their columns, with and without the lengths of sequences, and their account."""

import pytest
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st
from support.conversations import QUICK, build_conversation
from support.source_rows import fails
from support.templates import AGENT_TEMPLATE
from support.tiny import build_tokenizer

from sft_pipeline.data.chat_templates import build_template
from sft_pipeline.data.encode import IGNORED, Encoder, encode_dataset
from sft_pipeline.data.encoded_rows import is_encoded, load_encoded_rows

SEQUENCES = st.lists(st.lists(st.integers(0, 9), min_size=2, max_size=4), min_size=1, max_size=3)


def join(sequences):
    """An encoded row that trains every token of its sequences."""
    return {
        "input_ids": [i for ids in sequences for i in ids],
        "labels": [i for ids in sequences for i in [*ids[1:], IGNORED]],
        "sequence_lengths": [len(ids) for ids in sequences],
    }


@pytest.mark.parametrize("kind", [list, Dataset.from_list])
@QUICK
@given(st.lists(SEQUENCES, min_size=1, max_size=4))
def test_rows_of_several_sequences_are_taken_as_they_are(kind, rows):
    joined = [join(sequences) for sequences in rows]
    dataset, stats = load_encoded_rows(kind(joined), "rows")
    assert dataset.to_list() == joined
    lengths = [length for row in joined for length in row["sequence_lengths"]]
    assert (stats.rows, stats.kept, stats.sequences, stats.tokens) == (len(rows), len(rows), len(lengths), sum(lengths))
    assert stats.supervised_tokens == sum(lengths) - len(lengths)
    assert (stats.length_quantiles["least"], stats.length_quantiles["most"]) == (min(lengths), max(lengths))


def test_what_encode_dataset_returns_is_taken_with_its_account(cache):
    conversation = build_conversation(["Why?", "So.", "And?", "Yes."])
    conversation["messages"][1]["reasoning_content"] = "Hm."
    template = build_template("chat", build_tokenizer(AGENT_TEMPLATE))
    encoded, stats = encode_dataset([conversation], Encoder(template))
    dataset, same = load_encoded_rows(encoded, "rows")
    assert dataset.to_list() == encoded.to_list()
    assert stats.computed_tokens < stats.tokens and str(same) == f"{stats}".replace(
        "none\n", "none (read from the cache)\n"
    )


def test_a_row_without_lengths_is_one_sequence():
    row = join([[1, 2, 3]])
    plain = {key: row[key] for key in ("input_ids", "labels")}
    for rows in ([plain, row], [row, plain], Dataset.from_list([plain, plain])):
        dataset, stats = load_encoded_rows(rows, "rows")
        assert (stats.sequences, stats.tokens, stats.computed_tokens) == (2, 6, 6)
        assert dataset["input_ids"][:] == [[1, 2, 3]] * 2


def test_which_rows_are_encoded():
    row = join([[1, 2]])
    assert is_encoded([row]) and is_encoded(Dataset.from_list([row]))
    for other in (None, [], "rows.json", [{"input_ids": [1]}], ["x"], Dataset.from_list([{"labels": [1]}])):
        assert not is_encoded(other)


@pytest.mark.parametrize(
    "row, part",
    [
        ({"sequence_lengths": [1]}, "row 1: its sequence_lengths do not add up to its number of input_ids"),
        ({"sequence_lengths": [2, 3]}, "row 1: its sequence_lengths do not add up"),
        ({"sequence_lengths": []}, "row 1: its sequence_lengths do not add up"),
        ({"sequence_lengths": [0, 4]}, "row 1: its sequence_lengths must be 1 or more"),
        ({"sequence_lengths": [5, -1]}, "row 1: its sequence_lengths must be 1 or more"),
        ({"sequence_lengths": [2, 2], "labels": [2, 3, 4, IGNORED]}, "row 1: labels[1] is 3, not the id at 2"),
        ({"labels": [2, 4, 4, IGNORED]}, "row 1: labels[1] is 4, not the id at 2; labels must be shifted"),
        ({"labels": [2]}, "row 1: has 4 input_ids and 1 labels; give as many labels as ids, at least one"),
    ],
)
@pytest.mark.parametrize("kind", [list, Dataset.from_list])
def test_bad_rows_are_named(kind, row, part):
    good = join([[1, 2, 3, 4]])
    fails(lambda: load_encoded_rows(kind([good, good | row, good]), "rows"), f"rows {part}")


def test_rows_in_memory_that_lack_a_column_or_a_target():
    good = join([[1, 2]])
    fails(
        lambda: load_encoded_rows([good, {"input_ids": [1]}], "rows"), "rows row 1: missing 'labels', which the first"
    )
    untrained = good | {"labels": [IGNORED] * 2}
    fails(
        lambda: load_encoded_rows([untrained], "rows"), "rows: no row has a supervised token (a label other than -100)"
    )
