"""From a model folder to something that computes logits.

`load` reads the config, decides whose code computes the model (the native `decoder` for the families that a `ModelSpec`
describes, transformers' own for any other) and fills it with weights. Whatever cannot be served is refused here, by
name, before the engine takes a request.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol

import structlog
import torch
from torch import Tensor

from holdfast.errors import ConfigurationError
from services.engine.kv_cache import KVCache, KVShape
from services.engine.models.decoder import Decoder, ignored
from services.engine.models.spec import FAMILIES, Config, ModelSpec, NotCovered, read_config
from services.engine.quant.rules import Rules
from services.engine.shard import ALONE, Shard
from services.engine.weight_format import WeightFormat
from services.engine.weights import Dummy, gguf_file, open_checkpoint

if TYPE_CHECKING:
    from services.engine.models.fallback import TransformersDecoder
    from services.engine.state import Batch


class Model(Protocol):
    """What the engine needs of a model."""

    kv_shape: KVShape
    vocab_size: int
    max_positions: int
    """Most tokens of a sequence."""

    def forward(self, batch: Batch, cache: KVCache) -> Tensor:
        """The float32 logits of the rows to sample, [R, V]. Writes the keys and values of the batch's tokens."""
        ...


def load(
    folder: Path,
    *,
    implementation: Literal["auto", "native", "transformers"] = "auto",
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    load_format: Literal["safetensors", "dummy"] = "safetensors",
    quantization: str = WeightFormat.NONE,
    invariant: bool = False,
    shard: Shard = ALONE,
) -> Model:
    """The model of a folder, or a rank's part of it. `auto` takes the native code where it covers the model, `dtype` None
    what the config says; `quantization`: as `weight_format` says. `invariant`: of the native code on a GPU, what a
    token gives does not depend on the tokens beside it. Raises `ConfigurationError` for whatever cannot be served."""
    config, rules = read_config(folder), Rules(quantization, invariant=invariant)
    quantized = config.get("quantization_config")
    if quantized and load_format == "dummy":
        raise ConfigurationError(
            f"{folder}: load_format dummy makes no weights in few bits; take quantization_config out of config.json"
        )
    dtype, device = dtype or dtype_of(config), torch.device(device)
    try:
        spec = None if implementation == "transformers" else ModelSpec.from_config(config)
    except NotCovered as reason:
        if implementation == "native":
            raise
        structlog.stdlib.get_logger(__name__).info("transformers computes the model", reason=str(reason))
        spec = None
    if spec is None and not shard.is_alone:
        raise ConfigurationError(
            f"tensor_parallel is {shard.count}, but transformers computes this model, whose code cannot be split over "
            f"ranks; only {', '.join(sorted(FAMILIES))} can, natively"
        )
    if spec is None and invariant:
        raise ConfigurationError(
            "deterministic: transformers computes this model, whose products on a GPU depend on how many there are; only "
            f"{', '.join(sorted(FAMILIES))} are deterministic there, natively"
        )
    if spec is None:
        if quantized or (load_format != "dummy" and gguf_file(folder)):
            raise ConfigurationError(
                f"{folder} is quantized ({quantized.get('quant_method') if quantized else 'GGUF'}), and transformers computes this "
                f"model; only {', '.join(sorted(FAMILIES))} can be read so, natively"
            )
        if rules.quantizes:
            raise ConfigurationError(
                f"quantization is {quantization}, but what transformers computes cannot be; say none"
            )
        if load_format == "dummy":
            return _fallback().dummy(folder, Dummy(dtype=dtype, device=device))
        return _fallback().load(folder, dtype=dtype, device=device)
    if load_format == "dummy":
        model = Decoder(Dummy(dtype=dtype, device=device, rules=rules, shard=shard), spec)
    else:
        with open_checkpoint(
            folder, dtype=dtype, device=device, rules=rules, shard=shard, quantization_config=quantized
        ) as checkpoint:
            model = Decoder(checkpoint, spec)
            checkpoint.finish(ignored=ignored(spec))
    rules.finish()
    return model


def dtype_of(config: Config) -> torch.dtype:
    """What the config says the weights are in; float32 where it says nothing."""
    name = config.get("dtype") or config.get("torch_dtype") or "float32"
    dtype = _DTYPES.get(str(name))
    if dtype is None:
        raise ConfigurationError(f"config.json: dtype {name!r} is none of {', '.join(_DTYPES)}")
    return dtype


_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def _fallback() -> type[TransformersDecoder]:
    # Not above: transformers takes seconds to import, and the native families do without it.
    from services.engine.models.fallback import TransformersDecoder

    return TransformersDecoder
