"""What the host sends a captured step, and what the step makes of it.

A captured step is of one `Form`: decodes of a fixed number of sequences, or a fixed number of tokens of any works. The host
fills a packet of numbers, [rows, width] int32; everything else - the tokens, the blocks, the sampling parameters - the
device finds in the `DeviceState`. What a step has less than its form computes in a slot and a block that are nobody's.

Shapes: S works of the form, N tokens of the form.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import chain
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from services.engine.batch import Step
from services.engine.ops.kernels.attention import Works
from services.engine.ops.kernels.step import lay_out, lay_out_works
from services.engine.state import Batch, DeviceState, Selection


class Form(Protocol):
    """The shape of a captured step."""

    @property
    def rows(self) -> int:
        """Of its packet."""
        ...

    @property
    def width(self) -> int:
        """Of its packet."""
        ...

    def nobody(self, *, spare_slot: int) -> NDArray[np.int32]:
        """The packet of a step without works."""
        ...

    def grows(self, step: Step) -> bool:
        """Whether the packet can say how the step's block tables grow."""
        ...

    def numbers(self, step: Step, *, spare_slot: int, grows: bool) -> NDArray[np.int32]:
        """The packet of a step. `grows`: whether it says how block tables grow; else they have grown before it is read."""
        ...

    def batch(self, packet: Tensor, state: DeviceState, *, spare_block: int) -> Batch:
        """What the model is given. Its selection names nobody: the device alone knows whose the rows are."""
        ...


@dataclass(frozen=True, slots=True)
class Decodes:
    """So many sequences, a token each, all of which sample."""

    size: int

    @property
    def rows(self) -> int:
        """Slots, positions, entries of the block tables that are new, and their blocks."""
        return 4

    @property
    def width(self) -> int:
        """A number for each sequence."""
        return _aligned(self.size)

    def nobody(self, *, spare_slot: int) -> NDArray[np.int32]:
        """As `Form.nobody`: no table grows either."""
        packet = np.zeros((self.rows, self.width), np.int32)
        packet[0], packet[2] = spare_slot, -1
        return packet

    def grows(self, step: Step) -> bool:
        """As `Form.grows`: by a block each, of sequences that the step computes, which is nearly always so."""
        if not step.grown:
            return False
        computed = {work.slot for work in step.works}
        return all(len(growth.blocks) == 1 and growth.slot in computed for growth in step.grown)

    def numbers(self, step: Step, *, spare_slot: int, grows: bool) -> NDArray[np.int32]:
        """As `Form.numbers`."""
        packet = self.nobody(spare_slot=spare_slot)
        packet[:2, : len(step.works)] = _columns(step)[:2]
        if grows:
            row_of = {work.slot: row for row, work in enumerate(step.works)}
            rows = [row_of[growth.slot] for growth in step.grown]
            packet[2, rows] = [growth.index for growth in step.grown]
            packet[3, rows] = [growth.blocks[0] for growth in step.grown]
        return packet

    def batch(self, packet: Tensor, state: DeviceState, *, spare_block: int) -> Batch:
        """As `Form.batch`. A row that is nobody's is a first token in the spare slot."""
        slots_S, starts_S, grown_S, blocks_S = packet[:, : self.size].unbind(0)
        ids, positions, writes, lengths = lay_out(
            slots_S, starts_S, grown_S, blocks_S, state.tokens, state.block_tables, block_size=state.block_size
        )
        nobody = slots_S[:0]
        return Batch(
            token_ids_N=ids,
            positions_N=positions,
            write_slots_N=writes,
            block_tables=state.block_tables,
            table_rows_S=slots_S,
            query_starts=nobody,
            kv_lengths_S=lengths,
            sample_rows_R=None,
            num_decodes=self.size,
            query_lens=[1] * self.size,
            kv_lens=[],
            selection=Selection([], [], slots_S, lengths),
            works=Works(slots_S, lengths, nobody, nobody, nobody, nobody, most_prefill=0),
        )


