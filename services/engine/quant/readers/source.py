"""What readers read from, and what they have in common."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Mapping
from fnmatch import fnmatchcase
from typing import Any, NoReturn, Protocol

import torch
from torch import Tensor

from holdfast.errors import ConfigurationError
from services.engine.quant.matrix import QuantizedMatrix
from services.engine.weight_format import WeightFormat

Config = Mapping[str, Any]
"""The `quantization_config` of a config.json."""

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
"""In what scales are written."""


class Source(Protocol):
    """The tensors of a checkpoint as they lie in its files."""

    def has(self, name: str) -> bool:
        """Whether there is a tensor of this name."""
        ...

    def shape(self, name: str) -> tuple[int, ...]:
        """Of the tensor of this name, which is there."""
        ...

    def raw(self, name: str, *shape: int, dtypes: Collection[torch.dtype]) -> Tensor:
        """The tensor of this name, in the host's memory; from now on it counts as taken. Raises `ConfigurationError` if there is none, if
        it has another shape or none of these dtypes, or if it holds floats that are not finite numbers."""
        ...


class Reader(ABC):
    """How one family of checkpoints keeps matrices in few bits."""

    ignored: tuple[str, ...] = ()
    """Globs over tensors that such checkpoints hold and that nothing here needs."""

    def __init__(self, source: Source) -> None:
        self._source = source

    @abstractmethod
    def holds(self, name: str) -> bool:
        """Whether the matrix of this name comes in few bits."""

    @abstractmethod
    def matrix(self, name: str, outputs: int, inputs: int) -> QuantizedMatrix:
        """The whole matrix of this name, in the host's memory. Raises `ConfigurationError`, with the tensor's name, for what contradicts
        the config."""

    @abstractmethod
    def format(self, name: str) -> WeightFormat:
        """In what the matrix of this name is kept as it is; `none` if no format can, and it must be unpacked."""

    def is_needless(self, name: str) -> bool:
        """Whether nobody misses this tensor, for which the model has no place."""
        return any(fnmatchcase(name, glob) for glob in self.ignored)

    def _scales(self, name: str, *shape: int, dtypes: Collection[torch.dtype] = FLOATS) -> Tensor:
        """The scales of this name, in float32 and in this shape; they may be written with other dimensions of one."""
        written = self._source.shape(name) if self._source.has(name) else shape
        stored = written if _without_ones(written) == _without_ones(shape) else shape
        return self._source.raw(name, *stored, dtypes=dtypes).float().view(shape)

    def _is_zero(self, name: str) -> bool:
        """Whether this tensor, which is there, changes nothing."""
        dtypes = (*FLOATS, torch.int8, torch.int32, torch.int64)
        return not self._source.raw(name, *self._source.shape(name), dtypes=dtypes).any()


def number(config: Config, key: str, known: Collection[int], *, default: int | None = None) -> int:
    """What the config says under a key. Raises `ConfigurationError` where it is not among the known."""
    value = config.get(key, default)
    if type(value) is not int or value not in known:
        refuse(f"{key} is {value!r}, and must be one of {', '.join(map(str, known))}")
    return value


def refuse(why: str) -> NoReturn:
    """Raises `ConfigurationError` for a config."""
    raise ConfigurationError(f"config.json: quantization_config: {why}")


def four_bits(group: int, *, symmetric: bool) -> WeightFormat:
    """The format of values of four bits or fewer, of which so many share a scale; -1 for all inputs. Its group need not be the matrix's:
    one that is a part of it does as well."""
    size = next((size for size in (128, 64, 32) if group % size == 0), None) if group > 0 else 128
    return WeightFormat.NONE if size is None else WeightFormat(f"int4-g{size}" + ("" if symmetric else "-asym"))


def unpacked(words: Tensor, bits: int, count: int) -> Tensor:
    """The first `count` numbers of `bits` bits, without a sign, that lie one after the other in the bits of the last dimension's int32, the
    lowest first; uint8."""
    in_bytes = words.contiguous().view(torch.uint8)
    rows = in_bytes.shape[:-1]
    if bits in (2, 4, 8):
        parts: Tensor = in_bytes[..., None] >> torch.arange(0, 8, bits, dtype=torch.uint8) & 2**bits - 1
        return parts.reshape(*rows, -1)[..., :count]
    each_bit: Tensor = in_bytes[..., None] >> torch.arange(8, dtype=torch.uint8) & 1
    bits_of_each = each_bit.reshape(*rows, -1)[..., : count * bits].reshape(*rows, count, bits)
    numbers: Tensor = (bits_of_each << torch.arange(bits, dtype=torch.uint8)).sum(-1, dtype=torch.uint8)
    return numbers


def _without_ones(shape: Iterable[int]) -> list[int]:
    return [size for size in shape if size != 1]


def signed(numbers: Tensor, bits: int) -> Tensor:
    """Numbers without a sign as int8 around zero."""
    around_zero: Tensor = numbers.to(torch.int16) - 2 ** (bits - 1)
    return around_zero.to(torch.int8)


def order_of(groups_I: Tensor, size: int, *, name: str) -> Tensor | None:
    """The inputs by their group; None if they lie so already. Raises `ConfigurationError` unless each group has `size` of them."""
    order_I = torch.argsort(groups_I, stable=True)
    in_turn_I = torch.arange(len(groups_I)) // size
    if not torch.equal(groups_I[order_I].long(), in_turn_I):
        raise ConfigurationError(f"the tensor {name} does not put {size} inputs into each group, as the config says")
    return None if torch.equal(groups_I.long(), in_turn_I) else order_I
