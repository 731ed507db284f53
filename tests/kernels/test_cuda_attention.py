"""The attention of CUDA as far as a CPU shows it: masks, blocks, types, dispatch, FlexAttention's forward pass.

torch has no backward pass of FlexAttention on the CPU, and no variable-length attention, for which a dense emulation of
the same arguments stands here.
"""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.causal_models import tiny
from support.compiling import CountingBackend
from support.trees import build_row, build_visibility, rows_of_sequences
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from transformers import Gemma3TextConfig, LlamaConfig

from sft_pipeline.data.packing import pack_rows
from sft_pipeline.data.padding import PaddingCollator
from sft_pipeline.data.prefix_tree import build_prefix_tree
from sft_pipeline.kernels import cuda_attention
from sft_pipeline.kernels.cpu_attention import build_attention_tree, compute_attention
from sft_pipeline.kernels.cuda_attention import attend_flex, attend_varlen, build_flex_mask, can_use_varlen
from sft_pipeline.model import packed_attention
from sft_pipeline.model.loss_forward import patch_loss_forward
from sft_pipeline.model.packed_attention import compute_check_states, use_packed_attention

CPU = torch.device("cpu")


@st.composite
def long_trees(draw):
    """Lengths about the size of a block of scores: shared or not, and a line that is seldom a multiple of it."""
    trunk = np.arange(draw(st.integers(0, 400)))
    cuts = draw(st.lists(st.tuples(st.integers(0, 400), st.integers(1, 200)), min_size=1, max_size=6))
    tails = [np.arange(length) + 1000 * (index + 1) for index, (_, length) in enumerate(cuts)]
    return build_prefix_tree([np.concatenate([trunk[:cut], tail]) for (cut, _), tail in zip(cuts, tails)])


@settings(deadline=None, max_examples=30)
@given(long_trees(), st.sampled_from([None, 1, 100, 128, 300]))
def test_the_blocks_of_flex_attention_are_those_of_the_dense_mask(tree, window):
    """torch's own `create_block_mask` evaluates every pair; ours are computed from the tree alone.

    A window leaves some blocks without a visible pair that ours have still: their bounds are those of all depths.
    """
    attention_tree, device = build_attention_tree(tree.subtree_end), torch.device("cpu")
    mask = build_flex_mask(attention_tree, device, window)
    index, num_tokens = torch.arange(len(tree.subtree_end)), len(tree.subtree_end)
    visible = build_visibility(tree.subtree_end)
    if window is not None:
        depths = torch.from_numpy(tree.depths)
        visible &= depths[:, None] - depths[None] < window
    assert torch.equal(mask.mask_mod(0, 0, index[:, None], index[None]), visible)
    expected = create_block_mask(mask.mask_mod, None, None, num_tokens, num_tokens, device="cpu")
    assert mask.seq_lengths == expected.seq_lengths
    for name in ("kv", "full_kv", "q", "full_q"):
        lists = f"{name}_num_blocks", f"{name}_indices"
        assert all(getattr(mask, name).is_contiguous() and getattr(mask, name).dtype == torch.int32 for name in lists)
        counts, indices = (getattr(mask, name)[0, 0] for name in lists)
        expected_counts, expected_indices = (getattr(expected, name)[0, 0] for name in lists)
        for row, (count, expected_count) in enumerate(zip(counts, expected_counts)):
            blocks, expected_blocks = indices[row, :count], expected_indices[row, :expected_count]
            assert set(blocks.tolist()) >= set(expected_blocks.tolist())
            if window is None or name.startswith("full"):
                assert torch.equal(blocks, expected_blocks)
    assert build_flex_mask(attention_tree, device, window) is mask, "made once for all layers"


@pytest.fixture
def backend(monkeypatch):
    """FlexAttention compiled on the CPU, anew for each test."""
    torch.compiler.reset()
    backend = CountingBackend()
    compiled = torch.compile(flex_attention, dynamic=True, backend=backend)
    monkeypatch.setattr(cuda_attention, "compile_flex_attention", lambda: compiled)
    yield backend
    torch.compiler.reset()


@pytest.fixture
def cuda(monkeypatch):
    """The dispatch of CUDA, for batches of any size."""
    monkeypatch.setattr(packed_attention, "runs_on_cuda", lambda device: True)
    monkeypatch.setattr(packed_attention, "FLEX_BLOCK", 1)
    monkeypatch.setattr(cuda_attention, "find_varlen_attention", lambda device: None)


