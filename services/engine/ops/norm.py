"""Root mean square norm (Zhang and Sennrich 2019, "Root Mean Square Layer Normalization")."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x²) + eps) * weight over the last dimension, computed in float32, in the dtype of x."""
    return F.rms_norm(x, weight.shape, weight, eps)
