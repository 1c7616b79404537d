"""What a choice of formats costs, on a model small enough for a test."""

from __future__ import annotations

import gzip
import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer

from benchmarks import quality
from benchmarks.quality import Subject
from holdfast.errors import ConfigurationError
from services.engine.models import load
from tests.engine.batches import Bench

CONTEXT = 48


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    """An engine sets the number of torch's threads for the whole process; other tests have their own."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def subjects(folder: Path, *choices: str) -> list[Subject]:
    common = "device=cpu threads=1 block_size=16"
    return [quality.subject(choice, folder, f"{common} {choice}", window=CONTEXT) for choice in choices]


@pytest.fixture
def ids(stories260k: Path, tmp_path: Path) -> list[int]:
    """The published text, read from a packed file."""
    packed = tmp_path / "text.gz"
    packed.write_bytes(gzip.compress((stories260k / "expected_greedy_200.txt").read_bytes()))
    found = quality.read(packed, Tokenizer.from_file(str(stories260k / "tokenizer.json")), 150)
    assert len(found) == 150
    return found


def test_perplexity_is_that_of_windows_computed_at_once(stories260k: Path, ids: list[int]) -> None:
    """Of every token that follows another in its window; what is left of the text does not count."""
    (judged,) = subjects(stories260k, "dtype=float32")
    quality.judge([judged], ids, window=CONTEXT, chunk=20)
    nats = []
    for start in (0, 48, 96):
        window = ids[start : start + CONTEXT]
        logits = Bench(load(stories260k)).logits(window).log_softmax(-1)
        nats += [-float(logits[at, token]) for at, token in enumerate(window[1:])]
    assert judged.perplexity == pytest.approx(math.exp(sum(nats) / len(nats)), rel=1e-5)


def test_fewer_bits_diverge_more(stories260k: Path, ids: list[int]) -> None:
    """The reference diverges from itself by nothing; layers in 8 bits do, the more of them the more."""
    rules = ("auto", "-1=int8,auto", "int8", "fp8_e4m3")
    judged = subjects(stories260k, *(f"dtype=float32 kv_cache_dtype={rule}" for rule in rules))
    quality.judge(judged, ids, window=CONTEXT, chunk=16)
    divergences = [float(torch.cat(each.divergences).mean()) for each in judged]
    assert divergences[0] == 0 < divergences[1] < divergences[2] < divergences[3] < 0.05
    rows = [each.row(judged[0]) for each in judged]
    assert rows[0][2:6] == ["+0.000%", "0.00e+00", "0.00e+00", "100.00%"]
    assert rows[2][-1] == 5 * 2 * 4 * (8 + 4)


def test_windows_that_the_model_does_not_take_are_refused(stories260k: Path) -> None:
    """And values that its settings cannot have."""
    with pytest.raises(ConfigurationError, match="a window has 600 tokens, and the model takes 512: lower --window"):
        quality.subject("", stories260k, "device=cpu threads=1", window=600)
    with pytest.raises(ConfigurationError, match="block_size: Input should be 16, 32 or 64, not 'abc'"):
        quality.subject("", stories260k, "block_size=abc", window=CONTEXT)


def test_a_text_shorter_than_a_window_ends_the_benchmark(
    stories260k: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With one line."""
    text = tmp_path / "text"
    text.write_text("Once upon a time")
    with pytest.raises(SystemExit):
        quality.main([str(stories260k), "--text", str(text), "--window", "64"])
    assert "tokens here, fewer than a window of 64: lower --window" in capsys.readouterr().err
