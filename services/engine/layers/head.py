"""From features to logits.

Shapes: R rows whose logits are wanted, I features, V vocabulary, C candidates of a row.
"""

from __future__ import annotations

import torch
from torch import Tensor

from services.engine.layers.linear import Linear
from services.engine.ops.forms import Activations, Form
from services.engine.ops.linear import products
from services.engine.shard import Part, Shard

_CANDIDATES = 16


class Head:
    """A matrix whose products are compared with each other: they are wanted in float32, and a GPU gives them so.

    On a CPU, products of 16-bit values come out in 16 bits. Of these bfloat16 has eight for the number itself: logits about 25 lie
    an eighth apart, and the best tokens often seem equally good. So the best candidates of a row are computed again, in
    float32; they are a few rows of the matrix out of many thousands.
    """

    def __init__(self, linear: Linear, weight_VI: Tensor | None, *, part: Part, shard: Shard) -> None:
        """`weight_VI` holds the values that `linear` multiplies with, as they were loaded: those of a `part` of the
        vocabulary. None if it multiplies with others and gives float32 itself."""
        self._linear = linear
        self._weight_VI = weight_VI
        self._part = part
        self._shard = shard

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
        best_RC = logits_RV.topk(min(_CANDIDATES, logits_RV.shape[1]), dim=1, sorted=False).indices
        exact_RC = torch.bmm(weight_VI[best_RC].float(), x_RI.float().unsqueeze(2)).squeeze(2)
        return logits_RV.scatter_(1, best_RC, exact_RC)
