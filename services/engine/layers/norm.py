"""The norm between the parts of a layer."""

from __future__ import annotations

from torch import Tensor

from services.engine.ops.forms import Activations, Form, Terms, Unnormed
from services.engine.ops.norm import rms_norm_as, rms_norm_of_sum
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

    def of_sum(self, terms: Terms, form: Form) -> tuple[Activations, Tensor]:
        """The scaled rows of the sum, and the sum."""
        if isinstance(terms, Tensor):
            return self(terms, form), terms
        return rms_norm_of_sum(terms, self.weight, self._eps, form), terms.add_NI
