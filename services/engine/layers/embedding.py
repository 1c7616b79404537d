"""From token ids to features."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from holdfast.errors import ConfigurationError
from services.engine.layers.linear import Linear, named
from services.engine.quant.matrix import plain
from services.engine.weights import Weights


class Embedding:
    """One row of features for each token of the vocabulary; a rank has those of its part, and of other tokens zeros."""

    def __init__(self, weights: Weights, name: str, *, vocab_size: int, size: int) -> None:
        self._shard = weights.shard
        self.part = weights.shard.part(vocab_size, "tokens")
        self.weight_VI: Tensor | None = None
        """The table, where it is kept as it is."""
        self.table: Linear | None = None
        """Where it is not: a tied head multiplies with the same."""
        matrix, format = weights.matrix(name, self.part, size), weights.format(name)
        if format.scheme is None:
            self.weight_VI = plain(matrix, weights.dtype)
            return
        if format.table is None:
            raise ConfigurationError(
                f"quantization: {name} cannot be kept in {format.name}, for rows of it are looked up; say `{name}=none` before the "
                "other rules, or int8-weight or int4-g64"
            )
        with named(name):
            self.table = Linear(matrix, format=format.table, dtype=weights.dtype)

    def __call__(self, token_ids_N: Tensor) -> Tensor:
        if self._shard.is_alone:
            return self._rows(token_ids_N)
        rows_N = token_ids_N - self.part.start
        others_N = (rows_N < 0) | (rows_N >= self.part.count)
        x_NI = self._rows(rows_N.masked_fill(others_N, 0))
        return self._shard.all_reduce(x_NI.masked_fill_(others_N[:, None], 0))

    def _rows(self, indices_N: Tensor) -> Tensor:
        if self.table is not None:
            return self.table.rows(indices_N)
        assert self.weight_VI is not None
        return F.embedding(indices_N, self.weight_VI)
