"""The norm between the parts of a layer."""

from __future__ import annotations

from torch import Tensor

from services.engine.ops.forms import Activations, Form, Unnormed
from services.engine.ops.norm import rms_norm_as
from services.engine.weights import Weights


class RMSNorm:
    """Scales to a root mean square of one, then by a weight for each feature."""

    def __init__(self, weights: Weights, name: str, *, size: int, eps: float) -> None:
        self.weight = weights.take(f"{name}.weight", size)
        self._eps = eps

    def __call__(self, x: Tensor, form: Form = None) -> Activations:
        """The scaled rows, in this form where one is asked for; a single row on a GPU as it is."""
        if form is not None and x.is_cuda and x.shape[0] == 1:
            return Unnormed(x, self.weight, self._eps)
        return rms_norm_as(x, self.weight, self._eps, form)
