"""Where keys and values lie: one tensor of blocks, each a run of bytes that holds the layers one after the other.

    in the model's dtype   [k|v][kv_head][token][head_dim]
    in 8 bits              keys [kv_head][token][head_dim], values [kv_head][head_dim][token],
                           float32 scales [k|v][kv_head][token]

Each layer has a format of its own (`kv_format`). In 8 bits values lie as tensor cores take them, neighbours along the
axis that attention sums over: there 1.5 times as fast to read (measured on an H200).

A block holds the keys and values of `block_size` consecutive tokens for all layers, so it moves to a store and back as
one copy. A **slot** of the cache is `block * block_size + offset`: where one token's keys and values go.

Shapes: N tokens of the step, K kv heads, D head size, B blocks, T tokens of a block, L layers of like format, X any.
"""

from __future__ import annotations

import math
from collections.abc import Sequence as Seq
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import groupby
from typing import NamedTuple

import torch
from torch import Tensor

from services.engine.kv_format import KVFormat
from services.engine.ops import kv_quant


@dataclass(frozen=True, slots=True)
class KVShape:
    """What a model keeps for each token."""

    layers: int
    kv_heads: int
    head_dim: int
    dtype: torch.dtype

    def token_bytes(self, format: KVFormat) -> int:
        """Bytes of one token in one layer, keys and values, with their scales where there are any."""
        if format.is_quantized:
            return 2 * self.kv_heads * (self.head_dim + torch.float32.itemsize)
        return 2 * self.kv_heads * self.head_dim * self.dtype.itemsize


@dataclass(frozen=True, slots=True)
class KVLayout:
    """How a block is laid out."""

    shape: KVShape
    block_size: int
    formats: tuple[KVFormat, ...]
    """Of each layer."""

    @property
    def layer_bytes(self) -> list[int]:
        """Bytes of each layer in a block."""
        return [self.block_size * self.shape.token_bytes(format) for format in self.formats]

    @property
    def block_bytes(self) -> int:
        """Bytes of one block."""
        return sum(self.layer_bytes)


class Slots(NamedTuple):
    """The slots of a step's tokens as the cache's index. Made once a step by `KVCache.locate`."""

    blocks_N: Tensor
    offsets_N: Tensor


@dataclass(frozen=True)
class KVLayer:
    """One layer's part of all blocks, as views of the cache's bytes; or that of several layers of one format, which then
    are a dimension behind the blocks."""

    format: KVFormat
    dtype: torch.dtype
    """The model's."""
    head_dim: int
    kv: Tensor
    """[B, 2, K, T * D], in the layer's own dtype."""
    scales: Tensor | None
    """float32, [B, 2, K, T], in 8 bits."""

    @cached_property
    def keys(self) -> Tensor:
        """[B, K, T, D]"""
        return _split(self.kv[..., 0, :, :], -1, self.head_dim)

    @cached_property
    def values(self) -> Tensor:
        """[B, K, T, D]. In 8 bits tokens are neighbours in memory."""
        values = self.kv[..., 1, :, :]
        return _split(values, -1, self.head_dim) if self.scales is None else _split(values, self.head_dim, -1).mT

    @cached_property
    def _by_token(self) -> Tensor:
        """[B, T, 2, K, D], in the model's dtype: what a write indexes."""
        return _split(self.kv, -1, self.head_dim).permute(0, 3, 1, 2, 4)

    def read(self, blocks_X: Tensor) -> tuple[Tensor, Tensor]:
        """Copies of the keys and values of these blocks, each [X, K, T, D], in the model's dtype."""
        chosen = replace(self, kv=_bits(self.kv).index_select(0, blocks_X).view(self.kv.dtype))
        if self.scales is None:
            return chosen.keys, chosen.values
        key_scales, value_scales = self.scales.index_select(0, blocks_X).unbind(1)
        return (
            kv_quant.dequantize(chosen.keys, key_scales, self.dtype),
            kv_quant.dequantize(chosen.values, value_scales, self.dtype),
        )

    def write(self, kv_N2KD: Tensor, slots: Slots) -> None:
        """As `KVCache.write`."""
        if self.scales is None:
            self._by_token.index_put_(slots, kv_N2KD)
            return
        quantized_N2KD, scales_N2K = kv_quant.quantize(kv_N2KD, self.format)
        for to, x_NKD in zip((self.keys, self.values), quantized_N2KD.unbind(1), strict=True):
            _bits(to).permute(0, 2, 1, 3).index_put_(slots, _bits(x_NKD))
        self.scales.permute(0, 3, 1, 2).index_put_(slots, scales_N2K)

    def clear_rest(self, block: int, filled: int) -> None:
        """As `KVCache.clear_rest`."""
        for x in (self.keys, self.values):
            _bits(x)[block, ..., filled:, :].zero_()
        if self.scales is not None:
            self.scales[block, ..., filled:].zero_()


