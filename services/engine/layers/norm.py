"""The norm between the parts of a layer."""

from __future__ import annotations

from torch import Tensor

from services.engine.ops.norm import rms_norm
from services.engine.weights import Weights


class RMSNorm:
    """Scales to a root mean square of one, then by a weight for each feature."""

    def __init__(self, weights: Weights, name: str, *, size: int, eps: float) -> None:
        self.weight = weights.take(f"{name}.weight", size)
        self._eps = eps

    def __call__(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self._eps)
