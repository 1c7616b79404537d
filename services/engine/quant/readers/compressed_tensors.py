"""What the package compressed-tensors writes (0.20: `compressors/pack_quantized`, `compressors/naive_quantized`, and `quantization/quant_args.py` for the config): the
formats pack-quantized, int-quantized, float-quantized and naive-quantized.

Activations are never kept coarser than the config says, and finer where no format here has them just so: fp8 with static scales finds scales in every step;
weights of four bits, and of eight where activations have zero points, keep them as they are.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from holdfast.errors import ConfigurationError
from services.engine.quant.matrix import FLOAT, QuantizedMatrix
from services.engine.quant.readers.source import (
    Config,
    Reader,
    Source,
    four_bits,
    order_of,
    refuse,
    signed,
    unpacked,
)
from services.engine.weight_format import WeightFormat

_PACKED = "pack-quantized"
_FORMATS = (_PACKED, "int-quantized", "float-quantized", "naive-quantized")
_STRATEGIES = ("tensor", "channel", "group", "block")


@dataclass(frozen=True, slots=True)
class _Group:
    """One of the `config_groups`: what it says, checked."""

    targets: tuple[str, ...]
    packed: bool
    bits: int
    is_float: bool
    symmetric: bool
    tile: tuple[int | None, int | None]
    activations: str | None
    """In eight bits of the same kind, `row` by row or in `groups` with scales found in every step, or with one that is `static`; None for as
    they are, or in a way that no format here has."""

    @classmethod
    def of(cls, name: str, said: Any, *, format: str) -> _Group:
        if not isinstance(said, dict) or not isinstance(said.get("weights"), dict):
            refuse(f"config_groups.{name} must say weights, and it is {said!r}")
        if said.get("output_activations"):
            refuse(f"config_groups.{name} quantizes outputs (output_activations), which nothing here does")
        format, weights = said.get("format") or format, said["weights"]
        if format not in _FORMATS:
            refuse(f"config_groups.{name}: the format is {format!r}; there are {', '.join(_FORMATS)}")
        bits, kind = weights.get("num_bits", 8), weights.get("type", "int")
        if kind not in ("int", "float") or bits not in ((8,) if kind == "float" else range(2, 9)):
            refuse(
                f"config_groups.{name}: weights are {kind} of {bits!r} bits; there are int of 2 to 8, and float of 8"
            )
        if format == _PACKED and kind == "float":
            refuse(f"config_groups.{name}: floats are not packed; the format must be float-quantized, not {format}")
        return cls(
            targets=tuple(said.get("targets") or ()),
            packed=format == _PACKED,
            bits=bits,
            is_float=kind == "float",
            symmetric=bool(weights.get("symmetric", True)),
            tile=_tile(name, weights),
            activations=_activations(said.get("input_activations"), kind),
        )

    @property
    def weight_format(self) -> WeightFormat:
        """In what such a matrix is kept."""
        inputs = self.tile[1]
        if self.is_float:
            if self.activations is None:
                return WeightFormat.NONE  # no format of floats leaves activations as they are
            if self.tile == (128, 128):
                return WeightFormat.FP8_BLOCK
            by_row: dict[tuple[int | None, int | None], WeightFormat] = {
                (None, None): WeightFormat.FP8_TENSOR,
                (1, None): WeightFormat.FP8,
            }
            return WeightFormat.NONE if self.activations == "groups" else by_row.get(self.tile, WeightFormat.NONE)
        if self.bits <= 4:
            return four_bits(inputs or -1, symmetric=self.symmetric)
        if inputs is not None or not self.symmetric:
            return WeightFormat.NONE
        kept = {"row": WeightFormat.INT8, "static": WeightFormat.INT8_STATIC}
        return kept.get(self.activations or "", WeightFormat.INT8_WEIGHT)


class CompressedTensors(Reader):
    """The tensors `weight_packed` and `weight_shape`, or `weight`; `weight_scale`, `weight_zero_point`, `input_scale`."""

    # Scales of keys and values: `kv_cache_dtype` says in what they are kept. Of activations: those that a format needs are asked for.
    ignored = ("*.k_scale", "*.v_scale", "*.q_scale", "*.input_scale")

    def __init__(self, config: Config, source: Source) -> None:
        super().__init__(source)
        if config.get("transform_config"):
            refuse("transform_config: transforms of activations are not computed here")
        if (sparse := config.get("sparsity_config")) and sparse.get("format", "dense") != "dense":
            refuse(f"sparsity_config: {sparse.get('format')!r} weights cannot be read; only dense ones")
        groups = config.get("config_groups")
        if not isinstance(groups, dict) or not groups:
            refuse("it names no config_groups")
        format = str(config.get("format") or "dense")
        read = [_Group.of(name, said, format=format) for name, said in groups.items()]
        self._targets = {target: group for group in read for target in group.targets}
        self._ignore = tuple(config.get("ignore") or ())
        for target in (*self._targets, *self._ignore):
            _require_pattern(target)

    def holds(self, name: str) -> bool:
        return self._group(name) is not None

    def format(self, name: str) -> WeightFormat:
        return self._of(name).weight_format

    def matrix(self, name: str, outputs: int, inputs: int) -> QuantizedMatrix:
        group = self._of(name)
        rows, width = group.tile
        tile = (rows or outputs, width or inputs)
        if rows == 1 and inputs % tile[1]:
            raise ConfigurationError(
                f"{name}: its {inputs} inputs do not fall into the groups of {width} that the config says"
            )
        tiles = (-(-outputs // tile[0]), -(-inputs // tile[1]))
        scales_TU = self._scales(f"{name}.weight_scale", *tiles)
        zeros_TU = None if group.symmetric else self._zeros(name, group, outputs, tiles)
        values_OI = self._values(name, group, outputs, inputs)
        order_I = self._order(f"{name}.weight_g_idx", inputs, tile[1])
        values_OI = values_OI if order_I is None else values_OI[:, order_I]
        return QuantizedMatrix(values_OI, scales_TU, tile, group.bits, zeros_TU, order_I=order_I)

    def is_needless(self, name: str) -> bool:
        """Zero points that are in the middle are written by some versions."""
        return super().is_needless(name) or (name.endswith("_zero_point") and self._is_zero(name))

    def _values(self, name: str, group: _Group, outputs: int, inputs: int) -> Tensor:
        if not group.packed:
            dtype = FLOAT if group.is_float else torch.int8
            return self._source.raw(f"{name}.weight", outputs, inputs, dtypes=(dtype,))
        said = self._source.raw(f"{name}.weight_shape", 2, dtypes=(torch.int64, torch.int32))
        if said.tolist() != [outputs, inputs]:
            raise ConfigurationError(
                f"{name}.weight_shape says {said.tolist()}, but the config makes it {[outputs, inputs]}"
            )
        width = -(-inputs * group.bits // 32)
        words = self._source.raw(f"{name}.weight_packed", outputs, width, dtypes=(torch.int32,))
        return signed(unpacked(words, group.bits, inputs), group.bits)

    def _zeros(self, name: str, group: _Group, outputs: int, tiles: tuple[int, int]) -> Tensor:
        name = f"{name}.weight_zero_point"
        if not group.packed or group.tile[0] != 1:
            shape = (1,) if group.tile == (None, None) else tiles
            return self._source.raw(name, *shape, dtypes=(torch.int8,)).view(tiles)
        words = self._source.raw(name, -(-outputs * group.bits // 32), tiles[1], dtypes=(torch.int32,))
        return signed(unpacked(words.t(), group.bits, outputs), group.bits).t()

    def _order(self, name: str, inputs: int, size: int) -> Tensor | None:
        """Of inputs that GPTQ sorted, which the package wrote until August 2026; groups of -1 say that it did not."""
        if not self._source.has(name):
            return None
        groups_I = self._source.raw(name, inputs, dtypes=(torch.int32, torch.int64))
        return None if (groups_I < 0).any() else order_of(groups_I, size, name=name)

    def _of(self, name: str) -> _Group:
        group = self._group(name)
        assert group is not None, f"{name} is not quantized"
        return group

    def _group(self, name: str) -> _Group | None:
        """The group of a matrix: the one that names it, or else has a pattern that its name begins with, the first by the alphabet; or else names
        its kind. Of groups with the same target the last (`match_targets` and `apply_quantization_config` there)."""
        kind = "Embedding" if name.endswith("embed_tokens") else "Linear"
        if any(_matches(each, name, kind) for each in self._ignore):
            return None
        targets = (name, *sorted(each for each in self._targets if each.startswith("re:")), kind)
        return next(
            (self._targets[each] for each in targets if each in self._targets and _matches(each, name, kind)), None
        )


def _require_pattern(target: str) -> None:
    """Refuses what stands after `re:` and is no regular expression."""
    try:
        re.compile(target.removeprefix("re:") if target.startswith("re:") else "")
    except re.error as error:
        refuse(f"{target!r} is no pattern: {error}")


def _matches(target: str, name: str, kind: str) -> bool:
    """Whether a target means this matrix."""
    if target.startswith("re:"):
        return re.match(target.removeprefix("re:"), name) is not None
    return target in (name, kind)


def _tile(name: str, weights: Config) -> tuple[int | None, int | None]:
    size, block = weights.get("group_size"), weights.get("block_structure")
    strategy = weights.get("strategy") or ("tensor" if size is None else "channel" if size == -1 else "group")
    if isinstance(block, str):  # as early versions wrote it: "128x128"
        block = [int(each) for each in block.split("x") if each.isdecimal()]
    match strategy, size, block:
        case "tensor", _, _:
            return None, None
        case "channel", _, _:
            return 1, None
        case "group", int(), _ if size > 0:
            return 1, size
        case "block", _, [int(rows), int(inputs)] if rows > 0 and inputs > 0:
            return rows, inputs
    known = ", ".join(_STRATEGIES)
    refuse(
        f"config_groups.{name}: the strategy of weights is {strategy!r} with group_size {size!r} and block_structure {block!r}; there are "
        f"{known}, group with a group_size and block with a block_structure of two"
    )


def _activations(said: Any, kind: str) -> str | None:
    if not said or said.get("num_bits", 8) != 8 or said.get("type", "int") != kind or not said.get("symmetric", True):
        return None
    strategy = said.get("strategy") or "tensor"
    if strategy not in ("tensor", "token"):
        return "groups" if said.get("dynamic") else None
    # Floats find a scale in every step even where there is a static one, which is coarser.
    return "row" if said.get("dynamic") or kind == "float" else "static"
