"""Logits changed before a token is chosen: penalties, biases, and stop tokens that come too early. A program for a row, as
long as the row's known tokens.

A token that occurred twice is found twice. Both times it is given the same value, computed from the logits as they were; only
what is subtracted for each time is added up, always by as much.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from services.engine.ops.parameters import Parameters

_TOKENS = 4096


def edit(
    logits_RV: Tensor, before_RV: Tensor, parameters: Parameters, slots_R: Tensor, positions_R: Tensor, tokens: Tensor
) -> None:
    """Edits the rows whose slots ask for it, in place, as `services.engine.sampler.EDITS`. Leaves in `before_RV` what these rows
    were, and there nothing of the others."""
    num_rows, vocab_size = logits_RV.shape
    floats, integers = parameters.floats, parameters.integers
    _keep[(triton.cdiv(vocab_size, _TOKENS), num_rows)](
        logits_RV, before_RV, slots_R, integers.edited, logits_RV.stride(0), before_RV.stride(0),
        VOCAB=vocab_size, BLOCK=_TOKENS, num_warps=4,
    )  # fmt: skip
    _edit[(num_rows,)](
        logits=logits_RV, before=before_RV, row_stride=logits_RV.stride(0), before_stride=before_RV.stride(0),
        slots=slots_R, positions=positions_R, tokens=tokens, token_stride=tokens.stride(0), edited=integers.edited,
        repetitions=floats.repetition, presences=floats.presence, frequencies=floats.frequency,
        num_prompts=integers.num_prompt, min_lengths=integers.min_length,
        num_biased_of=integers.num_biased, num_stops_of=integers.num_stops,
        ids=parameters.ids_SE, additions=parameters.additions_SE, entry_stride=parameters.ids_SE.stride(0),
        BLOCK=4096, num_warps=8,
    )  # fmt: skip


@triton.jit
def _keep(
    logits, before, slots, edited, row_stride, before_stride, VOCAB: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    row = tl.program_id(1).to(tl.int64)
    if tl.load(edited + tl.load(slots + row)) != 0:
        token = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        x = tl.load(logits + row * row_stride + token, mask=token < VOCAB)
        tl.store(before + row * before_stride + token, x, mask=token < VOCAB)


@triton.jit
def _edit(
    logits, before, row_stride, before_stride, slots, positions, tokens, token_stride, edited,
    repetitions, presences, frequencies, num_prompts, min_lengths, num_biased_of, num_stops_of,
    ids, additions, entry_stride, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + row).to(tl.int64)
    if tl.load(edited + slot) != 0:
        now, then = logits + row * row_stride, before + row * before_stride
        known, length = tokens + slot * token_stride, tl.load(positions + row).to(tl.int32)
        each = tl.arange(0, BLOCK)
        repetition, presence = tl.load(repetitions + slot), tl.load(presences + slot)
        frequency = tl.load(frequencies + slot)
        answer = tl.load(num_prompts + slot).to(tl.int32)
        if repetition != 1.0:
            for first in range(0, length, BLOCK):
                inside = first + each < length
                token = tl.load(known + first + each, mask=inside, other=0)
                tl.store(now + token, _repeated(tl.load(then + token), repetition), mask=inside)
            tl.debug_barrier()
        if presence != 0.0:
            for first in range(answer, length, BLOCK):
                inside = first + each < length
                token = tl.load(known + first + each, mask=inside, other=0)
                tl.store(now + token, _repeated(tl.load(then + token), repetition) - presence, mask=inside)
            tl.debug_barrier()
        if frequency != 0.0:
            for first in range(answer, length, BLOCK):
                inside = first + each < length
                token = tl.load(known + first + each, mask=inside, other=0)
                tl.atomic_add(now + token, tl.zeros((BLOCK,), tl.float32) - frequency, mask=inside, sem="relaxed")
            tl.debug_barrier()
        # A sequence may end with the token that makes it long enough.
        too_short = length + 1 < tl.load(min_lengths + slot)
        count = tl.load(num_biased_of + slot) + tl.where(too_short, tl.load(num_stops_of + slot), 0)
        for first in range(0, count.to(tl.int32), BLOCK):
            inside = first + each < count
            token = tl.load(ids + slot * entry_stride + first + each, mask=inside, other=0)
            addition = tl.load(additions + slot * entry_stride + first + each, mask=inside, other=0.0)
            tl.atomic_add(now + token, addition, mask=inside, sem="relaxed")


@triton.jit
def _repeated(x, repetition):
    return tl.where(x > 0, x / repetition, x * repetition)
