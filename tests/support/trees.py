"""Random rows of several sequences that share prefixes, and the batch of their tree beside the padded one."""

import numpy as np
import torch
from hypothesis import strategies as st

IGNORED = -100


def build_row(*sequences: tuple[list[int], list[bool]]) -> dict[str, list[int]]:
    """Build an encoded row from pairs of ids and whether each is supervised; labels are shifted as in encode.py."""
    labels = [
        [token if trained else IGNORED for token, trained in zip(ids[1:], is_trained[1:])] + [IGNORED]
        for ids, is_trained in sequences
    ]
    return {
        "input_ids": [token for ids, _ in sequences for token in ids],
        "labels": [label for line in labels for label in line],
        "sequence_lengths": [len(ids) for ids, _ in sequences],
    }


# Few different ids, so that sequences repeat, begin one another and part anywhere, also within supervised spans.
sequences = st.lists(st.integers(0, 2), min_size=1, max_size=16).flatmap(
    lambda ids: st.tuples(st.just(ids), st.lists(st.booleans(), min_size=len(ids), max_size=len(ids)))
)
trunks = st.lists(st.integers(0, 9), max_size=12)


@st.composite
def rows_of_sequences(draw) -> list[dict[str, list[int]]]:
    """Some rows of one to three sequences, of which about half begin with the same tokens."""
    trunk, rows = draw(trunks), []
    for _ in range(draw(st.integers(1, 4))):
        row = []
        for ids, is_trained in draw(st.lists(sequences, min_size=1, max_size=3)):
            start = trunk[: draw(st.integers(0, len(trunk)))]
            row.append((start + ids, [False] * len(start) + is_trained))
        rows.append(build_row(*row))
    return rows


def build_visibility(subtree_end) -> torch.Tensor:
    """Build the dense mask (queries, keys) of a tree."""
    index = torch.arange(len(subtree_end))
    return (index[None] <= index[:, None]) & (index[:, None] < torch.as_tensor(subtree_end)[None])


def split_ids(rows) -> list[np.ndarray]:
    """Return the ids of every sequence of the rows."""
    return [
        ids for row in rows for ids in np.split(np.array(row["input_ids"]), np.cumsum(row["sequence_lengths"])[:-1])
    ]
