"""Which sequences run, on which blocks, and what each step computes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from services.engine import assignment
from services.engine.scheduler import Limits
from services.engine.sequence import FinishReason, Phase, Sequence
from tests.engine.driver import Driver, sequence
from tests.engine.fake_runner import expected_output

LOOKAHEADS = pytest.mark.parametrize("lookahead", [0, 1, 2, 3])


def works(driver: Driver) -> list[tuple[Sequence, int, int]]:
    """What the next step computes: (sequence, start, count). Then runs it."""
    step = driver.scheduler.plan(driver.now)
    assert step is not None
    holders = {each.slot: each for each in driver.all}
    driver.in_flight.append(driver.runner.launch(step))
    driver.step()
    return [(holders[work.slot], work.start, work.count) for work in step.works]


@LOOKAHEADS
def test_a_sequence_gets_the_tokens_of_its_model(lookahead: int) -> None:
    """One sequence alone is answered as the model says, up to max_tokens."""
    driver = Driver(lookahead=lookahead)
    only = driver.add(sequence([1, 2, 3, 4, 5], max_tokens=7))
    driver.run()
    assert only.finish is FinishReason.LENGTH
    assert len(only.output_ids) == 7
    driver.check_all_answered()


@LOOKAHEADS
def test_a_stop_token_ends_a_sequence_though_steps_are_in_flight(lookahead: int) -> None:
    """Rows that were planned before the stop token was known are dropped."""
    driver = Driver(lookahead=lookahead, num_blocks=64)
    many = [driver.add(sequence([i, i + 1], max_tokens=60, eos=True, arrival=i)) for i in range(6)]
    driver.run()
    assert FinishReason.STOP in {each.finish for each in many}
    driver.check_all_answered()


def test_decodes_come_before_prefill_which_is_cut_to_the_budget() -> None:
    """A step takes one token of each decoding sequence, then as much of a prompt as the step may still hold."""
    driver = Driver(num_blocks=64, max_step_tokens=8)
    first = driver.add(sequence([1, 2, 3], max_tokens=9))
    assert works(driver) == [(first, 0, 3)]
    second = driver.add(sequence(list(range(12))))
    assert works(driver) == [(first, 3, 1), (second, 0, 7)]
    assert works(driver) == [(first, 4, 1), (second, 7, 5)]
    assert works(driver) == [(first, 5, 1), (second, 12, 1)]


def test_prefill_leaves_time_to_running_sequences() -> None:
    """Beside a decode, prefill gets as many tokens as the measured pace allows within the target, and one block at
    least; alone it gets the whole step."""
    driver = Driver(num_blocks=256, max_step_tokens=128)
    for tokens in range(1, 20):
        driver.scheduler.pace.observe(tokens=tokens, kv_tokens=0, seconds=0.01 * tokens, prefills=True)
    first = driver.add(sequence([1], max_tokens=50))
    works(driver)
    second = driver.add(sequence(list(range(100))))
    (_, (who, start, count)) = works(driver)
    assert (who, start) == (second, 0)
    assert 17 <= count <= 20

    driver.scheduler.pace.observe(tokens=1, kv_tokens=0, seconds=0.01, prefills=False)
    for _ in range(200):
        driver.scheduler.pace.observe(tokens=10, kv_tokens=0, seconds=10.0, prefills=True)
    (_, (who, _, count)) = works(driver)
    assert (who, count) == (second, driver.pool.block_size)

    driver.cancel(first)
    assert works(driver)[0][2] == 100 - second.num_computed or second.num_computed == 100


def test_without_a_target_decodes_wait_while_prompts_fill_the_step() -> None:
    """They go on beside the rest that fills none, and where a prompt finds no block."""
    driver = Driver(num_blocks=64, max_step_tokens=8, itl_target=float("inf"))
    first = driver.add(sequence([1, 2, 3], max_tokens=9))
    assert works(driver) == [(first, 0, 3)]
    second, third = driver.add(sequence(list(range(12)))), driver.add(sequence(list(range(20, 25))))
    assert works(driver) == [(second, 0, 8)]
    assert works(driver) == [(second, 8, 4), (third, 0, 4)]
    assert works(driver) == [(first, 3, 1), (second, 12, 1), (third, 4, 1)]
    driver.run()
    driver.check_all_answered()


def test_without_a_target_decodes_get_on_however_many_prompts_come(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts whose answers are one token free their slots at once, and more may come without end."""
    monkeypatch.setattr(assignment, "_MOST_STEPS_OF_PROMPTS", 5)
    driver = Driver(num_blocks=64, max_step_tokens=8, itl_target=float("inf"), keeps_prefixes=False)
    first = driver.add(sequence([1, 2, 3], max_tokens=6))
    steps = 0
    while not first.is_finished:
        if driver.scheduler.num_waiting < 2:
            driver.add(sequence(list(range(16)), max_tokens=1))
        driver.step()
        steps += 1
        assert steps <= 1 + 5 * (5 + 1)
    assert steps > 5
    driver.run()
    driver.check_all_answered()


