"""Kernels whose rows do not depend on the rows beside them."""

from __future__ import annotations

import pytest
import torch

from services.engine.kv_cache import KVCache, KVShape
from services.engine.ops.kernels import invariant, prefill_attention

pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning")


@pytest.mark.parametrize(("outputs", "inputs"), [(64, 64), (100, 43), (33, 96)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_row_is_multiplied_alike_in_any_place(outputs: int, inputs: int, dtype: torch.dtype) -> None:
    """Alone, first or last of tiles that it fills or not: the same bits, and the product at that; with bias and sum, and
    in float32 where that is asked for."""
    x, weight = torch.randn(70, inputs, dtype=dtype), torch.randn(outputs, inputs, dtype=dtype)
    bias, add = torch.randn(outputs, dtype=dtype), torch.randn(70, outputs, dtype=dtype)
    whole = invariant.matmul(x, weight, bias_O=bias, add=add)
    expected = (x.double() @ weight.double().T + bias + add).to(dtype)
    torch.testing.assert_close(whole, expected, atol=2e-3, rtol=2e-3)
    wide = invariant.matmul(x, weight, dtype=torch.float32)
    torch.testing.assert_close(wide.double(), x.double() @ weight.double().T, atol=1e-4, rtol=1e-4)
    for rows in (slice(0, 1), slice(3, 4), slice(31, 69), slice(64, 70)):
        part = invariant.matmul(x[rows].contiguous(), weight, bias_O=bias, add=add[rows].contiguous())
        assert torch.equal(part, whole[rows])


def test_no_rows_are_no_launch() -> None:
    """A step that samples nothing has none."""
    assert invariant.matmul(torch.zeros(0, 8), torch.zeros(4, 8)).shape == (0, 4)


@pytest.mark.parametrize(("dtype", "window"), [(torch.float32, None), (torch.float16, 21)])
def test_a_token_attends_alike_however_its_prompt_is_cut(dtype: torch.dtype, window: int | None) -> None:
    """As a decode, or in a chunk that begins anywhere: the same bits."""
    heads, kv_heads, head_dim, length = 4, 2, 16, 75
    cache = KVCache(KVShape(1, kv_heads, head_dim, dtype), num_blocks=6, block_size=16)
    cache.data.copy_(
        torch.randn(cache.data.numel() // dtype.itemsize).to(dtype).view(cache.data.dtype).view_as(cache.data)
    )
    q, tables = torch.randn(length, heads, head_dim, dtype=dtype), torch.tensor([[4, 1, 3, 0, 5]], dtype=torch.int32)

    def attended(*cuts: int) -> torch.Tensor:
        ends, counts = torch.tensor(cuts, dtype=torch.int32), torch.tensor((0, *cuts), dtype=torch.int32).diff()
        starts, out = torch.tensor((0, *cuts), dtype=torch.int32), torch.zeros_like(q)
        work = prefill_attention.plan(
            tables, torch.zeros(len(cuts), dtype=torch.int64), ends, starts, counts,
            most_tokens=length, group=heads // kv_heads, tuning=prefill_attention.tuning(dtype, dtype.itemsize),
        )  # fmt: skip
        prefill_attention.attend(q, out, cache, 0, work, scale=0.25, window=window, alike=True)
        return out

    whole = attended(length)
    assert whole.isfinite().all() and whole.abs().max() > 0
    for cuts in ((1, 17, 18, 40, length), (33, length), tuple(range(1, length + 1))):
        assert torch.equal(attended(*cuts), whole)
