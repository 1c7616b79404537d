"""Steps as CUDA graphs: a step of each form is captured once and replayed with whatever the slots hold.

So the host launches step after step without having seen a token, and an operation costs it nothing. A graph is a whole
step, from the slots to the tokens in them. Where a row asks for more than a temperature, another graph samples once more
from the logits that the first one leaves. Beyond `MOST_TOKENS` there is one form more, of as many tokens as a step may have:
with prompts waiting, the scheduler fills steps up to just that. What lies between runs operation by operation.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, TypeVar

import numpy as np
import structlog
import torch
from numpy.typing import NDArray
from torch import Tensor

from services.engine.batch import Step
from services.engine.kernel_sampler import KernelSampler
from services.engine.kv_cache import KVCache
from services.engine.model_runner import Executor
from services.engine.models.decoder import Decoder
from services.engine.ops.kernels import decode_attention
from services.engine.packets import Decodes, Form, Tokens, decode_sizes, token_counts
from services.engine.sampler import Sampled
from services.engine.state import DeviceState, Selection

log = structlog.stdlib.get_logger(__name__)

T = TypeVar("T")

MOST_TOKENS = 2048
"""Up to here there is a form for every number of tokens. Beyond it most steps are full ones."""

FULL = 7 / 8
"""How much of the form beyond `MOST_TOKENS` a step must fill to take it. For 8,192 tokens a GPU takes 17 ms, and the host 9.5 to
14.5 to launch them operation by operation (Qwen3-0.6B, an H200). So what is nobody's costs 2 ms at most; and a step of less
than this would, even behind a busy host, be done sooner by itself than as a full one."""

FEW_ROWS = 32
"""Logits of so many rows have a place of their own."""


class Replay(Protocol):
    """Computes again what was captured."""

    def replay(self) -> None: ...


class Capture(Protocol):
    """Runs something once, and returns what that returned and how to run it again, into the same tensors."""

    def __call__(self, compute: Callable[[], T]) -> tuple[T, Replay]: ...


@dataclass(frozen=True, slots=True)
class _Captured:
    """A step of one form."""

    form: Form
    packet: Tensor
    """int32, [rows, width]."""
    step: Replay
    logits_RV: Tensor
    selection: Selection
    """What the step leaves for sampling once more: as long as they are held, no other form's graph computes in their place."""
    plain: Sampled
    """What the step samples, with rows of the form that are nobody's."""
    resampling: Replay
    whole: Sampled
    """The same, whatever the rows ask for."""