def test_a_cached_prefix_is_not_computed_again() -> None:
    """The second sequence computes only what follows the full blocks of the first."""
    driver = Driver()
    driver.add(sequence([1, 2, 3, 4, 5, 6, 7, 8, 9]))
    driver.run()
    again = driver.add(sequence([1, 2, 3, 4, 5, 6, 7, 8, 10]))
    assert works(driver) == [(again, 8, 1)]
    driver.run()
    assert again.num_cached == 8
    assert driver.scheduler.totals.num_cached_tokens == 8
    driver.check_all_answered()


def test_a_prefix_hit_never_covers_the_last_known_token() -> None:
    """Though all blocks of a prompt are held, its last block is computed: there must be something to sample from."""
    driver = Driver()
    driver.add(sequence([1, 2, 3, 4, 5, 6, 7, 8]))
    driver.run()
    again = driver.add(sequence([1, 2, 3, 4, 5, 6, 7, 8]))
    assert works(driver) == [(again, 4, 4)]
    driver.run()
    driver.check_all_answered()


def test_without_a_prefix_cache_everything_is_computed() -> None:
    """Where prefixes are not kept, an equal prompt costs the same again."""
    driver = Driver(keeps_prefixes=False)
    driver.add(sequence([1, 2, 3, 4, 5]))
    driver.run()
    again = driver.add(sequence([1, 2, 3, 4, 5]))
    assert works(driver) == [(again, 0, 5)]


def test_the_answer_is_found_as_a_prefix_too() -> None:
    """A next turn that repeats prompt and answer of the one before computes only what is new."""
    driver = Driver()
    first = driver.add(sequence([1, 2, 3, 4], max_tokens=8))
    driver.run()
    second = driver.add(sequence([*first.prompt_ids, *first.output_ids, 7]))
    driver.run()
    assert second.num_cached == 8
    driver.check_all_answered()


def test_interactive_goes_before_batch_and_each_class_by_arrival() -> None:
    """With one slot and a batch sequence in it, interactive ones run in the order of arrival, then batch ones."""
    driver = Driver(max_sequences=2, num_blocks=64)
    names: dict[Sequence, str] = {}
    for name, interactive, arrival in [("b1", False, 1), ("b2", False, 2), ("i4", True, 4), ("i3", True, 3)]:
        names[driver.add(sequence([1], interactive=interactive, arrival=arrival, max_tokens=3))] = name
    ended = []
    while driver.step():
        ended += [names[each] for each in driver.all if each.is_finished and names[each] not in ended]
    assert ended.index("i3") < ended.index("i4")
    assert ended.index("b1") < ended.index("b2")
    assert ended.index("i3") < ended.index("b2")


def test_batch_yields_its_slot_but_for_its_share() -> None:
    """An interactive sequence takes the slot of the youngest batch one, as long as more than a tenth are batch."""
    driver = Driver(max_sequences=3, num_blocks=64)
    batch = [driver.add(sequence([i], interactive=False, max_tokens=20)) for i in range(3)]
    driver.step()
    for arrival in range(3):
        driver.add(sequence([9], arrival=arrival, max_tokens=20))
        driver.step()
    assert [each.phase for each in batch] == [Phase.RUNNING, Phase.WAITING, Phase.WAITING]
    driver.run()
    driver.check_all_answered()


