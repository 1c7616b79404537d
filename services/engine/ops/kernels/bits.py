"""Numbers of eight and four bits, widened some at a time: converted one by one they would take longer than to read."""

from __future__ import annotations

import triton
import triton.language as tl

_IS_COMPILED = tl.constexpr(not triton.knobs.runtime.interpret)


@triton.jit
def widened(x, DTYPE: tl.constexpr):
    """8-bit numbers in what they are multiplied in, exactly."""
    if x.dtype == tl.int8 and DTYPE == tl.float16 and _IS_COMPILED:
        # 0x6400 is 1024 in float16, whose last eight places count ones; the byte less its sign bit's place, and
        # 1152 = 1024 + 128 taken away, it is the number.
        return tl.inline_asm_elementwise(
            """{ .reg .b32 biased, of_1024, of_1152;
            xor.b32 biased, $2, 0x80808080;
            mov.b32 of_1024, 0x64646464;
            mov.b32 of_1152, 0x64806480;
            prmt.b32 $0, biased, of_1024, 0x4140;
            prmt.b32 $1, biased, of_1024, 0x4342;
            sub.rn.f16x2 $0, $0, of_1152;
            sub.rn.f16x2 $1, $1, of_1152; }""",
            "=r,=r,r",
            [x],
            dtype=tl.float16,
            is_pure=True,
            pack=4,
        )
    if x.dtype == tl.int8 and DTYPE == tl.float32 and _IS_COMPILED:
        # The same with 0x4b000000, which is 2^23 in float32.
        return tl.inline_asm_elementwise(
            """{ .reg .b32 biased, of_2_23, a, b, c, d;
            xor.b32 biased, $4, 0x80808080;
            mov.b32 of_2_23, 0x4b000000;
            prmt.b32 a, biased, of_2_23, 0x7440;
            prmt.b32 b, biased, of_2_23, 0x7441;
            prmt.b32 c, biased, of_2_23, 0x7442;
            prmt.b32 d, biased, of_2_23, 0x7443;
            sub.rn.f32 $0, a, 0f4b000080;
            sub.rn.f32 $1, b, 0f4b000080;
            sub.rn.f32 $2, c, 0f4b000080;
            sub.rn.f32 $3, d, 0f4b000080; }""",
            "=f,=f,=f,=f,r",
            [x],
            dtype=tl.float32,
            is_pure=True,
            pack=4,
        )
    return x.to(DTYPE)


@triton.jit
def nibbles(x, HIGH: tl.constexpr):
    """Of bytes that hold two numbers of four bits each, from -8 to 7, the low ones or the high ones; sixteen times as large,
    int8."""
    if not _IS_COMPILED:
        return x & -16 if HIGH else x << 4
    if HIGH:
        return tl.inline_asm_elementwise(
            "and.b32 $0, $1, 0xf0f0f0f0;", "=r,r", [x], dtype=tl.int8, is_pure=True, pack=4
        )
    return tl.inline_asm_elementwise(
        "{ .reg .b32 up; shl.b32 up, $1, 4; and.b32 $0, up, 0xf0f0f0f0; }",
        "=r,r",
        [x],
        dtype=tl.int8,
        is_pure=True,
        pack=4,
    )