class Graphs:
    """Replays the steps that fill a captured one; other large ones are another executor's."""

    @torch.inference_mode()
    def __init__(
        self,
        model: Decoder,
        cache: KVCache,
        state: DeviceState,
        *,
        larger: Executor,
        most_tokens: int,
        capture: Capture | None = None,
    ) -> None:
        """`larger` runs what is not captured. `most_tokens`: of any step, as the scheduler makes them."""
        self._model = model
        self._cache = cache
        self._state = state
        self._sampler = KernelSampler(state)
        self._larger = larger
        self._capture = capture or CudaCapture()
        # Logits are the largest of what a step leaves: those of many rows share their place, and so do all before they are edited.
        size = (state.num_slots, model.vocab_size)
        self._logits_RV = torch.empty(size, dtype=torch.float32, device=state.device)
        self._before_RV = torch.empty_like(self._logits_RV)
        state.block_tables[state.spare_slot] = cache.spare_block
        # The largest first: the others find room in the memory that it leaves.
        self._counts = captured_counts(most_tokens)
        self._mixed = {count: self._captured(Tokens(count, state.num_slots)) for count in reversed(self._counts)}
        self._sizes = decode_sizes(state.num_slots)
        self._decodes = {size: self._captured(Decodes(size)) for size in reversed(self._sizes)}
        log.info("steps captured", decodes=len(self._sizes), mixed=len(self._counts))

    def run(self, step: Step) -> Sampled | None:
        """What the step sampled; None where none of its works does. Valid until the next step is run."""
        captured = self._fitting(step)
        if captured is None:
            return self._larger.run(step)
        grows = captured.form.grows(step)
        self._state.update(step, grow=not grows)
        numbers = captured.form.numbers(step, spare_slot=self._state.spare_slot, grows=grows)
        captured.packet.copy_(self._fetchable(numbers), non_blocking=True)
        captured.step.replay()
        slots = [work.slot for work in step.works if work.samples]
        if not slots:
            return None
        if self._sampler.is_plain(slots):
            return self._sampler.of_slots(captured.plain, slots)
        captured.resampling.replay()
        return self._sampler.of_slots(captured.whole, slots)

    def _fetchable(self, numbers: NDArray[np.int32]) -> Tensor:
        """A packet, where a GPU may fetch it by itself."""
        packet = torch.from_numpy(numbers)
        return packet.pin_memory() if self._state.device.type == "cuda" else packet

    def _fitting(self, step: Step) -> _Captured | None:
        """The least that holds the step; None where too much of it would be nobody's."""
        if step.is_decode:
            return self._decodes[self._sizes[bisect_left(self._sizes, len(step.works))]]
        num_tokens = step.num_tokens
        count = self._counts[bisect_left(self._counts, num_tokens)]
        return self._mixed[count] if num_tokens <= MOST_TOKENS or num_tokens >= FULL * count else None

    def _captured(self, form: Form) -> _Captured:
        state, spare_block = self._state, self._cache.spare_block
        packet = torch.from_numpy(form.nobody(spare_slot=state.spare_slot)).to(state.device)

        def compute() -> tuple[Tensor, Selection, Sampled]:
            batch = form.batch(packet, state, spare_block=spare_block)
            num_rows = len(batch.selection.slots_R)
            shared_RV = self._logits_RV[:num_rows] if num_rows > FEW_ROWS else None
            logits_RV = self._model.forward(batch, self._cache, shared_RV)
            return logits_RV, batch.selection, self._sampler.plain(logits_RV, batch.selection)

        (logits_RV, selection, plain), step = self._capture(compute)
        # Capturing computes nothing, and whose logits these are is looked up as soon as sampling is tried.
        step.replay()
        before_RV = self._before_RV[: len(logits_RV)]
        whole, resampling = self._capture(lambda: self._sampler.whole(logits_RV, before_RV, selection))
        return _Captured(form, packet, step, logits_RV, selection, plain, resampling, whole)


class CudaCapture:
    """Captures in memory that all graphs share, for no two of them run at a time."""

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, compute: Callable[[], T]) -> tuple[T, Replay]:
        # Once without capturing: kernels are compiled, libraries take their workspaces.
        compute()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            result = compute()
        return result, graph


def captured_counts(most_tokens: int) -> list[int]:
    """The numbers of tokens of captured steps with prefill, rising."""
    counts = token_counts(min(most_tokens, MOST_TOKENS))
    return counts if most_tokens in counts else [*counts, most_tokens]


def num_forms(*, num_slots: int, most_tokens: int) -> int:
    """How many steps are captured."""
    return len(_rows(num_slots, most_tokens))


def logits_rows(*, num_slots: int, most_tokens: int) -> int:
    """Rows of logits that are kept: a place for all forms of many rows, one for each of few, and one for what any of them was before
    it was edited."""
    return 2 * num_slots + sum(rows for rows in _rows(num_slots, most_tokens) if rows <= FEW_ROWS)


def scratch_bytes(*, num_slots: int, max_len: int, heads: int, kv_heads: int, head_dim: int) -> int:
    """Bytes in which decodes leave what their chunks found, at most."""
    return max(
        decode_attention.scratch_bytes(size, max_len=max_len, heads=heads, kv_heads=kv_heads, head_dim=head_dim)
        for size in decode_sizes(num_slots)
    )


def _rows(num_slots: int, most_tokens: int) -> list[int]:
    """How many rows each form samples."""
    return decode_sizes(num_slots) + [min(count, num_slots) for count in captured_counts(most_tokens)]
