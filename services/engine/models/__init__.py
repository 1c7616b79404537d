"""From a model folder to something that computes logits.

`load` reads the config, decides whose code computes the model (the native `decoder` for the families that a `ModelSpec`
describes, transformers' own for any other) and fills it with weights. Whatever cannot be served is refused here, by
name, before the engine takes a request.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol

import torch
from torch import Tensor

from holdfast.errors import ConfigurationError
from services.engine.kv_cache import KVCache, KVShape
from services.engine.models.decoder import Decoder
from services.engine.models.spec import Config, ModelSpec, read_config
from services.engine.weights import Dummy, open_checkpoint

if TYPE_CHECKING:
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
) -> Model:
    """The model of a folder. `dtype` None takes what the config says. Raises `ConfigurationError`."""
    config = read_config(folder)
    spec = ModelSpec.from_config(config)
    return _native(folder, spec, dtype=dtype or dtype_of(config), device=torch.device(device), load_format=load_format)


def dtype_of(config: Config) -> torch.dtype:
    """What the config says the weights are in; float32 where it says nothing."""
    name = config.get("dtype") or config.get("torch_dtype") or "float32"
    dtype = _DTYPES.get(str(name))
    if dtype is None:
        raise ConfigurationError(f"config.json: dtype {name!r} is none of {', '.join(_DTYPES)}")
    return dtype


_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def _native(folder: Path, spec: ModelSpec, *, dtype: torch.dtype, device: torch.device, load_format: str) -> Decoder:
    if load_format == "dummy":
        return Decoder(Dummy(dtype=dtype, device=device), spec)
    with open_checkpoint(folder, dtype=dtype, device=device) as weights:
        model = Decoder(weights, spec)
        weights.finish(ignored=("*.rotary_emb.inv_freq", *(("lm_head.weight",) if spec.tied else ())))
    return model
