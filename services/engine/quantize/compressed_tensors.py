"""A checkpoint in the format of the package compressed-tensors (0.20: `compressors/pack_quantized`, `compressors/naive_quantized` for tensors,
`quantization/quant_config.py` for the config), as its readers in transformers and vLLM take it.

Weights without quantized activations are packed, int32 by int32; those with such are bytes, and so is an embedding in eight bits. Scales are in the model's dtype, in which they have been
used while weights were rounded.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from services.engine.quant import Format
from services.engine.quant.matrix import QuantizedMatrix, Scheme
from services.engine.weight_format import EMBEDDING, HEAD

VERSION = "0.20.0"
"""Of the format."""

_PACKED = "pack-quantized"
_ROWS_AT_ONCE = 1024  # bits take a byte each while they are packed


def tensors_of(
    name: str,
    matrix: QuantizedMatrix,
    format: Format,
    *,
    dtype: torch.dtype,
    is_table: bool = False,
    input_scale: float | None = None,
) -> dict[str, Tensor]:
    """The matrix of this name. `dtype`: of scales, which must be representable in it. `is_table`: its rows are looked up."""
    assert matrix.order_I is None and matrix.minimums_TU is None
    scales_TU = matrix.scales_TU.to(dtype)
    assert torch.equal(scales_TU.float(), matrix.scales_TU), f"{name}: scales are finer than they are written"
    scales = scales_TU.view(1) if _strategy(format.scheme)["strategy"] == "tensor" else scales_TU
    found = {f"{name}.weight_scale": scales.contiguous()}
    if _layout(format, is_table=is_table) == _PACKED:
        found[f"{name}.weight_packed"] = packed(matrix.values_OI, matrix.bits)
        found[f"{name}.weight_shape"] = torch.tensor(matrix.shape)
        if matrix.zeros_TU is not None:
            found[f"{name}.weight_zero_point"] = packed(matrix.zeros_TU.t(), matrix.bits).t().contiguous()
    else:
        assert matrix.zeros_TU is None
        found[f"{name}.weight"] = matrix.values_OI.contiguous()
    if input_scale is not None:
        found[f"{name}.input_scale"] = torch.tensor([input_scale], dtype=dtype)
    return found


def config_of(matrices: Iterable[tuple[str, Format]], *, others: Iterable[str]) -> dict[str, Any]:
    """The `quantization_config` of a model with these matrices. `others`: what else a reader might take for a matrix that is quantized; names,
    or patterns after `re:`."""
    groups: list[tuple[dict[str, Any], list[str]]] = []
    ignored = list(others)
    for name, format in matrices:
        if format.scheme is None:
            ignored += [] if name == EMBEDDING else [name]
            continue
        scheme = scheme_of(format, is_table=name == EMBEDDING)
        names = next((names for known, names in groups if known == scheme), None)
        if names is None:
            groups.append((scheme, names := []))
        names.append(name)
    is_only = sum(names != [EMBEDDING] for _, names in groups) == 1
    formats = {scheme["format"] for scheme, _ in groups}
    return {
        "quant_method": "compressed-tensors",
        "version": VERSION,
        "format": formats.pop() if len(formats) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "config_groups": {
            f"group_{index}": {"targets": _targets(names, is_only=is_only), **scheme}
            for index, (scheme, names) in enumerate(groups)
        },
        "ignore": ignored,
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }


def _targets(names: Sequence[str], *, is_only: bool) -> list[str]:
    """What a config calls these matrices: their names, or if there is one group of linear ones only (`is_only`) their kind, to which vLLM does
    not count the head. The embedding goes by its kind, since vLLM's Llama asks for it without a name."""
    table, linear = [name for name in names if name == EMBEDDING], [name for name in names if name != EMBEDDING]
    if is_only and linear:
        linear = [*(name for name in linear if name == HEAD), "Linear"]
    return ["Embedding" for _ in table] + linear


def scheme_of(format: Format, *, is_table: bool = False) -> dict[str, Any]:
    """A format that rounds in the words of compressed-tensors, its targets apart."""
    scheme = format.scheme
    assert scheme is not None
    kind = "float" if scheme.is_float else "int"
    weights = _arguments(kind, scheme.bits, symmetric=scheme.symmetric, dynamic=False, **_strategy(scheme))
    activations: Mapping[str, Any] | None = None
    if format.needs_input_scale:
        activations = _arguments(kind, 8, strategy="tensor", dynamic=False)
    elif format.rounds_activations and scheme.tile == (128, 128):
        activations = _arguments(kind, 8, strategy="group", group_size=128, dynamic=True)
    elif format.rounds_activations:
        activations = _arguments(kind, 8, strategy="token", dynamic=True)
    layout = _layout(format, is_table=is_table)
    return {"weights": weights, "input_activations": activations, "output_activations": None, "format": layout}


def _layout(format: Format, *, is_table: bool) -> str:
    """How values lie. The package itself packs an embedding in eight bits too; transformers 5.23 cannot load one that has no `weight`."""
    scheme = format.scheme
    assert scheme is not None
    if not format.rounds_activations and not (is_table and scheme.bits == 8):
        return _PACKED
    return "float-quantized" if scheme.is_float else "int-quantized"


def packed(values_OI: Tensor, bits: int) -> Tensor:
    """Whole numbers of so few bits around zero, [O, I], one after the other in the bits of int32, the lowest first; [O, I * bits / 32], rounded
    up."""
    pieces = [_words(piece_OI, bits) for piece_OI in torch.split(values_OI, _ROWS_AT_ONCE)]
    return torch.from_numpy(np.concatenate(pieces))


def _words(values_OI: Tensor, bits: int) -> NDArray[np.int32]:
    numbers_OI = (values_OI.to(torch.int16) + 2 ** (bits - 1)).to(torch.uint8).cpu().numpy()
    each_bit = np.unpackbits(numbers_OI[..., None], axis=-1, count=bits, bitorder="little")
    each_bit = each_bit.reshape(len(numbers_OI), -1)
    each_bit = np.pad(each_bit, ((0, 0), (0, -each_bit.shape[1] % 32)))
    return np.packbits(each_bit, axis=-1, bitorder="little").view("<i4")


def _arguments(kind: str, bits: int, *, symmetric: bool = True, **more: Any) -> dict[str, Any]:
    return {"num_bits": bits, "type": kind, "symmetric": symmetric, **more}


def _strategy(scheme: Scheme | None) -> dict[str, Any]:
    """What shares a scale."""
    assert scheme is not None
    match scheme.tile:
        case (None, None):
            return {"strategy": "tensor"}
        case (1, None):
            return {"strategy": "channel"}
        case (1, size):
            return {"strategy": "group", "group_size": size}
        case block:
            return {"strategy": "block", "block_structure": list(block)}
