"""From token ids to features."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from services.engine.weights import Weights


class Embedding:
    """One row of features for each token of the vocabulary."""

    def __init__(self, weights: Weights, name: str, *, vocab_size: int, size: int) -> None:
        self.weight_VI = weights.take(f"{name}.weight", vocab_size, size)

    def __call__(self, token_ids_N: Tensor) -> Tensor:
        return F.embedding(token_ids_N, self.weight_VI)
