"""Steps as plain data."""

from __future__ import annotations

import pickle

from services.engine.batch import Admission, Growth, Step, Work
from services.engine.sequence import StopRules
from tests.engine.slots import sequence


def test_a_step_crosses_to_another_process_unchanged() -> None:
    """Works, admissions, growth and releases; what is a truth value stays one."""
    each = sequence([4, 5, 6], [7], temperature=0.5, logit_bias=((1, 2.0),), stop=StopRules(9, 2, frozenset({3})))
    step = Step(
        8, (Work(3, 70_000, 1, True), Work(0, 0, 4, False)), (Admission.of(each, 0),), (Growth(0, 0, (7, 5)),), (2,)
    )  # fmt: skip
    crossed = pickle.loads(pickle.dumps(step, protocol=5))
    assert crossed == step
    assert [type(work.samples) for work in crossed.works] == [bool, bool]
    assert (crossed.num_tokens, crossed.num_decodes, crossed.works[1].end) == (5, 1, 4)


def test_a_decode_samples_with_every_token() -> None:
    """A prompt's last token is like any other; one in its middle, computed alone, is none."""
    decode, middle, chunk = Work(0, 9, 1, True), Work(1, 4, 1, False), Work(2, 0, 3, True)
    assert Step(1, (decode, decode)).is_decode
    assert not Step(1, (decode, middle)).is_decode
    assert not Step(1, (decode, chunk)).is_decode


def test_an_admission_is_a_sequence_as_it_stands() -> None:
    """What the sequence gets later does not reach it."""
    each = sequence([4, 5], [6], choice=2)
    admission = Admission.of(each, 1)
    each.append(7)
    assert list(admission.token_ids) == [4, 5, 6]
    assert (admission.slot, admission.num_prompt, admission.choice) == (1, 2, 2)


def test_a_step_of_many_decodes_is_small() -> None:
    """256 of them take no more than their numbers do."""
    step = Step(9, tuple(Work(slot, 1000 + slot, 1, True) for slot in range(256)))
    assert len(pickle.dumps(step, protocol=5)) < 256 * 16 + 200