def test_batch_gets_its_share_however_many_interactive_ones_come() -> None:
    """While interactive sequences fill every slot, a batch one that waits longer than they do gets the next."""
    driver = Driver(max_sequences=2, num_blocks=64)
    for arrival in range(2):
        driver.add(sequence([1], arrival=float(arrival)))
    batch = driver.add(sequence([2], interactive=False, arrival=2.0))
    for arrival in range(3, 20):
        driver.add(sequence([1], arrival=float(arrival)))
        driver.step()
    assert batch.is_finished
    driver.run()
    driver.check_all_answered()


def overloaded(
    driver: Driver, *, steps: int, prompt: int, max_tokens: int, batch_prompt: int
) -> tuple[list[Sequence], list[Sequence]]:
    """Many steps during which more interactive sequences wait than there are slots, and batch ones that have waited
    longer than any of them. Both lists, of all that came."""
    interactive: list[Sequence] = []
    batch: list[Sequence] = []
    for step in range(steps):
        for line, many, length in ((interactive, 2, prompt), (batch, 1, batch_prompt)):
            while sum(not each.is_finished for each in line) < many * driver.scheduler.limits.max_sequences:
                prompt_ids = [1 + (len(line) + 3 * index) % 13 for index in range(length)]
                is_interactive = line is interactive
                arrival = 1000.0 + step if is_interactive else float(step)
                each = sequence(prompt_ids, max_tokens=max_tokens, interactive=is_interactive, arrival=arrival)
                line.append(driver.add(each))
        driver.step()
    return interactive, batch


def share_of(batch: list[Sequence], interactive: list[Sequence], size: Callable[[Sequence], int]) -> float:
    counts = [sum(map(size, each)) for each in (batch, interactive)]
    return counts[0] / sum(counts)


def test_batch_gets_a_tenth_where_slots_are_short() -> None:
    """Of the tokens that are generated while interactive sequences would fill every slot; and not more."""
    driver = Driver(max_sequences=20, num_blocks=400, max_step_tokens=64)
    interactive, batch = overloaded(driver, steps=300, prompt=4, max_tokens=20, batch_prompt=4)
    assert share_of(batch, interactive, lambda each: len(each.output_ids)) == pytest.approx(0.1, abs=0.01)


@pytest.mark.parametrize(("max_sequences", "share"), [(1, 0), (2, 1), (10, 1), (11, 2), (64, 7), (256, 26)])
def test_the_share_of_batch_is_a_tenth_rounded_up(max_sequences: int, share: int) -> None:
    """And never all."""
    assert Limits(max_sequences=max_sequences, max_step_tokens=max_sequences).batch_share == share


@pytest.mark.parametrize("batch_prompt", [30, 200])
def test_batch_gets_a_tenth_where_prefill_is_short(batch_prompt: int) -> None:
    """Of the prompts' tokens that are computed, however long its own are."""
    driver = Driver(max_sequences=20, num_blocks=800, max_step_tokens=40, keeps_prefixes=False)
    interactive, batch = overloaded(driver, steps=300, prompt=30, max_tokens=2, batch_prompt=batch_prompt)
    share = share_of(batch, interactive, lambda each: min(each.num_computed, len(each.prompt_ids)))
    assert share == pytest.approx(0.1, abs=0.03)


def test_batch_gets_a_tenth_where_blocks_are_short() -> None:
    """What it has begun within its share is not thrown out again and again."""
    driver = Driver(max_sequences=10, num_blocks=50, max_step_tokens=64, keeps_prefixes=False)
    interactive, batch = overloaded(driver, steps=300, prompt=12, max_tokens=20, batch_prompt=40)
    assert driver.scheduler.totals.num_preemptions
    assert share_of(batch, interactive, lambda each: len(each.output_ids)) >= 0.1


@pytest.mark.parametrize("num_blocks", [400, 110])
def test_a_long_batch_prompt_delays_no_interactive_sequence(num_blocks: int) -> None:
    """One that comes while it is computed begins with the next step, though there were not enough blocks for both."""
    driver = Driver(max_sequences=10, num_blocks=num_blocks, max_step_tokens=20, keeps_prefixes=False)
    driver.add(sequence([1] * 400, interactive=False, arrival=1.0))
    driver.step()
    late = driver.add(sequence([2] * 18, arrival=2.0))
    driver.step()
    assert len(late.output_ids) == 1
    driver.run()
    driver.check_all_answered()


