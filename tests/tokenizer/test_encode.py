"""Texts to ids."""

from __future__ import annotations

import asyncio
import random
import time
from pathlib import Path

import pytest

from holdfast.errors import InvalidRequest
from services.tokenizer.encode import encoding
from services.tokenizer.loading import ModelTokenizer
from tests.tokenizer.conftest import random_text


@pytest.mark.parametrize(("name", "vectors"), [("llama-3", "llama-bpe"), ("qwen3", "qwen2")])
async def test_ids_are_those_that_llama_cpp_expects(
    name: str, vectors: str, shared: Path, tokenizers: dict[str, ModelTokenizer]
) -> None:
    """Every text of llama.cpp's test vectors gives the published ids."""
    folder = shared / "data" / "tokenizers" / "vectors"
    texts = (folder / f"ggml-vocab-{vectors}.gguf.inp").read_bytes().decode().split("\n__ggml_vocab_test__\n")
    lines = (folder / f"ggml-vocab-{vectors}.gguf.out").read_text().split("\n")
    expected = [[int(id) for id in line.split()] for line in lines]
    async with encoding(tokenizers[name], threads=1) as encoder:
        assert await encoder.encode(texts, special_tokens=False) == expected
    assert len(texts) == 47


@pytest.mark.parametrize("name", ["qwen3", "llama-3", "smollm2", "stories260k"])
async def test_many_texts_in_one_call_give_the_ids_of_each_alone(
    name: str, tokenizers: dict[str, ModelTokenizer]
) -> None:
    """The fast call for several texts gives the ids of the slow one for one, with and without special tokens."""
    rng = random.Random(name)
    texts = ["", *(random_text(rng) for _ in range(300))]
    backend = tokenizers[name].backend
    async with encoding(tokenizers[name], threads=2) as encoder:
        for special_tokens in (True, False):
            alone = [backend.encode(text, add_special_tokens=special_tokens).ids for text in texts]
            assert await encoder.encode(texts, special_tokens=special_tokens) == alone


async def test_special_tokens_are_added_by_default_only_where_the_tokenizer_does(
    tokenizers: dict[str, ModelTokenizer],
) -> None:
    """Llama 3 begins a text with its bos token; the default model with nothing."""
    for name, expected in (("llama-3", [128000]), ("smollm2", [])):
        async with encoding(tokenizers[name], threads=1) as encoder:
            assert await encoder.encode([""], special_tokens=True) == [expected]


async def test_the_event_loop_goes_on_while_a_long_text_is_encoded(tokenizers: dict[str, ModelTokenizer]) -> None:
    """Between two turns of the loop far less time passes than the text takes."""
    text = " ".join(random_text(random.Random(number)) for number in range(20_000))
    longest = 0.0
    async with encoding(tokenizers["llama-3"], threads=1) as encoder:
        began = before = time.perf_counter()
        work = asyncio.ensure_future(encoder.encode([text], special_tokens=False))
        while not work.done():
            await asyncio.sleep(0)
            longest, before = max(longest, time.perf_counter() - before), time.perf_counter()
        await work
        took = time.perf_counter() - began
    assert longest < took / 4


async def test_a_call_that_is_cancelled_before_its_turn_is_never_computed(
    tokenizers: dict[str, ModelTokenizer], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It leaves its place in the queue: what comes after it does not wait for it."""
    computed: list[str] = []

    async with encoding(tokenizers["stories260k"], threads=1) as encoder:
        compute = encoder._encode

        def noted(texts: list[str], special_tokens: bool) -> list[list[int]]:
            computed.append(texts[0])
            return compute(texts, special_tokens)

        monkeypatch.setattr(encoder, "_encode", noted)
        long = asyncio.ensure_future(encoder.encode(["a" * 1_000_000], special_tokens=False))
        await asyncio.sleep(0)
        cancelled = asyncio.ensure_future(encoder.encode(["b"], special_tokens=False))
        await asyncio.sleep(0)
        cancelled.cancel()
        with pytest.raises(asyncio.CancelledError):
            await cancelled
        await encoder.encode(["c"], special_tokens=False)
        await long
    assert [text[0] for text in computed] == ["a", "c"]


async def test_a_token_that_the_model_lacks_is_refused(tokenizers: dict[str, ModelTokenizer]) -> None:
    """A tokenizer that knows more tokens than the model has rows gives an error that names the token."""
    whole = tokenizers["stories260k"]
    cut = ModelTokenizer(**{name: getattr(whole, name) for name in whole.__slots__} | {"vocab_size": 400})
    async with encoding(cut, threads=1) as encoder:
        assert await encoder.encode(["a"], special_tokens=True)
        with pytest.raises(InvalidRequest, match="and the model has only 400 tokens"):
            await encoder.encode(["the quick brown fox"], special_tokens=True)