@dataclass(frozen=True, slots=True)
class Tokens:
    """So many tokens, of decodes and of chunks of prompts; as many works as there are slots, or tokens if these are fewer."""

    count: int
    num_slots: int

    @property
    def rows(self) -> int:
        """Slots, positions and first tokens of the works; rows, slots and positions to sample; how many are decodes."""
        return 7

    @property
    def num_works(self) -> int:
        """Most works."""
        return min(self.count, self.num_slots)

    @property
    def width(self) -> int:
        """A number for each work, and one more for where the last one's tokens end."""
        return _aligned(self.num_works + 1)

    def nobody(self, *, spare_slot: int) -> NDArray[np.int32]:
        """As `Form.nobody`."""
        packet = np.zeros((self.rows, self.width), np.int32)
        packet[0] = packet[4] = spare_slot
        return packet

    def grows(self, step: Step) -> bool:
        """As `Form.grows`: never, for prompts grow by any number of blocks."""
        return False

    def numbers(self, step: Step, *, spare_slot: int, grows: bool) -> NDArray[np.int32]:
        """As `Form.numbers`."""
        assert not grows
        slots, starts, counts, samples = _columns(step)
        ends, (sampling,) = counts.cumsum(), samples.nonzero()
        packet = self.nobody(spare_slot=spare_slot)
        packet[2, 1:] = ends[-1]
        packet[0, : len(slots)] = slots
        packet[1, : len(slots)] = starts
        packet[2, 1 : len(slots) + 1] = ends
        packet[3, : len(sampling)] = ends[sampling] - 1
        packet[4, : len(sampling)] = slots[sampling]
        packet[5, : len(sampling)] = (starts + counts)[sampling]
        packet[6, 0] = step.num_decodes
        return packet

    def batch(self, packet: Tensor, state: DeviceState, *, spare_block: int) -> Batch:
        """As `Form.batch`. A token that is nobody's belongs to no work: nothing attends for it."""
        slots_S, starts_S, _, sample_rows_S, sample_slots_S, sample_positions_S, _ = packet[:, : self.num_works].unbind(
            0
        )
        query_starts = packet[2, : self.num_works + 1]
        layout = lay_out_works(
            slots_S,
            starts_S,
            query_starts,
            packet[6, :1],
            state.tokens,
            state.block_tables,
            num_tokens=self.count,
            block_size=state.block_size,
            spare_block=spare_block,
        )
        return Batch(
            token_ids_N=layout.ids_N,
            positions_N=layout.positions_N,
            write_slots_N=layout.write_slots_N,
            block_tables=state.block_tables,
            table_rows_S=slots_S,
            query_starts=query_starts,
            kv_lengths_S=layout.lengths_S,
            sample_rows_R=sample_rows_S,
            num_decodes=self.num_works,
            query_lens=[],
            kv_lens=[],
            selection=Selection([], [], sample_slots_S, sample_positions_S),
            works=Works(
                slots_S,
                layout.decode_lengths_S,
                slots_S,
                layout.lengths_S,
                layout.prefill_counts_S,
                query_starts,
                most_prefill=self.count,
            ),
        )


def decode_sizes(most: int) -> list[int]:
    """The numbers of sequences to capture, rising to `most`: a step has at most a few rows more than sequences."""
    sizes = [1, 2, 4, *range(8, 32, 8), *range(32, 64, 16), *range(64, most + 32, 32)]
    return [*(size for size in sizes if size < most), most]


def token_counts(most: int) -> list[int]:
    """The numbers of tokens to capture, rising to `most`: 64 at least, and from there four to an octave, so that of a
    step of more at most a fifth is nobody's."""
    counts = [quarter << octave for octave in range(4, most.bit_length()) for quarter in (4, 5, 6, 7)]
    return [*(count for count in counts if count < most), most]


def _aligned(width: int) -> int:
    """So that every row begins where wide loads may."""
    return -(-width // 4) * 4


def _columns(step: Step) -> NDArray[np.int32]:
    """Slots, starts, counts of the works, and whether they sample."""
    numbers = np.fromiter(chain.from_iterable(step.works), np.int32, count=4 * len(step.works))
    return numbers.reshape(-1, 4).T