def test_the_only_interactive_sequence_gets_on_though_batch_holds_the_blocks() -> None:
    """The first in line takes them from whom it must, its share or not."""
    driver = Driver(max_sequences=4, num_blocks=8, max_step_tokens=16, keeps_prefixes=False)
    batch = driver.add(sequence([1] * 12, interactive=False, max_tokens=16))
    while len(batch.output_ids) < 8:
        driver.step()
    driver.add(sequence([2] * 4, max_tokens=20))
    driver.run()
    assert driver.scheduler.totals.num_preemptions
    driver.check_all_answered()


@LOOKAHEADS
def test_the_youngest_is_preempted_and_answers_the_same(lookahead: int) -> None:
    """Where blocks run out the youngest goes back to the line; nobody is told a token twice or another one."""
    driver = Driver(num_blocks=6, lookahead=lookahead)
    old, young = (driver.add(sequence([i] * 6, max_tokens=14, arrival=i)) for i in (1, 2))
    while not driver.scheduler.totals.num_preemptions:
        assert driver.step()
    assert old.phase is Phase.RUNNING
    assert young.phase is Phase.WAITING
    driver.run()
    driver.check_all_answered()


@LOOKAHEADS
def test_one_is_preempted_where_one_is_enough(lookahead: int) -> None:
    """While the blocks of a preempted sequence are on their way back, no other one is thrown out for the same want."""
    driver = Driver(num_blocks=12, block_size=4, lookahead=lookahead)
    for arrival in range(3):
        driver.add(sequence([arrival] * 9, max_tokens=20, arrival=arrival))
    while not driver.scheduler.totals.num_preemptions:
        assert driver.step()
    for _ in range(lookahead + 1):
        driver.step()
    assert driver.scheduler.totals.num_preemptions == 1
    driver.run()
    driver.check_all_answered()


def test_admission_keeps_a_reserve_for_those_that_run() -> None:
    """A sequence is not admitted to the last block while another will want it; it is once that one ended."""
    driver = Driver(num_blocks=3)
    first = driver.add(sequence([1, 2, 3, 4, 5], max_tokens=8))
    driver.step()
    second = driver.add(sequence([6]))
    driver.step()
    assert second.phase is Phase.WAITING
    driver.run()
    assert first.finish is second.finish is FinishReason.LENGTH
    assert driver.scheduler.totals.num_preemptions == 0


def test_what_can_never_fit_is_refused_in_words() -> None:
    """A sequence whose prompt and answer are larger than the whole cache ends at once, and says why."""
    driver = Driver(num_blocks=4, block_size=4)
    fits = driver.add(sequence([1] * 10, max_tokens=7))
    too_long = driver.add(sequence([1] * 10, max_tokens=8))
    assert too_long.finish is FinishReason.ERROR
    assert "need 5 blocks of 4 tokens; the whole cache has 4" in too_long.error
    driver.run()
    assert len(fits.output_ids) == 7
    driver.check_all_answered()


def test_choices_start_when_their_prompt_is_computed() -> None:
    """Choices 1 and 2 wait for choice 0's prompt and then compute no more of it than the last, unfinished block."""
    driver = Driver(num_blocks=64)
    first = driver.add(sequence([1, 2, 3, 4, 5, 6], max_tokens=9))
    others = [driver.add(sequence([1, 2, 3, 4, 5, 6], choice=i, shares_prompt_with=first)) for i in (1, 2)]
    assert works(driver) == [(first, 0, 6)]
    assert works(driver) == [(first, 6, 1), (others[0], 4, 2), (others[1], 4, 2)]
    driver.run()
    driver.check_all_answered()
    assert first.output_ids[:4] != others[0].output_ids


def test_choices_go_on_without_the_first_one() -> None:
    """Cancelling choice 0 before its prompt is computed leaves the others to compute it."""
    driver = Driver()
    first = driver.add(sequence([1, 2, 3]))
    other = driver.add(sequence([1, 2, 3], choice=1, shares_prompt_with=first))
    driver.cancel(first)
    driver.run()
    assert other.finish is FinishReason.LENGTH
    driver.check_all_answered()


