"""The cache's layout, writes and whole blocks."""

from __future__ import annotations

import pytest
import torch

from services.engine.kv_cache import KVCache, KVShape


def small_cache(dtype: torch.dtype = torch.float32) -> KVCache:
    return KVCache(KVShape(layers=3, kv_heads=2, head_dim=4, dtype=dtype), num_blocks=5, block_size=8)


def test_a_token_lies_where_its_slot_says() -> None:
    """Slot 2 * 8 + 5 is token 5 of block 2, in the layer written and no other."""
    cache = small_cache()
    kv_N2KD = torch.arange(1.0, 33.0).view(2, 2, 2, 4)
    cache.write(1, kv_N2KD, cache.locate(torch.tensor([2 * 8 + 5, 4 * 8])))
    assert torch.equal(cache.data[2, 1, :, :, 5], kv_N2KD[0])
    assert torch.equal(cache.data[4, 1, :, :, 0], kv_N2KD[1])
    assert cache.data.count_nonzero() == kv_N2KD.numel()
    keys, values = cache.layer(1)
    assert torch.equal(keys[2, :, 5], kv_N2KD[0, 0])
    assert torch.equal(values[2, :, 5], kv_N2KD[0, 1])


def test_rows_begin_at_each_layer() -> None:
    """Row block * rows_per_block + head of a layer's rows is that block's keys of that head; values come K later."""
    cache = small_cache()
    cache.data.normal_()
    row = 3 * cache.rows_per_block
    assert torch.equal(cache.rows[2][row + 1].view(8, 4), cache.data[3, 2, 0, 1])
    assert torch.equal(cache.rows[2][row + 2 + 1].view(8, 4), cache.data[3, 2, 1, 1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_block_travels_as_bytes(dtype: torch.dtype) -> None:
    """What is read from one block and written to another is the same, in `block_bytes` bytes, in the layout's order."""
    cache = small_cache(dtype)
    cache.data.normal_()
    others = cache.data[[0, 2, 3]].clone()
    content = cache.read_block(1)
    assert len(content) == cache.block_bytes == 3 * 2 * 2 * 8 * 4 * dtype.itemsize
    assert content == bytearray(cache.data[1].contiguous().view(torch.uint8).flatten().tolist())
    cache.write_block(4, bytes(content))
    assert torch.equal(cache.data[4], cache.data[1])
    assert torch.equal(cache.data[[0, 2, 3]], others)


def test_a_block_of_another_size_is_refused() -> None:
    """Bytes of another shape of cache are named with what would be right."""
    with pytest.raises(ValueError, match="1536 bytes, not 1535"):
        small_cache().write_block(0, bytes(1535))
