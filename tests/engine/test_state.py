"""What the slots know, and the batches made of it."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from services.engine.batch import Admission, Growth, Step, Work
from services.engine.sampling_state import Wants
from services.engine.sequence import Sequence, StopRules
from services.engine.state import Batch, DeviceState
from tests.engine.driver import Driver
from tests.engine.driver import sequence as known_to_fake_model
from tests.engine.fake_runner import FakeRunner, Launched
from tests.engine.slots import sequence

BLOCK_SIZE = 4


class CheckedRunner(FakeRunner):
    """Runs the fake model on plain lists, and checks that the device's state says the same of every step."""

    def __init__(self, driver: Driver, *, max_len: int) -> None:
        super().__init__(driver.pool)
        num_slots = driver.scheduler.limits.max_sequences
        self.state = DeviceState(num_slots=num_slots, max_len=max_len, block_size=driver.pool.block_size)

    def launch(self, step: Step) -> Launched:
        batch = self.state.apply(step)
        launched = super().launch(step)
        self._check(batch, step)
        self.state.append(batch.selection, torch.tensor(launched.sampled, dtype=torch.int64))
        return launched

    def _check(self, batch: Batch, step: Step) -> None:
        works, size = step.works, self.pool.block_size
        spans = [(self.slots[work.slot], position) for work in works for position in range(work.start, work.end)]
        assert batch.token_ids_N.tolist() == [slot.token_ids[position] for slot, position in spans]
        assert batch.positions_N.tolist() == [position for _, position in spans]
        places = [slot.blocks[position // size] * size + position % size for slot, position in spans]
        assert batch.write_slots_N.tolist() == places
        for work, row in zip(works, batch.block_tables[batch.table_rows_S].tolist(), strict=True):
            blocks = self.slots[work.slot].blocks
            assert row == (blocks + [0] * len(row))[: len(row)]
            assert len(row) * size >= work.end
        assert batch.table_rows_S.tolist() == [work.slot for work in works]
        ends = [sum(work.count for work in works[: index + 1]) for index in range(len(works))]
        assert batch.query_starts.tolist() == [0, *ends]
        assert batch.query_lens == [work.count for work in works]
        assert batch.kv_lens == batch.kv_lengths_S.tolist() == [work.end for work in works]
        assert (batch.max_query, batch.max_kv) == (max(batch.query_lens), max(batch.kv_lens))
        assert batch.num_decodes == step.num_decodes
        sampling = [(end, work) for end, work in zip(ends, works, strict=True) if work.samples]
        assert batch.sample_rows_R.tolist() == [end - 1 for end, _ in sampling]
        selection = batch.selection
        assert selection.slots == selection.slots_R.tolist() == [work.slot for _, work in sampling]
        assert selection.positions == selection.positions_R.tolist() == [work.end for _, work in sampling]
        self._check_types(batch)

    @staticmethod
    def _check_types(batch: Batch) -> None:
        for tensor in (
            batch.token_ids_N,
            batch.positions_N,
            batch.write_slots_N,
            batch.sample_rows_R,
            batch.table_rows_S,
        ):
            assert tensor.dtype is torch.int64
        for tensor in (batch.block_tables, batch.query_starts, batch.kv_lengths_S):
            assert tensor.dtype is torch.int32


@st.composite
def sequences(draw: st.DrawFn) -> list[Sequence]:
    lengths = draw(st.lists(st.tuples(st.integers(1, 30), st.integers(1, 12)), min_size=1, max_size=10))
    prompts = [draw(st.lists(st.integers(0, 3), min_size=count, max_size=count)) for count, _ in lengths]
    return [
        known_to_fake_model(prompt, max_tokens=max_tokens, eos=True, arrival=float(index))
        for index, (prompt, (_, max_tokens)) in enumerate(zip(prompts, lengths, strict=True))
    ]


@settings(deadline=None)
@given(
    many=sequences(),
    num_blocks=st.integers(11, 40),
    max_step_tokens=st.integers(4, 40),
    lookahead=st.integers(0, 3),
    keeps_prefixes=st.booleans(),
)
def test_any_schedule_is_laid_out_as_plain_lists_say(
    many: list[Sequence], num_blocks: int, max_step_tokens: int, lookahead: int, keeps_prefixes: bool
) -> None:
    """Ids, positions, write slots, block tables and rows to sample of every batch: chunked prefill, prefix hits,
    preemption, reused slots and steps planned ahead included."""
    driver = Driver(
        num_blocks=num_blocks, block_size=BLOCK_SIZE, max_step_tokens=max_step_tokens, lookahead=lookahead,
        keeps_prefixes=keeps_prefixes,
    )  # fmt: skip
    driver.runner = CheckedRunner(driver, max_len=num_blocks * BLOCK_SIZE)
    for each in many:
        driver.add(each)
        driver.step()
    driver.run()
    driver.check_all_answered()


def admitting(each: Sequence, *, slot: int = 0, count: int = 1) -> Step:
    """A step that takes one sequence in and computes its last `count` known tokens."""
    work = Work(slot, each.num_known - count, count, True)
    return Step(1, (work,), (Admission.of(each, slot),), (Growth(slot, 0, tuple(range(8))),))


def test_a_decode_reads_the_token_that_the_sampler_wrote() -> None:
    """The host's sequence need not have it yet."""
    state = DeviceState(num_slots=2, max_len=32, block_size=BLOCK_SIZE)
    each = sequence([5, 6])
    first = state.apply(admitting(each, slot=1, count=2))
    state.append(first.selection, torch.tensor([9]))
    second = state.apply(Step(2, (Work(1, 2, 1, True),)))
    assert second.token_ids_N.tolist() == [9]
    assert state.history(1, 3).tolist() == [5, 6, 9]


def test_a_slot_forgets_its_last_sequence() -> None:
    """Wishes and blocks of the one before do not reach the next one."""
    state = DeviceState(num_slots=1, max_len=32, block_size=BLOCK_SIZE)
    rules = StopRules(9, min_tokens=5, stop_token_ids=frozenset({1}))
    demanding = sequence([1, 2], temperature=0.5, top_k=3, logit_bias=((1, 1.0),), logprobs=2, stop=rules)
    state.apply(admitting(demanding))
    assert state.sampling.wanted_by([0]) == (
        Wants.DRAW | Wants.TEMPERATURE | Wants.TOP_K | Wants.BIAS | Wants.LOGPROBS | Wants.MIN_TOKENS
    )
    plain = sequence([3] * 9)
    step = Step(2, (Work(0, 0, 9, True),), (Admission.of(plain, 0),), (Growth(0, 0, (7, 5)),), released=(0,))
    batch = state.apply(step)
    assert batch.block_tables[batch.table_rows_S, :3].tolist() == [[7, 5, 0]]
    assert not state.sampling.wanted_by([0])


def test_seeds_keep_all_their_bits() -> None:
    """The largest one too, and its halves in order."""
    state = DeviceState(num_slots=2, max_len=32, block_size=BLOCK_SIZE)
    largest, other = sequence(temperature=1.0, seed=2**64 - 1), sequence(temperature=1.0, seed=3 << 32 | 7)
    state.apply(admitting(largest, slot=0))
    selection = state.apply(Step(2, (Work(0, 3, 1, True), Work(1, 2, 1, True)), (Admission.of(other, 1),))).selection
    _, integers = state.sampling.parameters.take(selection.slots_R)
    assert (integers.seed_low.tolist(), integers.seed_high.tolist()) == ([2**32 - 1, 7], [2**32 - 1, 3])


def test_a_sequence_longer_than_a_slot_is_our_fault() -> None:
    """Nobody may admit it: the tokens would have nowhere to go."""
    state = DeviceState(num_slots=1, max_len=4, block_size=BLOCK_SIZE)
    with pytest.raises(AssertionError, match="5 known tokens, a slot holds 4"):
        state.apply(admitting(sequence([1] * 5)))