@LOOKAHEADS
@pytest.mark.parametrize("steps", range(5))
def test_cancelling_frees_slot_and_blocks_within_one_step(lookahead: int, steps: int) -> None:
    """Whatever was computed of it, a cancelled sequence holds nothing once the steps in flight are committed."""
    driver = Driver(lookahead=lookahead, max_step_tokens=4, num_blocks=64)
    other = driver.add(sequence([1], max_tokens=40))
    gone = driver.add(sequence([2] * 9, max_tokens=20))
    for _ in range(steps):
        driver.step()
    driver.cancel(gone)
    assert gone.phase is Phase.FINISHED
    assert driver.scheduler.num_running == (steps > 0)
    for _ in range(lookahead + 1):
        driver.step()
    assert driver.pool.num_active == len(other.blocks)
    driver.run()
    driver.check_all_answered()


def test_a_deadline_ends_a_running_and_a_waiting_sequence() -> None:
    """Once its time is over a sequence ends with DEADLINE and what it got so far."""
    driver = Driver(max_sequences=1)
    running = driver.add(sequence([1], max_tokens=20, deadline=4.0))
    waiting = driver.add(sequence([2], max_tokens=20, deadline=4.0, arrival=1.0))
    assert driver.scheduler.next_deadline == 4.0
    driver.run()
    assert running.finish is waiting.finish is FinishReason.DEADLINE
    assert (len(running.output_ids), len(waiting.output_ids)) == (3, 0)
    assert driver.scheduler.next_deadline is None
    driver.check_all_answered()


def test_a_loading_sequence_holds_up_nobody() -> None:
    """While blocks are fetched for the first in line the others run; it follows when it is loaded, or ends when it is
    cancelled."""
    driver = Driver(max_sequences=1)
    loading, cancelled = (driver.add(sequence([i], arrival=0.0), loading=True) for i in (1, 2))
    other = driver.add(sequence([3], arrival=1.0))
    driver.run()
    assert other.is_finished
    assert loading.phase is Phase.LOADING
    driver.cancel(cancelled)
    driver.scheduler.loaded(cancelled)
    driver.scheduler.loaded(loading)
    driver.run()
    driver.check_all_answered()


def test_hashes_beyond_the_cache_are_those_worth_fetching() -> None:
    """Of a prompt of four full blocks whose first is held, two can be fetched: the last token must be computed."""
    driver = Driver()
    driver.add(sequence([1, 2, 3, 4, 5], max_tokens=1))
    driver.run()
    each = sequence([1, 2, 3, 4, *range(10, 22)])
    missing = driver.scheduler.hashes_beyond_cache(each)
    assert len(missing) == 2
    (block,) = driver.pool.allocate(1)
    driver.pool.register(block, missing[0])
    assert driver.scheduler.hashes_beyond_cache(each) == missing[1:]


def test_the_youngest_waits_where_others_hold_its_blocks() -> None:
    """With every block pinned by somebody else there is no step; giving one back is enough to go on."""
    driver = Driver(num_blocks=2)
    pinned = driver.pool.allocate(2)
    only = driver.add(sequence([1], max_tokens=2))
    assert not driver.step()
    driver.pool.release(pinned)
    driver.run()
    assert only.finish is FinishReason.LENGTH


@LOOKAHEADS
def test_a_sequence_whose_logits_are_no_numbers_fails_alone(lookahead: int) -> None:
    """It ends with ERROR, others go on, and what was computed of it is not found by anybody, here or elsewhere, though its prompt took
    several steps."""
    driver = Driver(lookahead=lookahead, max_sequences=2, max_step_tokens=5, num_blocks=64)
    told: list[bytes] = []
    driver.scheduler.on_full = lambda block, block_hash, parent: told.append(block_hash)
    sick, well = driver.add(sequence([1] * 9, max_tokens=9)), driver.add(sequence([2] * 9, max_tokens=9))
    driver.runner.sick = sick
    driver.run()
    assert (sick.finish, well.finish) == (FinishReason.ERROR, FinishReason.LENGTH)
    assert "not a number" in sick.error
    assert driver.scheduler.hashes_beyond_cache(sequence([1] * 9)) == sick.block_hashes[:2]
    assert told == well.block_hashes[:4]
    driver.check_all_answered()