def draw_heads(num_tokens, num_heads, num_kv_heads, seed):
    """Random queries, keys and values (1, heads, tokens, head size)."""
    random = torch.Generator().manual_seed(seed)
    return [
        torch.randn(1, heads, num_tokens, 16, generator=random) for heads in (num_heads, num_kv_heads, num_kv_heads)
    ]


def build_layouts():
    """Trees of a dozen layouts: alone, side by side, shared at several depths, of 130 to 900 tokens."""
    random = np.random.default_rng(0)
    for count in (1, 2, 5, 1, 9, 3, 2, 7, 4, 1, 6, 3):
        trunk = np.arange(random.integers(0, 120))
        tails = [random.integers(200, 900, random.integers(70, 150)) for _ in range(count + 1)]
        yield build_prefix_tree([np.concatenate([trunk[: random.integers(0, len(trunk) + 1)], tail]) for tail in tails])


@pytest.mark.parametrize("window", [None, 50])
def test_flex_attention_is_the_block_attention_and_compiles_early(backend, window):
    counts = []
    for seed, tree in enumerate(build_layouts()):
        tree = build_attention_tree(tree.subtree_end)
        heads = draw_heads(len(tree.depths), 4, 2, seed)
        output = attend_flex(*heads, tree, 0.2, window)
        torch.testing.assert_close(output, compute_attention(*heads, tree, 0.2, window), rtol=1e-5, atol=1e-5)
        counts.append(backend.num_graphs)
    assert counts[-1] <= 3 and counts[2] == counts[-1], "no graph is compiled late"


def test_as_many_blocks_as_heads_have_no_kernels_of_their_own(backend):
    """torch takes equal sizes for one unless it is told: 16,384 tokens are 128 blocks, the size of many heads."""
    for num_tokens in (500, 300, 900):  # 4 blocks first, as heads
        tree = build_attention_tree(np.full(num_tokens, num_tokens))
        with torch.no_grad():
            attend_flex(*draw_heads(num_tokens, 4, 2, 0), tree, 0.2, None)
    assert backend.num_graphs == 1


@pytest.mark.parametrize("config", [LlamaConfig, Gemma3TextConfig])
def test_a_model_through_flex_attention_has_the_losses_of_the_padded_batch(config, backend, cuda):
    """With sliding and full layers in turn, as Gemma 3 has them."""
    kinds = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 4}
    model = tiny(config, **(kinds if config is Gemma3TextConfig else {}))
    patch_loss_forward(model)
    rows = [
        build_row(([5, 6, 7, 8, 9, 10, 11, 12, 13, 14], [False] * 4 + [True] * 6)),
        build_row(([5, 6, 7, 8, 9, 10, 11, 12, 20, 21, 22], [True] * 11), ([5, 6, 7, 8, 30, 31], [True] * 6)),
    ]
    expected = model(**PaddingCollator(0)(rows), return_row_losses=True).logits
    use_packed_attention(model)
    packed = pack_rows(rows)
    assert any(segment.ancestors for segment in packed["prefix_tree"].segments)
    with torch.no_grad():
        actual = model(**packed, return_row_losses=True).logits
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
    assert 1 <= backend.num_graphs <= 4


@pytest.mark.parametrize("share", [True, False])
def test_the_check_of_a_model_reaches_the_kernels_that_train(share, cuda, monkeypatch):
    """Packed lines of few tokens do not: so there are copies of its rows, and the last one is compared."""
    model, lengths = tiny(LlamaConfig), []
    use_packed_attention(model)

    def record(query, key, value, tree, *options):
        assert any(segment.ancestors for segment in tree.segments) == share
        lengths.append(query.shape[2])
        return compute_attention(query, key, value, tree, *options)

    monkeypatch.setattr(packed_attention, "FLEX_BLOCK", 128)
    monkeypatch.setattr(packed_attention, "attend_flex", record)
    with torch.no_grad():
        packed = compute_check_states(model.base_model, packed=True, share=share)
        expected = compute_check_states(model.base_model, packed=False)
    assert lengths == [140 if share else 144] * 2
    torch.testing.assert_close(packed, expected, rtol=1e-5, atol=1e-5)


