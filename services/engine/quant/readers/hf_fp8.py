"""Floats of eight bits as Hugging Face keeps them (transformers, `quantizer_finegrained_fp8.py`, `quantizer_fbgemm_fp8.py`): the weight as e4m3, and what it is
multiplied with to be itself again in `weight_scale_inv` (DeepSeek-V3's and Qwen3's, one for each block of 128 x 128; the inverse of what it was
multiplied with) or in `weight_scale` (one for the matrix, or one for each output).

Activations are rounded by scales found in every step; static ones (`input_scale`, `activation_scale`) are coarser and are not read.
"""

from __future__ import annotations

import math

import torch

from services.engine.quant.matrix import FLOAT, QuantizedMatrix
from services.engine.quant.readers.source import FLOATS, Config, Reader, Source, refuse
from services.engine.weight_format import WeightFormat

_SCALES = ("weight_scale_inv", "weight_scale")
_DTYPES = (*FLOATS, torch.float8_e8m0fnu)
"""Powers of two too (`scale_fmt` ue8m0)."""


class HuggingFaceFp8(Reader):
    """The methods fp8 and fbgemm_fp8."""

    ignored = ("*.input_scale", "*.activation_scale", "*.input_scale_ub", "*.k_scale", "*.v_scale")

    def __init__(self, config: Config, source: Source) -> None:
        super().__init__(source)
        block = config.get("weight_block_size")
        match block:
            case None:
                self._block: tuple[int, int] | None = None
            case [int(rows), int(inputs)] if rows > 0 and inputs > 0:
                self._block = rows, inputs
            case _:
                refuse(f"weight_block_size is {block!r}, and must be two whole numbers, or absent")
        if (floats := config.get("fmt", "e4m3")) != "e4m3":
            refuse(f"fmt is {floats!r}; only e4m3 can be read")

    def holds(self, name: str) -> bool:
        """What has scales: transformers leaves a matrix as it is that does not fall into blocks, and does not list it."""
        return any(self._source.has(f"{name}.{scale}") for scale in _SCALES)

    def format(self, name: str) -> WeightFormat:
        if self._block is not None:
            return WeightFormat.FP8_BLOCK if self._block == (128, 128) else WeightFormat.NONE
        is_one = math.prod(self._source.shape(self._scale(name))) == 1
        return WeightFormat.FP8_TENSOR if is_one else WeightFormat.FP8

    def matrix(self, name: str, outputs: int, inputs: int) -> QuantizedMatrix:
        tile = self._block or ((1, inputs) if self.format(name) is WeightFormat.FP8 else (outputs, inputs))
        tiles = (-(-outputs // tile[0]), -(-inputs // tile[1]))
        values_OI = self._source.raw(f"{name}.weight", outputs, inputs, dtypes=(FLOAT,))
        return QuantizedMatrix(values_OI, self._scales(self._scale(name), *tiles, dtypes=_DTYPES), tile)

    def _scale(self, name: str) -> str:
        """What the scales of this matrix are called."""
        return next(scale for each in _SCALES if self._source.has(scale := f"{name}.{each}"))
