"""GPTQ: inputs are rounded one after the other, and those that are still to be rounded make up for what the last one changed.

Frantar et al. 2023, "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers", sections 3 and 4. With H = x.T @ x, the
change of the inputs behind input j that keeps the products nearest to what they were is -(w_j - q_j) / [H^-1]_jj * [H^-1]_j, where H is that of the
inputs from j on; the rows of the Cholesky factor of H^-1 are just these, for all j (section 3, step 3).

Order (the paper's "act-order"): inputs with the largest squares first, while there are most others left to make up for them. Tiles stay those
of neighbouring inputs, with the parameters that they had before anything was rounded; so inputs need not be sorted when the matrix is
multiplied. In the inputs' own order each group is given its parameters when it is reached, by weights that have been changed until then.

Shapes: O outputs, I inputs, C inputs of a block that is computed at once.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import gcd

import torch
from torch import Tensor

from services.engine.calibrate.scales import Parameters, Search
from services.engine.quant.matrix import FLOAT, QuantizedMatrix, levels_of

_BLOCK = 128


@dataclass(frozen=True, slots=True)
class Factor:
    """What is the same for all matrices that see the same inputs."""

    upper_II: Tensor
    """The upper Cholesky factor of H^-1, its rows and columns in `order_I`."""
    order_I: Tensor
    sorted: bool
    """Whether the order is another than the inputs' own."""

    @classmethod
    def of(cls, products_II: Tensor, *, act_order: bool, damping: float) -> Factor:
        """`damping`: what is added to H's diagonal, as a part of its mean: the more, the less a few tokens can say of inputs that they
        hardly use. Raises ValueError if it is too little for H to be inverted."""
        squares_I = products_II.diagonal()
        mean = float(squares_I.mean()) or 1.0
        damped_II = products_II + torch.diag((squares_I == 0) * mean + damping * mean)
        order_I = torch.arange(len(squares_I), device=squares_I.device)
        if act_order:
            order_I = squares_I.argsort(descending=True, stable=True)
            damped_II = damped_II[order_I][:, order_I]
        try:
            inverse_II = torch.cholesky_inverse(torch.linalg.cholesky(damped_II))
            upper_II = torch.linalg.cholesky(inverse_II, upper=True)
        except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]
            raise ValueError(
                f"the squares of its inputs cannot be inverted; give more calibration text, or more damping than {damping}"
            ) from error
        return cls(upper_II, order_I, act_order)


def gptq(weight_OI: Tensor, factor: Factor, search: Search) -> QuantizedMatrix:
    """The matrix rounded so that its products stay near to what they were, in the scheme of the search."""
    return _Run(weight_OI, factor, search).matrix()


class _Run:
    """One matrix."""

    def __init__(self, weight_OI: Tensor, factor: Factor, search: Search) -> None:
        self._weight_OI = weight_OI.float()[:, factor.order_I].clone()
        self._factor, self._search, self._scheme = factor, search, search.scheme
        self._tile = self._scheme.tile_of(weight_OI.shape)
        outputs, inputs = weight_OI.shape
        # Groups are reached where a block begins, so that all that changes their weights has been done.
        width = self._tile[1]
        self._as_reached = not factor.sorted and self._tile[0] == 1 and width < inputs
        self._block = _BLOCK
        if self._as_reached:
            self._block = width if width < _BLOCK else gcd(_BLOCK, width)
        self._parameters: list[Parameters] = []
        if not self._as_reached:
            self._parameters = _columns(*search(weight_OI.float()), rows=self._tile[0], outputs=outputs)
        self._values_OI = torch.empty_like(self._weight_OI, dtype=FLOAT if self._scheme.is_float else torch.int8)

    def matrix(self) -> QuantizedMatrix:
        outputs, inputs = self._weight_OI.shape
        for start in range(0, inputs, self._block):
            if self._as_reached and start % self._tile[1] == 0:
                group = slice(start, start + self._tile[1])
                self._parameters += _columns(
                    *self._search.of(group)(self._weight_OI[:, group]), rows=1, outputs=outputs
                )
            self._round(start, min(start + self._block, inputs))
        back_I = self._factor.order_I.argsort()
        scales, zeros = zip(*self._parameters, strict=True)
        # Of each tile one row is enough.
        scales_TU = torch.stack(scales, 1)[:: self._tile[0]].contiguous()
        zeros_TU = None if zeros[0] is None else torch.stack(zeros, 1)[:: self._tile[0]].contiguous()
        return QuantizedMatrix(self._values_OI[:, back_I], scales_TU, self._tile, self._scheme.bits, zeros_TU)

    def _round(self, start: int, end: int) -> None:
        """These inputs; those behind them make up for all of them at once (the paper's "lazy batch-updates")."""
        block_OC = self._weight_OI[:, start:end]
        upper_CC = self._factor.upper_II[start:end, start:end]
        errors_OC = torch.empty_like(block_OC)
        for column, tile in enumerate((self._factor.order_I[start:end] // self._tile[1]).tolist()):
            weight_O = block_OC[:, column]
            scales_O, zeros_O = self._parameters[tile]
            values_O = levels_of(weight_O, scales_O, zeros_O, self._scheme)
            back_O = (values_O.float() if zeros_O is None else values_O.float() - zeros_O) * scales_O
            errors_OC[:, column] = (weight_O - back_O) / upper_CC[column, column]
            self._values_OI[:, start + column] = values_O
            block_OC[:, column + 1 :].addr_(errors_OC[:, column], upper_CC[column, column + 1 :], alpha=-1)
        self._weight_OI[:, end:] -= errors_OC @ self._factor.upper_II[start:end, end:]


def _columns(scales_TU: Tensor, zeros_TU: Tensor | None, *, rows: int, outputs: int) -> list[Parameters]:
    """For each tile of inputs the parameters of all outputs."""
    scales_OU, zeros_OU = (
        None if each is None else each.repeat_interleave(rows, 0)[:outputs] for each in (scales_TU, zeros_TU)
    )
    assert scales_OU is not None
    zeros = [None] * scales_OU.shape[1] if zeros_OU is None else list(zeros_OU.unbind(1))
    return list(zip(scales_OU.unbind(1), zeros, strict=True))
