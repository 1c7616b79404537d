"""The engine alone: scheduler, runner and sampler, token ids in and out, no log, no service.

    python -m benchmarks.offline smollm2-135m-instruct --scale 0.125 --batches 1,4,16
    python -m benchmarks.offline FOLDER_WITH_A_CONFIG --load-format dummy --device cuda --out results/offline.json

A  mixed throughput: 256 requests at once, input and output lengths U(100, 1024)
B  time per output token at each batch size, 1,024 tokens of context: (time of 129 tokens - time of 1) / 128
C  prefill: 16 prompts of 2,048 tokens, one token each

Greedy, no token ends an answer, prompts are random ids, nothing is found in a cache. `--scale` shortens all lengths, for a
CPU; the report says so. What is reported is the best of the repetitions: two of A and B, three of C.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Sequence
from pathlib import Path

import torch
import uvloop

from benchmarks.alone import EngineAlone, engine_alone
from benchmarks.options import above_zero, at_least, batches, run, setting, workloads
from benchmarks.report import Report
from holdfast import models

MIXED_REQUESTS = 256
OUTPUT = 128
"""Tokens over which B takes the mean time of one."""
CONTEXT = 1024
PREFILL = 2048
PREFILL_PROMPTS = 16


class Workloads:
    """The three workloads on one engine."""

    def __init__(self, engine: EngineAlone, report: Report, *, vocab_size: int, scale: float) -> None:
        self._engine = engine
        self._report = report
        self._vocab_size = vocab_size
        self._scale = scale
        self._random = random.Random(0)

    def require(self, work: str, *, count: int) -> None:
        """Raises ConfigurationError where the longest prompt and answer of these workloads do not fit the engine."""
        longest = {
            "A": max(map(sum, zip(*self._mixed_lengths(count), strict=True))),
            "B": self._length(CONTEXT) + self._length(OUTPUT) + 1,
            "C": self._length(PREFILL) + 1,
        }
        self._engine.require(max(longest[each] for each in work))

    async def mixed(self, count: int) -> None:
        """A."""
        inputs, outputs = self._mixed_lengths(count)
        seconds = await self._best(2, inputs, outputs)
        rates = [sum(outputs) / seconds, (sum(inputs) + sum(outputs)) / seconds]
        columns = ["requests", "output tok/s", "all tok/s", "s"]
        self._report.table("A: mixed throughput", columns, [[str(count), *rates, seconds]])

    async def decode(self, batches: Sequence[int]) -> None:
        """B."""
        context, output = self._length(CONTEXT), self._length(OUTPUT)
        rows: list[list[str | float]] = []
        for batch in batches:
            await self._best(1, [context] * batch, [4] * batch)
            first = await self._best(2, [context] * batch, [1] * batch)
            all_ = await self._best(2, [context] * batch, [output + 1] * batch)
            seconds = (all_ - first) / output
            rows.append([str(batch), seconds * 1e3, batch / seconds])
        title = f"B: time per output token, {context} tokens of context, mean of {output}"
        self._report.table(title, ["batch", "ms", "output tok/s"], rows)

    async def prefill(self) -> None:
        """C."""
        length, count = self._length(PREFILL), PREFILL_PROMPTS
        await self._best(1, [length] * 4, [1] * 4)
        seconds = await self._best(3, [length] * count, [1] * count)
        self._report.table(
            "C: prefill", ["prompts", "tok/s", "s"], [[f"{count} × {length}", count * length / seconds, seconds]]
        )

    async def _best(self, repetitions: int, inputs: Sequence[int], outputs: Sequence[int]) -> float:
        """Seconds of the fastest of so many runs."""
        return min([await self.run(inputs, outputs) for _ in range(repetitions)])

    async def run(self, inputs: Sequence[int], outputs: Sequence[int]) -> float:
        """Seconds that prompts of these lengths take together."""
        prompts = prompts_of(inputs, vocab_size=self._vocab_size, draw=self._random)
        start = time.perf_counter()
        await self._engine.answers(prompts, outputs)
        return time.perf_counter() - start

    def _mixed_lengths(self, count: int) -> tuple[list[int], list[int]]:
        """Of the prompts and the answers of A."""
        draw = random.Random(0)
        inputs = [self._length(draw.randint(100, 1024)) for _ in range(count)]
        return inputs, [self._length(draw.randint(100, 1024)) for _ in range(count)]

    def _length(self, full: int) -> int:
        return max(1, round(full * self._scale))


def prompts_of(lengths: Sequence[int], *, vocab_size: int, draw: random.Random | None = None) -> list[list[int]]:
    """Random ids, those at both ends of the vocabulary apart, which often mean something."""
    draw = draw or random.Random(0)
    return [[draw.randrange(10, vocab_size - 10) for _ in range(length)] for length in lengths]


async def measure(arguments: argparse.Namespace) -> Report:
    """Runs the workloads that were asked for."""
    folder = models.resolve(arguments.model, weights=arguments.load_format != "dummy")
    settings = engine_settings(arguments, most=max(arguments.batches))
    report = Report("offline", settings={**settings, **vars(arguments), "out": None, "model": folder.name})
    async with engine_alone(folder, settings) as engine:
        work = Workloads(engine, report, vocab_size=engine.vocab_size, scale=arguments.scale)
        work.require(arguments.work, count=arguments.requests)
        await work.run([64] * 8, [8] * 8)
        if "C" in arguments.work:
            await work.prefill()
        if "B" in arguments.work:
            await work.decode(arguments.batches)
        if "A" in arguments.work:
            await work.mixed(arguments.requests)
    return report


def engine_settings(arguments: argparse.Namespace, *, most: int) -> dict[str, object]:
    """Of an engine that holds whole workloads, decodes so many sequences at least, and gives prefill whole steps."""
    on_gpu = arguments.device == "cuda" or (arguments.device == "auto" and torch.cuda.is_available())
    return {
        "device": arguments.device,
        "dtype": arguments.dtype,
        "load_format": arguments.load_format,
        "implementation": arguments.implementation,
        "threads": arguments.threads,
        "max_sequences": max(most, 256 if on_gpu else 32),
        "max_step_tokens": 8192 if on_gpu else 2048,
        "max_model_len": 4096 if on_gpu else None,
        "block_size": 64 if on_gpu else 32,
        "cache_bytes": arguments.cache_gib << 30,
        "prefix_cache": False,
        "itl_target_ms": "inf",
        **dict(arguments.set),
    }


def add_engine_options(parser: argparse.ArgumentParser) -> None:
    """What `engine_settings` reads."""
    parser.add_argument(
        "model", nargs="?", default="smollm2-135m-instruct", help="a folder, or a name that `holdfast pull` knows"
    )
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"])
    parser.add_argument("--dtype", default="auto", choices=["auto", "float32", "bfloat16", "float16"])
    parser.add_argument("--load-format", default="safetensors", choices=["safetensors", "dummy"])
    parser.add_argument("--implementation", default="auto", choices=["auto", "native", "transformers"])
    parser.add_argument("--threads", type=at_least(1), help="of a CPU; by default one for each core")
    parser.add_argument(
        "--set",
        type=setting,
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="any other setting of the engine",
    )
    parser.add_argument("--cache-gib", type=at_least(1), default=4, help="KV cache on a CPU, GiB")


def main(argv: Sequence[str] | None = None) -> None:
    """`python -m benchmarks.offline`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_engine_options(parser)
    parser.add_argument("--work", type=workloads, default="ABC", help="which of the workloads")
    parser.add_argument("--batches", type=batches, default="1,32,128,256", help="of B")
    parser.add_argument("--requests", type=at_least(1), default=MIXED_REQUESTS, help="of A")
    parser.add_argument("--scale", type=above_zero, default=1.0, help="what all lengths are multiplied with")
    parser.add_argument("--out", type=Path, help="a JSON file for the report")
    arguments = parser.parse_args(argv)
    run("offline", lambda: uvloop.run(measure(arguments)), out=arguments.out)


if __name__ == "__main__":
    main()
