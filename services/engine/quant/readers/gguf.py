"""GGUF files of the Llama family: matrices in the blocks of ggml (ggml-org/llama.cpp, `ggml/src/ggml-common.h` for how blocks lie, `ggml-quants.c` for what they mean),
under the names of Hugging Face and with the rows of q and k in its order.

A block is some neighbouring inputs of an output. Every type here is values by a scale, and in some plus a minimum, so that all of them are read as
they are; four bits are kept so too. For eight and six bits no format has scales for groups, so they are unpacked.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from holdfast.convert import halves_together, hugging_face_name, opened
from holdfast.errors import ConfigurationError
from services.engine.quant.matrix import QuantizedMatrix
from services.engine.quant.readers.source import Reader, Source
from services.engine.weight_format import WeightFormat

_NEEDLESS = "rope_freqs.weight"
"""Of rotary embeddings, which the config describes."""


class _Parts(NamedTuple):
    """What blocks hold, a block a row."""

    values: Tensor
    """int8."""
    scales: Tensor
    minimums: Tensor | None = None


def _half(blocks: Tensor, start: int) -> Tensor:
    """The 16-bit float at this byte."""
    return blocks[:, start : start + 2].contiguous().view(torch.float16).float()


def _nibbles(packed: Tensor) -> Tensor:
    """The lower halves of all bytes, then the upper ones."""
    return torch.cat((packed & 15, packed >> 4), dim=-1)


def _around_zero(values: Tensor, scales: Tensor, minimums: Tensor, *, bits: int) -> _Parts:
    """Values without a sign around zero, which changes the minimum."""
    half = 2 ** (bits - 1)
    return _Parts((values.to(torch.int16) - half).to(torch.int8), scales, minimums + half * scales)


def _q4_0(blocks: Tensor) -> _Parts:
    return _Parts(_nibbles(blocks[:, 2:]).to(torch.int8) - 8, _half(blocks, 0))


def _q4_1(blocks: Tensor) -> _Parts:
    return _around_zero(_nibbles(blocks[:, 4:]), _half(blocks, 0), _half(blocks, 2), bits=4)


def _q8_0(blocks: Tensor) -> _Parts:
    return _Parts(blocks[:, 2:].contiguous().view(torch.int8), _half(blocks, 0))


def _q4_k(blocks: Tensor) -> _Parts:
    """Eight groups of 32, of which two lie in the same bytes. Scale and minimum of each have six bits: those of the first four groups a
    byte; of the others the upper two in the upper bits of those, and four in a byte for both."""
    first, second, both = blocks[:, 4:8], blocks[:, 8:12], blocks[:, 12:16]
    scales = torch.cat((first & 63, (both & 15) | (first >> 2 & 48)), dim=1)
    minimums = torch.cat((second & 63, (both >> 4) | (second >> 2 & 48)), dim=1)
    values = _nibbles(blocks[:, 16:].reshape(-1, 4, 32)).flatten(1)
    scales, minimums = _half(blocks, 0) * scales.float(), _half(blocks, 2) * -minimums.float()
    return _around_zero(values, scales, minimums, bits=4)


def _q6_k(blocks: Tensor) -> _Parts:
    """Sixteen groups of 16, in two halves: four bits of two values in a byte, the other two of four values in another."""
    low = _nibbles(blocks[:, :128].reshape(-1, 2, 64))
    shifts = torch.tensor([0, 2, 4, 6], dtype=torch.uint8)[:, None]
    high = (blocks[:, 128:192].reshape(-1, 2, 1, 32) >> shifts & 3).flatten(2)
    values = ((low | high << 4).flatten(1).to(torch.int8)) - 32
    return _Parts(values, _half(blocks, 208) * blocks[:, 192:208].contiguous().view(torch.int8).float())


class _Type(NamedTuple):
    """A type of ggml."""

    inputs: int
    """Of a block."""
    bytes: int
    """Of a block."""
    group: int
    """So many inputs share a scale."""
    bits: int
    read: Callable[[Tensor], _Parts]
    format: WeightFormat


_TYPES = {
    "Q4_0": _Type(32, 18, 32, 4, _q4_0, WeightFormat.INT4_G32),
    "Q4_1": _Type(32, 20, 32, 4, _q4_1, WeightFormat.INT4_G32_ASYM),
    "Q8_0": _Type(32, 34, 32, 8, _q8_0, WeightFormat.NONE),
    "Q4_K": _Type(256, 144, 32, 4, _q4_k, WeightFormat.INT4_G32_ASYM),
    "Q6_K": _Type(256, 210, 16, 6, _q6_k, WeightFormat.NONE),
}
_PLAIN = ("F32", "F16", "BF16")


class GGUFFile:
    """An open GGUF file, as a file of tensors; those in few bits are bytes, [outputs, bytes of a row]."""

    def __init__(self, path: Path) -> None:
        """Raises `ConfigurationError`, with the tensor, for what cannot be read."""
        reader = opened(path)
        self._path = path
        self._heads = {
            "attn_q": _heads(path, reader, "llama.attention.head_count"),
            "attn_k": _heads(path, reader, "llama.attention.head_count_kv"),
        }
        self._tensors = {hugging_face_name(each.name): each for each in reader.tensors if each.name != _NEEDLESS}
        for each in reader.tensors:
            if each.tensor_type.name not in (*_PLAIN, *_TYPES):
                raise ConfigurationError(
                    f"{path}: the tensor {each.name} is of type {each.tensor_type.name}; there are {', '.join((*_PLAIN, *_TYPES))}"
                )

    def reader(self, source: Source) -> Reader:
        """Of its matrices in few bits."""
        return _GGUF(source, self)

    def keys(self) -> Iterable[str]:
        """The names of its tensors, as Hugging Face has them."""
        return self._tensors.keys()

    def type_of(self, name: str) -> _Type | None:
        """Of the tensor of this name; None for one that is as it is, or that is not there."""
        tensor = self._tensors.get(name)
        return None if tensor is None else _TYPES.get(tensor.tensor_type.name)

    def get_tensor(self, name: str) -> Tensor:
        """The tensor of this name."""
        tensor = self._tensors[name]
        content = torch.from_numpy(np.array(tensor.data))  # a copy, for what is mapped cannot be written to
        if tensor.tensor_type.name == "BF16":
            content = content.view(torch.bfloat16)
        heads = next((heads for part, heads in self._heads.items() if f".{part}." in tensor.name), None)
        if heads is None:
            return content
        if len(content) % (2 * heads):
            raise ConfigurationError(
                f"{self._path}: the {len(content)} rows of {tensor.name} are not those of {heads} heads"
            )
        return content[torch.from_numpy(halves_together(np.arange(len(content)), num_heads=heads))]

    def get_slice(self, name: str) -> _Slice:
        """The tensor of this name, not read yet; of one in few bits the shape is that of the matrix."""
        return _Slice(self, name, [int(size) for size in reversed(self._tensors[name].shape)])


@dataclass(frozen=True, slots=True)
class _Slice:
    file: GGUFFile
    name: str
    whole: list[int]

    def get_shape(self) -> list[int]:
        return self.whole

    def __getitem__(self, index: tuple[slice, ...]) -> Tensor:
        return self.file.get_tensor(self.name)[index]


class _GGUF(Reader):
    def __init__(self, source: Source, file: GGUFFile) -> None:
        super().__init__(source)
        self._file = file

    def holds(self, name: str) -> bool:
        return self._file.type_of(f"{name}.weight") is not None

    def format(self, name: str) -> WeightFormat:
        return self._type(name).format

    def matrix(self, name: str, outputs: int, inputs: int) -> QuantizedMatrix:
        weight, type = f"{name}.weight", self._type(name)
        if (shape := self._source.shape(weight)) != (outputs, inputs):
            raise ConfigurationError(
                f"the tensor {weight} has shape {list(shape)}, but the config makes it {[outputs, inputs]}"
            )
        row = inputs // type.inputs * type.bytes
        blocks = self._source.raw(weight, outputs, row, dtypes=(torch.uint8,)).view(-1, type.bytes)
        values, scales, minimums = type.read(blocks)
        if not (scales.isfinite().all() and (minimums is None or minimums.isfinite().all())):
            raise ConfigurationError(f"the tensor {weight} holds scales that are not finite")
        return QuantizedMatrix(
            values.reshape(outputs, inputs),
            scales.reshape(outputs, -1),
            (1, type.group),
            type.bits,
            minimums_TU=None if minimums is None else minimums.reshape(outputs, -1),
        )

    def _type(self, name: str) -> _Type:
        type = self._file.type_of(f"{name}.weight")
        assert type is not None, f"{name} is not quantized"
        return type


def _heads(path: Path, reader: Any, key: str) -> int:
    field = reader.get_field(key)
    heads = None if field is None else field.contents()
    if not isinstance(heads, int) or heads < 1:
        raise ConfigurationError(f"{path}: {key} is {heads!r}, and must be a whole number above zero")
    return heads
