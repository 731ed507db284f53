"""The key-value cache of a batch of rows, and attention over it.

Rows are right-padded: the token at position p of the row in slot s lies in cell (s, p), whatever the other rows'
lengths, and a query at position p attends to cells 0..p of its own slot, so that nothing to the right of a row is ever
attended to. A forward takes one flat row with the new tokens of all slots, one after the other: prompts being read and
answers being written share it, and no padding is computed.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate, groupby
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from sft_pipeline.utils.errors import SFTError

FEW = 4  # new tokens of a slot that is attended to beside others, as many queries a slot as the busiest of them has
UNSERVED = ("softcap", "s_aux", "position_bias")  # they change what attention computes, and are not computed here


@dataclass(frozen=True)
class SlotGroup:
    """Tokens attended to at once: one slot with many new tokens, or neighbouring slots with `width` <= FEW new tokens
    each; where they have unequally many, `padded` gives each slot `width` of the group's tokens by repeating its last,
    (slots x width,), and `real` finds the group's tokens among these."""

    slots: slice
    tokens: slice
    length: int  # cells of a slot that some token of the group attends to
    width: int
    padded: Tensor | None = None
    real: Tensor | None = None


@dataclass
class ForwardPlan:
    """What a forward adds to the cache: per token its slot and its position in the slot's row, (tokens,)."""

    slots: Tensor
    positions: Tensor
    groups: list[SlotGroup]
    masks: dict[tuple[int, int | None], Tensor | None] = field(default_factory=dict)  # by group and sliding window
    cells: dict[int, Tensor] = field(default_factory=dict)  # by number of heads


def compute_bytes_per_token(
    layers: int, key_value_heads: int, head_dim: int, dtype: torch.dtype = torch.float32
) -> int:
    """Memory of one cell over all layers, in bytes: a key and a value a layer. SmolLM2-135M in fp32: 46,080."""
    return 2 * layers * key_value_heads * head_dim * dtype.itemsize


