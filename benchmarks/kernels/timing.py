"""How long one call of a kernel takes, and what the machine could do at best.

On a GPU the calls are captured in a CUDA graph, one after the other, so that the host takes no part; the graph holds some
milliseconds of them and is replayed seven times, of which the median counts. Kernels that are set up while the one before
ends (programmatic dependent launch) do so here as in a step. On a CPU the calls are made in turn, three times at least,
and the median of the rounds counts.

Every call is to read what no cache holds: weights, keys and values are there in as many `copies` as fill the L2 cache of a
GPU five times over, and calls go from one to the next. Activations are the same for all calls: in a step, too, the kernel before has just
written them. So a kernel that reads nothing else may be faster than the memory.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

Call = Callable[[], object]

SPAN = 4e-3
"""Seconds that a graph is to take."""
MOST_CALLS = 256
"""Of a graph."""
ROUNDS = {"cuda": 7, "cpu": 3}
ROTATED = {"cuda": 256 << 20, "cpu": 64 << 20}
"""Bytes of all copies together. The L2 cache of an H200 has 50 MiB."""
MOST_COPIES = {"cuda": 64, "cpu": 4}


def copies(size: float, device: torch.device) -> int:
    """How many there must be of something of so many bytes."""
    return int(min(MOST_COPIES[device.type], max(1, -(-ROTATED[device.type] // max(1, size)))))


def seconds_a_call(calls: Sequence[Call], device: torch.device) -> float:
    """The median time of a call; they are made in turn."""
    return _on_gpu(calls) if device.type == "cuda" else _on_cpu(calls)


def _on_cpu(calls: Sequence[Call]) -> float:
    calls[0]()
    rounds = []
    for _ in range(ROUNDS["cpu"]):
        start = time.perf_counter()
        for call in calls:
            call()
        rounds.append(time.perf_counter() - start)
    return statistics.median(rounds) / len(calls)


def _on_gpu(calls: Sequence[Call]) -> float:
    def all_(count: int) -> None:
        for index in range(count):
            calls[index % len(calls)]()

    all_(len(calls))  # kernels are compiled, libraries take their workspaces
    once = _span(partial(all_, len(calls))) / len(calls)
    count = max(len(calls), min(MOST_CALLS, int(SPAN / once) + 1))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        all_(count)
    graph.replay()
    return statistics.median(_span(graph.replay) for _ in range(ROUNDS["cuda"])) / count


def _span(work: Call) -> float:
    """Seconds from when the device begins with this to when it is done."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    start.record()
    work()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / 1e3


@contextmanager
def compiled_ahead() -> Iterator[None]:
    """Kernels that are launched in the block are compiled instead, side by side; they are ready when it ends. One that
    cannot be compiled says so when it is launched again."""
    from triton import AsyncCompileMode
    from triton.runtime.jit import JITFunction

    run = JITFunction.run

    def compile_only(self: Any, *arguments: Any, warmup: bool, **options: Any) -> Any:
        return run(self, *arguments, warmup=True, **options)

    with ThreadPoolExecutor(os.cpu_count()) as executor, AsyncCompileMode(executor, ignore_errors=True):
        JITFunction.run = compile_only
        try:
            yield
        finally:
            JITFunction.run = run


@dataclass(frozen=True, slots=True)
class Ceilings:
    """What the machine did at best in this run."""

    bandwidth: float
    """Bytes a second."""
    flops: dict[str, float]
    """A second, by what is multiplied."""

    def seconds(self, *, bytes_: float, flops: float, unit: str) -> float:
        """The least that so much can take."""
        return max(bytes_ / self.bandwidth, flops / self.flops[unit])


def measured_ceilings(device: torch.device) -> Ceilings:
    """The faster of copying and reading; products of large square matrices in bfloat16, in fp8 with scales of rows as the engine has
    them, and in int8 by `_int_mm`, which is no ceiling for other kernels. What is widened to bfloat16, as a CPU does with fp8, and what takes
    two parts of eight bits has bfloat16's."""
    on_gpu = device.type == "cuda"
    size = (1 << 30) if on_gpu else (64 << 20)
    source = torch.zeros(size // 4, dtype=torch.int32, device=device)
    target = torch.empty_like(source)
    copying = 2 * size / seconds_a_call([lambda: target.copy_(source)], device)
    reading = size / seconds_a_call([lambda: source.max()], device)
    side = 8192 if on_gpu else 768
    x, y = (torch.randn(side, side, device=device).bfloat16() for _ in range(2))
    flops = {"bf16": 2 * side**3 / seconds_a_call([lambda: x @ y.t()], device)}
    flops |= dict.fromkeys(("fp8", "w8a8", "w4a16"), flops["bf16"])
    if on_gpu:
        flops["fp8"] = 2 * side**3 / seconds_a_call([_fp8_product(x, y)], device)
        values, others = x.to(torch.int8), y.to(torch.int8)
        flops["w8a8"] = 2 * side**3 / seconds_a_call([lambda: torch._int_mm(values, others.t())], device)
    return Ceilings(max(copying, reading), flops)


def _fp8_product(x: Tensor, y: Tensor) -> Call:
    values, others = (matrix.to(torch.float8_e4m3fn) for matrix in (x, y))
    ones = torch.ones(len(x), 1, device=x.device)
    return lambda: torch._scaled_mm(
        values, others.t(), scale_a=ones, scale_b=ones.t(), out_dtype=torch.bfloat16, use_fast_accum=True
    )
