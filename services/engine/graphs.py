"""Decode steps as CUDA graphs: each batch size is captured once and replayed with whatever the slots hold.

A captured step reads which slots take part, and how far they are, from a small packet; everything else - the tokens it
begins with, the blocks, the sampling parameters - it finds in the `DeviceState`, where it also leaves what it sampled.
So the host launches step after step without having seen a token. Rows that fill up the batch compute in a slot and a
block that are nobody's.

The model and the sampler are two graphs: rows that want more than a temperature are sampled operation by operation from
the logits that the first one leaves. Steps with prefill run operation by operation as a whole; their kernels are long
enough to hide their launches.
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass
from typing import Any

import structlog
import torch
from torch import Tensor

from services.engine.batch import Step
from services.engine.kv_cache import KVCache
from services.engine.models.decoder import Decoder
from services.engine.ops.kernels import sampling
from services.engine.ops.kernels.step import lay_out
from services.engine.sampler import Sampled, Sampler
from services.engine.state import Batch, DeviceState, Selection, Wants, on_device

log = structlog.stdlib.get_logger(__name__)

CAPTURED_WANTS = Wants.DRAW | Wants.TEMPERATURE
"""What the captured sampler does."""


@dataclass(frozen=True, slots=True)
class _Captured:
    """A decode step of one batch size."""

    packet: Tensor
    """int32, [2, size]: slots and positions."""
    model: torch.cuda.CUDAGraph
    logits_RV: Tensor
    sampler: torch.cuda.CUDAGraph
    sampled: Sampled


class Graphs:
    """Replays decode steps; anything else is for the operation by operation executor."""

    def __init__(self, model: Decoder, cache: KVCache, state: DeviceState, sampler: Sampler) -> None:
        self._model = model
        self._cache = cache
        self._state = state
        self._sampler = sampler
        self._sizes = batch_sizes(state.num_slots)
        state.block_tables[state.spare_slot] = cache.spare_block
        pool = torch.cuda.graph_pool_handle()
        # The largest first: the others find room in the memory that it leaves.
        self._captured = {size: self._capture(size, pool) for size in reversed(self._sizes)}
        log.info("decode steps captured", sizes=len(self._sizes), largest=self._sizes[-1])

    def takes(self, step: Step) -> bool:
        """Whether every work computes one token and samples the next."""
        return step.num_decodes == len(step.works) and all(work.samples for work in step.works)

    def run(self, step: Step) -> Sampled:
        """What the step, one that it `takes`, sampled. Valid until the next step is run."""
        self._state.update(step)
        slots, positions = [work.slot for work in step.works], [work.start for work in step.works]
        count = len(slots)
        captured = self._captured[self._sizes[bisect_left(self._sizes, count)]]
        idle = captured.packet.shape[1] - count
        rows = [slots + [self._state.spare_slot] * idle, positions + [0] * idle]
        captured.packet.copy_(on_device(rows, self._state.device, dtype=torch.int32))
        captured.model.replay()
        if self._state.sampling.wanted_by(slots) & ~CAPTURED_WANTS:
            return self._sample(captured.logits_RV[:count], slots, [position + 1 for position in positions])
        captured.sampler.replay()
        sampled = captured.sampled
        return Sampled(sampled.token_ids_R[:count], sampled.peaks_R[:count], None)

    def _sample(self, logits_RV: Tensor, slots: list[int], positions: list[int]) -> Sampled:
        slots_R, positions_R = on_device([slots, positions], self._state.device).unbind(0)
        selection = Selection(slots, positions, slots_R, positions_R)
        sampled = self._sampler(logits_RV, selection)
        self._state.append(selection, sampled.token_ids_R)
        return sampled

    def _capture(self, size: int, pool: Any) -> _Captured:
        state = self._state
        packet = torch.zeros((2, size), dtype=torch.int32, device=state.device)
        packet[0] = state.spare_slot
        # Once without capturing: kernels are compiled, libraries take their workspaces.
        logits_RV, positions_R = self._forward(packet)
        self._draw(logits_RV, packet[0], positions_R)
        torch.cuda.synchronize()
        model, sampler = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        with torch.cuda.graph(model, pool=pool):
            logits_RV, positions_R = self._forward(packet)
        with torch.cuda.graph(sampler, pool=pool):
            sampled = self._draw(logits_RV, packet[0], positions_R)
        return _Captured(packet, model, logits_RV, sampler, sampled)

    def _forward(self, packet: Tensor) -> tuple[Tensor, Tensor]:
        """The logits of the packet's rows, and the positions of the tokens to sample."""
        state, size = self._state, packet.shape[1]
        slots_S, starts_S = packet.unbind(0)
        ids, positions, writes, lengths = lay_out(
            slots_S, starts_S, state.tokens, state.block_tables, block_size=state.block_size
        )
        batch = Batch(
            token_ids_N=ids,
            positions_N=positions,
            write_slots_N=writes,
            block_tables=state.block_tables,
            table_rows_S=slots_S,
            query_starts=slots_S,
            kv_lengths_S=lengths,
            sample_rows_R=None,
            num_decodes=size,
            query_lens=[1] * size,
            kv_lens=[],
            selection=Selection([], [], slots_S, lengths),
        )
        return self._model.forward(batch, self._cache), lengths

    def _draw(self, logits_RV: Tensor, slots_R: Tensor, positions_R: Tensor) -> Sampled:
        parameters = self._state.sampling
        token_ids_R, peaks_R = sampling.sample(
            logits_RV, parameters.floats, parameters.integers, slots_R, positions_R, self._state.tokens
        )
        return Sampled(token_ids_R, peaks_R, None)


def batch_sizes(most: int) -> list[int]:
    """The sizes to capture, rising to `most`: a step has at most a few rows more than sequences."""
    sizes = [1, 2, 4, *range(8, 32, 8), *range(32, 64, 16), *range(64, most + 32, 32)]
    return [*(size for size in sizes if size < most), most]
