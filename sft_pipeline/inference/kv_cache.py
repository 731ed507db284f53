"""Key-value cache of a batch of sequences, and attention over it.

Each sequence occupies a slot of the cache. The key and value of the token at position p of the sequence in slot s are
stored in cell (s, p), whatever the lengths of the other sequences. A query at position p attends to cells 0..p of its
own slot, so that unused cells to the right of a sequence are never attended to. A forward pass takes one flat row with
the new tokens of all slots, concatenated: prefill and decoding share it, and the model computes no padding.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate, groupby
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from sft_pipeline.utils.errors import SFTError

# Slots with at most this many new tokens are attended to together, padded to the largest count among them.
MAX_GROUPED_TOKENS = 4
UNSUPPORTED_ARGUMENTS = ("softcap", "s_aux", "position_bias")  # of attention: they change its result


@dataclass(frozen=True)
class SlotGroup:
    """Slots whose new tokens are attended to in one call.

    Either one slot with many new tokens, or adjacent slots with at most MAX_GROUPED_TOKENS new tokens each, `width` for
    the slot with the most. Where the counts differ, `pad_index` (slots x width,) pads the group's tokens to `width` per
    slot by repeating each slot's last one, and `unpad_index` (tokens,) selects the group's tokens from the padded ones.
    """

    slots: slice
    tokens: slice
    length: int  # the largest number of cells that a token of the group attends to
    width: int
    pad_index: Tensor | None = None
    unpad_index: Tensor | None = None


@dataclass
class ForwardPlan:
    """Where the new tokens of a forward pass go in the cache: the slot and the position of each, (tokens,).

    `masks` and `cell_indices` are computed by the first layer that needs them and reused by the others.
    """

    slots: Tensor
    positions: Tensor
    groups: list[SlotGroup]
    # By the group's first token and the sliding window.
    masks: dict[tuple[int, int | None], Tensor | None] = field(default_factory=dict)
    cell_indices: dict[int, Tensor] = field(default_factory=dict)  # by number of heads


def compute_bytes_per_token(
    layers: int, key_value_heads: int, head_dim: int, dtype: torch.dtype = torch.float32
) -> int:
    """Return the bytes that one token takes in the cache: a key and a value per layer. SmolLM2-135M in fp32: 46,080."""
    return 2 * layers * key_value_heads * head_dim * dtype.itemsize


class KVCache:
    """Keys and values of `slots` sequences: per layer two tensors (slots, key-value heads, capacity, head size).

    A layer's tensors are allocated when it first attends, with the dtype and the head count of its keys and values, and
    grow by doubling. A slot takes `capacity` times `compute_bytes_per_token` bytes; `capacity` is at most twice the
    length of the longest sequence so far, and at least 64.
    """

    def __init__(self, slots: int) -> None:
        self.slots = slots
        self.capacity = 0
        self.layers: dict[int, list[Tensor]] = {}
        self.plan: ForwardPlan  # of the current forward pass; set by `prepare`

    def prepare(self, past: Sequence[int], new: Sequence[int], device: torch.device) -> ForwardPlan:
        """Plan a forward pass that adds `new[s]` >= 1 tokens to slot s, which holds `past[s]` tokens.

        Slots 0 to len(new) - 1 are in use.
        """
        self._grow(max(p + n for p, n in zip(past, new)))
        slots = [slot for slot, n in enumerate(new) for _ in range(n)]
        positions = [p + i for p, n in zip(past, new) for i in range(n)]
        groups = _group_slots(past, new, device)
        self.plan = ForwardPlan(torch.tensor(slots, device=device), torch.tensor(positions, device=device), groups)
        return self.plan

    def attend(
        self,
        module: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        scaling: float | None = None,
        sliding_window: int | None = None,
        **kwargs: object,
    ) -> tuple[Tensor, None]:
        """Write the new keys and values to the cache and attend, as planned by `prepare`.

        An attention function for transformers' attention interface. `query` is (1, heads, tokens, head size), `key` and
        `value` are (1, key-value heads, tokens, head size). Returns (1, tokens, heads, head size). Raises SFTError for
        attention other than scaled causal dot-product attention, with or without a sliding window.
        """
        unsupported = [name for name in UNSUPPORTED_ARGUMENTS if kwargs.get(name) is not None]
        if unsupported or kwargs.get("is_causal") is False:
            raise SFTError(
                f"{type(module).__name__}: generation does not support attention with "
                f"{unsupported or 'is_causal=False'}; use transformers' generate instead"
            )
        keys, values = self._write(module.layer_idx, key, value)
        outputs = [self._attend(group, query, keys, values, scaling, sliding_window) for group in self.plan.groups]
        return (outputs[0] if len(outputs) == 1 else torch.cat(outputs))[None], None

    def copy_prefix(self, length: int) -> None:
        """Copy the first `length` cells of slot 0 to all slots.

        They stay valid when a slot is reused, as each sequence starts with this prefix and writes after it.
        """
        for tensor in self._list_tensors():
            tensor[1:, :, :length] = tensor[:1, :, :length]

    def copy_slot(self, source: int, target: int, length: int) -> None:
        """Copy the first `length` cells of slot `source` to slot `target`."""
        for tensor in self._list_tensors():
            tensor[target, :, :length] = tensor[source, :, :length]

    def _list_tensors(self) -> list[Tensor]:
        return [tensor for pair in self.layers.values() for tensor in pair]

    def _grow(self, length: int) -> None:
        """Extend the capacity to at least `length` cells per slot."""
        if length <= self.capacity:
            return
        old_capacity, self.capacity = self.capacity, max(2 * self.capacity, -(-length // 64) * 64)
        for pair in self.layers.values():
            for i, tensor in enumerate(pair):
                pair[i] = self._allocate(tensor)
                pair[i][:, :, :old_capacity] = tensor

    def _allocate(self, like: Tensor) -> Tensor:
        # Zeros, not uninitialized memory: a masked cell has weight 0, and 0 times NaN would be NaN.
        return like.new_zeros(self.slots, like.shape[1], self.capacity, like.shape[3])

    def _write(self, layer: int, key: Tensor, value: Tensor) -> list[Tensor]:
        """Write the new tokens' keys and values, (1, heads, tokens, head size); return the layer's two tensors."""
        if layer not in self.layers:
            self.layers[layer] = [self._allocate(new) for new in (key, value)]
        for tensor, new in zip(self.layers[layer], (key, value)):
            tensor.flatten(0, 2).index_copy_(0, self._get_cell_indices(new.shape[1]), new.flatten(0, 2))
        return self.layers[layer]

    def _get_cell_indices(self, heads: int) -> Tensor:
        """Return the indices of the new tokens' cells in a layer's tensor flattened to (cells, head size).

        The result is (heads x tokens,), with the tokens of a head adjacent.
        """
        plan = self.plan
        if heads not in plan.cell_indices:
            head = torch.arange(heads, device=plan.slots.device)[:, None]
            plan.cell_indices[heads] = ((plan.slots * heads + head) * self.capacity + plan.positions).flatten()
        return plan.cell_indices[heads]

    def _attend(
        self, group: SlotGroup, query: Tensor, keys: Tensor, values: Tensor, scaling: float | None, window: int | None
    ) -> Tensor:
        """Return the attention output of one group, (tokens, heads, head size).

        Query heads that share a key-value head are grouped in a dimension of their own, so that keys and values are
        not repeated.
        """
        query = query[0, :, group.tokens]
        heads, _, size = query.shape
        scaling = size**-0.5 if scaling is None else scaling
        keys, values = keys[group.slots, :, : group.length], values[group.slots, :, : group.length]
        mask, kv_heads = self._get_mask(group, window), keys.shape[1]
        if group.width <= MAX_GROUPED_TOKENS:
            query = query if group.pad_index is None else query[:, group.pad_index]
            query = query.view(kv_heads, heads // kv_heads, -1, group.width, size).permute(2, 0, 1, 3, 4)
            output = _attend_few(query * scaling, keys, values, mask).permute(0, 3, 1, 2, 4).reshape(-1, heads, size)
            return output if group.unpad_index is None else output[group.unpad_index]
        query = query.view(kv_heads, heads // kv_heads, -1, size)  # the key-value heads are the batch dimension
        keys, values = (x[0, :, None].expand(-1, query.shape[1], -1, -1) for x in (keys, values))
        return scaled_dot_product_attention(query, keys, values, mask, scale=scaling).flatten(0, 1).transpose(0, 1)

    def _get_mask(self, group: SlotGroup, window: int | None) -> Tensor | None:
        """Return the additive attention mask: 0 for cells a token attends to, -inf for the others.

        None if every token of the group attends to all cells up to `group.length`.
        """
        key = (group.tokens.start, window)
        if key not in self.plan.masks:
            position = self.plan.positions[group.tokens, None]
            position = position if group.pad_index is None else position[group.pad_index]
            cell = torch.arange(group.length, device=position.device)
            hidden = cell > position if window is None else (cell > position) | (cell <= position - window)
            few = group.width <= MAX_GROUPED_TOKENS
            shape = (-1, 1, 1, group.width, group.length) if few else (1, 1, -1, group.length)
            dtype = self._list_tensors()[0].dtype
            mask = torch.zeros(hidden.shape, device=hidden.device, dtype=dtype).masked_fill_(hidden, -torch.inf)
            self.plan.masks[key] = mask.view(shape) if bool(hidden.any()) else None
        return self.plan.masks[key]


def _attend_few(query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
    """Return the attention output of few tokens per slot; `query` is already scaled.

    `query` and the result are (slots, key-value heads, query heads per key-value head, tokens per slot, head size).
    Plain matrix products take half the time of scaled_dot_product_attention here on the CPU, as that is optimized for
    many queries.
    """
    scores = query.flatten(2, 3) @ keys.transpose(-1, -2)
    if mask is not None:
        scores = scores.unflatten(2, query.shape[2:4]).add_(mask).flatten(2, 3)
    return (scores.softmax(-1, dtype=torch.float32).to(values.dtype) @ values).view(query.shape)


def _group_slots(past: Sequence[int], new: Sequence[int], device: torch.device) -> list[SlotGroup]:
    """Split the slots into groups, in order.

    Adjacent slots with at most MAX_GROUPED_TOKENS new tokens form a group; a slot with more is a group alone.
    """
    starts = list(accumulate(new, initial=0))
    runs = groupby(range(len(new)), key=lambda slot: -1 if new[slot] <= MAX_GROUPED_TOKENS else slot)
    groups = []
    for _, run in runs:
        slots = list(run)
        first, last = slots[0], slots[-1] + 1
        length = max(past[slot] + new[slot] for slot in slots)
        counts = new[first:last]
        padding = (None, None) if len(set(counts)) == 1 else _build_pad_indices(counts, device)
        groups.append(SlotGroup(slice(first, last), slice(starts[first], starts[last]), length, max(counts), *padding))
    return groups


def _build_pad_indices(counts: Sequence[int], device: torch.device) -> tuple[Tensor, Tensor]:
    """Return `pad_index` and `unpad_index` of a SlotGroup whose slots have `counts` new tokens."""
    width, ends = max(counts), accumulate(counts)
    pad_index = [end - n + min(i, n - 1) for end, n in zip(ends, counts) for i in range(width)]
    unpad_index = [slot * width + i for slot, n in enumerate(counts) for i in range(n)]
    return torch.tensor(pad_index, device=device), torch.tensor(unpad_index, device=device)
