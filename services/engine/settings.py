"""What an engine can be told."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from holdfast.settings import Settings
from services.engine import kv_format, weight_format
from services.engine.economy import Economy


@dataclass(frozen=True, slots=True)
class Capacity:
    """How much an engine takes at a time."""

    max_sequences: int
    max_step_tokens: int
    block_size: int


_USUAL = {"cpu": Capacity(64, 2048, 32), "cuda": Capacity(256, 8192, 64)}
"""By type of device."""


MOST_RANKS = 8
"""Over so many devices a model can be split."""


def _checked_by(rules_of: Callable[[str], object]) -> AfterValidator:
    """Rules stay the text that they are given as, once that can be read."""

    def checked(text: str) -> str:
        rules_of(text)
        return text

    return AfterValidator(checked)


class EngineSettings(Settings, env_prefix="HOLDFAST_ENGINE_"):
    """One engine."""

    model: str = "smollm2-135m-instruct"
    """What to serve: a folder, a GGUF file, a name known to `holdfast pull`, or a hub id."""
    served_model_name: str = ""
    """The name that requests use; empty for the last part of `model`."""
    name: str = ""
    """This engine's name, unique in the mesh; empty for one made of host and process id."""
    kafka: str = "127.0.0.1:9092"
    """Bootstrap servers of the log, `host:port,host:port`."""
    kafka_namespace: str = ""
    """Stands before the names of all topics and groups, so that several meshes can share a cluster."""
    incarnation: Annotated[int, Field(ge=0, lt=1 << 31)] = 0
    """Raise it when the engines' consumer group was deleted: epochs must never fall."""
    address: str = "127.0.0.1:0"
    """Where the control service listens, `host:port`; port 0 for any: what serves needs no address, only who looks on."""
    metrics_address: str = ""
    """Where `/metrics` is served, `host:port`; empty for nowhere."""
    drain_seconds: Annotated[float, Field(ge=0)] = 5.0
    """How long running sequences may go on after the stop signal. What is left is taken up by another engine, which computes
    its tokens so far anew; and so long new requests of this engine's share wait for another."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where the model runs; auto takes cuda where there is one."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Of weights and activations; auto takes what the model's config says."""
    quantization: Annotated[str, _checked_by(weight_format.rules_of)] = "none"
    """How weight matrices are kept: none for as they are; one of fp8, fp8-tensor, fp8-block, int8, int8-static, int8-weight, int4-g32,
    int4-g64, int4-g128, and the same with int3 (these with -asym too), which spares embedding and head; ordered rules `glob=format,...` over
    their names, of which the first that matches decides; or a file of groups, .yaml, .toml or .json (`weight_groups.py`)."""
    economy: Annotated[str, _checked_by(lambda rules: rules and weight_format.rules_of(rules))] = ""
    """Weight formats, as in `quantization`, of a second copy of the model, which computes steps while time is short (`economy.py`);
    empty for none. On a CPU only so far."""
    economy_for: Literal["interactive", "batch", "all"] = "all"
    """Whose tokens may come from it. A step that has any other sequence in it is computed with the full weights."""
    economy_wait_ms: Annotated[float, Field(ge=0)] = 1000.0
    """Time is short while the first request in line has waited longer than this, or running ones would wait for a token longer than
    `itl_target_ms`."""
    load_format: Literal["safetensors", "dummy"] = "safetensors"
    """dummy builds the model of a config with random weights, for benchmarks."""
    implementation: Literal["auto", "native", "transformers"] = "auto"
    """Whose modelling code; auto takes ours where it covers the architecture."""
    max_model_len: Annotated[int, Field(ge=1)] | None = None
    """Most tokens of prompt and answer together; by default the model's context, as far as the cache can hold it."""
    max_sequences: Annotated[int, Field(ge=1, le=4096)] | None = None
    """Most sequences in a step; by default 64 on a CPU and 256 on a GPU."""
    max_step_tokens: Annotated[int, Field(ge=1, le=65_535)] | None = None
    """Most tokens in a step, decodes and prefill chunks together; by default 2,048 on a CPU and 8,192 on a GPU, or
    `max_sequences` if that is more."""
    itl_target_ms: Annotated[float, Field(gt=0)] = 200.0
    """The time between two tokens that prefill chunks should leave to running sequences. Prefill gets less of a step
    as the step's expected time nears it, but never less than one block. inf for most tokens a second: while prompts fill whole steps, running
    sequences wait, for 64 steps at most."""
    block_size: Literal[16, 32, 64] | None = None
    """Tokens of a KV block; by default 32 on a CPU and 64 on a GPU."""
    kv_cache_dtype: Annotated[str, _checked_by(kv_format.rules_of)] = "auto"
    """How keys and values are kept: auto (the model's dtype), fp8_e4m3 or int8 (half of 16 bits and a little for their
    scales; on a GPU they want block_size 64). Or for each layer, the first rule that names it: LAYERS=FORMAT,... with LAYERS a
    number, a range like 2..5, negative from the end, or *, as in 0..1=auto,-2..-1=auto,*=fp8_e4m3."""
    cache_blocks: Annotated[int, Field(ge=2)] | None = None
    """KV blocks in all; by default as many as `cache_bytes` holds, on a GPU as many as fit below `gpu_memory_share`."""
    gpu_memory_share: Annotated[float, Field(gt=0, le=1)] = 0.9
    """Of the whole memory of a GPU, up to where the engine fills it; what is left is for others."""
    cache_bytes: Annotated[int, Field(ge=1 << 20)] = 1 << 30
    """Memory for the KV cache on a CPU, of all ranks together."""
    prefix_cache: bool = True
    """Whether blocks of earlier sequences are found again by their content."""
    kvstore: str = ""
    """`host:port` of a KV store for prefixes that this engine no longer holds; empty for none."""
    threads: Annotated[int, Field(ge=1)] | None = None
    """Threads of the CPU executor, in each rank; by default one for each core there is."""
    deterministic: bool = False
    """Whether a request's tokens, greedy or seeded, must not depend on what else the engine computes. On a GPU that takes one
    kernel for every number of rows, and bfloat16, float16 or float32 throughout; on a CPU tokens are computed one by one."""
    tensor_parallel: Annotated[int, Field(ge=1, le=MOST_RANKS)] = 1
    """Over how many devices of this machine each layer is split, a process for each: GPUs, or processes alone on a CPU."""

    def economy_targets(self) -> Economy | None:
        """When the second copy computes, and for whom; None where there is none."""
        if not self.economy:
            return None
        return Economy(
            interactive=self.economy_for != "batch",
            batch=self.economy_for != "interactive",
            itl_target=self.itl_target_ms / 1000,
            wait_target=self.economy_wait_ms / 1000,
        )

    def capacity(self, device_type: str) -> Capacity:
        """What is said of it here, and the rest as suits such a device."""
        usual = _USUAL[device_type]
        max_sequences = self.max_sequences or usual.max_sequences
        return Capacity(
            max_sequences,
            self.max_step_tokens or max(usual.max_step_tokens, max_sequences),
            self.block_size or usual.block_size,
        )
