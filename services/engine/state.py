"""What the device knows of the running sequences, by slot, and the batch a step makes of it.

A slot holds a sequence's known tokens, its block table and its sampling parameters. A step brings what changes (the
delta) and says which tokens to compute; everything else, the token that a decode begins with above all, is read from
the slots. Sampled tokens are written back by `append`, so one step's input never waits for the host to see the last
one's output. Nothing that a step does here grows with the vocabulary, nor with the context but for its block tables.

Shapes: N tokens of the step, S works of the step, R rows to sample, B blocks.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from services.engine.batch import Admission, Growth, Step
from services.engine.sampling_state import SamplingState
from services.engine.transfers import on_device

if TYPE_CHECKING:
    from services.engine.ops.kernels.attention import Works


@dataclass(frozen=True, slots=True)
class Selection:
    """Where a step samples: which slots get their next token, and at which position of the sequence it stands."""

    slots: Seq[int]
    positions: Seq[int]
    slots_R: Tensor
    positions_R: Tensor
    """Both int64."""

    def __len__(self) -> int:
        return len(self.slots)

    def take(self, rows: Seq[int], rows_D: Tensor) -> Selection:
        """Some of the rows; both say the same."""
        return Selection(
            [self.slots[row] for row in rows],
            [self.positions[row] for row in rows],
            self.slots_R.index_select(0, rows_D),
            self.positions_R.index_select(0, rows_D),
        )


@dataclass(frozen=True, slots=True)
class Batch:
    """What a model needs to know of a step. The works stand one after the other, decodes first."""

    token_ids_N: Tensor
    positions_N: Tensor
    """Both int64."""
    write_slots_N: Tensor
    """int64: block * block_size + offset, where each token's keys and values go."""
    block_tables: Tensor
    """int32, [slots, blocks]: the blocks of every slot's sequence."""
    table_rows_S: Tensor
    """int64: the row of each work's sequence in there."""
    query_starts: Tensor
    """int32, S + 1 of them: the works' first tokens among N, and N."""
    kv_lengths_S: Tensor
    """int32: tokens of each sequence after this step's are written."""
    sample_rows_R: Tensor | None
    """int64: the tokens among N whose logits are wanted; None for all of them."""

    # The same for the host.
    num_decodes: int
    """The first so many works compute one token each."""
    query_lens: Seq[int]
    kv_lens: Seq[int]

    selection: Selection
    """Not for the model: to whom the rows of `sample_rows_R` belong."""

    works: Works | None = None
    """Of a captured step: what attention goes by, since the host's numbers are not those of the step that is replayed."""

    @property
    def max_query(self) -> int:
        return max(self.query_lens)

    @property
    def max_kv(self) -> int:
        return max(self.kv_lens)


class DeviceState:
    """All slots of one engine. Steps are applied in their order, from one thread."""

    def __init__(self, *, num_slots: int, max_len: int, block_size: int, device: torch.device | str = "cpu") -> None:
        self.device = torch.device(device)
        self.max_len = max_len
        self.num_slots = num_slots
        self.block_size = block_size
        # One slot more than there are sequences, for the rows that fill up a captured step.
        self.spare_slot = num_slots
        self.sampling = SamplingState(num_slots + 1, device=self.device)
        self.tokens = torch.zeros((num_slots + 1, max_len), dtype=torch.int32, device=self.device)
        """[slots, max_len] int32: the known tokens of each slot."""
        num_blocks = -(-max_len // block_size)
        self.block_tables = torch.zeros((num_slots + 1, num_blocks), dtype=torch.int32, device=self.device)
        """[slots, blocks] int32."""

    def apply(self, step: Step) -> Batch:
        """Takes in the step's delta and lays out its batch. The tokens it computes are known to the slots by then."""
        self.update(step)
        return self._batch(step)

    def update(self, step: Step, *, grow: bool = True) -> None:
        """Takes in the step's delta; without `grow` all but the blocks."""
        for slot in step.released:
            self.sampling.release(slot)
        for admission in step.admitted:
            self._admit(admission)
        if step.grown and grow:
            self._grow(step.grown)

    def append(self, selection: Selection, token_ids_R: Tensor) -> None:
        """The sampled tokens become known."""
        self.tokens.index_put_((selection.slots_R, selection.positions_R), token_ids_R.int())

    def history(self, slot: int, length: int) -> Tensor:
        """The first `length` known tokens of a slot, int32."""
        return self.tokens[slot, :length]

    def _admit(self, admission: Admission) -> None:
        slot, num_known = admission.slot, len(admission.token_ids)
        assert num_known <= self.max_len, f"{num_known} known tokens, a slot holds {self.max_len}"
        self.tokens[slot, :num_known] = on_device(admission.token_ids, self.device, dtype=torch.int32)
        self.block_tables[slot].zero_()
        self.sampling.admit(admission)

    def _grow(self, grown: Seq[Growth]) -> None:
        entries = [
            (growth.slot, growth.index + offset, block)
            for growth in grown
            for offset, block in enumerate(growth.blocks)
        ]
        slots, indices, blocks = on_device(entries, self.device).unbind(1)
        self.block_tables.index_put_((slots, indices), blocks.int())

    def _batch(self, step: Step) -> Batch:
        """The layout of a step, from one copy of the host's numbers to the device."""
        works = step.works
        query_lens = [work.count for work in works]
        kv_lens = [work.end for work in works]
        query_starts = [0]
        for count in query_lens:
            query_starts.append(query_starts[-1] + count)
        sampling = [index for index, work in enumerate(works) if work.samples]
        slots, positions = [works[index].slot for index in sampling], [kv_lens[index] for index in sampling]
        numbers = (
            [work.slot for work in works],
            [work.start for work in works],
            query_starts,
            kv_lens,
            [query_starts[index + 1] - 1 for index in sampling],
            slots,
            positions,
        )
        flat = on_device([number for part in numbers for number in part], self.device)
        slots_S, starts_S, query_starts_S1, kv_lengths_S, sample_rows_R, slots_R, positions_R = torch.split(
            flat, [len(part) for part in numbers]
        )
        slots_N, positions_N = slots_S, starts_S
        if query_starts[-1] > len(works):
            slots_N, positions_N = _spread(slots_S, starts_S, query_starts_S1, num_tokens=query_starts[-1])
        return Batch(
            token_ids_N=self.tokens[slots_N, positions_N].long(),
            positions_N=positions_N,
            write_slots_N=self._write_slots(slots_N, positions_N),
            block_tables=self.block_tables,
            table_rows_S=slots_S,
            query_starts=query_starts_S1.int(),
            kv_lengths_S=kv_lengths_S.int(),
            sample_rows_R=sample_rows_R,
            num_decodes=step.num_decodes,
            query_lens=query_lens,
            kv_lens=kv_lens,
            selection=Selection(slots, positions, slots_R, positions_R),
        )

    def _write_slots(self, slots_N: Tensor, positions_N: Tensor) -> Tensor:
        blocks_N = self.block_tables[slots_N, positions_N // self.block_size]
        return blocks_N.long() * self.block_size + positions_N % self.block_size


def _spread(slots_S: Tensor, starts_S: Tensor, query_starts_S1: Tensor, *, num_tokens: int) -> tuple[Tensor, Tensor]:
    """The slot and the position of each token of the step."""
    works_N = torch.repeat_interleave(query_starts_S1.diff(), output_size=num_tokens)
    offsets_S = starts_S - query_starts_S1[:-1]
    return slots_S[works_N], torch.arange(num_tokens, device=slots_S.device) + offsets_S[works_N]
