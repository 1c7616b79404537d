"""Which tokens a step has."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from holdfast.errors import ConfigurationError
from services.engine.quality.passages import tokenizer_of
from services.engine.training.text import Text, split, tokens

TEXT = Text(torch.arange(101, dtype=torch.int32), length=10)


def test_all_windows_come_once_before_any_comes_again() -> None:
    """Ten windows in steps of four: five steps have each twice, in two orders."""
    starts = torch.cat([TEXT.batch(step, 4, seed=0, share=range(4))[:, 0] for step in range(5)]).tolist()
    assert sorted(starts[:10]) == sorted(starts[10:]) == list(range(0, 100, 10))
    assert starts[:10] != starts[10:]


def test_a_window_has_the_token_after_each_of_its_own() -> None:
    """One more than it predicts."""
    assert TEXT.window(9).tolist() == list(range(90, 101))


def test_ranks_share_a_step_without_a_rest() -> None:
    """Whatever their number, a step has the same windows."""
    whole = TEXT.batch(3, 4, seed=1, share=range(4))
    halves = [TEXT.batch(3, 4, seed=1, share=share) for share in (range(2), range(2, 4))]
    assert torch.equal(torch.cat(halves), whole)


def test_another_seed_is_another_order() -> None:
    """The order is the seed's, in every process."""
    one, same, other = (TEXT.batch(0, 10, seed=seed, share=range(10)) for seed in (0, 0, 1))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


def test_whole_files_are_held_out(text: Path) -> None:
    """None is on both sides, and about the share of bytes that was asked for is apart."""
    paths = list(text.iterdir())
    train_on, apart = split(paths, held_out=0.3, seed=0)
    assert sorted(train_on + apart) == sorted(paths)
    assert len(apart) == 2
    assert split(paths[::-1], held_out=0.3, seed=0) == (train_on, apart)
    with pytest.raises(ConfigurationError, match="at least two"):
        split(paths[:1], held_out=0.3, seed=0)


def test_files_are_put_together_with_a_token_between_them(text: Path, stories260k: Path) -> None:
    """So that a window that has two of them can know it. Too little text is refused with its length."""
    paths = sorted(text.iterdir())[:2]
    tokenizer = tokenizer_of(stories260k)
    found = tokens(paths, tokenizer, between=2, length=8).ids.tolist()
    first = tokenizer.encode(paths[0].read_text(), add_special_tokens=False).ids
    assert found[: len(first) + 2] == [2, *first, 2]
    with pytest.raises(ConfigurationError, match="give more text"):
        tokens(paths, tokenizer, between=2, length=100_000)
