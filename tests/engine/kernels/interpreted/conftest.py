"""Where Triton's interpreter differs from a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
import triton.language as tl
from triton.runtime import interpreter

_DTYPES = {tl.float8e4nv: torch.float8_e4m3fn, tl.float16: torch.float16, tl.float32: torch.float32}
_BITS = {torch.float8_e4m3fn: torch.uint8, torch.float16: torch.uint16, torch.float32: torch.uint32}


@pytest.fixture(autouse=True)
def eight_bits_as_torch_rounds_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter of Triton 3.6 halves what is rounded up to a power of two, rounds ties away from zero and makes
    NaN a number."""
    own = interpreter._convert_float

    def convert(values: np.ndarray, source: tl.dtype, target: tl.dtype, rounding: Any) -> np.ndarray:
        if tl.float8e4nv not in (source, target) or not {source, target} <= set(_DTYPES):
            return own(values, source, target, rounding)
        given, wanted = _DTYPES[source], _DTYPES[target]
        bits = torch.frombuffer(bytearray(values.tobytes()), dtype=_BITS[given])
        return bits.view(given).to(wanted).view(_BITS[wanted]).numpy().reshape(values.shape)

    monkeypatch.setattr(interpreter, "_convert_float", convert)


@pytest.fixture(autouse=True, scope="session")
def language_is_replaced_once() -> Iterator[None]:
    """The interpreter puts its own functions into Triton's language, and the others back, around every call, which takes a third of the time.
    Nothing here needs the others."""
    replace, done = interpreter._patch_lang, set[str]()

    def once(function: Any) -> interpreter._LangPatchScope:
        if (module := function.__module__) not in done:
            done.add(module)
            replace(function)
        return interpreter._LangPatchScope()  # of no changes, to be taken back

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter, "_patch_lang", once)
        yield