def emulate_varlen(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale, window_size):
    """Dense attention for the arguments of torch's variable-length attention: (tokens, heads, head size)."""
    assert cu_seq_q is cu_seq_k and cu_seq_q.dtype == torch.int32 and max_q == max_k == cu_seq_q.diff().max()
    assert query.dtype == key.dtype == value.dtype and window_size[1] == 0
    rows = torch.bucketize(torch.arange(len(query)), cu_seq_q[1:], right=True)
    distance = torch.arange(len(query))[:, None] - torch.arange(len(query))
    visible = (rows[:, None] == rows) & (distance >= 0)
    if window_size[0] >= 0:
        visible &= distance <= window_size[0]
    heads = [t.transpose(0, 1).float() for t in (query, key, value)]
    heads[1:] = [t.repeat_interleave(len(heads[0]) // len(t), 0) for t in heads[1:]]
    output = torch.nn.functional.scaled_dot_product_attention(*heads, attn_mask=visible, scale=scale)
    return output.transpose(0, 1).to(query.dtype)


@settings(deadline=None, max_examples=25)
@given(rows_of_sequences(), st.sampled_from([None, 1, 3, 9]), st.integers(0, 99))
def test_variable_length_attention_is_called_for_rows_side_by_side(rows, window, seed):
    tree = pack_rows(rows, share_prefixes=False)["prefix_tree"]
    heads = draw_heads(len(tree.depths), 4, 2, seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cuda_attention, "find_varlen_attention", lambda device: emulate_varlen)
        output = attend_varlen(*heads, tree, 0.3, window)
    torch.testing.assert_close(output, compute_attention(*heads, tree, 0.3, window), rtol=1e-5, atol=1e-5)


def test_variable_length_attention_is_its_home_case_alone(monkeypatch):
    monkeypatch.setattr(cuda_attention, "find_varlen_attention", lambda device: emulate_varlen)
    rows = [build_row(([5, 6, 7, 8, 9], [True] * 5)), build_row(([5, 6, 7, 20], [True] * 4))]
    flat, shared = (pack_rows(rows, share)["prefix_tree"] for share in (False, True))

    def can_use(tree, dtype=torch.bfloat16, head_dim=16, value_dim=16):
        return can_use_varlen(*(torch.empty(1, 2, 9, d, dtype=dtype) for d in (head_dim, head_dim, value_dim)), tree)

    assert can_use(flat) and can_use(flat, torch.float16) and can_use(flat, head_dim=256, value_dim=256)
    assert not can_use(shared) and not can_use(flat, torch.float32) and not can_use(flat, value_dim=8)
    assert not can_use(flat, head_dim=20, value_dim=20) and not can_use(flat, head_dim=264, value_dim=264)
    monkeypatch.setattr(cuda_attention, "find_varlen_attention", lambda device: None)
    assert not can_use(flat)


@pytest.mark.parametrize("share", [True, False])
def test_autocast_gives_every_kernel_one_type(share, cuda, monkeypatch):
    """Queries and keys come in float32 from their rotation, values in 16 bits."""
    calls = []

    def record(query, key, value, *args, **kwargs):
        calls.append({query.dtype, key.dtype, value.dtype})
        return torch.zeros_like(query.transpose(1, 2) if query.dim() == 4 else query)

    monkeypatch.setattr(packed_attention, "attend_flex", record)
    monkeypatch.setattr(cuda_attention, "find_varlen_attention", lambda device: record)
    model = tiny(LlamaConfig)
    patch_loss_forward(model)
    use_packed_attention(model)
    rows = [build_row(([5, 6, 7, 8, 9], [True] * 5)), build_row(([5, 6, 7, 20], [True] * 4))]
    for dtype in (torch.bfloat16, torch.float16):
        with torch.autocast("cpu", dtype):
            model(**pack_rows(rows, share))
    assert calls == [{torch.bfloat16}] * 2 + [{torch.float16}] * 2


def test_few_tokens_and_dropout_do_not_reach_flex_attention(cuda, monkeypatch):
    """Its kernels for less than a block of tokens would be others, compiled late."""
    monkeypatch.setattr(packed_attention, "attend_flex", lambda *args: pytest.fail("called"))
    monkeypatch.setattr(packed_attention, "FLEX_BLOCK", 128)
    model = tiny(LlamaConfig)
    patch_loss_forward(model)
    use_packed_attention(model)
    rows = [build_row(([5, 6, 7, 8, 9], [True] * 5))]
    model(**pack_rows(rows))
    monkeypatch.setattr(packed_attention, "FLEX_BLOCK", 1)
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.1
    model(**pack_rows(rows))