class KVCache:
    """Keys and values of `slots` rows, each (slots, key-value heads, capacity, head size), a pair a layer.

    Allocated at a layer's first use from what the layer brings, grown by doubling. A row in use takes `capacity` times
    `compute_bytes_per_token` bytes, capacity being the longest row's length rounded up by at most that doubling.
    """

    def __init__(self, slots: int) -> None:
        self.slots = slots
        self.capacity = 0
        self.layers: dict[int, list[Tensor]] = {}
        self.plan: ForwardPlan  # of the forward pass, from `prepare` on

    def prepare(self, past: Sequence[int], new: Sequence[int], device: torch.device) -> ForwardPlan:
        """Plan a forward that adds `new[s]` >= 1 tokens to slot s, which holds `past[s]`. Slots are filled from 0."""
        self._grow(max(p + n for p, n in zip(past, new)))
        slots = [slot for slot, n in enumerate(new) for _ in range(n)]
        positions = [p + i for p, n in zip(past, new) for i in range(n)]
        groups = _group(past, new, device)
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
        """transformers' attention interface: writes the new keys and values, then attends, by the plan of this forward.

        `query` is (1, heads, tokens, head size), `key` and `value` have their own fewer heads. Returns (1, tokens,
        heads, head size). Raises SFTError for attention that is more than a scaled, causal, possibly windowed product.
        """
        unserved = [name for name in UNSERVED if kwargs.get(name) is not None]
        if unserved or kwargs.get("is_causal") is False:
            raise SFTError(
                f"{type(module).__name__}: generation does not serve attention with {unserved or 'is_causal=False'}"
            )
        keys, values = self._write(module.layer_idx, key, value)
        outputs = [self._attend(group, query, keys, values, scaling, sliding_window) for group in self.plan.groups]
        return (outputs[0] if len(outputs) == 1 else torch.cat(outputs))[None], None

    def share(self, length: int) -> None:
        """Copy the first `length` cells of slot 0 to all slots. They stay: rows that follow write behind them."""
        for tensor in self._tensors():
            tensor[1:, :, :length] = tensor[:1, :, :length]

    def move(self, source: int, target: int, length: int) -> None:
        """Copy the row of `length` cells in slot `source` to slot `target`."""
        for tensor in self._tensors():
            tensor[target, :, :length] = tensor[source, :, :length]

    def _tensors(self) -> list[Tensor]:
        return [tensor for pair in self.layers.values() for tensor in pair]

    def _grow(self, length: int) -> None:
        if length <= self.capacity:
            return
        old, self.capacity = self.capacity, max(2 * self.capacity, -(-length // 64) * 64)
        for pair in self.layers.values():
            for i, tensor in enumerate(pair):
                pair[i] = self._allocate(tensor)
                pair[i][:, :, :old] = tensor

    def _allocate(self, like: Tensor) -> Tensor:
        """Zeros, not whatever memory holds: a masked cell has weight 0, and 0 times NaN would be NaN."""
        return like.new_zeros(self.slots, like.shape[1], self.capacity, like.shape[3])

    def _write(self, layer: int, key: Tensor, value: Tensor) -> list[Tensor]:
        """Put the new tokens' keys and values, (1, heads, tokens, head size), in their cells."""
        if layer not in self.layers:
            self.layers[layer] = [self._allocate(new) for new in (key, value)]
        for tensor, new in zip(self.layers[layer], (key, value)):
            tensor.flatten(0, 2).index_copy_(0, self._cells(new.shape[1]), new.flatten(0, 2))
        return self.layers[layer]

    def _cells(self, heads: int) -> Tensor:
        """Where each head of each new token lies in a layer's tensor of flat cells, (heads x tokens,)."""
        if heads not in self.plan.cells:
            head = torch.arange(heads, device=self.plan.slots.device)[:, None]
            self.plan.cells[heads] = ((self.plan.slots * heads + head) * self.capacity + self.plan.positions).flatten()
        return self.plan.cells[heads]

    def _attend(
        self, group: SlotGroup, query: Tensor, keys: Tensor, values: Tensor, scaling: float | None, window: int | None
    ) -> Tensor:
        """Attention of one group, (tokens, heads, head size).

        Query heads that share a key-value head are laid out beside each other, so that keys and values are not
        repeated.
        """
        query = query[0, :, group.tokens]
        heads, _, size = query.shape
        scaling = size**-0.5 if scaling is None else scaling
        keys, values = keys[group.slots, :, : group.length], values[group.slots, :, : group.length]
        mask, shared = self._mask(group, window), keys.shape[1]
        if group.width <= FEW:
            query = query if group.padded is None else query[:, group.padded]
            query = query.view(shared, heads // shared, -1, group.width, size).permute(2, 0, 1, 3, 4)
            mixed = _decode(query * scaling, keys, values, mask).permute(0, 3, 1, 2, 4).reshape(-1, heads, size)
            return mixed if group.real is None else mixed[group.real]
        query = query.view(shared, heads // shared, -1, size)  # each key-value head is a batch of its own
        keys, values = (x[0, :, None].expand(-1, query.shape[1], -1, -1) for x in (keys, values))
        return scaled_dot_product_attention(query, keys, values, mask, scale=scaling).flatten(0, 1).transpose(0, 1)

    def _mask(self, group: SlotGroup, window: int | None) -> Tensor | None:
        """Added to the scores: 0 for the cells a token attends to, -inf for the others. None where it attends to
        all."""
        key = (group.tokens.start, window)
        if key not in self.plan.masks:
            position = self.plan.positions[group.tokens, None]
            position = position if group.padded is None else position[group.padded]
            cell = torch.arange(group.length, device=position.device)
            hidden = cell > position if window is None else (cell > position) | (cell <= position - window)
            shape = (-1, 1, 1, group.width, group.length) if group.width <= FEW else (1, 1, -1, group.length)
            mask = torch.zeros(hidden.shape, device=hidden.device, dtype=self._dtype()).masked_fill_(hidden, -torch.inf)
            self.plan.masks[key] = mask.view(shape) if bool(hidden.any()) else None
        return self.plan.masks[key]

    def _dtype(self) -> torch.dtype:
        return next(iter(self.layers.values()))[0].dtype


def _decode(query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
    """Attention of few tokens a slot; `query` and the result are (slots, key-value heads, queries a head, tokens a
    slot, head size).

    Plain products: on the CPU they take half the time of scaled_dot_product_attention, which is made for many queries.
    """
    scores = query.flatten(2, 3) @ keys.transpose(-1, -2)
    if mask is not None:
        scores = scores.unflatten(2, query.shape[2:4]).add_(mask).flatten(2, 3)
    return (scores.softmax(-1, dtype=torch.float32).to(values.dtype) @ values).view(query.shape)


def _group(past: Sequence[int], new: Sequence[int], device: torch.device) -> list[SlotGroup]:
    """Split the slots into groups, in order: runs of slots with few new tokens, and each slot with more alone."""
    starts = list(accumulate(new, initial=0))
    runs = groupby(range(len(new)), key=lambda slot: -1 if new[slot] <= FEW else slot)
    groups = []
    for _, run in runs:
        slots = list(run)
        first, last = slots[0], slots[-1] + 1
        length = max(past[slot] + new[slot] for slot in slots)
        counts = new[first:last]
        padding = (None, None) if len(set(counts)) == 1 else _pad(counts, device)
        groups.append(SlotGroup(slice(first, last), slice(starts[first], starts[last]), length, max(counts), *padding))
    return groups


def _pad(counts: Sequence[int], device: torch.device) -> tuple[Tensor, Tensor]:
    """The indices `padded` and `real` of a group whose slots have `counts` tokens."""
    width, ends = max(counts), accumulate(counts)
    padded = [end - n + min(i, n - 1) for end, n in zip(ends, counts) for i in range(width)]
    real = [slot * width + i for slot, n in enumerate(counts) for i in range(n)]
    return torch.tensor(padded, device=device), torch.tensor(real, device=device)
