"""Texts to ids, in threads: the tokenizer works without the interpreter's lock, the event loop goes on."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager

from holdfast.errors import InvalidRequest
from services.tokenizer.loading import ModelTokenizer


class Encoder:
    """Encodes in a bounded number of threads."""

    def __init__(self, tokenizer: ModelTokenizer, threads: ThreadPoolExecutor) -> None:
        self._backend = tokenizer.backend
        self._vocab_size = tokenizer.vocab_size
        self._beyond_the_model = max(self._backend.get_vocab().values(), default=0) >= tokenizer.vocab_size
        self._threads = threads

    async def encode(self, texts: Sequence[str], *, special_tokens: bool) -> list[list[int]]:
        """One list of ids for each text; with `special_tokens`, those that the tokenizer adds by default among them. A
        call that is cancelled while it waits for a thread is never computed.

        Raises:
            InvalidRequest: a text has a token for which the model has no embedding.
        """
        return await asyncio.get_running_loop().run_in_executor(self._threads, self._encode, texts, special_tokens)

    def _encode(self, texts: Sequence[str], special_tokens: bool) -> list[list[int]]:
        encodings = self._backend.encode_batch_fast(list(texts), add_special_tokens=special_tokens)
        ids: list[list[int]] = [encoding.ids for encoding in encodings]
        if self._beyond_the_model:
            self._check(ids)
        return ids

    def _check(self, ids_of_texts: list[list[int]]) -> None:
        """Some models come with a tokenizer that was given more tokens than they have."""
        for ids in ids_of_texts:
            if (largest := max(ids, default=0)) >= self._vocab_size:
                token = self._backend.id_to_token(largest)
                raise InvalidRequest(f"{token!r} is token {largest}, and the model has only {self._vocab_size} tokens")


@asynccontextmanager
async def encoding(tokenizer: ModelTokenizer, *, threads: int | None) -> AsyncIterator[Encoder]:
    """An encoder whose threads (by default one for each core) end with the block."""
    pool = ThreadPoolExecutor(threads or os.cpu_count() or 1, thread_name_prefix="encode")
    try:
        yield Encoder(tokenizer, pool)
    finally:
        await asyncio.to_thread(pool.shutdown, cancel_futures=True)
