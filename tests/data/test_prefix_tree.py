"""The tree of shared prefixes: every sequence is a path of it, shared tokens are there once, and order is fixed."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.trees import build_visibility

from sft_pipeline.data import prefix_tree
from sft_pipeline.data.prefix_tree import build_prefix_tree, count_tree_tokens

vectors = st.lists(st.lists(st.integers(0, 1), min_size=1, max_size=14).map(np.array), min_size=1, max_size=8)


def count_prefixes(sequences) -> int:
    """Count the different prefixes: the tokens of a tree that shares everything."""
    return len({tuple(ids[:length].tolist()) for ids in sequences for length in range(1, len(ids) + 1)})


@settings(deadline=None, max_examples=200)
@given(vectors, st.booleans(), st.integers(1, 5))
def test_a_token_sees_the_tokens_before_it_in_its_sequence(sequences, share, min_shared):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prefix_tree, "MIN_SHARED", min_shared)
        tree = build_prefix_tree(sequences, share)
    visible = build_visibility(tree.subtree_end)
    for ids, positions in zip(sequences, tree.positions, strict=True):
        assert tree.input_ids[positions].tolist() == ids.tolist()
        assert tree.depths[positions].tolist() == list(range(len(ids)))
        for depth, position in enumerate(positions):
            assert visible[position].nonzero()[:, 0].tolist() == positions[: depth + 1].tolist()
    assert sorted(set(np.concatenate(tree.positions))) == list(range(len(tree.input_ids))), (
        "every token is of a sequence"
    )


@settings(deadline=None, max_examples=200)
@given(vectors)
def test_every_shared_token_is_computed_once(sequences):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prefix_tree, "MIN_SHARED", 1)
        assert len(build_prefix_tree(sequences).input_ids) == count_prefixes(sequences)
        assert count_tree_tokens(sequences) == count_prefixes(sequences)


def test_a_branch_opens_only_where_enough_is_shared():
    shared, first, second = np.arange(prefix_tree.MIN_SHARED), np.arange(50, 60), np.arange(70, 75)
    sequences = [np.concatenate([shared, first]), np.concatenate([shared, second])]
    assert len(build_prefix_tree(sequences).input_ids) == len(shared) + 15
    sequences = [ids[1:] for ids in sequences]
    assert len(build_prefix_tree(sequences).input_ids) == 2 * (len(shared) - 1) + 15


def test_a_rewritten_conversation_is_a_trunk_with_branches():
    """Each turn's reasoning (100 and more) is dropped from the prompts of later turns."""
    turns = [np.arange(turn * 10, turn * 10 + 6) for turn in range(3)]
    trunk = np.concatenate(turns)
    sequences = [np.concatenate([trunk[: 6 * (turn + 1)], [100 + turn] * 9]) for turn in range(3)]
    tree = build_prefix_tree(sequences)
    assert tree.input_ids.tolist() == [*trunk, *[102] * 9, *[101] * 9, *[100] * 9], "the longest path, then the deepest"
    assert tree.depths.tolist() == [*range(18), *range(18, 27), *range(12, 21), *range(6, 15)]
    assert tree.subtree_end.tolist() == [45] * 6 + [36] * 6 + [27] * 6 + [27] * 9 + [36] * 9 + [45] * 9


def test_sequences_that_begin_others_or_repeat_add_no_token():
    ids = np.arange(9)
    tree = build_prefix_tree([ids[:5], ids, ids])
    assert tree.input_ids.tolist() == list(range(9))
    assert [positions.tolist() for positions in tree.positions] == [[*range(5)], [*range(9)], [*range(9)]]


def test_without_sharing_sequences_lie_side_by_side():
    tree = build_prefix_tree([np.arange(9), np.arange(10)], share=False)
    assert tree.depths.tolist() == [*range(9), *range(10)] and tree.subtree_end.tolist() == [9] * 9 + [19] * 10