class KVCache:
    """The blocks of one engine. It knows no sequence: who owns which block is the scheduler's business, and a block
    that nobody wrote holds zeros."""

    def __init__(
        self,
        shape: KVShape,
        *,
        num_blocks: int,
        block_size: int,
        device: torch.device | str = "cpu",
        formats: Seq[KVFormat] | None = None,
    ) -> None:
        """`formats`: of each layer; by default all in the model's dtype."""
        self.shape = shape
        self.layout = KVLayout(shape, block_size, tuple(formats or [KVFormat.AUTO] * shape.layers))
        assert len(self.layout.formats) == shape.layers
        self.num_blocks = num_blocks
        self.block_size = block_size
        # One block more than there are: what nobody will read is written there.
        self.spare_block = num_blocks
        self.data = torch.zeros((num_blocks + 1, self.layout.block_bytes), dtype=torch.uint8, device=device)
        self._runs, self.layers = _views(self.data, self.layout)
        # What attention gathers of layers in the model's dtype: rows of one block's tokens for k or v and one head, begun
        # at each layer. They overlap where a block's bytes are no multiple of theirs: row block * rows_per_block +
        # (0 for keys, K for values + head) * rows_per_head of rows[layer].
        row_bytes = block_size * shape.head_dim * shape.dtype.itemsize
        step = math.gcd(row_bytes, self.layout.block_bytes)
        self.rows_per_block, self.rows_per_head = self.layout.block_bytes // step, row_bytes // step
        self.rows = [None if layer.scales is not None else _rows(layer, step) for layer in self.layers]

    @property
    def block_bytes(self) -> int:
        """Bytes of one block."""
        return self.layout.block_bytes

    def locate(self, write_slots_N: Tensor) -> Slots:
        """The index of these slots, for `write`."""
        return Slots(
            torch.div(write_slots_N, self.block_size, rounding_mode="floor"),
            torch.remainder(write_slots_N, self.block_size),
        )

    def write(self, layer: int, kv_N2KD: Tensor, slots: Slots) -> None:
        """Puts each token's keys [:, 0] and values [:, 1] where `slots` says. Two tokens never share a slot."""
        self.layers[layer].write(kv_N2KD, slots)

    def clear_rest(self, block: int, filled: int) -> None:
        """Zeroes what a block holds, in all layers, behind its first `filled` tokens."""
        for run in self._runs:
            run.clear_rest(block, filled)

    def read_block(self, block: int) -> bytearray:
        """A copy of one block's bytes, `block_bytes` of them, in the order of the layout above."""
        # Not torch's copy, which would leave OpenMP workers to whatever thread this is (see `build.build_apart`).
        return bytearray(self.data[block].cpu().numpy())

    def write_block(self, block: int, content: bytes | bytearray | memoryview) -> None:
        """Fills one block with bytes that `read_block` of a cache of the same layout and byte order gave. Raises
        ValueError if there are too many or too few."""
        if len(content) != self.block_bytes:
            raise ValueError(f"a block of this cache has {self.block_bytes} bytes, not {len(content)}")
        # frombuffer wants memory that may be written, which bytes are not; the copy also ends the view's life early.
        self.data[block].copy_(torch.frombuffer(bytearray(content), dtype=torch.uint8))


def _views(data: Tensor, layout: KVLayout) -> tuple[list[KVLayer], list[KVLayer]]:
    """Layers of like format that follow one another, seen together; and each layer."""
    shape, num_values = layout.shape, 2 * layout.shape.kv_heads * layout.shape.head_dim * layout.block_size
    runs, layers, start = [], [], 0
    for format, members in groupby(layout.formats):
        count, size = len(list(members)), layout.block_size * shape.token_bytes(format)
        bytes_ = _split(data[:, start : start + count * size], count, size)
        dtype = kv_quant.DTYPES.get(format, shape.dtype)
        end = num_values * dtype.itemsize
        kv = _split(bytes_[..., :end].view(dtype), 2, shape.kv_heads, -1)
        scales = _split(bytes_[..., end:].view(torch.float32), 2, shape.kv_heads, -1) if end < size else None
        run = KVLayer(format, shape.dtype, shape.head_dim, kv, scales)
        runs.append(run)
        layers += [replace(run, kv=kv[:, i], scales=None if scales is None else scales[:, i]) for i in range(count)]
        start += count * size
    return runs, layers


def _rows(layer: KVLayer, step: int) -> Tensor:
    """Rows of one head's tokens, one begun every `step` bytes from the layer's first on."""
    size, step = layer.kv.shape[-1], step // layer.kv.dtype.itemsize
    left = layer.kv.untyped_storage().nbytes() // layer.kv.dtype.itemsize - layer.kv.storage_offset()
    return layer.kv.as_strided(((left - size) // step + 1, size), (step, 1))


def _split(x: Tensor, *sizes: int) -> Tensor:
    """A view with these sizes in place of the last dimension."""
    return x.view(*x.shape[:-1], *sizes)


def _bits(x: Tensor) -> Tensor:
    """The same as bytes where it is a type of one byte, few of which torch can index by."""
    return x.view(torch.uint8) if x.dtype.itemsize == 1 else x
