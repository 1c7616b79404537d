"""Matrices in few bits as others write them: a file for each family, and what they read from in `source`.

A checkpoint says of itself how it is quantized, in the `quantization_config` of its config.json, or by being a GGUF file. A reader says which
matrices come in few bits, what they are, and in what format they are kept without a change. Nothing is rounded again: where no
format of ours keeps what there is, it is unpacked, and the log says so.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from services.engine.quant.readers.awq import AWQ
from services.engine.quant.readers.compressed_tensors import CompressedTensors
from services.engine.quant.readers.gptq import GPTQ
from services.engine.quant.readers.hf_fp8 import HuggingFaceFp8
from services.engine.quant.readers.source import Config, Reader, Source, refuse

_METHODS: Mapping[str, Callable[[Config, Source], Reader]] = {
    "compressed-tensors": CompressedTensors,
    "gptq": GPTQ,
    "awq": AWQ,
    "fp8": HuggingFaceFp8,
    "fbgemm_fp8": HuggingFaceFp8,
}


def reader_of(config: Config, source: Source) -> Reader:
    """The reader of a checkpoint with this `quantization_config`. Raises `ConfigurationError` where there is none, or where the config
    says what cannot be read."""
    method = config.get("quant_method")
    reader = _METHODS.get(str(method))
    if reader is None:
        refuse(f"quant_method is {method!r}; there are readers for {', '.join(_METHODS)}, and for GGUF files")
    return reader(config, source)
