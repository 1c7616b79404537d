"""Where keys and values lie: one tensor of blocks.

    data[block][layer][k|v][kv_head][token][head_dim]

A block holds the keys and values of `block_size` consecutive tokens for all layers, so it moves to a store and back as
one copy. A **slot** of the cache is `block * block_size + offset`: where one token's keys and values go.

Shapes: N tokens of the step, K kv heads, D head size, B blocks, T tokens of a block, L layers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class KVShape:
    """What a model keeps for each token."""

    layers: int
    kv_heads: int
    head_dim: int
    dtype: torch.dtype

    @property
    def token_bytes(self) -> int:
        """Bytes of one token over all layers, keys and values."""
        return self.layers * 2 * self.kv_heads * self.head_dim * self.dtype.itemsize


class Slots(NamedTuple):
    """The slots of a step's tokens as the cache's index. Made once a step by `KVCache.locate`."""

    blocks_N: Tensor
    offsets_N: Tensor


class KVCache:
    """The blocks of one engine. It knows no sequence: who owns which block is the scheduler's business, and a block
    that nobody wrote holds zeros."""

    def __init__(self, shape: KVShape, *, num_blocks: int, block_size: int, device: torch.device | str = "cpu") -> None:
        self.shape = shape
        self.num_blocks = num_blocks
        self.block_size = block_size
        # One block more than there are: what nobody will read is written there.
        self.spare_block = num_blocks
        self.data = torch.zeros(
            (num_blocks + 1, shape.layers, 2, shape.kv_heads, block_size, shape.head_dim),
            dtype=shape.dtype,
            device=device,
        )
        # The tensor as rows of one block's tokens for one layer, k or v, and head, begun at each layer: row
        # block * rows_per_block + (0 for keys, K for values) + head of rows[layer] is what attention gathers.
        self.rows_per_block = shape.layers * 2 * shape.kv_heads
        rows = self.data.view(-1, block_size * shape.head_dim)
        self.rows = [rows[layer * 2 * shape.kv_heads :] for layer in range(shape.layers)]
        # [B, T, 2, K, D] for each layer: what a write indexes.
        self._by_token = [layer.permute(0, 3, 1, 2, 4) for layer in self.data.unbind(1)]

    @property
    def block_bytes(self) -> int:
        """Bytes of one block."""
        return self.block_size * self.shape.token_bytes

    def layer(self, index: int) -> tuple[Tensor, Tensor]:
        """Views of one layer's keys and values, each [B, K, T, D]."""
        keys, values = self.data[:, index].unbind(1)
        return keys, values

    def locate(self, write_slots_N: Tensor) -> Slots:
        """The index of these slots, for `write`."""
        return Slots(
            torch.div(write_slots_N, self.block_size, rounding_mode="floor"),
            torch.remainder(write_slots_N, self.block_size),
        )

    def write(self, layer: int, kv_N2KD: Tensor, slots: Slots) -> None:
        """Puts each token's keys [:, 0] and values [:, 1] where `slots` says. Two tokens never share a slot."""
        self._by_token[layer].index_put_(slots, kv_N2KD)

    def read_block(self, block: int) -> bytearray:
        """A copy of one block's bytes, `block_bytes` of them, in the order of the layout above."""
        # Not torch's copy, which would leave OpenMP workers to whatever thread this is (see `build.build_apart`).
        return bytearray(self.data[block].reshape(-1).view(torch.uint8).cpu().numpy())

    def write_block(self, block: int, content: bytes | bytearray | memoryview) -> None:
        """Fills one block with bytes that `read_block` of a cache of the same shape, block size and byte order gave.
        Raises ValueError if there are too many or too few."""
        if len(content) != self.block_bytes:
            raise ValueError(f"a block of this cache has {self.block_bytes} bytes, not {len(content)}")
        # frombuffer wants memory that may be written, which bytes are not; the copy also ends the view's life early.
        source = torch.frombuffer(bytearray(content), dtype=self.shape.dtype)
        self.data[block].copy_(source.view(self.data.shape[1:]))
