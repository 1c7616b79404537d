"""Compiles kernels for an H100 or H200 on a machine that has none, and says what they use."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

TARGET = GPUTarget("cuda", 90, 32)


@dataclass(frozen=True, slots=True)
class Compiled:
    """One kernel as the GPU would run it."""

    name: str
    ptx: str
    registers: int
    spilled_bytes: int
    shared_bytes: int


class _Driver:
    """What Triton asks a driver before it compiles."""

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return TARGET


@contextmanager
def offline() -> Iterator[list[Any]]:
    """Within the block, kernels that are launched are compiled instead; yields the list that they are put into."""
    kernels: list[Any] = []
    run: Callable[..., Any] = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        kernels.append(run(self, *args, grid=grid, warmup=True, **kwargs))
        return kernels[-1]

    before = driver._active
    driver.set_active(_Driver())
    JITFunction.run = compile_only
    try:
        yield kernels
    finally:
        JITFunction.run = run
        driver._active = before


def described(kernel: Any) -> Compiled:
    """What a compiled kernel takes of a multiprocessor."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    registers, stack, local = (int(re.findall(rf"{word}:(\d+)", usage)[-1]) for word in ("REG", "STACK", "LOCAL"))
    return Compiled(kernel.metadata.name, kernel.asm["ptx"], registers, stack + local, kernel.metadata.shared)
