"""The cache's layout, writes and whole blocks."""

from __future__ import annotations

import pytest
import torch

from services.engine.kv_cache import KVCache, KVShape
from services.engine.kv_format import KVFormat
from services.engine.ops.kv_quant import dequantize, quantize
from tests.engine.batches import fill

AUTO, FP8, INT8 = KVFormat

MIXED = (AUTO, FP8, FP8, INT8, AUTO)
UNIFORM = (AUTO,) * 3


def small_cache(formats: tuple[KVFormat, ...] = UNIFORM, dtype: torch.dtype = torch.float32) -> KVCache:
    shape = KVShape(layers=len(formats), kv_heads=2, head_dim=4, dtype=dtype)
    return KVCache(shape, num_blocks=5, block_size=8, formats=formats)


def test_a_token_lies_where_its_slot_says() -> None:
    """Slot 2 * 8 + 5 is token 5 of block 2, in the layer written and no other."""
    cache = small_cache()
    kv_N2KD = torch.arange(1.0, 33.0).view(2, 2, 2, 4)
    cache.write(1, kv_N2KD, cache.locate(torch.tensor([2 * 8 + 5, 4 * 8])))
    data = cache.data.view(torch.float32).view(6, 3, 2, 2, 8, 4)
    assert torch.equal(data[2, 1, :, :, 5], kv_N2KD[0])
    assert torch.equal(data[4, 1, :, :, 0], kv_N2KD[1])
    assert data.count_nonzero() == kv_N2KD.numel()
    keys, values = cache.layers[1].read(torch.tensor([0, 2]))
    assert torch.equal(keys[1, :, 5], kv_N2KD[0, 0])
    assert torch.equal(values[1, :, 5], kv_N2KD[0, 1])


@pytest.mark.parametrize("format", [FP8, INT8])
def test_in_8_bits_values_lie_by_dimension_and_scales_behind(format: KVFormat) -> None:
    """Keys [head][token][dim], values [head][dim][token], then a float32 scale for each."""
    cache = small_cache((AUTO, format))
    kv_N2KD = torch.randn(1, 2, 2, 4)
    cache.write(1, kv_N2KD, cache.locate(torch.tensor([2 * 8 + 5])))
    quantized, scales = quantize(kv_N2KD[0], format)
    layer = cache.data[2, 2 * 2 * 8 * 4 * 4 :]
    keys, values = layer[: 2 * 2 * 8 * 4].view(quantized.dtype).view(2, 2, 32)
    assert torch.equal(keys.view(2, 8, 4)[:, 5].float(), quantized[0].float())
    assert torch.equal(values.view(2, 4, 8)[:, :, 5].float(), quantized[1].float())
    assert torch.equal(layer[2 * 2 * 8 * 4 :].view(torch.float32).view(2, 2, 8)[:, :, 5], scales)
    others = torch.cat((cache.data[:2], cache.data[3:]))
    assert not others.any()


def test_layers_of_any_format_lie_beside_one_another() -> None:
    """Each gives back its own tokens to what its format rounds, and the others' are not touched."""
    cache, slots = small_cache(MIXED), torch.randperm(40)[:23]
    written = [torch.randn(23, 2, 2, 4) * 10 ** (layer - 2) for layer in range(5)]
    for layer in torch.randperm(5).tolist():
        cache.write(layer, written[layer], cache.locate(slots))
    for layer, (format, kv_N2KD) in enumerate(zip(MIXED, written, strict=True)):
        keys_NKD, values_NKD = (
            x.transpose(1, 2).flatten(0, 1)[slots] for x in cache.layers[layer].read(torch.arange(5))
        )
        expected = kv_N2KD if format is AUTO else dequantize(*quantize(kv_N2KD, format), torch.float32)
        assert torch.equal(torch.stack((keys_NKD, values_NKD), 1), expected)


def test_the_same_tokens_are_the_same_bytes_however_they_are_written() -> None:
    """All at once or one by one, in any order: nothing that is kept of a token depends on another."""
    once, singly = small_cache(MIXED, torch.bfloat16), small_cache(MIXED, torch.bfloat16)
    kv_N2KD = torch.randn(40, 2, 2, 4).bfloat16()
    for layer in range(5):
        once.write(layer, kv_N2KD, once.locate(torch.arange(40)))
        for token in torch.randperm(40).tolist():
            singly.write(layer, kv_N2KD[token, None], singly.locate(torch.tensor([token])))
    assert torch.equal(once.data, singly.data)


@pytest.mark.parametrize("formats", [UNIFORM, MIXED])
def test_rows_begin_at_each_layer(formats: tuple[KVFormat, ...]) -> None:
    """Row block * rows_per_block + head * rows_per_head of a layer's rows is that block's keys of that head; values come
    K heads later."""
    cache = small_cache(formats)
    fill(cache)
    keys, values = cache.layers[-1].read(torch.tensor([3]))
    rows = cache.rows[-1]
    assert rows is not None
    first = 3 * cache.rows_per_block
    assert torch.equal(rows[first + cache.rows_per_head].view(8, 4), keys[0, 1])
    assert torch.equal(rows[first + (2 + 1) * cache.rows_per_head].view(8, 4), values[0, 1])


def test_the_rest_of_a_block_is_cleared_in_every_layer() -> None:
    """Behind its first tokens it holds zeros; before them, and in other blocks, nothing changes."""
    cache = small_cache(MIXED)
    fill(cache)
    before = [layer.read(torch.arange(5)) for layer in cache.layers]
    cache.data[2, -4:] = 255  # the last scale: NaN
    cache.clear_rest(2, 3)
    for layer, kv in zip(cache.layers, before, strict=True):
        for now, then in zip(layer.read(torch.arange(5)), kv, strict=True):
            then[2, :, 3:] = 0
            assert torch.equal(now, then)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("formats", [UNIFORM, MIXED])
def test_a_block_travels_as_bytes(formats: tuple[KVFormat, ...], dtype: torch.dtype) -> None:
    """What is read from one block and written to another is the same, in `block_bytes` bytes, in the layout's order."""
    cache = small_cache(formats, dtype)
    fill(cache)
    others = cache.data[[0, 2, 3]].clone()
    content = cache.read_block(1)
    per_token = {AUTO: 4 * dtype.itemsize, FP8: 4 + 4, INT8: 4 + 4}
    assert len(content) == cache.block_bytes == sum(2 * 2 * 8 * per_token[format] for format in formats)
    assert content == bytearray(cache.data[1].tolist())
    cache.write_block(4, bytes(content))
    for layer in cache.layers:
        for kv in layer.read(torch.tensor([1, 4])):
            assert kv.count_nonzero() > 0 and torch.equal(kv[0], kv[1])
    assert torch.equal(cache.data[[0, 2, 3]], others)


def test_a_block_of_another_size_is_refused() -> None:
    """Bytes of another shape of cache are named with what would be right."""
    with pytest.raises(ValueError, match="1536 bytes, not 1535"):
        small_cache().write_block(0, bytes(1535))
