"""From features to logits.

Shapes: R rows whose logits are wanted, I features, V vocabulary, C candidates of a row.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from services.engine.layers.embedding import Embedding
from services.engine.layers.linear import Linear, named
from services.engine.ops.forms import Activations, Form
from services.engine.ops.linear import products
from services.engine.ops.sampling import likeliest
from services.engine.quant import Weight
from services.engine.quant.matrix import plain
from services.engine.quant.unquantized import Unquantized
from services.engine.shard import Part, Shard
from services.engine.weight_format import EMBEDDING, HEAD
from services.engine.weights import Weights

_CANDIDATES = 16


class Head:
    """A matrix whose products are compared with each other: they are wanted in float32, and a GPU gives them so.

    On a CPU, products of 16-bit values come out in 16 bits. Of these bfloat16 has eight for the number itself: logits about 25 lie
    an eighth apart, and the best tokens often seem equally good. So the best candidates of a row are computed again, in
    float32; they are a few rows of the matrix out of many thousands.
    """

    def __init__(self, linear: Linear, weight_VI: Tensor | None, *, part: Part, shard: Shard) -> None:
        """`weight_VI` holds the values that `linear` multiplies with, as they were loaded: those of a `part` of the
        vocabulary. None if it multiplies with others and gives float32 itself, or rounds products and gives rows."""
        self._linear = linear
        self._weight_VI = weight_VI
        self._part = part
        self._shard = shard

    @classmethod
    def load(cls, weights: Weights, embedding: Embedding, *, hidden: int, tied: bool) -> Head:
        """The model's. A tied one is the embedding's table, in whatever format that is; unless a rule names another one for the
        head: then it is a matrix of its own."""
        part, shard, format = embedding.part, weights.shard, weights.format(HEAD)
        table = embedding.table
        if tied and table is not None and (not weights.is_named(HEAD) or table.is_in(format)):
            return cls(table, None, part=part, shard=shard)
        name = EMBEDDING if tied else HEAD
        weight_VI: Weight | None = embedding.weight_VI if tied else None
        if weight_VI is None:
            weight_VI = weights.matrix(name, part, hidden)
        if format.scheme is None:
            weight_VI = plain(weight_VI, weights.dtype)
        scale = weights.input_scale(HEAD) if format.needs_input_scale else None
        with named(HEAD):
            linear = Linear(weight_VI, format=format, dtype=weights.dtype, input_scale=scale)
        kept_VI = weight_VI if isinstance(format, Unquantized) and isinstance(weight_VI, Tensor) else None
        return cls(linear, kept_VI, part=part, shard=shard)

    @property
    def takes(self) -> Form:
        return self._linear.takes if self._weight_VI is None else None

    def __call__(self, x_RI: Activations, out_RV: Tensor | None = None) -> Tensor:
        """The logits in float32, [R, V], of the whole vocabulary; in `out_RV` where there is one."""
        if self._shard.is_alone:
            return self._products(x_RI, out_RV)
        logits_RV = self._shard.all_gather(self._products(x_RI), self._part)
        return logits_RV if out_RV is None else out_RV.copy_(logits_RV)

    def _products(self, x_RI: Activations, out_RV: Tensor | None = None) -> Tensor:
        if self._weight_VI is None:
            logits_RV = self._linear(x_RI, dtype=torch.float32)
            if self._linear.rounds_products:
                assert isinstance(x_RI, Tensor)
                logits_RV = _refined(logits_RV, x_RI, self._linear.rows)
        else:
            assert isinstance(x_RI, Tensor)
            if x_RI.is_cuda and x_RI.dtype is not torch.float32:
                return products(x_RI, self._weight_VI, out=out_RV)
            logits_RV = self._logits(x_RI, self._weight_VI)
        return logits_RV if out_RV is None else out_RV.copy_(logits_RV)

    def _logits(self, x_RI: Tensor, weight_VI: Tensor) -> Tensor:
        logits_RV = self._linear(x_RI).float()
        if x_RI.dtype is torch.float32:
            return logits_RV
        return _refined(logits_RV, x_RI, weight_VI.__getitem__)


def _refined(logits_RV: Tensor, x_RI: Tensor, rows: Callable[[Tensor], Tensor]) -> Tensor:
    """The same, the best candidates computed again, by rows of the matrix."""
    _, best_RC = likeliest(logits_RV, min(_CANDIDATES, logits_RV.shape[1]))
    exact_RC = torch.bmm(rows(best_RC).float(), x_RI.float().unsqueeze(2)).squeeze(2)
    return logits_RV.scatter_(1, best_RC, exact_RC)