def test_a_step_must_hold_a_token_of_every_slot() -> None:
    """Limits under which decodes would not fit into a step are refused."""
    with pytest.raises(ValueError, match="max_step_tokens must be at least max_sequences"):
        Limits(max_sequences=8, max_step_tokens=7)


@dataclass(frozen=True)
class Arrival:
    prompt_ids: list[int]
    max_tokens: int
    interactive: bool
    choices: int
    gone_after: int | None
    """Cancelled after so many steps."""
    deadline: int | None
    loading_for: int
    steps_before: int


ARRIVALS = st.lists(
    st.builds(
        Arrival,
        # Few tokens and a low branching make prefixes that are shared.
        prompt_ids=st.lists(st.integers(1, 2), min_size=1, max_size=14),
        max_tokens=st.integers(1, 10),
        interactive=st.booleans(),
        choices=st.sampled_from([1, 1, 1, 3]),
        gone_after=st.one_of(st.none(), st.none(), st.integers(0, 12)),
        deadline=st.one_of(st.none(), st.none(), st.integers(1, 40)),
        loading_for=st.sampled_from([0, 0, 3]),
        steps_before=st.integers(0, 4),
    ),
    min_size=1,
    max_size=10,
)


@settings(max_examples=300, deadline=None)
@given(
    arrivals=ARRIVALS,
    lookahead=st.integers(0, 3),
    num_blocks=st.integers(6, 14),
    max_sequences=st.integers(1, 4),
    spare_tokens=st.integers(0, 8),
    keeps_prefixes=st.booleans(),
    slow=st.booleans(),
    itl_target=st.sampled_from([0.2, float("inf")]),
)
def test_any_schedule_answers_as_an_unlimited_one(
    arrivals: list[Arrival],
    lookahead: int,
    num_blocks: int,
    max_sequences: int,
    spare_tokens: int,
    keeps_prefixes: bool,
    slow: bool,
    itl_target: float,
) -> None:
    """Under random arrivals, cancellations, deadlines and loads, in tiny pools and steps, every sequence ends, is told
    its tokens once and in order, and those that were let finish are told what the model says. The driver and the
    runner check the accounts, the block tables and the cache's content after every move."""
    driver = Driver(
        num_blocks=num_blocks,
        max_sequences=max_sequences,
        max_step_tokens=max_sequences + spare_tokens,
        lookahead=lookahead,
        keeps_prefixes=keeps_prefixes,
        itl_target=itl_target,
    )
    if slow:
        for tokens in range(8):
            driver.scheduler.pace.observe(tokens=tokens, kv_tokens=0, seconds=tokens * 0.05, prefills=True)
    clock = 0
    leaving: list[tuple[int, Sequence]] = []
    loading: list[tuple[int, Sequence]] = []

    def tick() -> None:
        nonlocal clock
        clock += 1
        for _, each in [pair for pair in leaving if pair[0] == clock]:
            driver.cancel(each)
        for _, each in [pair for pair in loading if pair[0] == clock]:
            driver.scheduler.loaded(each)
        driver.step()

    for arrival in arrivals:
        for _ in range(arrival.steps_before):
            tick()
        first: Sequence | None = None
        for choice in range(arrival.choices):
            each = sequence(
                arrival.prompt_ids,
                max_tokens=arrival.max_tokens,
                eos=True,
                choice=choice,
                interactive=arrival.interactive,
                arrival=float(clock),
                deadline=driver.now + arrival.deadline if arrival.deadline else None,
                shares_prompt_with=first,
            )
            loads = arrival.loading_for > 0 and first is None
            first = first or each
            driver.add(each, loading=loads)
            if loads:
                loading.append((clock + arrival.loading_for, each))
        if arrival.gone_after is not None:
            leaving.append((clock + 1 + arrival.gone_after, first))  # type: ignore[arg-type]
    while clock < max([0, *(at for at, _ in leaving), *(at for at, _ in loading)]):
        tick()
    driver.run()
    driver.check_all_answered()
    for each in driver.all:
        assert each.finish is not FinishReason.ERROR
        if each.finish in (FinishReason.STOP, FinishReason.LENGTH):
            assert each.output_ids == expected_output(each.prompt_ids, each.stop, each.choice)
