"""Builds what computes: model, cache, slots and runner, as the settings say and as the machine allows."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Iterator
from collections.abc import Sequence as Seq
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import structlog
import torch

from holdfast.errors import ConfigurationError
from holdfast.models import cache_folder
from services.engine import memory, models
from services.engine.kv_cache import KVCache, KVLayout
from services.engine.kv_format import KVFormat, formats_of
from services.engine.model_runner import Eager, ModelRunner, TwoCopies
from services.engine.models import Model
from services.engine.models.decoder import Decoder
from services.engine.sampler import sampler_for
from services.engine.settings import Capacity, EngineSettings
from services.engine.shard import ALONE, Shard
from services.engine.state import DeviceState
from services.engine.token_by_token import TokenByToken

log = structlog.stdlib.get_logger(__name__)

GPU_LOOKAHEAD = 2
"""Steps in flight behind the oldest one on a GPU: one that runs, and one so that it never waits for the host."""

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True, slots=True)
class Facts:
    """What the engine around it must know of what computes; plain data."""

    vocab_size: int
    layout: KVLayout
    """Of a block of the cache, or of a rank's part of one."""
    num_blocks: int
    max_model_len: int
    """Most tokens of a sequence."""
    lookahead: int
    """How many steps to launch before the result of the oldest is waited for, that one apart."""
    device: str
    """Its type."""
    implementation: Literal["native", "transformers"]
    """Whose modelling code."""


@dataclass(frozen=True, slots=True)
class Computer:
    """What computes steps."""

    model: Model
    cache: KVCache
    runner: ModelRunner
    facts: Facts


