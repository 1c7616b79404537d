"""A weight matrix in few bits, as readers of checkpoints, calibration and formats hand it to each other.

It says what the weights are, not how a kernel wants them: one byte for each value, and a scale for each tile. Formats pack
it; `dequant` says what it stands for. Rounding to the nearest is here too, with the levels of compressed-tensors
(`calculate_qparams` and `quantize` of its 0.20), so that what is rounded here is written there without a change.

Shapes: O outputs, I inputs; T tiles of outputs, U tiles of inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import gcd

import torch
import torch.nn.functional as F
from torch import Tensor

FLOAT = torch.float8_e4m3fn
"""The one floating-point type that values have."""

_ROWS_AT_ONCE = 1024


@dataclass(frozen=True, slots=True)
class Scheme:
    """How weights are to be rounded."""

    bits: int = 8
    """Of a value, 2 to 8."""
    is_float: bool = False
    """Whether a value is a float (8 bits, e4m3) and not a whole number."""
    tile: tuple[int | None, int | None] = (1, None)
    """So many outputs and so many inputs share a scale, None for all: (None, None) is a scale for the tensor, (1, None) one for each row
    ("channel"), (1, 128) one for each group of 128 inputs, (128, 128) one for each block."""
    symmetric: bool = True
    """Whether zero lies in the middle of the levels. Otherwise each tile says where, by a whole number."""

    def __post_init__(self) -> None:
        assert 2 <= self.bits <= 8 and (not self.is_float or (self.bits == 8 and self.symmetric))

    @property
    def levels(self) -> tuple[float, float]:
        """The lowest and the highest value."""
        if self.is_float:
            return torch.finfo(FLOAT).min, torch.finfo(FLOAT).max
        return -(2.0 ** (self.bits - 1)), 2.0 ** (self.bits - 1) - 1

    def tile_of(self, shape: Sequence[int]) -> tuple[int, int]:
        """The tile in numbers, for a matrix of this shape."""
        rows, inputs = self.tile
        return shape[0] if rows is None else rows, shape[1] if inputs is None else inputs

    def fits(self, inputs: int) -> bool:
        """Whether so many inputs fall into whole tiles. Blocks may be cut off at the edge, groups not."""
        rows, size = self.tile
        return size is None or rows != 1 or inputs % size == 0


@dataclass(frozen=True, slots=True, eq=False)
class QuantizedMatrix:
    """Weights as `values * scale`, `(values - zero) * scale` or `values * scale + minimum`, a scale (zero, minimum) for each tile."""

    values_OI: Tensor
    """int8, which holds whole numbers of fewer bits too, from -2^(bits - 1) on; or float8_e4m3fn."""
    scales_TU: Tensor
    """float32."""
    tile: tuple[int, int]
    """So many outputs and so many inputs share a scale; the last tiles may be cut off."""
    bits: int = 8
    zeros_TU: Tensor | None = None
    """Which value stands for zero; it need not be a whole number, and it may lie outside of the levels."""
    minimums_TU: Tensor | None = None
    """float32: instead of zeros, what is added (GGUF's Q4_1)."""
    order_I: Tensor | None = None
    """Which input each column stands for, where a method sorted them (GPTQ's act-order); None: column i for input i."""

    def __post_init__(self) -> None:
        tiles = tuple(-(-size // step) for size, step in zip(self.values_OI.shape, self.tile, strict=True))
        assert self.values_OI.dtype in (torch.int8, FLOAT) and self.scales_TU.dtype is torch.float32
        assert self.zeros_TU is None or self.minimums_TU is None
        for each in (self.scales_TU, self.zeros_TU, self.minimums_TU):
            assert each is None or tuple(each.shape) == tiles, f"{tuple(each.shape)} for {tiles} tiles"
        assert self.order_I is None or self.order_I.shape == self.values_OI.shape[1:]

    @property
    def shape(self) -> torch.Size:
        """[O, I]."""
        return self.values_OI.shape

    @property
    def device(self) -> torch.device:
        return self.values_OI.device

    @property
    def is_float(self) -> bool:
        """Whether the values are floats."""
        return self.values_OI.dtype is FLOAT

    @property
    def is_symmetric(self) -> bool:
        """Whether every weight is a multiple of a scale."""
        return self.zeros_TU is None and self.minimums_TU is None

    @property
    def offsets_TU(self) -> Tensor:
        """What is added to values * scale, float32."""
        if self.minimums_TU is not None:
            return self.minimums_TU
        if self.zeros_TU is not None:
            return self.zeros_TU * -self.scales_TU
        return torch.zeros_like(self.scales_TU)

    def dequant(self) -> Tensor:
        """The weights, [O, I], in float32."""
        weight_OI = self.values_OI.float()
        if self.zeros_TU is not None:
            weight_OI = weight_OI - self._spread(self.zeros_TU)
        weight_OI = weight_OI * self._spread(self.scales_TU)
        if self.minimums_TU is not None:
            weight_OI = weight_OI + self._spread(self.minimums_TU)
        if self.order_I is None:
            return weight_OI
        return torch.empty_like(weight_OI).index_copy_(1, self.order_I, weight_OI)

    def to(self, device: torch.device | str) -> QuantizedMatrix:
        """The same on this device."""
        order_I = None if self.order_I is None else self.order_I.to(device)
        return self._like(self.values_OI.to(device), self.tile, lambda each: each.to(device), order_I)

    def part(self, rows: slice, inputs: slice) -> QuantizedMatrix:
        """These outputs and inputs alone; in smaller tiles where a cut goes through tiles. Where inputs are sorted, only all of
        them can be wanted."""
        (top, bottom, _), (left, right, _) = (
            each.indices(size) for each, size in zip((rows, inputs), self.shape, strict=True)
        )
        assert self.order_I is None or (left, right) == (0, self.shape[1]), "sorted inputs cannot be cut"
        tile = (
            _step(self.tile[0], top, bottom, self.shape[0]),
            _step(self.tile[1], left, right, self.shape[1]),
        )
        return self._cut((top, bottom), (left, right), tile)

    def in_tiles(self, rows: int, inputs: int) -> QuantizedMatrix:
        """The same with smaller tiles, which must divide those there are or, where these hold all, the matrix."""
        height, width = (min(step, size) for step, size in zip(self.tile, self.shape, strict=True))
        assert height % rows == 0 and width % inputs == 0, f"tiles of {self.tile} are not made of ({rows}, {inputs})"
        return self._cut((0, self.shape[0]), (0, self.shape[1]), (rows, inputs))

    def _cut(self, rows: tuple[int, int], inputs: tuple[int, int], tile: tuple[int, int]) -> QuantizedMatrix:
        """These outputs and inputs; `tile`: of which every one lies within one of ours."""
        places = [
            torch.arange(start, stop, new, device=self.device) // old
            for (start, stop), new, old in zip((rows, inputs), tile, self.tile, strict=True)
        ]
        return self._like(
            self.values_OI[slice(*rows), slice(*inputs)],
            tile,
            lambda each_TU: each_TU[places[0][:, None], places[1]],
            self.order_I,
        )

    def _like(
        self, values_OI: Tensor, tile: tuple[int, int], change: Callable[[Tensor], Tensor], order_I: Tensor | None
    ) -> QuantizedMatrix:
        """These values, and what tiles have changed so."""
        zeros_TU, minimums_TU = (None if each is None else change(each) for each in (self.zeros_TU, self.minimums_TU))
        return QuantizedMatrix(values_OI, change(self.scales_TU), tile, self.bits, zeros_TU, minimums_TU, order_I)

    def _spread(self, each_TU: Tensor) -> Tensor:
        """For each weight what its tile has."""
        return _spread(each_TU, self.tile, self.shape)


def all_finite(values: Tensor) -> bool:
    """Whether every value is a finite number. Nothing as large as the tensor is made on the way: a pass or two read it."""
    if not values.is_floating_point() or not values.numel():
        return True
    match values.dtype:
        case torch.float8_e4m3fn:  # it has no infinity, and NaN are all ones behind either sign
            return bool(values.view(torch.uint8).amax() < 0xFF and values.view(torch.int8).amax() < 0x7F)
        case torch.float8_e8m0fnu:
            return bool(values.view(torch.uint8).amax() < 0xFF)
    low, high = values.aminmax()  # of which NaN is both
    return bool(low.isfinite() and high.isfinite())


def plain(weight_OI: Tensor | QuantizedMatrix, dtype: torch.dtype) -> Tensor:
    """The weights themselves; those in few bits in this dtype."""
    return weight_OI if isinstance(weight_OI, Tensor) else weight_OI.dequant().to(dtype)


def joined(parts: Sequence[QuantizedMatrix]) -> QuantizedMatrix:
    """The outputs of all of them side by side, for the same inputs; in smaller tiles where theirs differ. Raises ValueError where
    values differ in kind, or inputs in their order."""
    if len(parts) == 1:
        return parts[0]
    if len({(part.bits, part.is_float) for part in parts}) > 1:
        kinds = ", ".join(f"{'float' if part.is_float else 'int'}{part.bits}" for part in parts)
        raise ValueError(f"their values are of different kinds ({kinds})")
    if any(not _same(part.order_I, parts[0].order_I) for part in parts):
        raise ValueError("their inputs are in different orders")
    tiles = [tuple(map(min, part.tile, part.shape)) for part in parts]
    rows = gcd(*(tile[0] for tile in tiles), *(part.shape[0] for part in parts[:-1]))
    inputs = gcd(*(tile[1] for tile in tiles))
    parts = [part.in_tiles(rows, inputs) for part in parts]
    zeros = minimums = None
    if all(part.zeros_TU is not None for part in parts):
        zeros = torch.cat([part.zeros_TU for part in parts if part.zeros_TU is not None])
    elif not all(part.is_symmetric for part in parts):
        minimums = torch.cat([part.offsets_TU for part in parts])
    return QuantizedMatrix(
        torch.cat([part.values_OI for part in parts]),
        torch.cat([part.scales_TU for part in parts]),
        (rows, inputs),
        parts[0].bits,
        zeros,
        minimums,
        parts[0].order_I,
    )


def nearest(weight_OI: Tensor, scheme: Scheme, *, scale_dtype: torch.dtype = torch.float32) -> QuantizedMatrix:
    """The weights rounded to the nearest, between levels that hold the lowest, the highest and zero. `scale_dtype`: to what scales
    are rounded before they are used. Raises ValueError where a weight is not finite, or inputs do not fall into groups."""
    return rounded(weight_OI, scheme, *parameters(*extremes(weight_OI, scheme), scheme, scale_dtype=scale_dtype))


def tiles_of(each_OI: Tensor, scheme: Scheme) -> Tensor:
    """The values of tiles, [T, outputs of one, U, inputs of one]; those that are cut off at the edge are filled with zeros."""
    (outputs, inputs), (height, width) = each_OI.shape, scheme.tile_of(each_OI.shape)
    padded = F.pad(each_OI, (0, -inputs % width, 0, -outputs % height))
    return padded.view(padded.shape[0] // height, height, padded.shape[1] // width, width)


def extremes(weight_OI: Tensor, scheme: Scheme) -> tuple[Tensor, Tensor]:
    """The lowest and the highest weight of each tile, [T, U], in float32; no higher and no lower than zero. Raises ValueError as
    `nearest` does."""
    if not scheme.fits(inputs := weight_OI.shape[1]):
        raise ValueError(f"{inputs} inputs do not fall into groups of {scheme.tile[1]}")
    tiles = tiles_of(weight_OI, scheme)
    low_TU, high_TU = tiles.amin((1, 3)).float().clamp_(max=0), tiles.amax((1, 3)).float().clamp_(min=0)
    if not (low_TU.isfinite().all() and high_TU.isfinite().all()):
        raise ValueError("it holds weights that are not finite")
    return low_TU, high_TU


def parameters(
    low_TU: Tensor, high_TU: Tensor, scheme: Scheme, *, scale_dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor | None]:
    """Scales, and zeros where the scheme has them, by which the levels reach from the one weight to the other. The full range:
    of a symmetric scheme half of it is the larger of the two, so that of 4 bits -7.5 to 7.5 are rounded to -8 to 7."""
    lowest, highest = scheme.levels
    if scheme.symmetric:
        scales_TU = torch.maximum(high_TU, -low_TU) / ((highest - lowest) / 2)
    else:
        scales_TU = (high_TU - low_TU) / (highest - lowest)
    scales_TU = scales_TU.to(scale_dtype).float()
    scales_TU = torch.where(scales_TU == 0, torch.finfo(torch.float32).eps, scales_TU)
    if scheme.symmetric:
        return scales_TU, None
    return scales_TU, (lowest - low_TU / scales_TU).clamp_(lowest, highest).round_().to(torch.int8)


def rounded(weight_OI: Tensor, scheme: Scheme, scales_TU: Tensor, zeros_TU: Tensor | None = None) -> QuantizedMatrix:
    """Each weight as the nearest level, ties to even, by these scales and zeros; what is beyond the levels as the last of them."""
    tile = scheme.tile_of(weight_OI.shape)
    values_OI = torch.empty_like(weight_OI, dtype=FLOAT if scheme.is_float else torch.int8)
    # Some rows at a time: all of them in float32 would take more memory than the matrix.
    step = -(-_ROWS_AT_ONCE // tile[0]) * tile[0]
    for start in range(0, weight_OI.shape[0], step):
        rows, tiles = slice(start, start + step), slice(start // tile[0], -(-(start + step) // tile[0]))
        piece = weight_OI[rows].float()
        scales, zeros = (
            None if each is None else _spread(each[tiles], tile, piece.shape) for each in (scales_TU, zeros_TU)
        )
        assert scales is not None
        values_OI[rows] = levels_of(piece, scales, zeros, scheme)
    return QuantizedMatrix(values_OI, scales_TU, tile, scheme.bits, zeros_TU)


def levels_of(weights: Tensor, scales: Tensor, zeros: Tensor | None, scheme: Scheme) -> Tensor:
    """The nearest level of each weight, as `rounded` has it; `scales` and `zeros` as for each of them."""
    levels = weights / scales
    if zeros is not None:
        levels += zeros
    if scheme.is_float:
        return levels.clamp_(*scheme.levels).to(FLOAT)
    return levels.round_().clamp_(*scheme.levels).to(torch.int8)


def _spread(each_TU: Tensor, tile: tuple[int, int], shape: Sequence[int]) -> Tensor:
    """For each place of a matrix of this shape what its tile has; where all have one tile, one that can be broadcast."""
    for dim in (0, 1):
        if each_TU.shape[dim] > 1:
            each_TU = each_TU.repeat_interleave(tile[dim], dim).narrow(dim, 0, shape[dim])
    return each_TU


def _step(step: int, start: int, stop: int, size: int) -> int:
    """The largest tiles that places from `start` to `stop` of `size` fall into, where they fell into tiles of `step`."""
    if start // step == (stop - 1) // step:
        return stop - start
    return gcd(step, start, 0 if stop == size else stop)


def _same(one: Tensor | None, other: Tensor | None) -> bool:
    return one is other or (one is not None and other is not None and torch.equal(one, other))
