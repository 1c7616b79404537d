"""What AutoAWQ writes for its GEMM kernels (AutoAWQ, `awq/modules/linear/gemm.py`, `from_linear`; `awq/utils/packing_utils.py`).

`qweight` [inputs, outputs / 8] and `qzeros` [groups, outputs / 8] have the values of eight outputs in each int32, in the order 0, 2, 4, 6, 1, 3, 5, 7 from the lowest bits on;
`scales` [groups, outputs]: weight = (value - zero) * scale. Without `zero_point` there need be no `qzeros`: zero is in the middle.
"""

from __future__ import annotations

import torch
from torch import Tensor

from holdfast.errors import ConfigurationError
from services.engine.quant.matrix import QuantizedMatrix
from services.engine.quant.readers.source import Config, Reader, Source, four_bits, number, refuse, signed, unpacked
from services.engine.weight_format import WeightFormat

_EACH = 8
_PLACES = [0, 4, 1, 5, 2, 6, 3, 7]
"""In which four bits of a word, from the lowest on, each of its eight outputs is."""


class AWQ(Reader):
    """The method awq."""

    def __init__(self, config: Config, source: Source) -> None:
        super().__init__(source)
        self._bits = number(config, "bits", (4,), default=config.get("w_bit"))
        self._group = number(config, "group_size", (-1, 16, 32, 64, 128, 256), default=config.get("q_group_size", 128))
        self._symmetric = not config.get("zero_point", True)
        version = str(config.get("version") or config.get("format") or "gemm").lower()
        if version != "gemm":
            refuse(f"version is {version!r}; of awq only the order of gemm can be read")

    def holds(self, name: str) -> bool:
        return self._source.has(f"{name}.qweight")

    def format(self, name: str) -> WeightFormat:
        return four_bits(self._group, symmetric=not self._source.has(f"{name}.qzeros"))

    def matrix(self, name: str, outputs: int, inputs: int) -> QuantizedMatrix:
        size = inputs if self._group == -1 else self._group
        if inputs % size or outputs % _EACH:
            raise ConfigurationError(
                f"{name}: {outputs} x {inputs} weights do not fall into groups of {size} and words of {_EACH}"
            )
        values_OI = self._numbers(f"{name}.qweight", inputs, outputs)
        zeros_OG = None
        if not self._symmetric or self._source.has(f"{name}.qzeros"):
            zeros_OG = self._numbers(f"{name}.qzeros", inputs // size, outputs)
        scales_OG = self._scales(f"{name}.scales", inputs // size, outputs).t().contiguous()
        return QuantizedMatrix(values_OI, scales_OG, (1, size), self._bits, zeros_OG)

    def _numbers(self, name: str, rows: int, outputs: int) -> Tensor:
        """What is packed under this name, around zero, outputs first."""
        words = self._source.raw(name, rows, outputs // _EACH, dtypes=(torch.int32,))
        by_word = unpacked(words, self._bits, outputs).view(rows, -1, _EACH)
        return signed(by_word[..., _PLACES].flatten(1), self._bits).t().contiguous()