class Took:
    """How long the phases of a start took."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        """By name: `weights` are read, the `cache` is sized and made, `steps` are captured."""

    @contextmanager
    def noted(self, phase: str) -> Iterator[None]:
        """The block is this phase."""
        start = time.monotonic()
        yield
        self.seconds[phase] = round(time.monotonic() - start, 2)


async def build_apart(settings: EngineSettings, folder: Path) -> Computer:
    """As `build`, beside the event loop, in a thread that ends with it.

    OpenMP gives every thread that computes workers of its own, for as long as it lives. Where a process has more of them
    than cores, GNU's lets none wait awake for the next operation, and to wake them costs more than most operations of a
    decode step take: beside the idle workers of another thread it took 1.6 times as long (135M model, 2 cores).
    """
    thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="build")
    try:
        return await asyncio.get_running_loop().run_in_executor(thread, build, settings, folder)
    finally:
        thread.shutdown(wait=False)  # it ends once it is done, though nobody should wait any more


def build(settings: EngineSettings, folder: Path, shard: Shard = ALONE) -> Computer:
    """Loads the model of a folder, or a rank's part of it, and sets up everything around it. Sets the number of threads
    that torch uses in this process. Raises `ConfigurationError` where the settings do not fit the model or the machine."""
    assert settings.tensor_parallel == shard.count, "the other ranks are processes of their own"
    device = device_of(settings, shard)
    if settings.deterministic:
        _check_deterministic(settings, device)
    if settings.economy and device.type == "cuda":
        raise ConfigurationError("economy: a GPU keeps one copy of the weights so far; leave it out, or say device cpu")
    capacity = settings.capacity(device.type)
    torch.set_num_threads(settings.threads or max(1, len(os.sched_getaffinity(0)) // shard.count))
    # Kernels are compiled once for a machine, and lie where models do: in a container, on what outlives it.
    os.environ.setdefault("TRITON_CACHE_DIR", str(cache_folder() / "triton"))
    took = Took()
    with took.noted("weights"):
        model = _load(settings, folder, device, shard, quantization=settings.quantization)
        economical = _load(settings, folder, device, shard, quantization=settings.economy) if settings.economy else None
    with took.noted("cache"):
        cache = _cache(settings, capacity, model, device, shard)
    max_model_len = _max_model_len(settings, model, cache)
    state = DeviceState(
        num_slots=capacity.max_sequences, max_len=max_model_len, block_size=capacity.block_size, device=device
    )
    with took.noted("steps"):
        runner = _runner(
            model,
            cache,
            state,
            most_tokens=capacity.max_step_tokens,
            deterministic=settings.deterministic,
            economical=economical,
        )
    log.info(
        "model loaded",
        folder=str(folder),
        device=str(device),
        dtype=str(model.kv_shape.dtype).removeprefix("torch."),
        quantization=settings.quantization,
        economy=settings.economy,
        kv_cache_dtype=settings.kv_cache_dtype,
        cache_blocks=cache.num_blocks,
        cache_tokens=cache.num_blocks * cache.block_size,
        max_model_len=max_model_len,
        threads=torch.get_num_threads(),
        seconds=took.seconds,
    )
    facts = Facts(
        vocab_size=model.vocab_size,
        layout=cache.layout,
        num_blocks=cache.num_blocks,
        max_model_len=max_model_len,
        lookahead=GPU_LOOKAHEAD if device.type == "cuda" else 0,
        device=device.type,
        implementation="native" if isinstance(model, Decoder) else "transformers",
    )
    return Computer(model, cache, runner, facts)


def _load(settings: EngineSettings, folder: Path, device: torch.device, shard: Shard, *, quantization: str) -> Model:
    return models.load(
        folder,
        implementation=settings.implementation,
        dtype=_DTYPES.get(settings.dtype),
        device=device,
        load_format=settings.load_format,
        shard=shard,
        quantization=quantization,
        invariant=settings.deterministic and device.type == "cuda",
    )


def _runner(
    model: Model,
    cache: KVCache,
    state: DeviceState,
    *,
    most_tokens: int,
    deterministic: bool,
    economical: Model | None,
) -> ModelRunner:
    sampler = sampler_for(state)
    eager = Eager(model, cache, state, sampler)
    if economical is not None:
        return ModelRunner(TwoCopies(eager, Eager(economical, cache, state, sampler)))
    if state.device.type != "cuda":
        return ModelRunner(TokenByToken(eager) if deterministic else eager)
    if not isinstance(model, Decoder):
        return ModelRunner(eager)
    from services.engine.graphs import Graphs  # needs Triton, which a CPU does without

    return ModelRunner(Graphs(model, cache, state, larger=eager, most_tokens=most_tokens))


def _check_deterministic(settings: EngineSettings, device: torch.device) -> None:
    """Raises `ConfigurationError` for what cannot be deterministic, or is not proven to be."""
    if settings.economy:
        raise ConfigurationError(
            "deterministic: not with economy, which lets tokens depend on how much there is to do; leave out one of them"
        )
    if settings.tensor_parallel > 1:
        raise ConfigurationError(
            f"deterministic: not with tensor_parallel {settings.tensor_parallel}, for sums over ranks are added up in an order "
            "that follows from their size; say 1"
        )
    if device.type == "cpu":
        return
    for name, plain in (("quantization", "none"), ("kv_cache_dtype", "auto")):
        if getattr(settings, name) != plain:
            raise ConfigurationError(
                f"deterministic: not with {name} {getattr(settings, name)} on a GPU, whose kernels for 8 bits round by what "
                f"stands beside a token; say {plain}"
            )


def device_of(settings: EngineSettings, shard: Shard) -> torch.device:
    """Where a rank computes: each on a GPU of its own, or all on the CPU. Raises `ConfigurationError` where there is none."""
    if settings.device == "cpu" or (settings.device == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    num_devices = torch.cuda.device_count()
    if not num_devices:
        raise ConfigurationError("device is cuda, but PyTorch sees no CUDA device here; say cpu or auto")
    if num_devices < shard.count:
        raise ConfigurationError(
            f"tensor_parallel is {shard.count}, but PyTorch sees only {num_devices} CUDA devices here, and each rank wants "
            "one of its own"
        )
    return torch.device("cuda" if shard.is_alone else f"cuda:{shard.rank}")


def _cache(settings: EngineSettings, capacity: Capacity, model: Model, device: torch.device, shard: Shard) -> KVCache:
    shape = model.kv_shape
    formats = formats_of(settings.kv_cache_dtype, num_layers=shape.layers)
    if device.type == "cuda" and capacity.block_size != 64 and any(format.is_quantized for format in formats):
        raise ConfigurationError(
            f"block_size is {capacity.block_size}; on a GPU keys and values in 8 bits (kv_cache_dtype is "
            f"{settings.kv_cache_dtype}) lie in blocks of 64 tokens"
        )
    block_bytes = KVLayout(shape, capacity.block_size, formats).block_bytes
    room = (
        settings.cache_bytes // shard.count
        if device.type == "cpu"
        else _gpu_room(settings, capacity, model, formats, device)
    )
    # One block more is made than there are; a GPU has no room to spare for it.
    holds = shard.least(room // block_bytes, device) - (device.type == "cuda")
    num_blocks = settings.cache_blocks or holds
    if num_blocks < 2 or (device.type == "cuda" and num_blocks > holds):
        raise ConfigurationError(
            _no_room(settings, capacity, device, shard, block_bytes=block_bytes, num_blocks=num_blocks, holds=holds)
        )
    try:
        return KVCache(shape, num_blocks=num_blocks, block_size=capacity.block_size, device=device, formats=formats)
    except (RuntimeError, torch.OutOfMemoryError) as error:
        raise ConfigurationError(
            f"no memory for a KV cache of {num_blocks:,} blocks of {block_bytes:,} bytes; ask for less with cache_blocks"
        ) from error


def _gpu_room(
    settings: EngineSettings, capacity: Capacity, model: Model, formats: Seq[KVFormat], device: torch.device
) -> int:
    """Bytes of a GPU that a rank's cache may take."""
    largest = memory.Largest(
        min(capacity.max_step_tokens, capacity.max_sequences * model.max_positions),
        capacity.max_sequences,
        capacity.block_size,
    )
    try:
        step = memory.step_bytes(model, largest, formats=formats, device=device)
    except torch.OutOfMemoryError as error:
        raise ConfigurationError(
            f"no memory for a step of max_step_tokens ({capacity.max_step_tokens:,}) tokens and max_sequences "
            f"({capacity.max_sequences:,}) sequences beside the weights; lower either"
        ) from error
    captured = 0
    if isinstance(model, Decoder):
        from services.engine import graphs  # needs Triton, which a CPU does without

        most = {"num_slots": capacity.max_sequences, "most_tokens": capacity.max_step_tokens}
        captured = memory.captured_bytes(
            step=step,
            forms=graphs.num_forms(**most),
            logits_rows=graphs.logits_rows(**most),
            vocab_size=model.vocab_size,
        ) + 2 * graphs.scratch_bytes(  # of captured steps, and of one that is not
            num_slots=capacity.max_sequences,
            max_len=settings.max_model_len or model.max_positions,
            heads=model.spec.heads,
            kv_heads=model.kv_shape.kv_heads,
            head_dim=model.spec.head_dim,
        )
    slots = memory.slot_bytes(
        num_slots=capacity.max_sequences,
        max_len=settings.max_model_len or model.max_positions,
        block_size=capacity.block_size,
    )
    free, total = torch.cuda.mem_get_info(device)
    room = memory.room_for_cache(
        free=free, total=total, share=settings.gpu_memory_share, step=step, captured=captured, slots=slots
    )
    log.info("memory", free=free, step=step, captured=captured, slots=slots, cache=room)
    return room


