"""A model that is made to compute given tokens, by the way that an engine's prompts take.

Shapes: N tokens of a chunk, R of them whose successors are judged, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from holdfast.errors import ConfigurationError
from services.engine.kv_cache import KVCache
from services.engine.models import Model
from services.engine.quality.passages import Passage
from services.engine.state import Batch, Selection

BLOCK_SIZE = 64


@dataclass(frozen=True, slots=True)
class Chunk:
    """Some tokens of a passage, which follow one another."""

    passage: Passage
    start: int
    end: int

    @property
    def judging(self) -> range:
        """Positions of the chunk at which tokens that are judged are predicted."""
        return range(max(self.start, self.passage.first - 1), min(self.end, len(self.passage.ids) - 1))

    def next_ids(self) -> Tensor:
        """What came there, [R]."""
        return torch.tensor(self.passage.ids[self.judging.start + 1 : self.judging.stop + 1], dtype=torch.int64)

    def batch(self, cache: KVCache) -> Batch:
        """The step that computes it, of a sequence that has the cache's blocks in their order."""
        device, num_tokens = cache.data.device, self.end - self.start
        positions_N = torch.arange(self.start, self.end, device=device)
        # A step samples at least one row; what nobody asked for is thrown away.
        rows = list(self.judging) or [self.end - 1]
        nobody = torch.zeros(len(rows), dtype=torch.int64, device=device)
        return Batch(
            token_ids_N=torch.tensor(self.passage.ids[self.start : self.end], device=device),
            positions_N=positions_N,
            write_slots_N=positions_N,
            block_tables=torch.arange(cache.num_blocks, dtype=torch.int32, device=device)[None],
            table_rows_S=torch.zeros(1, dtype=torch.int64, device=device),
            query_starts=torch.tensor([0, num_tokens], dtype=torch.int32, device=device),
            kv_lengths_S=torch.tensor([self.end], dtype=torch.int32, device=device),
            sample_rows_R=torch.tensor(rows, device=device) - self.start,
            num_decodes=int(num_tokens == 1),
            query_lens=[num_tokens],
            kv_lens=[self.end],
            selection=Selection([], [], nobody, nobody),
        )


def chunks_of(passage: Passage, size: int) -> list[Chunk]:
    """The passage in chunks of this size, the last one shorter."""
    length = len(passage.ids)
    return [Chunk(passage, start, min(start + size, length)) for start in range(0, length, size)]


@dataclass(frozen=True, slots=True)
class Forced:
    """A model and a cache for one passage at a time."""

    name: str
    """For errors."""
    model: Model
    cache: KVCache

    @classmethod
    def of(cls, name: str, model: Model, *, longest: int, device: torch.device | str = "cpu") -> Forced:
        """With a cache for passages of so many tokens."""
        blocks = max(2, -(-longest // BLOCK_SIZE))
        return cls(name, model, KVCache(model.kv_shape, num_blocks=blocks, block_size=BLOCK_SIZE, device=device))

    def check(self, passages: Iterable[Passage]) -> None:
        """Raises `ConfigurationError` for passages that it cannot compute."""
        room = min(self.model.max_positions, self.cache.num_blocks * self.cache.block_size)
        for passage in passages:
            if len(passage.ids) > room:
                raise ConfigurationError(
                    f"{self.name}: a passage has {len(passage.ids):,} tokens, and the model takes {room:,} here; ask for shorter ones"
                )
            if (largest := max(passage.ids)) >= self.model.vocab_size:
                raise ConfigurationError(
                    f"{self.name}: the text has the token {largest:,}, and the model only {self.model.vocab_size:,} tokens: this is the "
                    "tokenizer of another model"
                )

    @torch.inference_mode()
    def log_probs(self, chunk: Chunk) -> Tensor:
        """What it predicts where tokens are judged, [R, V], in float32. The chunks of a passage are computed in their order. Raises
        `ConfigurationError` where a prediction is not a number."""
        logits_RV = self.model.forward(chunk.batch(self.cache), self.cache)[: len(chunk.judging)]
        return checked(logits_RV.log_softmax(-1), chunk, name=self.name)


def checked(log_probs_RV: Tensor, chunk: Chunk, *, name: str) -> Tensor:
    """The same. Raises `ConfigurationError` where a row is not a number; one NaN or +infinity among the logits makes it so."""
    bad_R = log_probs_RV[:, :1].isnan().squeeze(1)
    if bad_R.any():
        position = chunk.judging[int(bad_R.nonzero()[0])]
        raise ConfigurationError(
            f"{name}: the logits behind token {position:,} of a passage are not finite numbers; either the weights hold some that are "
            "not, or a format cannot hold them: try layers by themselves, with rules such as model.layers.0.*=FORMAT"
        )
    return log_probs_RV


def require_one_vocabulary(models: Sequence[Forced]) -> None:
    """Raises `ConfigurationError` for models that cannot be compared token by token."""
    first, *others = models
    for other in others:
        if other.model.vocab_size != first.model.vocab_size:
            raise ConfigurationError(
                f"{other.name} has {other.model.vocab_size:,} tokens and {first.name} {first.model.vocab_size:,}: predictions over "
                "different vocabularies cannot be compared"
            )
