"""What benchmarks send."""

from __future__ import annotations

import random
from itertools import pairwise
from pathlib import Path

import pytest

from benchmarks.load import Lengths, Request, poisson, token_ids, trace


def test_a_trace_is_cut_scaled_and_played_faster(tmp_path: Path) -> None:
    """Requests come in the trace's order and rhythm, divided by the speed, their lengths multiplied and then cut."""
    file = tmp_path / "trace.csv"
    file.write_text(
        "TIMESTAMP,ContextTokens,GeneratedTokens\n"
        "2023-11-16 18:17:03.0000000,1,1\n"
        "2023-11-16 18:17:04.0000000,100,3\n"
        "2023-11-16 18:17:05.5000000,1000,80\n"
        "2023-11-16 18:17:09.0000000,7,7\n"
    )
    lengths = Lengths(0.5, max_prompt=400, max_output=20)
    assert trace(file, 2, skip=1, speed=2.0, lengths=lengths) == [Request(0.0, 50, 2), Request(0.75, 400, 20)]


def test_a_trace_that_is_too_short_or_another_table_is_refused(tmp_path: Path) -> None:
    """Nothing is repeated or made up to fill a load."""
    file = tmp_path / "trace.csv"
    file.write_text("TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:17:03.0000000,1,1\n")
    with pytest.raises(ValueError, match="has 1 requests after the first 0, and 2 were asked for"):
        trace(file, 2, skip=0, speed=1.0, lengths=Lengths())
    file.write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="not a trace of the Azure dataset"):
        trace(file, 1, skip=0, speed=1.0, lengths=Lengths())


def test_the_recorded_trace_is_read(shared: Path) -> None:
    """The published trace has the form that `trace` reads, gzipped."""
    file = shared / "data" / "traces" / "azure2023_conv.csv.gz"
    requests = trace(file, 1000, skip=100, speed=1.0, lengths=Lengths())
    assert requests[0].due == 0.0
    assert all(earlier.due <= later.due for earlier, later in pairwise(requests))


def test_poisson_arrivals_keep_their_rate_and_their_seed() -> None:
    """Ten thousand arrivals at 5 a second take 2,000 seconds within a few percent, the same ones for the same seed."""
    load = poisson(10_000, rate=5.0, prompt_tokens=3, output_tokens=4, seed=1)
    assert load[-1].due == pytest.approx(2000, rel=0.05)
    assert load == poisson(10_000, rate=5.0, prompt_tokens=3, output_tokens=4, seed=1)
    assert load != poisson(10_000, rate=5.0, prompt_tokens=3, output_tokens=4, seed=2)


def test_prompts_are_ids_of_the_vocabulary_that_share_no_prefix() -> None:
    """Every id is one of the vocabulary, and no two prompts begin alike."""
    draw = random.Random(0)
    prompts = [token_ids(Request(0.0, 50, 1), vocab_size=1000, draw=draw) for _ in range(100)]
    assert all(len(prompt) == 50 and 0 <= min(prompt) and max(prompt) < 1000 for prompt in prompts)
    assert len({tuple(prompt[:4]) for prompt in prompts}) == 100
