"""Weights in fp8 on a GPU, against float64 and against the same model on a CPU."""

from __future__ import annotations

import os
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from torch import Tensor

from services.engine.kv_cache import KVCache
from services.engine.models import load
from services.engine.ops.activation import silu_mul, silu_mul_as
from services.engine.ops.forms import Quantized
from services.engine.ops.norm import rms_norm, rms_norm_as
from services.engine.ops.quantize import by_torch, quantize
from services.engine.ops.scaled import takes_row
from services.engine.quant.fp8 import Fp8
from services.engine.quant.matrix import nearest
from tests.engine.batches import Chunk, batch_of
from tests.gpu.test_engine import answers

FORM = Fp8.takes


def assert_same(got: Quantized, expected: Quantized) -> None:
    """Bit for bit."""
    assert torch.equal(got.values_NI.view(torch.uint8), expected.values_NI.view(torch.uint8))
    assert torch.equal(got.scales_N, expected.scales_N)


def dequantized(x: Quantized) -> Tensor:
    return x.values_NI.double() * x.scales_N.double()[:, None]


@pytest.mark.parametrize("width", [576, 4096, 14336, 28672])
def test_rows_are_rounded_as_specified(width: int) -> None:
    """Bit for bit, alone and behind a norm or a gate."""
    x = (torch.randn(50, width, device="cuda") * torch.logspace(-20, 4, 50, device="cuda")[:, None]).bfloat16()
    x[7] = 0
    assert_same(quantize(x, FORM), by_torch(x, FORM))
    if width <= 4096:
        weight = torch.randn(width, device="cuda").bfloat16()
        assert_same(rms_norm_as(x, weight, 1e-5, FORM), quantize(rms_norm(x, weight, 1e-5), FORM))
    gate_up = torch.randn(30, 2 * width, device="cuda").bfloat16()
    assert_same(silu_mul_as(gate_up, FORM), quantize(silu_mul(gate_up), FORM))


@pytest.mark.parametrize("num_rows", [1, 2, 16, 17, 32, 33, 64, 65, 128, 129, 256, 257, 1000, 4096])
@pytest.mark.parametrize("shape", [(6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336), (960, 576), (576, 1536)])
def test_products(shape: tuple[int, int], num_rows: int) -> None:
    """Of every tile, with a bias and something to add; twice, as what is counted in must be empty. Matrix units add up
    with some 14 bits, so a sum may be off by that part of what went into it."""
    outputs, inputs = shape
    weight = (torch.randn(outputs, inputs, device="cuda") * 0.02).bfloat16()
    x = torch.randn(num_rows, inputs, device="cuda").bfloat16()
    bias, add = torch.randn(outputs, device="cuda").bfloat16(), torch.randn(num_rows, outputs, device="cuda").bfloat16()
    fp8 = Fp8()
    buffers = fp8.pack(weight, dtype=torch.bfloat16)
    rows = x.double() if takes_row(x, buffers[0]) else dequantized(quantize(x, FORM))
    product = rows @ nearest(weight, fp8.scheme).dequant().double().T
    for _ in range(2):
        got = fp8.apply(x, buffers, bias_O=bias, add=add.clone(), dtype=torch.bfloat16)
        torch.testing.assert_close(got.double(), product + bias + add, atol=0.1, rtol=2e-2)
    got = fp8.apply(x, buffers, bias_O=None, add=None, dtype=torch.float32)
    error = (got.double() - product).norm() / product.norm()
    assert error < 1e-2


@pytest.mark.parametrize("num_rows", [1, 100, 300])
def test_a_row_that_is_not_finite_spoils_no_other(num_rows: int) -> None:
    """By either kernel."""
    fp8 = Fp8()
    buffers = fp8.pack(torch.randn(128, 512, device="cuda").bfloat16(), dtype=torch.bfloat16)
    x = torch.randn(num_rows, 512, device="cuda").bfloat16()
    clean = fp8.apply(x, buffers, bias_O=None, add=None, dtype=torch.bfloat16)
    x[0, 3] = torch.nan
    got = fp8.apply(x, buffers, bias_O=None, add=None, dtype=torch.bfloat16)
    assert got[0].isnan().all() and torch.equal(got[1:], clean[1:])


@pytest.mark.parametrize("num_tokens", [1, 40, 300])
def test_a_model_of_real_shape_computes_what_a_cpu_does(num_tokens: int, real_shape: Path) -> None:
    """Two layers as wide as Llama-3.1-8B's: what differs is the order of sums, and the few values that it tips over to the
    next step of eight bits. Beside the same model in 16 bits both are as far off; a single token, whose activations a GPU does not
    round, less."""
    found, on_cpu = (logits(real_shape, num_tokens, device=device, quantization="fp8") for device in ("cuda", "cpu"))
    truth = logits(real_shape, num_tokens, device="cuda", quantization="none")
    error, error_on_cpu = ((each - truth).norm() / truth.norm() for each in (found, on_cpu))
    if num_tokens == 1:
        assert 0.005 < error < error_on_cpu
        return
    assert 0.01 < error < 0.3 and error == pytest.approx(error_on_cpu, rel=0.25)
    assert (found - on_cpu).norm() < (found - truth).norm()


def logits(folder: Path, num_tokens: int, *, device: str, quantization: str) -> Tensor:
    """Of every position of one prompt."""
    model = load(folder, load_format="dummy", device=device, quantization=quantization)
    cache = KVCache(model.kv_shape, num_blocks=20, block_size=16, device=device)
    chunk = Chunk([(7 * n * n + 3) % 2048 for n in range(num_tokens)], 0, range(20))
    batch = batch_of(chunk, block_size=16, sample_all=True)
    tensors = {
        field.name: value.to(device)
        for field in fields(batch)
        if isinstance(value := getattr(batch, field.name), Tensor)
    }
    return model.forward(replace(batch, **tensors), cache).cpu()


def test_a_head_in_fp8_gives_float32(stories260k: Path) -> None:
    """In captured steps too: rows of one step say the same, and begin as the published text does."""
    published = (stories260k / "expected_greedy_200.txt").read_text()
    found = answers(stories260k, 3, dtype="bfloat16", quantization="lm_head=fp8")
    assert all(each == found[0] for each in found)
    text = Tokenizer.from_file(str(stories260k / "tokenizer.json")).decode(found[0])
    assert len(os.path.commonprefix([text, published])) > 20
