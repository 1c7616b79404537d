"""From token ids to features."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from services.engine.weights import Weights


class Embedding:
    """One row of features for each token of the vocabulary; a rank has those of its part, and of other tokens zeros."""

    def __init__(self, weights: Weights, name: str, *, vocab_size: int, size: int) -> None:
        self._shard = weights.shard
        self.part = weights.shard.part(vocab_size, "tokens")
        self.weight_VI = weights.take(f"{name}.weight", self.part, size)

    def __call__(self, token_ids_N: Tensor) -> Tensor:
        if self._shard.is_alone:
            return F.embedding(token_ids_N, self.weight_VI)
        rows_N = token_ids_N - self.part.start
        others_N = (rows_N < 0) | (rows_N >= self.part.count)
        x_NI = F.embedding(rows_N.masked_fill(others_N, 0), self.weight_VI)
        return self._shard.all_reduce(x_NI.masked_fill_(others_N[:, None], 0))
