"""What AutoGPTQ and GPTQModel write (AutoGPTQ, `auto_gptq/nn_modules/qlinear/qlinear_cuda.py`, `pack` and `forward`; GPTQModel, `gptqmodel/utils/model.py`,
`convert_gptq_v1_to_v2_format_module`).

`qweight` [inputs / 8, outputs] has the values of eight inputs (of four bits; of eight bits four) in each int32, `qzeros` [groups, outputs / 8] the zero points
of eight outputs, `scales` [groups, outputs], and `g_idx` the group of each input: weight = (value - zero) * scale. In the second version of the
format, `gptq_v2`, a zero point is written as it is. In the first, `gptq`, one is taken from each: from all that lie in a word at once, so that a zero point of 0
borrows from the next.
"""

from __future__ import annotations

import torch
from torch import Tensor

from holdfast.errors import ConfigurationError
from services.engine.quant.matrix import QuantizedMatrix
from services.engine.quant.readers.source import (
    Config,
    Reader,
    Source,
    four_bits,
    number,
    order_of,
    refuse,
    signed,
    unpacked,
)
from services.engine.weight_format import WeightFormat

_VERSIONS = {"gptq": 1, "gptq_v2": 0}
"""What was taken from each zero point."""


class GPTQ(Reader):
    """The method gptq."""

    def __init__(self, config: Config, source: Source) -> None:
        super().__init__(source)
        self._bits = number(config, "bits", (4, 8))
        self._group = number(config, "group_size", (-1, 16, 32, 64, 128, 256, 512, 1024), default=-1)
        self._symmetric = bool(config.get("sym", True))
        self._sorted = bool(config.get("desc_act", False))
        version = config.get("checkpoint_format") or config.get("format") or "gptq"
        if version not in _VERSIONS:
            refuse(f"checkpoint_format is {version!r}; there are {', '.join(_VERSIONS)}")
        each_place = sum(1 << place for place in range(0, 32, self._bits))
        self._missing = _VERSIONS[version] * each_place
        if own := [each for each in config.get("dynamic") or () if not str(each).startswith("-:")]:
            refuse(f"dynamic: layers that have bits of their own ({own[0]}) cannot be read")

    def holds(self, name: str) -> bool:
        return self._source.has(f"{name}.qweight")

    def format(self, name: str) -> WeightFormat:
        if self._bits == 4:
            return four_bits(self._group, symmetric=self._symmetric)
        # Eight bits have formats without groups and zero points alone.
        is_plain = self._symmetric and self._group == -1
        return WeightFormat.INT8_WEIGHT if is_plain else WeightFormat.NONE

    def matrix(self, name: str, outputs: int, inputs: int) -> QuantizedMatrix:
        size, each = (inputs if self._group == -1 else self._group), 32 // self._bits
        if inputs % size or inputs % each or outputs % each:
            raise ConfigurationError(
                f"{name}: {outputs} x {inputs} weights do not fall into groups of {size} and words of {each}"
            )
        words = self._source.raw(f"{name}.qweight", inputs // each, outputs, dtypes=(torch.int32,))
        values_OI = signed(unpacked(words.t(), self._bits, inputs), self._bits)
        scales_OG = self._scales(f"{name}.scales", inputs // size, outputs).t().contiguous()
        order_I = self._order(name, inputs, size)
        if order_I is not None:
            values_OI = values_OI[:, order_I]
        zeros_OG = self._zeros(name, outputs, inputs // size)
        return QuantizedMatrix(values_OI, scales_OG, (1, size), self._bits, zeros_OG, order_I=order_I)

    def _zeros(self, name: str, outputs: int, groups: int) -> Tensor | None:
        """Where the levels that are around zero have it; None where that is in the middle."""
        words = self._source.raw(f"{name}.qzeros", groups, outputs * self._bits // 32, dtypes=(torch.int32,))
        zeros_OG = signed(unpacked(words + self._missing, self._bits, outputs), self._bits).t().contiguous()
        if not zeros_OG.any():
            return None
        if self._symmetric:
            raise ConfigurationError(f"{name}.qzeros holds zero points off the middle, but the config says sym")
        return zeros_OG

    def _order(self, name: str, inputs: int, size: int) -> Tensor | None:
        if not self._source.has(f"{name}.g_idx"):
            if self._sorted:
                raise ConfigurationError(
                    f"it lacks the tensor {name}.g_idx, without which the inputs of desc_act have no groups"
                )
            return None
        groups_I = self._source.raw(f"{name}.g_idx", inputs, dtypes=(torch.int32, torch.int64))
        return order_of(groups_I, size, name=f"{name}.g_idx")

    def is_needless(self, name: str) -> bool:
        """AutoGPTQ writes a bias for every layer, of zeros where there is none."""
        return name.endswith(".bias") and self._is_zero(name)