def _no_room(
    settings: EngineSettings,
    capacity: Capacity,
    device: torch.device,
    shard: Shard,
    *,
    block_bytes: int,
    num_blocks: int,
    holds: int,
) -> str:
    if device.type == "cpu":
        share = settings.cache_bytes // shard.count
        its, of = ("", "") if shard.is_alone else (" of a rank", f" of {settings.cache_bytes:,}, its share")
        return (
            f"a block of {capacity.block_size} tokens takes {block_bytes:,} bytes{its}; cache_bytes ({share:,}{of}) "
            "must hold two at least"
        )
    return (
        f"the KV cache should have {max(num_blocks, 2):,} blocks of {block_bytes:,} bytes, but beside weights and steps the GPU has "
        f"room for {holds:,}; lower cache_blocks, max_step_tokens or max_sequences, or raise gpu_memory_share "
        f"({settings.gpu_memory_share})"
    )


def _max_model_len(settings: EngineSettings, model: Model, cache: KVCache) -> int:
    holds = cache.num_blocks * cache.block_size
    if settings.max_model_len is None:
        return min(model.max_positions, holds)
    if settings.max_model_len > model.max_positions:
        raise ConfigurationError(
            f"max_model_len is {settings.max_model_len}, but the model's context has {model.max_positions} tokens"
        )
    if settings.max_model_len > holds:
        raise ConfigurationError(
            f"the cache is too small for one sequence of max_model_len ({settings.max_model_len}) tokens: its "
            f"{cache.num_blocks} blocks hold {holds}; raise cache_bytes or cache_blocks, or lower max_model_len"
        )
    return settings.max_model_len
