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
def plane(words, pair, PLACE: tl.constexpr, HALF: tl.constexpr, PAIRED: tl.constexpr, DTYPE: tl.constexpr):
    """Of words that hold four numbers from 0 to 15 the ones at this place, less 8, times their scales, and with their offsets where there are
    any; in 16 bits, rounded once. A pair is a word of 32 bits: two scales, of which this half is taken, 0 the low one; or the scale and, in
    the high half, the offset."""
    if _IS_COMPILED:
        if DTYPE == tl.float16:
            halves: tl.constexpr = _widening(PLACE, HALF, PAIRED, True)
            return tl.inline_asm_elementwise(halves, "=r,r,r,r", [words, pair], dtype=tl.float16, is_pure=True, pack=2)
        text: tl.constexpr = _widening(PLACE, HALF, PAIRED, False)
        return tl.inline_asm_elementwise(text, "=r,r,r,r", [words, pair], dtype=tl.bfloat16, is_pure=True, pack=2)
    number = ((words.to(tl.int32) >> 4 * PLACE & 15) - 8).to(tl.float32)
    found = number * low_half(pair >> 16 * HALF, DTYPE)
    if not PAIRED:
        found += low_half(pair >> 16, DTYPE)
    return found.to(DTYPE)


@triton.jit
def biased(words, PLACE: tl.constexpr):
    """Of words that hold four numbers from 0 to 15 the ones at this place, in float32, and 128 with each."""
    if _IS_COMPILED:
        text: tl.constexpr = _biasing(PLACE)
        return tl.inline_asm_elementwise(text, "=f,=f,r", [words], dtype=tl.float32, is_pure=True, pack=2)
    return ((words.to(tl.int32) >> 4 * PLACE & 15) + 128).to(tl.float32)


@triton.constexpr_function
def _biasing(place: int) -> str:
    """Two words at a time. The bit 16 of 128, which is 0x43000000, counts ones."""
    return f"""{{ .reg .b32 n;
        shl.b32 n, $2, {16 - 4 * place};
        lop3.b32 $0, n, 0x000f0000, 0x43000000, 0xea;
        shr.u32 n, $2, {4 * place};
        lop3.b32 $1, n, 0x000f0000, 0x43000000, 0xea; }}"""


@triton.jit
def low_half(pair, DTYPE: tl.constexpr):
    """The number of 16 bits there, in float32."""
    if DTYPE == tl.bfloat16:
        return (pair << 16).to(tl.float32, bitcast=True)
    return pair.to(tl.int16).to(DTYPE, bitcast=True).to(tl.float32)


@triton.constexpr_function
def _widening(place: int, half: int, paired: bool, is_half: bool) -> str:
    """Two words at a time. The numbers become the last places of 128 in bfloat16 (0x4300), or of 1024 in float16 (0x6400), and are these plus
    8 too large."""
    kind, base, over = ("f16x2", "0x64006400", "0x64086408") if is_half else ("bf16x2", "0x43004300", "0x43084308")
    scaled = "mul.rn.KIND $0, n, s;" if paired else "prmt.b32 o, $2, $3, 0x7632; fma.rn.KIND $0, n, s, o;"
    text = f"""{{ .reg .b32 n, s, o;
        shr.u32 n, $1, {4 * place};
        lop3.b32 n, n, 0x000f000f, {base}, 0xea;
        mov.b32 o, {over};
        sub.rn.KIND n, n, o;
        prmt.b32 s, $2, $3, {"0x7632" if half else "0x5410"};
        {scaled} }}"""
    return text.replace("KIND", kind)
